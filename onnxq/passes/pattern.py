"""What passes look for around a node: codes in front of a node, codes behind it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant, shape_of

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


@dataclass
class Codes:
    """A tensor of codes with its scale and zero point (all tensors of the graph), and the axis of several scales."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int = 1
    block_size: int = 0

    @property
    def inputs(self) -> list[Tensor]:
        """In the order in which QLinear operators take them."""
        return [self.q, self.scale, self.zero_point]


@dataclass
class Stored:
    """A result that is quantized right away: the codes, the Q node, and an absorbed Relu or Clip."""

    codes: Codes
    quantize: Node
    clamp: Node | None


def behind(graph: Graph, node: Node, op: str) -> tuple[Node, Tensor] | None:
    """(maker, constant) of an Add or Mul of a constant and what an operator `op` makes; None for anything else."""
    if node.op not in ("Add", "Mul") or node.domain:
        return None
    index = next((i for i, t in enumerate(node.inputs) if is_constant(t)), None)
    source = node.inputs[1 - index] if index is not None else None
    maker = graph.producer(source) if source is not None else None
    if maker is None or maker.op != op or maker.domain or maker.outputs[0] is not source:
        return None
    return maker, node.inputs[index]


def per_channel(given: tuple[int, ...], rank: int, channels: int) -> bool:
    """Whether a constant of this shape gives a tensor [N, C, ..] of that rank one number per channel, or one in all."""
    padded = (1,) * (rank - len(given)) + given
    others = [d for k, d in enumerate(padded) if k != 1]
    return len(padded) == rank and padded[1] in (1, channels) and all(d == 1 for d in others)


def read(graph: Graph, tensor: Tensor) -> Codes | None:
    """The codes behind a DequantizeLinear with an explicit zero point, else None."""
    node = graph.producer(tensor)
    if node is None or node.op != DEQUANTIZE or graph.optional_input(node, 2) is None:
        return None
    return _codes(node, node.inputs[0])


def _codes(node: Node, q: Tensor) -> Codes:
    return Codes(q, node.inputs[1], node.inputs[2], node.attrs.get("axis", 1), node.attrs.get("block_size", 0))


def per_tensor(codes: Codes | None) -> bool:
    """Whether there are codes with one scale, stored in the model."""
    return (codes is not None and is_constant(codes.scale) and is_constant(codes.zero_point)
            and not shape_of(codes.scale))


def unsigned(codes: Codes | None) -> bool:
    """Whether the codes are uint8, the activation type of the fast kernels."""
    return codes is not None and dtype_of(codes.zero_point) == np.uint8


def activation(codes: Codes | None) -> bool:
    """Whether the codes are what kernels take and make: uint8 with one stored scale."""
    return per_tensor(codes) and unsigned(codes)


def weight(codes: Codes | None, axis: int) -> bool:
    """Whether the codes are 8 bits with one stored scale, or one per channel along `axis` (-1: the last)."""
    if codes is None or not is_constant(codes.scale) or dtype_of(codes.zero_point) not in (np.int8, np.uint8):
        return False
    scales, dims = shape_of(codes.scale), shape_of(codes.q)
    if not is_constant(codes.zero_point) or codes.block_size or not scales:
        return is_constant(codes.zero_point) and scales == ()
    return dims is not None and len(scales) == 1 and codes.axis % len(dims) == axis % len(dims)


def bias(graph: Graph, tensor: Tensor, x: Codes, w: Codes) -> Tensor | None:
    """The int32 codes of a bias whose scale is that of the products, x_scale * w_scale; None for any other bias."""
    node = graph.producer(tensor)
    if node is None or node.op != DEQUANTIZE or not all(is_constant(t) for t in node.inputs):
        return None
    codes, scale = node.inputs[0], np.asarray(graph.read(node.inputs[1]), np.float32)
    wanted = np.asarray(graph.read(x.scale), np.float32) * np.asarray(graph.read(w.scale), np.float32)
    zero = len(node.inputs) < 3 or not np.any(graph.read(node.inputs[2]))
    return codes if zero and dtype_of(codes) == np.int32 and np.allclose(scale, wanted, rtol=1e-5, atol=0) else None


def same_scale(graph: Graph, a: Codes, b: Codes) -> bool:
    """Whether codes mean the same numbers in both; a and b each have one scale, stored."""
    return (bool(graph.read(a.scale) == graph.read(b.scale))
            and bool(graph.read(a.zero_point) == graph.read(b.zero_point)))


def stored(graph: Graph, tensor: Tensor, absorbed: frozenset[str] | set[str]) -> Stored | None:
    """The Q that alone reads a result, behind a Relu or Clip named in `absorbed` where there is one."""
    user = graph.only_consumer(tensor)
    clamp = None
    if user is not None and user.name in absorbed:
        clamp = user
        user = graph.only_consumer(clamp.outputs[0])
    if user is None or user.op != QUANTIZE or len(user.inputs) < 3:
        return None
    return Stored(_codes(user, user.outputs[0]), user, clamp)


def finish(graph: Graph, old: Node, found: Stored | None, op: str, inputs: list[Tensor | None],
           attrs: dict[str, object], domain: str | None) -> Node:
    """Put an integer operator in the place of a float one (and of the Q and clamp behind it), under its name.

    Without `found` the result stays the float tensor of the old node.
    """
    name = old.name
    if found is None:
        result = old.outputs[0]
    else:
        result = found.codes.q
        graph.remove(found.quantize)
        if found.clamp is not None:
            graph.remove(found.clamp)
    extra = graph.extras.get(name)
    graph.remove(old)
    node = graph.add_node(op, name, inputs, [result], attrs, domain)
    if extra is not None:
        graph.extras[name] = extra
    return node
