"""Weights kept as int8 for operators that compute in float: the file gets smaller, speed stays float's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import replace

import numpy as np

from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant, shape_of
from onnxq.plan import FLOAT, STORED, NodePlan

# operator -> positions of its weights; the axis of their channels is found by `channel_axis`
_WEIGHTS = {"Conv": (1,), "ConvTranspose": (1,), "GRU": (1, 2), "Gather": (0,), "Gemm": (1,), "LSTM": (1, 2),
            "MatMul": (0, 1), "RNN": (1, 2)}
_LEAST = 1024  # elements; below, the scales and the two nodes that decode eat what is gained
_LEAST_TABLE = 16384  # a look-up decodes at every run, which only a large table is worth
_LEAST_PER_SCALE = 8  # elements
_NAMES = ("q", "scales", "floats", "decoded")  # what the pass calls the parts of a weight


def store(graph: Graph, nodes: dict[str, NodePlan], kept: Collection[str]) -> None:
    """Turn float verdicts into stored ones where weights are large enough; bodies of If, Loop and Scan included.

    `kept` names nodes that a user wants float: their weights are left alone, too. A weight that several nodes read is
    stored when all of them can take the same codes; otherwise the file would hold it twice.
    """
    taken = {v.weight for v in nodes.values() if v.weight}  # codes of int8 kernels, with axes of their own
    readers: dict[str, list[tuple[Node, int | None]]] = defaultdict(list)  # weight -> (node, axis of its channels)
    for node, _ in graph.walk():
        verdict = nodes.get(node.name)
        free = verdict is not None and verdict.scheme == FLOAT and not node.domain and node.name not in kept
        positions = _WEIGHTS.get(node.op, ()) if free else ()
        for index, tensor in enumerate(node.inputs):
            if tensor.name and is_constant(tensor):
                fits = index in positions and tensor.name not in taken and _storable(graph, node, index)
                readers[tensor.name].append((node, channel_axis(node, index, _rank(tensor)) if fits else None))
    for name, found in readers.items():
        axes = {axis for _, axis in found}
        if len(axes) > 1 or None in axes or any(graph.has(f"{name}.{part}") for part in _NAMES):
            continue
        for node, _ in found:
            _mark(nodes, node, name)


def _mark(nodes: dict[str, NodePlan], node: Node, weight: str) -> None:
    verdict = nodes[node.name]
    if verdict.lowering == STORED:
        nodes[node.name] = replace(verdict, stored=(*verdict.stored, weight))
        return
    reason = ("a look-up in a table stored as int8, whose rows are decoded as they are read" if node.op == "Gather"
              else f"weights stored as int8 to save space, computed in float: {verdict.reason}")
    nodes[node.name] = replace(verdict, scheme=STORED, lowering=STORED, stored=(weight,), reason=reason)


def _storable(graph: Graph, node: Node, index: int) -> bool:
    weight = node.inputs[index]
    dims = [int(d or 0) for d in shape_of(weight) or ()]
    if dtype_of(weight) != np.float32 or len(dims) < 2 or graph.is_output(weight):
        return False
    if node.op == "Gather" and (len(dims) != 2 or int(node.attrs.get("axis", 0)) != 0):
        return False
    count = int(np.prod(dims))
    channels = dims[channel_axis(node, index, len(dims))]
    return count >= (_LEAST_TABLE if node.op == "Gather" else _LEAST) and count >= _LEAST_PER_SCALE * channels


def _rank(tensor: Tensor) -> int:
    return len(shape_of(tensor) or ())


def channel_axis(node: Node, index: int, rank: int) -> int:
    """The axis along which a stored weight has a scale of its own for each output (or, for a table, for each row)."""
    if node.op == "Gather" or node.op == "Conv":
        return 0
    if node.op == "ConvTranspose":  # [C, M / group, ...]
        return 1 if int(node.attrs.get("group", 1)) == 1 else 0
    if node.op == "Gemm":
        return 0 if node.attrs.get("transB", 0) else 1
    if node.op == "MatMul":
        return rank - 2 if index == 0 else rank - 1
    return 1  # LSTM, GRU, RNN: [directions, gates * hidden, inputs]


def stored_by(node: Node, verdict: NodePlan | None) -> Iterator[tuple[int, Tensor]]:
    """(position, weight) of each input that a verdict wants stored."""
    if verdict is not None:
        yield from ((k, t) for k, t in enumerate(node.inputs) if t.name in verdict.stored)
