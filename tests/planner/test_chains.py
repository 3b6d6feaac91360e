"""What a kernel computes along: the bias Add and the clamp behind a node, and the forms that kernels refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, make_model, node, random

from onnxq.graph import Graph, Node
from onnxq.planner.chains import chain, clip_bounds, weighted

STORED = {"w": random(32, 24), "b": random(24), "b2": random(1, 24), "b3": random(1, 1, 24), "one": random(1),
          "scalar": np.float32(1), "rows": random(4, 24), "wide": np.ones(24), "v": random(24, 24)}
INF = float("inf")


def linear(nodes: list[onnx.NodeProto], outputs: list[str], inputs: dict[str, Any] | None = None) -> onnx.ModelProto:
    return make_model([node("MatMul", "x w", "m", name="m"), *nodes], {"x": [4, 32], **(inputs or {})},
                      dict.fromkeys(outputs), STORED)


def by_name(graph: Graph, name: str) -> Node:
    return next(n for n in graph.nodes if n.name == name)


def followed(graph: Graph, barred: tuple[str, ...] = ()) -> tuple[str | None, str | None, str, str]:
    """(bias Add, clamp, result, result before the clamp) of the node m, by name."""
    link = chain(graph, by_name(graph, "m"), barred)
    return (link.bias_add.name if link.bias_add else None, link.clamp.name if link.clamp else None, link.result.name,
            link.unclamped.name)


ADD, RELU = node("Add", "m b", "a", name="add"), node("Relu", "a", "r", name="relu")


def test_a_whole_chain(opened: Opener) -> None:
    assert followed(opened(linear([ADD, RELU], ["r"]))) == ("add", "relu", "r", "a")


@pytest.mark.parametrize(("nodes", "outputs", "wanted"), [
    ([], ["m"], (None, None, "m", "m")),
    ([node("Add", "b m", "a", name="add")], ["a"], ("add", None, "a", "a")),  # the bias first
    ([ADD, RELU], ["a", "r"], ("add", None, "a", "a")),  # an output before the clamp
    ([ADD, RELU], ["m", "r"], (None, None, "m", "m")),  # an output before the bias
    ([ADD, RELU, node("Exp", "a", "e")], ["e", "r"], ("add", None, "a", "a")),  # two readers before the clamp
    ([ADD, node("Exp", "m", "e")], ["e", "a"], (None, None, "m", "m")),  # two readers before the bias
    ([node("Relu", "m", "r", name="relu"), node("Add", "r b", "a")], ["a"], (None, "relu", "r", "m")),
    ([node("Add", "m m", "a")], ["a"], (None, None, "m", "m")),  # a sum with itself
    ([node("Relu", "m", "r", name="relu"), node("Relu", "r", "s")], ["s"], (None, "relu", "r", "m")),  # one clamp only
], ids=["alone", "bias first", "output a", "output m", "two of a", "two of m", "clamp first", "itself", "two clamps"])
def test_each_link_is_the_only_reader(nodes: list[onnx.NodeProto], outputs: list[str], wanted: tuple[str | None, ...],
                                      opened: Opener) -> None:
    assert followed(opened(linear(nodes, outputs))) == wanted


@pytest.mark.parametrize(("added", "is_bias"), [
    ("b", True), ("b2", True), ("b3", False), ("one", False), ("scalar", False), ("rows", False), ("z", False)])
def test_a_bias_is_a_constant_per_column_that_keeps_the_shape(added: str, is_bias: bool, opened: Opener) -> None:
    graph = opened(linear([node("Add", f"m {added}", "a", name="add")], ["a"], {"z": [24]}))
    assert followed(graph)[0] == ("add" if is_bias else None)


def test_barred_nodes_end_the_chain(opened: Opener) -> None:
    graph = opened(linear([ADD, RELU], ["r"]))
    assert followed(graph, ("relu",)) == ("add", None, "a", "a")
    assert followed(graph, ("add",)) == (None, None, "m", "m")


def test_an_add_of_another_domain_is_no_bias(opened: Opener) -> None:
    model = make_model([node("MatMul", "x w", "m", name="m"), node("Add", "m b", "a", name="add", domain="acme")],
                       {"x": [4, 32]}, {"a": None}, STORED, domains={"acme": 1})
    assert followed(opened(model)) == (None, None, "m", "m")


@pytest.mark.parametrize(("op", "inputs", "bounds"), [
    ("Relu", "x", (0.0, INF)), ("Clip", "x", (-INF, INF)), ("Clip", "x low", (-1.0, INF)),
    ("Clip", "x _ high", (-INF, 6.0)), ("Clip", "x low high", (-1.0, 6.0)), ("Clip", "x computed", None),
    ("Sigmoid", "x", None)])
def test_bounds(op: str, inputs: str, bounds: tuple[float, float] | None, opened: Opener) -> None:
    model = make_model([node(op, inputs, "y", name="clip"), node("Identity", "computed", "z")],
                       {"x": [4], "computed": []}, {"y": [4], "z": []}, {"low": np.float32(-1), "high": np.float32(6)})
    graph = opened(model)
    assert clip_bounds(graph, by_name(graph, "clip")) == bounds


def test_an_old_clip_has_its_bounds_as_attributes(opened: Opener) -> None:
    old = node("Clip", "x", "y", name="clip", min=-1.0, max=6.0)
    graph = opened(make_model([old], {"x": [4]}, {"y": [4]}, opset=9))
    assert clip_bounds(graph, by_name(graph, "clip")) == (-1.0, 6.0)


@pytest.mark.parametrize(("item", "reason"), [
    (node("MatMul", "x w", "y"), None),
    (node("MatMul", "x s", "y"), None),  # a vector of scores would be [K], a matrix of one column is fine
    (node("Gemm", "x w b", "y"), None),
    (node("MatMul", "x k", "y"), "its weight has rank 1, and the int8 kernels take rank 2"),
    (node("MatMul", "x none", "y"), "its weight is empty"),
    (node("Gemm", "x w b2", "y"), "its form (transA, or a bias that is not one number per column) has no int8 kernel"),
], ids=str)
def test_what_kernels_take(item: onnx.NodeProto, reason: str | None, opened: Opener) -> None:
    stored = {**STORED, "k": random(32), "s": random(32, 1), "none": np.empty((32, 0), np.float32)}
    graph = opened(make_model([item], {"x": [4, 32]}, {"y": None}, stored))
    assert weighted(graph, graph.nodes[0]) == reason
