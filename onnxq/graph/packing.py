"""A constant gives way to a decoder over the arrays of an encoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from onnxq.graph.decoders import PACKED, decoder
from onnxq.graph.graph import Graph, Tensor
from onnxq.graph.shared import Shared
from onnxq.graph.tensors import Array, is_constant
from onnxq.numerics.encodings import Encoded, Outline, Stored

_NARROW: dict[str, Any] = {"int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4}


def pack_weight(graph: Graph, weight: Tensor, outline: Outline, encode: Callable[[Array], Encoded],
                shared: Shared) -> None:
    """Let nodes that decode make a constant, under its name, from arrays that `encode` gives of its values.

    The nodes stand before the first one that reads it. Arrays are computed as they are saved. Bodies of If and Loop
    read the weight from the main graph.
    """
    result = gs.Variable(weight.name, dtype=outline.dtype, shape=list(outline.shape))
    nodes = graph.ir.nodes
    place = next(k for k, node in enumerate(nodes) if any(t.name == weight.name for t in graph.reads(node)))
    for node, _ in graph.walk():
        for index, tensor in enumerate(node.inputs):
            if is_constant(tensor) and tensor.name == weight.name:
                node.inputs[index] = result

    def arrays() -> list[Array]:
        return [_typed(found) for found in encode(graph.read(weight)).arrays()]

    before = len(nodes)
    _call(graph, outline, result, iter(shared.parts(arrays, outline.count)))
    nodes[place:] = [*nodes[before:], *nodes[place:before]]


def decoder_bytes(name: str, opset: int) -> int:
    """What the function of an encoding takes in the file, once for all weights."""
    return int(decoder(name, opset).ByteSize())


def _call(graph: Graph, outline: Outline, result: Tensor, compute: Iterator[Callable[[], Array]]) -> None:
    """Add the node that makes `result`, behind those that make its parts."""
    inputs = []
    for name, part in outline.parts.items():
        full = f"{result.name}.{name}"
        if isinstance(part, Outline):
            inputs.append(graph.variable(full, part.dtype, part.shape))
            _call(graph, part, inputs[-1], compute)
        else:
            inputs.append(graph.computed(full, _NARROW.get(part.dtype, part.dtype), part.shape, next(compute)))
    attributes = {"shape": list(outline.shape)}
    if outline.name == "Transposed":
        rank = len(outline.shape)
        attributes["perm"] = [rank - 1, *range(rank - 1)]
    graph.add_node(outline.name, f"{result.name}/{outline.name}", inputs, [result], attributes, domain=PACKED)


def _typed(stored: Stored) -> Array:
    return np.asarray(stored.values.astype(_NARROW[stored.dtype]) if stored.dtype in _NARROW else stored.values)
