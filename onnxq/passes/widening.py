"""What has to be repeated so that channels of a tensor occur several times: columns of the layers above it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant, shape_of
from onnxq.passes.absorbing import Constant, unused

_ELEMENTWISE = frozenset({
    "Abs", "Add", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish",
    "Mul", "Neg", "Pow", "QuickGelu", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh",
})
_MOST = 24  # nodes between a tensor and the layers that make its channels


@dataclass(frozen=True)
class Region:
    """The constants whose last axis is repeated, and the computed tensors that become as wide."""

    constants: tuple[Constant, ...]
    tensors: tuple[str, ...]


def region(graph: Graph, tensor: Tensor, readers: frozenset[str], channels: int) -> Region | None:
    """What lies between a tensor [.., C] that `readers` alone read and the layers that make its channels.

    All of it works element by element, and is read by nothing else: the tensor's value at a channel depends on the same
    column of each layer above alone. None where that is not so.
    """
    found: dict[str, Node] = {}
    waiting = [graph.producer(tensor)]
    while waiting:
        node = waiting.pop()
        if node is None or len(found) > _MOST:
            return None
        if node.name in found:
            continue
        found[node.name] = node
        if node.op in _ELEMENTWISE and len([t for t in node.outputs if t.name]) == 1:
            waiting += [graph.producer(t) for t in node.inputs if t.name and not is_constant(t)]
        elif not _layer(node):
            return None
    inside = frozenset(found) | readers
    for node in found.values():
        result = node.outputs[0]
        dims = shape_of(result)
        within = {n.name for n in graph.consumers(result)} <= inside and not graph.is_output(result)
        if not within or not dims or dims[-1] != channels:
            return None
    constants = _constants(found.values(), channels)
    return Region(constants, tuple(n.outputs[0].name for n in found.values())) if constants else None


def _layer(node: Node) -> bool:
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    return (node.op in ("MatMul", "Gemm") and not node.domain and not node.attrs and weight is not None
            and is_constant(weight) and dtype_of(weight) == np.float32 and len(shape_of(weight) or ()) == 2)


def _constants(nodes: Iterable[Node], channels: int) -> tuple[Constant, ...] | None:
    """Those with a number per channel; None where one has another size than that or 1."""
    found = []
    for node in nodes:
        for k, tensor in enumerate(node.inputs):
            if not tensor.name or not is_constant(tensor):
                continue
            last = (shape_of(tensor) or (1,))[-1]
            if last == channels and dtype_of(tensor) == np.float32:
                found.append(Constant(node.name, k, -1))
            elif last != 1:
                return None
    return tuple(found)


def widen(graph: Graph, found: Region, source: npt.NDArray[np.int64]) -> None:
    """Repeat columns: channel c of what was C wide becomes source[c] of it, `source` int64 [C']."""
    nodes, made = {n.name: n for n in graph.nodes}, dict[str, Tensor]()
    for constant in found.constants:
        node = nodes[constant.node]
        old = node.inputs[constant.index]
        if old.name not in made:
            values = np.ascontiguousarray(np.asarray(graph.read(old))[..., source])
            made[old.name] = graph.constant(unused(graph, old.name, ".split"), values)
        graph.replace_input(node, constant.index, made[old.name])
    wide = set(found.tensors)
    for tensor in (t for n in nodes.values() for t in n.outputs if t.name in wide):
        tensor.shape = [*tensor.shape[:-1], source.size]
