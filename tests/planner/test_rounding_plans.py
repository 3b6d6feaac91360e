"""Codes of weights from calibrated rows: where they hold on others, within the target's limits, in their own order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random, run
from search_support import PAIRED, Array, Case, case, compiled, sqnr

from onnxq.calibration import observer
from onnxq.graph import Graph
from onnxq.numerics import affine
from onnxq.numerics.rounding import Hessian, gptq
from onnxq.numerics.smoothing import Activation
from onnxq.plan import TOKEN, Plan
from onnxq.planner import hessians, ranging, rounding
from onnxq.planner.outline import Measured, outline
from onnxq.planner.readers import groups
from onnxq.planner.scales import finish
from onnxq.planner.smoothing import Searching
from onnxq.recipe import Outliers, Recipe
from onnxq.schemes import scheme

K, N = 32, 24


def together(*shape: int, axis: int = -1, seed: int = 0) -> Array:
    """Normal numbers whose K channels along an axis are mixtures of 6."""
    few = np.moveaxis(random(*(6 if k == axis % len(shape) else n for k, n in enumerate(shape)), seed=seed), axis, -1)
    mixed = few @ random(6, shape[axis], seed=1) + 0.1 * np.moveaxis(random(*shape, seed=seed + 1), axis, -1)
    return np.ascontiguousarray(np.moveaxis(mixed, -1, axis).astype(np.float32))


def linear() -> onnx.ModelProto:
    return make_model([node("MatMul", "x w", "y", name="fc")], {"x": ["rows", 4, K]}, {"y": None}, {"w": random(K, N)})


def conv(group: int = 1, **attrs: Any) -> onnx.ModelProto:
    return make_model([node("Conv", "x w", "y", name="conv", group=group, **attrs)], {"x": ["rows", K, 7, 7]},
                      {"y": None}, {"w": random(N, K // group, 3, 2)})


def rounded(graph: Graph, plan: Plan, by: Searching) -> dict[str, Array]:
    """The codes that are noted in a copy of a Plan."""
    copy = replace(plan, rounded={})
    rounding.round_weights(graph, copy, by)
    return copy.rounded


def planned(of: Case, name: str = "w8a8") -> Plan:
    wanted = groups(of.graph, of.found.nodes) if of.found.ranges_of else []
    ranges = {key: one.bounds for key, one in ranging.choose(of.graph, of.found.nodes, wanted, of.by).items()}
    running = observer.make([t for t in of.found.ranges_of if t not in ranges], of.by.how, of.by.scheme.activations)
    if running:
        observer.fold(of.graph, running, of.by.data, of.by.how, of.by.options)
    ranges |= {key: one.result() for key, one in running.items()}
    return finish(of.found, of.graph, ranges, Recipe(scheme(name)), of.by.target)


def weight(of: Case) -> Array:
    (node_,) = (n for n in of.graph.nodes if n.op in ("MatMul", "Conv"))
    return np.asarray(of.graph.read(node_.inputs[1]), np.float32)


def error(model: onnx.ModelProto, x: Array, w: Array) -> float:
    """The mean squared error of a model with other weights."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(w, "w"))
    return float(np.mean((run(model, {"x": x})["y"] - run(other, {"x": x})["y"]) ** 2))


@pytest.mark.parametrize("target", [None, PAIRED], ids=["plain", "pairs"])
@pytest.mark.parametrize("form", ["MatMul", "Conv", "strided Conv", "w8a8-dynamic"])
def test_codes_keep_results_of_other_rows(form: str, target: Any, tmp_path: Path) -> None:
    name = "w8a8-dynamic" if form == "w8a8-dynamic" else "w8a8"
    model = {"Conv": conv(pads=[1, 1, 1, 1]), "strided Conv": conv(strides=[2, 1], dilations=[2, 1])}.get(
        form, linear())
    x, unseen = ((together(256, 4, K, seed=s) if "Conv" not in form else together(64, K, 7, 7, axis=1, seed=s))
                 for s in (0, 9))
    of = case(model, tmp_path, x, name, **({"target": target} if target is not None else {}))
    plan = planned(of, name)
    found = rounded(of.graph, plan, of.by)
    assert list(found) == ["w"]
    w, params = weight(of), plan.weights["w"]
    nearest = affine.quantize(w, params)
    assert (found["w"].shape, found["w"].dtype) == (w.shape, np.int8)
    assert (found["w"] != nearest).any()
    after, before = (error(model, unseen, affine.dequantize(codes, params)) for codes in (found["w"], nearest))
    assert after < 0.8 * before
    if target is PAIRED:
        rows = found["w"].T if "Conv" not in form else np.moveaxis(found["w"], 1, -1).reshape(N, -1)
        one, other = rows[:, 0::2].astype(int), rows[:, 1::2].astype(int)
        assert ((np.abs(one + other) <= 128) | (one * other <= 0)).all(), "what a kernel adds in 16 bits"


