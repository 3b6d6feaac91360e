"""What is smoothed and what not, what it gains, what is said of it; in several runs where rows would not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random
from search_support import Array, Case, K, N, case, compiled, linear, normed, perceptron, plain, reasons, sqnr

from onnxq.calibration import observer
from onnxq.errors import ModelError
from onnxq.graph import read_nodes
from onnxq.numerics.sampling import View
from onnxq.numerics.smoothing import Found
from onnxq.plan import FLOAT, NodePlan, Plan, Smoothing
from onnxq.planner import readers, smoothing
from onnxq.planner.readers import groups, sampled
from onnxq.planner.smoothing import Smoothed
from onnxq.recipe import Escape, Fallback, Outliers

ROWS = random(256, 4, K)
SAID = re.compile(r"; its input's outliers are moved into its weights (.*) \(alpha ([\d.]+), beta ([\d.]+)\): "
                  r"([\d.]+) to ([\d.]+) dB on data not searched on$")
NONE = Outliers("none")


def found(of: Case) -> dict[str, Smoothed]:
    codes = frozenset(v.result for v in of.found.nodes.values() if v.int_output and v.result is not None)
    return {s.rewrite.tensor: s for s in smoothing.find(of.graph, of.found.nodes, codes, of.by)}


# ------------------------------------------------------------------ gains


@pytest.mark.parametrize(("model", "x", "layer", "how", "notice"), [
    (normed(), ROWS, "fc", "by the constants above", ""),
    (linear(), plain(), "fc", "by a Mul", " (1 by a Mul)"),
    (perceptron("Relu"), random(512, 4, 16), "down", "by the constants above and 16 copies of channels",
     " (1 with channels repeated)"),
    (perceptron(), random(512, 4, 16), "down", "by a Mul and 16 copies of channels",
     " (1 by a Mul, 1 with channels repeated)"),
], ids=["normed", "input", "Relu", "Gelu"])
def test_errors_fall_and_the_plan_says_so(model: onnx.ModelProto, x: Array, layer: str, how: str, notice: str,
                                          tmp_path: Path) -> None:
    keep = ["up"] if layer == "down" else []  # what it makes has outliers, too, which cost it more
    alone: dict[str, Any] = {"rounding": "nearest", "escape": Escape(None)}  # what else would mend the outliers
    before = compiled(model, tmp_path, x, keep=keep, outliers=NONE, **alone)
    after = compiled(model, tmp_path, x, keep=keep, **alone)
    said = SAID.search(reasons(after)[layer])
    assert said is not None, reasons(after)
    assert said[1] == how
    assert float(said[5]) > float(said[4]) + 6
    assert sqnr(after) > sqnr(before) + 2
    told = [n.removesuffix(notice) for n in after.verdict.notices]
    assert "outliers in what layers read are moved into their weights at 1 tensor" in told
    plan = Plan.load(tmp_path / "plan")
    assert len(plan.smoothings) == 1
    assert not any("outliers" in n for n in before.verdict.notices)


def test_scales_per_token_gain_too(tmp_path: Path) -> None:
    before, after = (compiled(normed(), tmp_path, ROWS, "w8a8-dynamic", outliers=o) for o in (NONE, Outliers()))
    assert sqnr(after) > sqnr(before) + 2  # GPTQ helps both


def test_a_saved_plan_makes_the_same_file(tmp_path: Path) -> None:
    import onnxq

    compiled(perceptron(), tmp_path, random(256, 4, 16))
    onnxq.compile(tmp_path / "model.onnx", tmp_path / "again.onnx", plan=tmp_path / "plan", measure=False)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


def test_even_channels_stay(tmp_path: Path) -> None:
    """Values of a few sizes, the same in all channels, and weights likewise: there is nothing to even out."""
    x = np.sign(random(256, 4, K)) * np.float32([[[1.0], [0.3], [0.7], [0.1]]])
    of = case(linear(w=np.sign(random(K, N))), tmp_path, x.astype(np.float32))
    assert found(of) == {}


def test_exponents_as_asked(tmp_path: Path) -> None:
    for outliers, wanted in ((Outliers(alpha=0.5), (0.5, 0.5)), (Outliers(alpha=0.7, beta=0.1), (0.7, 0.1))):
        of = case(normed(), tmp_path, ROWS, outliers=outliers)
        one = found(of)["t"].found
        assert (one.alpha, one.beta) == wanted


def test_factors_are_of_all_the_data(tmp_path: Path) -> None:
    """Exponents are searched on one half; the factors that they give are of the extremes of both."""
    x = plain()
    x[1, 0, 7] = 40.0  # seen by the odd half alone
    of = case(linear(), tmp_path, x, outliers=Outliers(alpha=1.0, beta=0.0))
    s = found(of)["x"].rewrite.factors
    extreme = np.abs(x).max(axis=(0, 1))
    np.testing.assert_allclose(s / s[0], extreme / extreme[0], rtol=1e-5)


def test_factors_of_copies_are_of_the_channels_that_they_copy(tmp_path: Path) -> None:
    """Where the odd half alone has the largest values of a channel, other channels are copied in the end."""
    model, x = perceptron("Relu"), random(256, 4, 16)
    x[1, 0] = 20 * random(16, K, seed=2)[:, 20]  # makes channel 20 large
    of = case(model, tmp_path, x, outliers=Outliers(alpha=0.1, beta=0.3))
    one = found(of)["t"].rewrite
    up, w = (of.graph.read(n.inputs[1]) for n in of.graph.nodes if n.op == "MatMul")
    hidden = np.maximum(x.reshape(-1, 16) @ up, 0)
    assert one.source is not None
    assert one.copies[one.source == 20][0] > 1
    sizes = hidden.max(axis=0)[one.source] / one.copies
    wanted = sizes**0.1 / np.abs(w).max(axis=1)[one.source]**0.3 * one.copies
    np.testing.assert_allclose(one.factors / one.factors[0], wanted / wanted[0], rtol=1e-4)


def test_switches(tmp_path: Path) -> None:
    gelu, x = perceptron(), random(256, 4, 16)
    assert found(case(gelu, tmp_path, x, outliers=Outliers(at_run_time=False))) == {}
    (one,) = found(case(gelu, tmp_path, x, outliers=Outliers(split=False))).values()
    assert one.rewrite.source is None
    (one,) = found(case(perceptron("Relu"), tmp_path, x, outliers=Outliers(at_run_time=False))).values()
    assert one.rewrite.absorbed


def test_no_mul_stands_before_a_reader_of_codes(tmp_path: Path) -> None:
    """Between kernels that hand codes on, what would take the factors is a conversion."""
    model = make_model([node("Gemm", "x v", "h", name="up"), node("Gemm", "x u", "i", name="beside"),
                        node("Add", "h i", "t"), node("Gemm", "t w", "y", name="down")], {"x": ["rows", 16]},
                       {"y": ["rows", N]}, {"v": random(16, K) * plain(1)[0, 0], "u": random(16, K), "w": random(K, N)})
    of = case(model, tmp_path, random(1024, 16))
    assert of.found.nodes["Add_t"].int_output
    assert "t" not in found(of)


def test_weights_with_nan_are_named(tmp_path: Path) -> None:
    weight = random(K, N)
    weight[3, 3] = np.nan
    with pytest.raises(ModelError, match="the weights 'w' of fc hold NaN"):
        found(case(linear(w=weight), tmp_path, plain()))


# ------------------------------------------------------------------ layers that stay float


def example(absorbed: bool = False, layers: tuple[str, ...] = ("fc",)) -> dict[str, Smoothed]:
    rewrite = Smoothing("t", layers, np.ones(2, np.float32), -1, absorbed)
    return {"t": Smoothed(rewrite, Found(0.5, 0.4, 1e-3, 1e-2))}


def verdict(name: str, scheme: str = "w8a8") -> NodePlan:
    return NodePlan(name, "MatMul", scheme, scheme, "why")


def test_a_mul_for_float_layers_alone_is_dropped() -> None:
    plan = Plan("w8a8", "cpu", {n.node: n for n in (verdict("t/smooth", FLOAT), verdict("fc", FLOAT))})
    smoothing.use(plan, example())
    assert (plan.smoothings, list(plan.nodes)) == ({}, ["fc"])
    assert plan.nodes["fc"].reason == "why"


def test_one_integer_reader_is_enough() -> None:
    nodes = (verdict("t/smooth", FLOAT), verdict("fc"), verdict("other", FLOAT))
    plan = Plan("w8a8", "cpu", {n.node: n for n in nodes})
    smoothing.use(plan, example(layers=("fc", "other")))
    assert list(plan.smoothings) == ["t"]
    assert list(plan.nodes) == ["t/smooth", "fc", "other"]
    assert plan.nodes["fc"].reason == ("why; its input's outliers are moved into its weights by a Mul (alpha 0.5, beta "
                                       "0.4): 20.0 to 30.0 dB on data not searched on")
    assert plan.nodes["other"].reason == "why"


def test_what_is_ranked_float_later_is_not_smoothed(tmp_path: Path) -> None:
    report = compiled(linear(), tmp_path, plain(), fallback=Fallback(level=1))
    assert {row.name: row.scheme for row in report.nodes} == {"fc": FLOAT}
    assert [op for _, op, *_ in read_nodes(tmp_path / "out.onnx")] == ["MatMul"]
    assert not any("outliers" in notice for notice in report.verdict.notices)
    kept = compiled(linear(), tmp_path, plain(), keep=["w"])
    assert {row.name: row.scheme for row in kept.nodes} == {"fc": FLOAT}


def test_a_rewrite_that_changes_the_model_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothing, "same", lambda *_: False)
    report = compiled(normed(), tmp_path, ROWS)
    assert ("channels of layers' inputs are not scaled: the rewritten float model computes something else; please "
            "report this") in report.verdict.notices
    assert Plan.load(tmp_path / "plan").smoothings == {}
    assert "outliers" not in reasons(report)["fc"]


def test_what_computes_the_same(tmp_path: Path) -> None:
    of, other = (case(linear(w=w), tmp_path, ROWS) for w in (random(K, N), random(K, N) * np.float32(1.01)))
    assert smoothing.same(of.graph, of.graph.copy(), {"x": ROWS[:2]}, of.by.options)
    assert not smoothing.same(of.graph, other.graph, {"x": ROWS[:2]}, of.by.options)


# ------------------------------------------------------------------ groups and samples


def test_groups_are_of_layers_with_weights_of_their_own(tmp_path: Path) -> None:
    model = make_model(
        [node("Conv", "x a", "c", name="one"), node("Conv", "x b", "d", name="two", strides=[2], pads=[1, 1]),
         node("Conv", "c g", "e", name="grouped", group=2), node("Conv", "e s", "f", name="shared"),
         node("Conv", "f s", "h", name="shared too"), node("Conv", "h u", "k", name="padded", auto_pad="SAME_UPPER"),
         node("Transpose", "k", "t", perm=[0, 2, 1]), node("MatMul", "t w", "y", name="linear")],
        {"x": ["rows", 16, 12]}, {"y": None, "d": None},
        {"a": random(16, 16, 3), "b": random(16, 16, 5), "g": random(16, 8, 1), "s": random(16, 16, 1),
         "u": random(16, 16, 3, seed=1), "w": random(16, 16)})
    of = case(model, tmp_path, random(8, 16, 12))
    made = {g.name: g for g in groups(of.graph, of.found.nodes)}
    assert {name: [n.name for n in g.layers] for name, g in made.items()} == {"x": ["one", "two"], "t": ["linear"]}
    assert made["x"].views == (View((3,), (1,), (0, 0), (1,)), View((5,), (2,), (1, 1), (1,)))
    assert [(g.axis, g.channels) for g in made.values()] == [(1, 16), (-1, 16)]


def test_rows_are_sampled_in_as_many_runs_as_memory_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = case(perceptron(), tmp_path, random(64, 4, 16), batch=7)
    wanted, runs = groups(of.graph, of.found.nodes), []
    fold = observer.fold

    def counted(graph: Any, running: Mapping[str, Any], *rest: Any) -> None:
        runs.append(sorted(running))
        fold(graph, running, *rest)

    monkeypatch.setattr(observer, "fold", counted)
    results = []
    for most in (readers._MOST_BYTES, 1):
        monkeypatch.setattr(readers, "_MOST_BYTES", most)
        results.append({g.name: h.results() for g, h in sampled(of.graph, wanted, of.by.data, of.by.how,
                                                                of.by.options)})
    assert runs == [["t", "x"], ["x"], ["t"]]
    for name, (seen, unseen) in results[0].items():
        for whole, apart in zip((seen, unseen), results[1][name], strict=True):
            np.testing.assert_array_equal(whole.low, apart.low)
            np.testing.assert_array_equal(whole.rows[View()], apart.rows[View()])
    even, odd = results[0]["x"]
    np.testing.assert_array_equal(even.low, random(64, 4, 16)[::2].min(axis=(0, 1)))
    np.testing.assert_array_equal(odd.high, random(64, 4, 16)[1::2].max(axis=(0, 1)))


def test_one_row_of_data_searches_nothing(tmp_path: Path) -> None:
    assert found(case(normed(), tmp_path, ROWS[:1])) == {}
