"""What lowering passes look for: codes in front of a node, codes behind it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant, shape_of

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


@dataclass
class Codes:
    """A tensor of codes with its scale and zero point (all tensors of the graph)."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor

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


def read(graph: Graph, tensor: Tensor) -> Codes | None:
    """The codes behind a DequantizeLinear with an explicit zero point, else None."""
    node = graph.producer(tensor)
    if node is None or node.op != DEQUANTIZE or len(node.inputs) < 3 or not node.inputs[2].name:
        return None
    return Codes(node.inputs[0], node.inputs[1], node.inputs[2])


def per_tensor(codes: Codes | None) -> bool:
    """Whether there are codes with one scale, stored in the model."""
    return (codes is not None and is_constant(codes.scale) and is_constant(codes.zero_point)
            and not shape_of(codes.scale))


def unsigned(codes: Codes | None) -> bool:
    """Whether the codes are uint8, the activation type of the fast kernels."""
    return codes is not None and dtype_of(codes.zero_point) == np.uint8


def stored(graph: Graph, tensor: Tensor, absorbed: frozenset[str] | set[str]) -> Stored | None:
    """The Q that alone reads a result, behind a Relu or Clip named in `absorbed` where there is one."""
    user = graph.only_consumer(tensor)
    clamp = None
    if user is not None and user.name in absorbed:
        clamp = user
        user = graph.only_consumer(clamp.outputs[0])
    if user is None or user.op != QUANTIZE or len(user.inputs) < 3:
        return None
    return Stored(Codes(user.outputs[0], user.inputs[1], user.inputs[2]), user, clamp)


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
