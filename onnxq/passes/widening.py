"""What makes the channels of a tensor: columns of the layers above, which are repeated or taken out with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant, shape_of
from onnxq.passes.absorbing import LAST, Constant, unused

ELEMENTWISE = frozenset({
    "Abs", "Add", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish",
    "Mul", "Neg", "Pow", "QuickGelu", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh",
})
_BY_CHANNEL = frozenset({"AveragePool", "Dropout", "GlobalAveragePool", "GlobalMaxPool", "Identity", "MaxPool"})
_MOST = 24  # nodes between a tensor and the layers that make its channels


@dataclass(frozen=True)
class Region:
    """The constants whose channels are repeated or taken out, and the computed tensors that become as wide, with
    channels along `axis`. `depthwise` names Convs with a filter for each channel."""

    constants: tuple[Constant, ...]
    tensors: tuple[str, ...]
    axis: int = LAST
    depthwise: tuple[str, ...] = ()


def region(graph: Graph, tensor: Tensor, readers: frozenset[str], channels: int, axis: int = LAST) -> Region | None:
    """What lies between a tensor that `readers` alone read and the layers that make its channels: [.., C], made by
    MatMul and Gemm, or with `axis` 1 [N, C, ..], made by Convs.

    All of it works element by element, or at least channel by channel, and is read by nothing else: the tensor's value
    at a channel depends on the same column of each layer above alone. None where that is not so.
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
        alone = len([t for t in node.outputs if t.name]) == 1 and not node.domain
        if alone and (node.op in ELEMENTWISE or (axis == 1 and node.op in _BY_CHANNEL)):
            waiting += [graph.producer(t) for t in node.inputs if t.name and not is_constant(t)]
        elif axis == 1 and _depthwise(node, channels):
            waiting.append(graph.producer(node.inputs[0]))
        elif not (is_layer(node) if axis == LAST else _filters(node)):
            return None
    inside = frozenset(found) | readers
    for node in found.values():
        result = node.outputs[0]
        dims = shape_of(result)
        within = {n.name for n in graph.consumers(result)} <= inside and not graph.is_output(result)
        if not within or not dims or len(dims) < 2 or dims[axis] != channels:
            return None
    constants = _constants(found.values(), channels, axis)
    depthwise = tuple(n.name for n in found.values() if axis == 1 and _depthwise(n, channels))
    return Region(constants, tuple(n.outputs[0].name for n in found.values()), axis, depthwise) if constants else None


def is_layer(node: Node) -> bool:
    """Whether a node is a MatMul or Gemm with a stored matrix."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    return (node.op in ("MatMul", "Gemm") and not node.domain and not node.attrs and weight is not None
            and is_constant(weight) and dtype_of(weight) == np.float32 and len(shape_of(weight) or ()) == 2
            and all(is_constant(t) for t in node.inputs[2:] if t.name))


def _filters(node: Node) -> bool:
    """Whether a node is a Conv of one group with stored filters."""
    return _conv(node) and int(node.attrs.get("group", 1)) == 1


def _depthwise(node: Node, channels: int) -> bool:
    """Whether a node is a Conv with one stored filter for each of its channels."""
    return _conv(node) and int(node.attrs.get("group", 1)) == channels > 1 and (
        shape_of(node.inputs[1]) or ())[:2] == (channels, 1)


def _conv(node: Node) -> bool:
    stored = all(is_constant(t) and dtype_of(t) == np.float32 for t in node.inputs[1:] if t.name)
    return node.op == "Conv" and not node.domain and stored


def _constants(nodes: Iterable[Node], channels: int, axis: int) -> tuple[Constant, ...] | None:
    """Those with a number per channel; None where one has another size than that or 1."""
    found = []
    for node in nodes:
        rank = len(shape_of(node.outputs[0]) or ())
        for k, tensor in enumerate(node.inputs):
            if not tensor.name or not is_constant(tensor):
                continue
            dims = shape_of(tensor) or ()
            place = -1 if axis == LAST else 0 if node.op == "Conv" else len(dims) - rank + 1
            has_channels = bool(dims) and (axis == LAST or place >= 0)
            if has_channels and dims[place] == channels and dtype_of(tensor) == np.float32:
                found.append(Constant(node.name, k, place))
            elif (axis == LAST and dims and dims[-1] != 1) or (axis == 1 and any(d != 1 for d in dims)):
                return None
    return tuple(found)


def widen(graph: Graph, found: Region, source: npt.NDArray[np.int64], suffix: str = ".split") -> None:
    """Channel c of what was C wide becomes source[c] of it, `source` int64 [C']: some are repeated, or left out."""
    nodes, made = {n.name: n for n in graph.nodes}, dict[str, Tensor]()
    for constant in found.constants:
        node = nodes[constant.node]
        old = node.inputs[constant.index]
        if old.name not in made:
            values = np.ascontiguousarray(np.asarray(graph.read(old)).take(source, constant.axis))
            made[old.name] = graph.constant(unused(graph, old.name, suffix), values)
        graph.replace_input(node, constant.index, made[old.name])
    wide = set(found.tensors)
    for tensor in (t for n in nodes.values() for t in n.outputs if t.name in wide):
        tensor.shape = [*tensor.shape[: found.axis], source.size, *tensor.shape[found.axis :][1:]]
    for name in found.depthwise:
        nodes[name].attrs["group"] = source.size
