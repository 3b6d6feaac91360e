"""What passes look for above a Softmax: scores, and the masks that are added to them or selected with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant, shape_of

ABSORBING = -1e30  # a score added to a number below it leaves it as it is, bit for bit: scores beyond 1e22 do not occur
HIDING = -1e4  # a score of this size has no weight beside others, unless they are as large
_PRODUCTS = frozenset({"Attention", "Conv", "Einsum", "FusedMatMul", "GRU", "Gemm", "LSTM", "MatMul", "MatMulInteger",
                       "MatMulIntegerToFloat", "MatMulNBits", "DynamicQuantizeMatMul", "QLinearMatMul"})
_FURTHEST = 2000  # nodes above a mask


@dataclass
class Added:
    """Softmax(scores + masks): `adds` from the Softmax upwards, each read by the next alone."""

    softmax: Node
    scores: Tensor
    masks: list[Tensor]
    adds: list[Node]


@dataclass
class Selected:
    """Where(condition, scores, fill), or the other way round where `hides`: then the condition is true for fills."""

    where: Node
    condition: Tensor
    scores: Tensor
    fill: float
    hides: bool


def over_last_axis(graph: Graph, node: Node) -> bool:
    """Whether this is a Softmax along the last axis; below opset 13 the default is axis 1."""
    if node.op != "Softmax" or node.domain:
        return False
    axis = node.attrs.get("axis", -1 if graph.opset >= 13 else 1)
    return bool(axis == -1 or axis == len(shape_of(node.inputs[0]) or ()) - 1)


def added(graph: Graph, softmax: Node) -> Added | None:
    """The masks added to what a Softmax reads; None where there is none."""
    x, masks, adds = softmax.inputs[0], list[Tensor](), list[Node]()
    while True:
        add = graph.producer(x)
        parts = apart(graph, add) if add is not None and graph.only_consumer(x) is not None else None
        if add is None or parts is None:
            return Added(softmax, x, masks, adds) if masks else None
        x, mask = parts
        masks.append(mask)
        adds.append(add)


def apart(graph: Graph, add: Node) -> tuple[Tensor, Tensor] | None:
    """(scores, mask) of a node that adds the two: a matrix product has a part in one of them alone."""
    if add.op != "Add" or add.domain:
        return None
    of_products = [_of_products(graph, t) for t in add.inputs]
    if of_products[0] == of_products[1]:
        return None
    scores, mask = add.inputs if of_products[0] else reversed(add.inputs)
    return (scores, mask) if dtype_of(mask) in (None, np.float32) else None


def selected(graph: Graph, softmax: Node) -> Iterator[Selected]:
    """The Wheres between scores and a Softmax that put a number in the place of hidden scores, from the Softmax up."""
    x = softmax.inputs[0]
    while True:
        node = graph.producer(x)
        if node is None or graph.only_consumer(x) is None:
            return
        found, parts = selection(graph, node), apart(graph, node)
        if found is not None:
            yield found
            x = found.scores
        elif parts is not None:
            x = parts[0]
        else:
            return


def selection(graph: Graph, node: Node) -> Selected | None:
    """A Where between computed scores and one stored number."""
    if node.op != "Where" or node.domain:
        return None
    for position in (2, 1):
        fill, scores = graph.scalar(node.inputs[position]), node.inputs[3 - position]
        if fill is not None and not is_constant(scores) and dtype_of(node.inputs[position]) == np.float32:
            return Selected(node, node.inputs[0], scores, fill, position == 1)
    return None


def bounded(graph: Graph, mask: Tensor) -> bool:
    """Whether a mask is max(m, p + min(p, fill)) already, p the greatest of a row."""
    node = graph.producer(mask)
    add = graph.producer(node.inputs[1]) if node is not None and node.op == "Max" and len(node.inputs) == 2 else None
    peak = graph.producer(add.inputs[0]) if add is not None and add.op == "Add" else None
    return (node is not None and peak is not None and peak.op == "ReduceMax"
            and peak.inputs[0].name == node.inputs[0].name)


def _of_products(graph: Graph, tensor: Tensor) -> bool:
    """Whether a matrix product has a part in the tensor: scores are products of queries and keys, masks are not."""
    seen: set[str] = set()
    frontier = [tensor]
    while frontier and len(seen) < _FURTHEST:
        node = graph.producer(frontier.pop())
        if node is None or node.name in seen:
            continue
        if node.op in _PRODUCTS:
            return True
        seen.add(node.name)
        if node.op not in ("Shape", "Size"):
            frontier += [t for t in node.inputs if t.name]
    return False