def test_a_layer_of_a_static_scheme_with_scales_per_row(tmp_path: Path) -> None:
    """Its codes are from rows as its kernel reads them, whose sizes differ a hundredfold here: larger ones than the
    median of a half of a batch (64 samples) count as that."""
    x = together(256, 4, K) * np.geomspace(0.05, 5, 256).reshape(-1, 1, 1).astype(np.float32)
    of = case(linear(), tmp_path, x)
    of.found = outline(of.graph, Recipe(scheme("w8a8")), of.by.target, Measured(per_token={"fc": "why"}))
    plan = planned(of)
    assert plan.nodes["fc"].activation == TOKEN
    hessian = Hessian()
    for batch in np.split(x, 4):
        for half in (batch[0::2], batch[1::2]):
            rows = Activation(per_row=True).decoded(half.reshape(-1, K), 0, 0)
            sizes = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
            hessian.update(rows / np.maximum(sizes, np.median(sizes)))
    wanted = gptq(weight(of), hessian.result(), plan.weights["w"], rounding._DAMPING)
    np.testing.assert_array_equal(rounded(of.graph, plan, of.by)["w"], wanted)


def test_inputs_that_move_apart_are_rounded_to_nearest(tmp_path: Path) -> None:
    of = case(linear(), tmp_path, random(1024, 4, K))
    assert rounded(of.graph, planned(of), of.by) == {}


def test_few_rows_tell_nothing(tmp_path: Path) -> None:
    """Of 8 rows each half has no more than 16 tokens for 32 inputs: what keeps one does not keep the other."""
    of = case(linear(), tmp_path, random(8, 4, K), batch=2)
    assert rounded(of.graph, planned(of), of.by) == {}
    of = case(linear(), tmp_path, together(1, 4, K))
    assert rounded(of.graph, planned(of), of.by) == {}, "one half has seen nothing"


def test_the_compiled_file_holds_them(tmp_path: Path) -> None:
    """Only rounding differs, and what runs is nearer to float."""
    x = together(512, 4, K)
    errors = {}
    for how in ("nearest", "auto"):
        report = compiled(linear(), tmp_path, x, rounding=how, outliers=Outliers("none"))
        plan = Plan.load(tmp_path / "plan")
        errors[how] = sqnr(report)
        assert (list(plan.rounded) == ["w"]) == (how == "auto")
        assert ("round" in [stage.name for stage in report.stages]) == (how == "auto")
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    np.testing.assert_array_equal(stored["w.q"], plan.rounded["w"])
    assert errors["auto"] > errors["nearest"]


def test_layers_share_a_hessian_and_run_in_as_many_runs_as_memory_needs(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model([node("MatMul", "x w", "a"), node("MatMul", "x v", "b"), node("Tanh", "a", "t"),
                        node("MatMul", "t u", "y")], {"x": ["rows", 4, K]}, {"y": None, "b": None},
                       {"w": random(K, N), "v": random(K, N, seed=1), "u": random(N, N)})
    of = case(model, tmp_path, together(256, 4, K))
    plan = planned(of)
    runs: list[list[str]] = []
    fold = observer.fold

    def counted(graph: Any, running: Any, data: Any, how: Any, options: Any, progress: Any,
                beside: list[Mapping[str, Any]]) -> None:
        runs.append([name for some in beside for name in some])
        fold(graph, running, data, how, options, progress, beside)

    monkeypatch.setattr(observer, "fold", counted)
    results = []
    for most in (hessians._MOST_BYTES, 1):
        monkeypatch.setattr(hessians, "_MOST_BYTES", most)
        results.append(rounded(of.graph, plan, of.by))
    assert runs == [["x", "t"], ["x"], ["t"]]
    assert {"w", "v"} <= results[0].keys() == results[1].keys()
    for name, codes in results[0].items():
        np.testing.assert_array_equal(codes, results[1][name])


def test_layers_that_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = together(64, K, 7, 7, axis=1)
    of = case(conv(group=2), tmp_path, x)
    assert rounded(of.graph, planned(of), of.by) == {}, "filters that see a part of the channels"
    of = case(conv(), tmp_path, x)
    plan = planned(of)
    monkeypatch.setattr(rounding, "_WIDEST", 6 * K - 1)
    assert rounded(of.graph, plan, of.by) == {}
    monkeypatch.setattr(rounding, "_WIDEST", 6 * K)
    assert list(rounded(of.graph, plan, of.by)) == ["w"]


def test_many_patches_are_drawn_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ones each time."""
    of = case(conv(), tmp_path, together(64, K, 7, 7, axis=1), batch=16)
    plan = planned(of)
    monkeypatch.setattr(hessians, "PATCHES", 100)
    codes = [rounded(of.graph, plan, of.by)["w"] for _ in range(2)]
    np.testing.assert_array_equal(codes[0], codes[1])
