"""Float rewrites for the target: bit for bit what was there, where the target lists the slow fusion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from conftest import Opener, apply, assert_same, make_model, node, random, run

from onnxq.graph import Graph
from onnxq.passes.manager import Context
from onnxq.passes.transform.keep_layer_norm import KeepLayerNorm
from onnxq.plan import NodePlan, Plan
from onnxq.targets import TARGETS, Target

Written = Callable[[Graph], Path]
PLAIN = Target("plain", "CPUExecutionProvider", "qdq")
FEED = {"x": random(2, 5, 16), "r": random(2, 5, 16, seed=1)}


def residual(*before: onnx.NodeProto, adds: str = "x r") -> onnx.ModelProto:
    """x + r, normalised, and one layer behind it: the form of BERT."""
    return make_model([*before, node("Add", adds, "s"), node("LayerNormalization", "s g b", "n"),
                       node("MatMul", "n w", "m"), node("Add", "n m", "y")],
                      {"x": [2, 5, 16], "r": [2, 5, 16]}, {"y": [2, 5, 16]},
                      {"g": random(16, seed=2), "b": random(16, seed=3), "w": random(16, 16), "k": random(16, seed=4)})


def verdict(scheme: str) -> Plan:
    return Plan("w8a8", "cpu", {"Add_s": NodePlan("Add_s", "Add", scheme, "QLinearAdd", "its neighbours are int8")})


def ops(model: Any) -> list[str]:
    return [n.op for n in model.nodes]


def fused(path: Path, folder: Path) -> set[str]:
    """Operators of the graph that onnxruntime makes of a model."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return {n.op_type for n in onnx.load(folder / "optimized.onnx").graph.node}


@pytest.mark.parametrize("plan", [Plan("", ""), verdict("float")])
def test_the_add_becomes_a_sum(tmp_path: Path, opened: Opener, written: Written, plan: Plan) -> None:
    model = residual()
    graph = opened(model)
    context = Context(TARGETS["cpu"], plan)
    assert apply(KeepLayerNorm(), graph, context) == (True, [])
    assert ops(graph) == ["Sum", "LayerNormalization", "MatMul", "Add"], "the Add behind is not touched"
    path = written(graph)
    assert_same(run(path, FEED), run(model, FEED))
    assert apply(KeepLayerNorm(), graph, context) == (False, [])
    before = tmp_path / "before.onnx"
    onnx.save(model, before)
    assert "SkipLayerNormalization" in fused(before, tmp_path), "else the pass has become needless"
    assert "SkipLayerNormalization" not in fused(path, tmp_path)


@pytest.mark.parametrize("target", [PLAIN, None])
def test_other_targets_keep_the_add(opened: Opener, target: Target | None) -> None:
    graph = opened(residual())
    assert apply(KeepLayerNorm(), graph, Context(target)) == (False, [])
    assert ops(graph)[0] == "Add"


def test_a_quantized_add_stays(opened: Opener) -> None:
    graph = opened(residual())
    assert apply(KeepLayerNorm(), graph, Context(TARGETS["cpu"], verdict("w8a8"))) == (
        False, [("LayerNormalization_n", "Add_s is quantized")])


def test_an_add_of_a_constant_stays(opened: Opener) -> None:
    graph = opened(residual(adds="x k"))
    assert apply(KeepLayerNorm(), graph, Context(TARGETS["cpu"])) == (
        False, [("LayerNormalization_n", "Add_s adds a constant, which is not the fusion's form")])


def test_what_is_no_add_stays(opened: Opener) -> None:
    model = make_model([node("Mul", "x r", "s"), node("LayerNormalization", "s g", "n"),
                        node("LayerNormalization", "x g", "m"), node("Add", "n m", "y")],
                       {"x": [2, 5, 16], "r": [2, 5, 16]}, {"y": [2, 5, 16]}, {"g": random(16)})
    graph = opened(model)
    assert apply(KeepLayerNorm(), graph, Context(TARGETS["cpu"])) == (False, [])
