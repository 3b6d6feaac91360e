"""What stands above a tensor and can divide its channels by factors: a normalisation's gain, a layer's weights.

The walk goes up from the tensor through what commutes with positive factors per channel, and ends at constants that
every channel of the tensor is proportional to. All it passes is read by nobody else, or the others would see factors.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant, shape_of

LAST = -1  # channels along the last axis; along axis 1 it is 1
_ROW_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
_HOMOGENEOUS = frozenset({"LeakyRelu", "Relu"})
_BY_CHANNEL = frozenset({"AveragePool", "Dropout", "GlobalAveragePool", "Identity", "MaxPool"})
_MOVES = frozenset({"Expand", "Reshape", "Transpose", "Unsqueeze"})
_FURTHEST = 12  # nodes between a tensor and what takes its factors


@dataclass(frozen=True)
class Constant:
    """Input `index` of a node, whose slices along `axis` are divided by the factors."""

    node: str
    index: int
    axis: int


@dataclass(frozen=True, eq=False)
class Absorber:
    """The constants to divide, and the computed tensors whose channels that divides. `tie` int64 [C]: the slice that
    each channel belongs to, where heads share some."""

    constants: tuple[Constant, ...]
    tensors: tuple[str, ...] = ()
    tie: npt.NDArray[np.int64] | None = field(default=None)


def absorber(graph: Graph, tensor: Tensor, readers: frozenset[str], channels: int, axis: int) -> Absorber | None:
    """What can divide a tensor's `channels` along `axis` (LAST or 1), where the nodes `readers` alone read it."""
    if graph.is_output(tensor) or {n.name for n in graph.consumers(tensor)} != readers:
        return None
    if axis == LAST:
        heads = _heads(graph, tensor, channels)
        if heads is not None:
            return heads
    return _above(graph, tensor, channels, axis, _FURTHEST)


def _above(graph: Graph, tensor: Tensor, channels: int, axis: int, left: int) -> Absorber | None:
    """The walk: `tensor` is read by what called alone."""
    found = _taken(graph, tensor, channels, axis, left)
    return replace(found, tensors=(*found.tensors, tensor.name)) if found is not None else None


def _taken(graph: Graph, tensor: Tensor, channels: int, axis: int, left: int) -> Absorber | None:
    node = graph.producer(tensor)
    if node is None or not left or len([t for t in node.outputs if t.name]) != 1:
        return None
    found = _own(graph, node, channels, axis)
    if found is not None:
        return found
    if node.op in ("Add", "Mul") and not node.domain:
        return _elementwise(graph, node, channels, axis, left)
    if (node.op in _HOMOGENEOUS or (axis == 1 and node.op in _BY_CHANNEL)) and not node.domain:
        return _further(graph, node.inputs[0], channels, axis, left)
    return None


def _further(graph: Graph, tensor: Tensor, channels: int, axis: int, left: int) -> Absorber | None:
    return _above(graph, tensor, channels, axis, left - 1) if graph.only_consumer(tensor) is not None else None


def _own(graph: Graph, node: Node, channels: int, axis: int) -> Absorber | None:
    """The weights and bias of the node itself, if the channels are what it makes by them."""
    along = _slices(node, axis)
    if along is None:
        return None
    indices = [k for k in (1, 2) if graph.optional_input(node, k) is not None]
    for k in indices:
        dims = shape_of(node.inputs[k])
        if not _stored(node.inputs[k]) or not dims or dims[along] != channels:
            return None
    return Absorber(tuple(Constant(node.name, k, along) for k in indices))


def _slices(node: Node, axis: int) -> int | None:
    """The axis of a node's weights and bias along which there is a slice for each channel that it makes along `axis`;
    None where there is none."""
    if node.op in _ROW_NORMS and axis == LAST:
        last = int(node.attrs.get("axis", -1)) in (-1, len(shape_of(node.inputs[0]) or ()) - 1)
        return 0 if last else None
    if axis == 1 and (node.op == "BatchNormalization" or (node.op == "Conv" and not node.domain)):
        return 0
    if node.op in ("MatMul", "Gemm") and axis == LAST and not node.attrs and not node.domain:
        return -1 if len(shape_of(node.inputs[1]) or ()) > 1 else None  # by a vector, the last axis is one of rows
    return None


