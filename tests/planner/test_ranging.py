"""Ranges by layers' errors: the extremes unless clearly worse, clipped where what is rare does not matter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_model, node, random
from search_support import PAIRED, Array, Case, K, N, case, compiled, linear, reasons, sqnr

from onnxq.calibration import observer
from onnxq.numerics.ranges import MinMax
from onnxq.plan import Plan
from onnxq.planner import ranging, readers
from onnxq.planner.ranging import MINMAX, Chosen
from onnxq.planner.readers import groups
from onnxq.recipe import Calibration, Outliers

NONE = Outliers("none")


def chosen(of: Case) -> dict[str, Chosen]:
    return ranging.choose(of.graph, of.found.nodes, groups(of.graph, of.found.nodes), of.by)


def rare(rows: int = 512, size: float = 100.0) -> Array:
    """Normal numbers with a few far ones in channel 3."""
    x = random(rows, 4, K)
    x[::37, 0, 3], x[1::41, 0, 3] = size, -size
    return x


def deaf() -> Array:
    """A weight that hardly hears of channel 3."""
    w = random(K, N)
    w[3] *= 1e-4
    return w


@pytest.mark.parametrize("kind", ["normal", "uniform", "positive"])
def test_the_extremes_stay_where_nothing_is_clearly_better(kind: str, tmp_path: Path) -> None:
    x = {"normal": random(256, 4, K), "uniform": np.random.default_rng(0).uniform(-1, 1, (256, 4, K)),
         "positive": np.random.default_rng(0).uniform(0, 1, (256, 4, K))}[kind].astype(np.float32)
    one = chosen(case(linear(), tmp_path, x))["x"]
    assert one.method == MINMAX
    assert one.bounds == (min(0.0, float(x.min())), float(x.max()))
    assert 1e-6 < one.error < 1e-3


def test_rare_values_that_do_not_matter_are_clipped(tmp_path: Path) -> None:
    one = chosen(case(linear(w=deaf()), tmp_path, rare()))["x"]
    assert one.method != MINMAX
    assert -50 < one.bounds[0] < -2
    assert 2 < one.bounds[1] < 50
    assert one.error < 2e-3


def test_rare_values_that_matter_are_not(tmp_path: Path) -> None:
    """The same values, heard by the layer: their rows would come out as something else."""
    one = chosen(case(linear(), tmp_path, rare(size=20.0)))["x"]
    assert one.bounds[1] >= 15


def test_the_range_is_of_both_halves(tmp_path: Path) -> None:
    """A method is chosen on the even rows, its range is of all rows."""
    x = np.random.default_rng(0).uniform(-1, 1, (256, 4, K)).astype(np.float32)
    x[0, 0, 0], x[1, 0, 0] = -1.25, 1.25
    assert chosen(case(linear(), tmp_path, x))["x"].bounds == (-1.25, 1.25)


def test_a_compilation_uses_them(tmp_path: Path) -> None:
    """Less error for rows that hold no far value, which are most."""
    x, rows = rare(), {}
    for name in ("minmax", "auto"):
        report = compiled(linear(w=deaf()), tmp_path, x, calibration=Calibration(ranges=name), outliers=NONE,
                          rounding="nearest")
        rows[name] = sqnr(report), float(Plan.load(tmp_path / "plan").activations["x"].scale)
        assert "row" not in reasons(report)["fc"]
    assert rows["auto"][0] > rows["minmax"][0] + 6
    assert rows["auto"][1] < rows["minmax"][1] / 4


def test_a_conv_looks_at_patches(tmp_path: Path) -> None:
    w = random(N, 16, 3, 3)
    w[:, 3] *= 1e-4
    x = random(64, 16, 9, 9)
    x[::5, 3, 4, 4] = 80.0
    model = make_model([node("Conv", "x w", "y", name="conv", pads=[1, 1, 1, 1])], {"x": ["rows", 16, 9, 9]},
                       {"y": None}, {"w": w})
    one = chosen(case(model, tmp_path, x, batch=8))["x"]
    assert one.method != MINMAX
    assert one.bounds[1] < 40
    assert one.by_row is None, "its rows are no tokens"


def test_scales_of_the_target_that_adds_pairs(tmp_path: Path) -> None:
    """Errors are those of the codes that the target takes."""
    plain, paired = (chosen(case(linear(), tmp_path, random(256, 4, K), target=t))["x"]
                     for t in (case(linear(), tmp_path, random(2, 4, K)).by.target, PAIRED))
    assert paired.error > plain.error


def test_layers_of_one_tensor_choose_together(tmp_path: Path) -> None:
    """One hears the far values, the other does not: they stay."""
    model = make_model([node("MatMul", "x w", "y"), node("MatMul", "x v", "z")], {"x": ["rows", 4, K]},
                       {"y": None, "z": None}, {"w": deaf(), "v": random(K, N, seed=1)})
    assert chosen(case(model, tmp_path, rare(size=20.0)))["x"].bounds[1] >= 15


def test_one_run_serves_ranges_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, runs = case(linear(), tmp_path, random(64, 4, K)), []
    fold = observer.fold

    def counted(graph: Any, running: Mapping[str, Any], *rest: Any) -> None:
        runs.append(sorted(running))
        fold(graph, running, *rest)

    monkeypatch.setattr(observer, "fold", counted)
    wanted = groups(of.graph, of.found.nodes)
    beside = {"y": MinMax()}
    whole = ranging.choose(of.graph, of.found.nodes, wanted, of.by, [beside])
    assert runs == [["x"]]
    assert beside["y"].result()[1] > 1
    monkeypatch.setattr(readers, "_MOST_BYTES", 1)
    assert ranging.choose(of.graph, of.found.nodes, wanted, of.by) == whole
    assert ranging.choose(of.graph, of.found.nodes, [], of.by, [{"y": MinMax()}]) == {}
    assert runs[2:] == [[]], "what is beside is observed without groups, too"


def test_one_row_of_data_has_its_extremes(tmp_path: Path) -> None:
    x = random(1, 4, K)
    one = chosen(case(linear(), tmp_path, x))["x"]
    assert (one.method, one.bounds) == (MINMAX, (float(x.min()), float(x.max())))


def test_methods_are_those_of_the_recipe_and_shares_of_the_extremes(tmp_path: Path) -> None:
    of = case(linear(), tmp_path, random(64, 4, K))
    names = list(ranging.methods(of.by))
    assert names[0] == MINMAX
    assert {"mse", "entropy", "percentile 99.99", "0.7 of minmax", "1.2 of minmax"} < set(names)


@pytest.mark.parametrize("maximum", [True, False], ids=["a maximum behind", "the token dropped behind"])
def test_outputs_decide_where_a_layer_is_wrong(maximum: bool, tmp_path: Path) -> None:
    """One token in 40 has a far value. To clip it looks good at the layer's result, where all others count as much;
    but a maximum over tokens takes that very one."""
    w = random(K, N) / 8
    w[3] = np.abs(w[3])
    x = random(128, 40, K) / 50
    x[:, 0, 3] = 3.0
    behind = [node("ReduceMax", "t", "y", axes=[1], keepdims=0)] if maximum else [node("Slice", "t one all one", "y")]
    constants = {} if maximum else {"one": np.array([1]), "all": np.array([40])}
    model = make_model([node("MatMul", "x w", "t", name="fc"), *behind], {"x": ["rows", 40, K]}, {"y": None},
                       {"w": w, **constants})
    one = chosen(case(model, tmp_path, x, batch=8))["x"]
    assert (one.method == MINMAX) == maximum


@pytest.mark.parametrize("matter", [True, False])
def test_a_tensor_that_no_layer_reads_is_clipped_where_outputs_say_so(matter: bool, tmp_path: Path) -> None:
    """What a layer makes and an Add reads is normal, so its extremes are rarer than codes are coarse. Its sign alone
    matters behind a Sigmoid; where a maximum is the output, the extremes do."""
    behind = [node("GlobalMaxPool", "s", "y", name="most")] if matter else [node("Sigmoid", "s", "y", name="gate")]
    model = make_model([node("Conv", "x w", "a", name="left"), node("Conv", "x v", "b", name="right"),
                        node("Add", "a b", "s", name="sum"), *behind], {"x": ["rows", 16, 16, 16]}, {"y": None},
                       {name: random(16, 16, 1, 1, seed=k) * size for k, (name, size) in enumerate((("w", 0.5),
                                                                                                     ("v", 0.01)))})
    of = case(model, tmp_path, random(96, 16, 16, 16), batch=8)
    found = ranging.choose(of.graph, of.found.nodes, [], of.by, (), ["a"])["a"]
    assert found.by_row is None
    assert found.method == (MINMAX if matter else "mse")
