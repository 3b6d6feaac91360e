"""Parts of graphs as graphs of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import Opener, make_model, node, random, run

from onnxq.graph import Graph, alone, cut, expose_codes, repeat, save, up_to, weight_bytes

X = random(2, 4)
W = random(4, 8)


def chained(opened: Opener) -> Graph:
    """x -> a -> b -> y, where a is read by an Add, too."""
    return opened(make_model([node("MatMul", "x w", "a", name="first"), node("Relu", "a", "b", name="second"),
                              node("Add", "b a", "y", name="last")], {"x": [2, 4]}, {"y": [2, 8]}, {"w": W}))


def saved(graph: Graph, tmp_path: Path) -> Path:
    path = tmp_path / "part.onnx"
    save(graph, path)
    return path


def test_what_is_read_from_outside_is_an_input_and_what_is_read_outside_an_output(opened: Opener) -> None:
    graph = chained(opened)
    part = cut(graph, ["second", "last"], {"a": random(2, 8)})
    assert [t.name for t in part.inputs] == ["a"]
    assert [t.name for t in part.outputs] == ["y"]
    assert [t.name for t in cut(graph, ["first", "second"], {"x": X}).outputs] == ["a", "b"]


def test_a_part_computes_what_it_does_in_the_whole_and_leaves_it_alone(opened: Opener, tmp_path: Path) -> None:
    graph = chained(opened)
    part = cut(graph, ["first", "second"], {"x": X})
    found = run(saved(part, tmp_path), {"x": X})
    np.testing.assert_allclose(found["b"], np.maximum(X @ W, 0), rtol=1e-5, atol=1e-6)
    assert [n.name for n in graph.nodes] == ["first", "second", "last"]
    assert all(len(n.outputs) for n in graph.nodes)


def test_what_computes_a_tensor(opened: Opener, tmp_path: Path) -> None:
    graph = chained(opened)
    part = up_to(graph, ["a", "b", "a"])
    assert ([n.name for n in part.nodes], [t.name for t in part.outputs]) == (["first", "second"], ["a", "b"])
    found = run(saved(part, tmp_path), {"x": X})
    np.testing.assert_allclose(found["a"], X @ W, rtol=1e-5, atol=1e-6)
    assert [n.name for n in up_to(graph, ["a"]).nodes] == ["first"]
    assert ([n.name for n in graph.nodes], [t.name for t in graph.outputs]) == (["first", "second", "last"], ["y"])


def test_types_and_ranks_that_nobody_inferred_come_from_the_values(opened: Opener) -> None:
    graph = opened(make_model([node("Relu", "a", "b", name="r")], {"a": [2, 3]}, {"b": None}))
    tensor = graph.nodes[0].inputs[0]
    tensor.dtype, tensor.shape = None, None
    [port] = cut(graph, ["r"], {"a": random(2, 3)}).ports()
    assert (port.dtype, port.shape) == (np.float32, (None, None))


def test_codes_are_fed_and_taken_where_q_and_dq_stood(opened: Opener, tmp_path: Path) -> None:
    nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "d"), node("Relu", "d", "r"),
             node("QuantizeLinear", "r s z", "rq"), node("DequantizeLinear", "rq s z", "y")]
    graph = opened(make_model(nodes, {"x": [4]}, {"y": [4]}, {"s": np.float32(0.5), "z": np.uint8(10)}))
    found = expose_codes(graph)
    assert {name: codes.name for name, codes in found.items()} == {"x": "q"}
    assert (found["x"].scale, found["x"].zero_point) == (np.float32(0.5), 10)
    result = run(saved(graph, tmp_path), {"q": np.uint8([8, 10, 12, 20])})
    assert result["rq"].tolist() == [10, 10, 12, 20]


def test_a_tensor_that_others_read_as_float_keeps_its_q(opened: Opener) -> None:
    graph = opened(make_model([node("QuantizeLinear", "x s z", "q"), node("Relu", "x", "y"),
                               node("Cast", "q", "c", to=1)], {"x": [4]}, {"y": [4], "c": [4]},
                              {"s": np.float32(0.5), "z": np.uint8(10)}))
    assert expose_codes(graph) == {}


def test_repeated_nodes_have_large_weights_of_their_own(opened: Opener, tmp_path: Path) -> None:
    wide, bias = random(32, 32), random(32)
    graph = opened(make_model([node("MatMul", "x w", "a"), node("Add", "a b", "y")], {"x": [2, 32]}, {"y": [2, 32]},
                              {"w": wide, "b": bias}))
    assert weight_bytes(graph) == 4 * 33 * 32
    repeat(graph, 3)
    x = random(2, 32, seed=2)
    found = run(saved(graph, tmp_path), {"x": x})
    assert sorted(found) == ["y", "y#1", "y#2"]
    for result in found.values():
        np.testing.assert_allclose(result, x @ wide + bias, rtol=1e-4, atol=1e-4)
    assert weight_bytes(graph) == 4 * (3 * 32 + 1) * 32  # the bias is small enough to be shared


@pytest.mark.parametrize("kind", [ml_dtypes.int4, np.int8])
def test_repeated_codes_stay_of_their_type(opened: Opener, tmp_path: Path, kind: Any) -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (64, 64)).astype(kind)
    graph = opened(make_model([node("Add", "x w", "y")], {"x": [64, 64]}, {"y": [64, 64]}, {"w": random(64, 64)},
                              opset=21, ir_version=10))
    graph.add_cast("cast", graph.constant("q", codes), graph.variable("f", np.float32, (64, 64)))
    graph.replace_input(graph.nodes[0], 1, graph.made("f"))
    graph.sort()
    repeat(graph, 2)
    found = run(saved(graph, tmp_path), {"x": np.zeros((64, 64), np.float32)})
    for result in found.values():
        np.testing.assert_array_equal(result, codes.astype(np.float32))
    assert weight_bytes(graph) == 2 * 64 * 64 // (2 if kind is ml_dtypes.int4 else 1)


def test_one_operator_alone(tmp_path: Path) -> None:
    graph = alone("QuantizeLinear", [X], [np.uint8], constants=[np.float32(0.5), np.uint8(3)])
    [codes] = run(saved(graph, tmp_path), {"x0": X}).values()
    assert codes.tolist() == np.clip(np.rint(X / np.float32(0.5)) + 3, 0, 255).tolist()