def _by_constant(graph: Graph, node: Node, index: int, channels: int, axis: int, left: int) -> Absorber | None:
    """Mul by a number for each channel, which takes the factors, or by one for all; Add of one for each, which takes
    them as what goes on above does."""
    constant, other = node.inputs[index], node.inputs[1 - index]
    own = Constant(node.name, index, -1)
    fits = axis == LAST and _stored(constant) and (shape_of(constant) or (0,))[-1] == channels
    if node.op == "Add":
        above = _further(graph, other, channels, axis, left) if fits else None
        return replace(above, constants=(*above.constants, own)) if above is not None else None
    if fits and (shape_of(other) or (0,))[-1] == channels:
        return Absorber((own,))
    scalar = int(np.prod([int(d or 0) for d in shape_of(constant) or ()])) == 1
    return _further(graph, other, channels, axis, left) if scalar else None


def _elementwise(graph: Graph, node: Node, channels: int, axis: int, left: int) -> Absorber | None:
    """Add or Mul of a constant and what goes on above; Mul of two branches, of which one takes the factors."""
    index = next((k for k, t in enumerate(node.inputs) if is_constant(t)), None)
    if index is not None:
        return _by_constant(graph, node, index, channels, axis, left)
    if node.op == "Add":
        return None
    if node.inputs[0] is node.inputs[1]:
        return None  # a square
    for branch in node.inputs:
        dims = shape_of(branch)
        if dims and len(dims) == len(shape_of(node.outputs[0]) or ()) and dims[axis] == channels:
            found = _further(graph, branch, channels, axis, left)
            if found is not None:
                return found
    return None


def _heads(graph: Graph, tensor: Tensor, channels: int) -> Absorber | None:
    """The values' projection under attention: x = merged heads of (weights of attention) @ (heads of V).

    Each head's columns of x are proportional to its columns of V; of grouped heads, several to the same ones.
    """
    product, merged = _through_moves(graph, tensor)
    if product is None or product.op != "MatMul" or any(is_constant(t) for t in product.inputs):
        return None
    values = product.inputs[1]
    size = (shape_of(values) or (None,))[-1]
    bottom, split = _through_moves(graph, values)
    if bottom is None or not isinstance(size, int) or graph.only_consumer(values) is None:
        return None
    if graph.only_consumer(product.outputs[0]) is None:
        return None
    made = (shape_of(bottom.outputs[0]) or (None,))[-1]
    if not isinstance(made, int) or graph.only_consumer(bottom.outputs[0]) is None or made % size or channels % made:
        return None
    found = _above(graph, bottom.outputs[0], made, LAST, 3)
    if found is None:
        return None
    found = replace(found, tensors=(*found.tensors, *split[:-1], *merged))
    if channels == made:
        return found
    if made != size and not _one_after_the_other(graph, values):
        return None
    head, place = np.divmod(np.arange(channels), size)
    return replace(found, tie=np.asarray(head // (channels // made) * size + place, np.int64))


def _one_after_the_other(graph: Graph, values: Tensor) -> bool:
    """Whether an Expand above, if there is one, repeats each head by itself: [B, G, 1, S, D] to [B, G, H/G, S, D]."""
    node = graph.producer(values)
    while node is not None and node.op in _MOVES and node.op != "Expand":
        node = graph.producer(node.inputs[0])
    dims = shape_of(node.inputs[0]) if node is not None and node.op == "Expand" else (0, 0, 1, 0, 0)
    return dims is not None and len(dims) == 5 and dims[2] == 1


def _through_moves(graph: Graph, tensor: Tensor) -> tuple[Node | None, list[str]]:
    """The first node above that is no data movement, and the tensors from `tensor` up to its result.

    None where something else reads what lies between, and where a Transpose brings another axis to the end: then it is
    not heads' columns that lie there.
    """
    passed = [tensor.name]
    for _ in range(_FURTHEST):
        node = graph.producer(tensor)
        if node is None or node.op not in _MOVES:
            return node, passed
        perm = node.attrs.get("perm", [-1])
        tensor = node.inputs[0]
        if (node.op == "Transpose" and perm[-1] != len(perm) - 1) or graph.only_consumer(tensor) is None:
            break
        passed.append(tensor.name)
    return None, passed


def unused(graph: Graph, name: str, suffix: str) -> str:
    """The name with the suffix behind it, more than once where a constant that several nodes read is changed for each.
    """
    name += suffix
    while graph.has(name):
        name += suffix
    return name


def _stored(tensor: Tensor) -> bool:
    return is_constant(tensor) and dtype_of(tensor) == np.float32
