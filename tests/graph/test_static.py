"""Free axes that get sizes: inputs, outputs and all between, weights and what else the graph knows untouched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Opener, assert_same, body, make_model, node, random, run
from onnx import TensorProto

from onnxq.errors import UsageError
from onnxq.graph import Graph, fix_axes, fix_inputs, infer_again, inline, shape_of

Written = Callable[[Graph], Path]


def model() -> onnx.ModelProto:
    return make_model([node("MatMul", "x w", "m"), node("Concat", "m p", "c", axis=1), node("Relu", "c", "y")],
                      {"x": ["n", "s", 40], "p": ["n", "past", 50]}, {"y": ["n", "total", 50]}, {"w": random(40, 50)})


def shapes(graph: Graph) -> dict[str, object]:
    return {t.name: shape_of(t) for t in (*graph.inputs, *(t for n in graph.nodes for t in n.outputs))}


def test_sizes_reach_every_tensor(opened: Opener, written: Written) -> None:
    given = opened(model())
    graph = fix_axes(given, {"n": 2, "s": 3, "past": 4})
    assert shapes(graph) == {"x": (2, 3, 40), "p": (2, 4, 50), "m": (2, 3, 50), "c": (2, 7, 50), "y": (2, 7, 50)}
    assert shape_of(graph.outputs[0]) == (2, 7, 50)
    assert shapes(given)["x"] == ("n", "s", 40)
    feed = {"x": random(2, 3, 40), "p": random(2, 4, 50)}
    assert_same(run(written(graph), feed), run(model(), feed))


def test_other_axes_stay_free(opened: Opener) -> None:
    found = shapes(fix_axes(opened(model()), {"n": 2}))
    assert (found["x"], found["m"]) == ((2, "s", 40), (2, "s", 50))


def test_no_past(opened: Opener) -> None:
    assert shapes(fix_axes(opened(model()), {"n": 1, "s": 3, "past": 0}))["y"] == (1, 3, 50)


@pytest.mark.parametrize(("sizes", "message"), [
    ({"m": 2}, "no input has a free axis 'm'; name one of n, past, s"),
    ({"total": 2}, "no input has a free axis 'total'; name one of n, past, s"),
    ({"n": -1}, "axis 'n' can't have the size -1; give 0 or more")])
def test_names_and_sizes_that_cannot_be(sizes: dict[str, int], message: str, opened: Opener) -> None:
    with pytest.raises(UsageError) as caught:
        fix_axes(opened(model()), sizes)
    assert str(caught.value) == message


def test_a_model_without_free_axes(opened: Opener) -> None:
    graph = opened(make_model([node("Relu", "x", "y")], {"x": [2]}, {"y": [2]}))
    with pytest.raises(UsageError) as caught:
        fix_axes(graph, {"n": 1})
    assert str(caught.value) == "no input has a free axis 'n', nor any other; leave out its size"


def test_weights_made_by_passes_come_along(opened: Opener, written: Written) -> None:
    graph = opened(model())
    wanted = random(40, 50, seed=3)
    graph.replace_input(graph.nodes[0], 1, graph.computed("v", np.float32, (40, 50), lambda: wanted))
    graph.half, graph.metadata["who"] = ("float16",), "me"
    twin = fix_axes(graph, {"n": 1})
    np.testing.assert_array_equal(twin.read(twin.nodes[0].inputs[1]), wanted)
    assert (twin.half, twin.metadata["who"]) == (("float16",), "me")
    feed = {"x": random(1, 3, 40), "p": random(1, 4, 50)}
    assert_same(run(written(twin), feed), run(written(graph), feed))


def test_shapes_behind_operators_that_onnx_lacks_stay(opened: Opener) -> None:
    item = make_model([node("QuickGelu", "x", "g", domain="com.microsoft"), node("Relu", "g", "y")],
                      {"x": ["n", "s", 3]}, {"y": ["n", "s", 3]}, domains={"com.microsoft": 1})
    item.graph.value_info.append(onnx.helper.make_tensor_value_info("g", TensorProto.FLOAT, ["n", "s", 3]))
    assert shapes(fix_axes(opened(item), {"n": 2}))["g"] == (2, "s", 3)


def test_shapes_follow_from_new_constants(opened: Opener) -> None:
    graph = opened(make_model([node("Shape", "x", "s"), node("Reshape", "p s", "r"), node("Relu", "r", "y")],
                              {"x": [2, 3], "p": [6]}, {"y": ["a", "b"]}))
    reshape = graph.nodes[1]
    graph.replace_input(reshape, 1, graph.constant("to", np.int64([2, 3])))
    reshape.outputs[0].shape = ["unk__0", "unk__1"]
    twin = infer_again(graph)
    assert shape_of(twin.nodes[1].outputs[0]) == shape_of(twin.outputs[0]) == (2, 3)


def test_bodies_get_sizes_too(opened: Opener, written: Written) -> None:
    then = body([node("Relu", "x", "a")], {"a": ["n", 3]}, "then")
    other = body([node("Neg", "x", "b")], {"b": ["n", 3]}, "other")
    item = make_model([node("If", "c", "y", then_branch=then, else_branch=other)],
                      {"x": ["n", 3], "c": (TensorProto.BOOL, [])}, {"y": ["n", 3]})
    graph = fix_axes(opened(item), {"n": 2})
    assert [shape_of(inner.outputs[0]) for _, inner in graph.subgraphs()] == [(2, 3), (2, 3)]
    written(graph)


def test_a_branch_in_place_of_its_node(opened: Opener, written: Written) -> None:
    """Its nodes keep their names; what it stores is handed on, too."""
    then = body([node("Relu", "x", "a"), node("Neg", "a", "b")], {"b": None, "k": None}, "then", {"k": random(3)})
    other = body([node("Abs", "x", "d"), node("Neg", "d", "e")], {"d": None, "e": None}, "other")
    item = make_model([node("If", "c", "p q", then_branch=then, else_branch=other), node("Add", "p q", "y")],
                      {"x": [3], "c": (TensorProto.BOOL, [])}, {"y": [3]})
    graph = opened(item)
    inline(graph, graph.nodes[0], "then_branch")
    graph.sort()
    assert graph.check() == []
    assert {n.name for n in graph.nodes} == {"Relu_a", "Neg_b", "If_p/0", "If_p/1", "Add_y"}
    feed = {"x": random(3), "c": np.asarray(True)}
    assert_same(run(written(graph), feed), run(item, feed))


def choosing() -> onnx.ModelProto:
    return make_model([node("Equal", "rate k", "c"), node("Where", "c x x2", "y")],
                      {"x": [3], "x2": [3], "rate": (TensorProto.INT64, [1])}, {"y": [3]}, {"k": np.int64(16000)})


@pytest.mark.parametrize("rate", [16000, 8000])
def test_inputs_that_are_fixed(rate: int, opened: Opener, written: Written) -> None:
    graph = opened(choosing())
    fix_inputs(graph, {"rate": rate})
    assert [t.name for t in graph.inputs] == ["x", "x2"]
    feed = {"x": random(3), "x2": random(3, seed=1)}
    assert_same(run(written(graph), feed), run(choosing(), {**feed, "rate": np.asarray([rate])}))


@pytest.mark.parametrize(("values", "message"), [
    ({"x": 1}, "there is no input 'x' of one element that could be fixed; leave it out"),
    ({"k": 1}, "there is no input 'k' of one element that could be fixed; leave it out"),
    ({"rate": 0.5}, "the input 'rate' is int64, which doesn't hold 0.5; give another number")])
def test_inputs_that_cannot_be_fixed(values: dict[str, float], message: str, opened: Opener) -> None:
    with pytest.raises(UsageError) as caught:
        fix_inputs(opened(choosing()), values)
    assert str(caught.value) == message
