"""Axes with sizes, and the arithmetic of shapes that goes with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Opener, apply, assert_same, body, make_model, node, random, run
from onnx import TensorProto, load_model

from onnxq.graph import Graph, load
from onnxq.passes.canonicalize.inline_if import InlineIf
from onnxq.passes.manager import Context
from onnxq.passes.static_shapes import free_tensors, settled, static_shapes

Written = Callable[[Graph], Path]
MODELS = Path(__file__).parents[2] / "models"


def ops(graph: Graph) -> list[str]:
    return sorted(n.op for n in graph.nodes)


def test_what_follows_from_shapes_is_folded(opened: Opener, written: Written) -> None:
    """A causal mask of Range, Expand and ConstantOfShape, and a Reshape by dimensions: in two rounds, as the size of
    `zeros` is told by a constant only."""
    model = make_model(
        [node("Shape", "x", "dims"), node("Gather", "dims one", "s"), node("Range", "zero s one", "r"),
         node("Unsqueeze", "r axis", "column"), node("Unsqueeze", "s axis", "size"),
         node("Concat", "size size", "square", axis=0), node("Expand", "column square", "rows"),
         node("GreaterOrEqual", "rows r", "causal"), node("ConstantOfShape", "square", "zeros"),
         node("Where", "causal zeros low", "mask"), node("Shape", "mask", "again"), node("Reshape", "p again", "q"),
         node("Add", "x mask", "m"), node("Add", "m q", "y")],
        {"x": ["n", "s", "s"], "p": ["t"]}, {"y": ["n", "s", "s"]},
        {"one": np.int64(1), "zero": np.int64(0), "axis": np.int64([0]), "low": np.float32(-9)}, 18)
    model.graph.node[3].input[1] = "last"
    model.graph.initializer.append(
        make_model([], {}, {}, {"last": np.int64([1])}).graph.initializer[0])
    graph = static_shapes(opened(model), {"n": 2, "s": 4, "t": 16}, Context())
    assert ops(graph) == ["Add", "Add", "Reshape"]
    assert free_tensors(graph) == []
    feed = {"x": random(2, 4, 4), "p": random(16)}
    assert_same(run(written(graph), feed), run(model, feed))
    assert ops(settled(graph, Context())) == ["Add", "Add", "Reshape"]


def test_what_stays_free_is_named(opened: Opener) -> None:
    model = make_model([node("NonZero", "x", "z"), node("Cast", "z", "f", to=1), node("Relu", "x", "r")],
                       {"x": ["n", "s"]}, {"f": [2, "k"], "r": ["n", "s"]})
    assert free_tensors(static_shapes(opened(model), {"n": 2}, Context())) == ["x", "z", "f", "r"]
    assert free_tensors(static_shapes(opened(model), {"n": 2, "s": 3}, Context())) == ["z", "f"]


def choice(condition: bool | None) -> Any:
    then = body([node("Relu", "x", "a")], {"a": None}, "then")
    other = body([node("Neg", "x", "b")], {"b": None}, "other")
    ports: dict[str, Any] = {"x": [3]} if condition is not None else {"x": [3], "c": (TensorProto.BOOL, [])}
    return make_model([node("If", "c", "y", name="choice", then_branch=then, else_branch=other)], ports, {"y": [3]},
                      {} if condition is None else {"c": np.asarray(condition)})


@pytest.mark.parametrize(("condition", "op"), [(True, "Relu"), (False, "Neg")])
def test_a_known_choice_is_made(condition: bool, op: str, fires: Any) -> None:
    graph, _ = fires(choice(condition), InlineIf(), {"x": random(3)})
    assert ops(graph) == ["Identity", op]
    assert [n.op for n in settled(graph, Context()).nodes] == [op]


def test_other_choices_stay(opened: Opener) -> None:
    assert apply(InlineIf(), opened(choice(None))) == (False, [])


SIZES = {"text_encoder": {"batch": 4, "seq": 32},
         "decoder": {"batch": 2, "sequence": 16, "total": 16, "past": 0}, "recurrent": {"batch": 2, "sequence": 16}}
ARITHMETIC = {"ConstantOfShape", "Range", "Shape", "Size"}


@pytest.mark.parametrize("name", SIZES)
def test_models_without_arithmetic_of_shapes(name: str, written: Written) -> None:
    path = MODELS / name / "model.onnx"
    graph = static_shapes(load(path), SIZES[name], Context())
    assert free_tensors(graph) == []
    assert not ARITHMETIC & {n.op for n in graph.nodes}
    feed = {t.name: _fed(t, name) for t in graph.inputs}
    assert_same(run(written(graph), feed), run(load_model(path), feed), 1e-4)  # other sizes, other order of sums


def _fed(port: Any, name: str) -> np.ndarray[Any, Any]:
    if port.dtype == np.float32:
        return random(*port.shape)
    if "mask" in port.name:
        return np.ones(port.shape, np.int64)
    if "position" in port.name:
        return np.broadcast_to(np.arange(port.shape[1]), port.shape)
    return np.random.default_rng(0).integers(0, 2 if "type" in port.name else 30, port.shape)
