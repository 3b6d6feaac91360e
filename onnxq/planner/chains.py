"""A node with weights and what its kernel computes along: the bias Add and the Relu or Clip behind it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant, shape_of


@dataclass
class Chain:
    """node [-> bias_add] [-> clamp] -> result."""

    node: Node
    bias_add: Node | None
    clamp: Node | None
    result: Tensor

    @property
    def unclamped(self) -> Tensor:
        """The result before Relu or Clip: what a kernel with float output hands on."""
        return self.result if self.clamp is None else self.clamp.inputs[0]


def chain(graph: Graph, node: Node, barred: Collection[str] = ()) -> Chain:
    """Follow a node's result through a bias Add (MatMul alone) and one Relu or Clip, each its only reader.

    Nodes named in `barred` (inside bodies, or kept float) are never taken in.
    """
    result = node.outputs[0]
    bias_add = _bias_add(graph, node) if node.op == "MatMul" else None
    if bias_add is not None and bias_add.name in barred:
        return Chain(node, None, None, result)
    if bias_add is not None:
        result = bias_add.outputs[0]
    clamp = graph.only_consumer(result)
    if clamp is not None and clamp.name in barred:
        clamp = None
    bounds = clip_bounds(graph, clamp) if clamp is not None and not clamp.domain else None
    if clamp is None or bounds is None or not bounds[0] <= 0 <= bounds[1]:  # codes always reach 0
        return Chain(node, bias_add, None, result)
    return Chain(node, bias_add, clamp, clamp.outputs[0])


def _bias_add(graph: Graph, node: Node) -> Node | None:
    add = graph.only_consumer(node.outputs[0])
    if add is None or add.op != "Add" or add.domain:
        return None
    added = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
    weight = node.inputs[1]
    if not is_constant(added) or not is_constant(weight) or dtype_of(added) != np.float32:
        return None
    dims, columns = shape_of(added) or (), (shape_of(weight) or (None,))[-1]
    rank = len(shape_of(node.inputs[0]) or (1,))  # of the product; more dimensions would raise it
    alone = 1 <= len(dims) <= rank and dims[-1] == columns and all(d == 1 for d in dims[:-1])
    return add if alone else None


def clip_bounds(graph: Graph, node: Node) -> tuple[float, float] | None:
    """(low, high) of a Relu or of a Clip with constant bounds, else None."""
    if node.op == "Relu":
        return 0.0, float("inf")
    if node.op != "Clip":
        return None
    bounds = [float("-inf"), float("inf")]
    for k in (0, 1):
        tensor = node.inputs[k + 1] if len(node.inputs) > k + 1 and node.inputs[k + 1].name else None
        if tensor is not None:
            value = graph.scalar(tensor)
            if value is None:
                return None
            bounds[k] = value
    return bounds[0], bounds[1]


def weighted(graph: Graph, node: Node) -> str | None:
    """Why a Conv, MatMul or Gemm can't take int8 weights; None when it can."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    maker = graph.producer(weight) if weight is not None else None
    if maker is not None and maker.op == "DequantizeLinear":
        return "its weights came quantized, and what it reads or makes did not"
    if node.op == "MatMul" and (weight is None or not is_constant(weight)):
        if is_constant(node.inputs[0]):
            return "its constant is on the left side"
        return "it multiplies two computed tensors: there is no stored weight to make int8"
    if weight is None or not is_constant(weight):
        return "its weights are computed at run time"
    if dtype_of(weight) != np.float32:
        return f"its weights are {dtype_of(weight)}, not float32"
    dims = shape_of(weight) or ()
    bias = graph.optional_input(node, 2)
    if bias is not None and not is_constant(bias):
        return "its bias is computed at run time"
    if node.op in ("MatMul", "Gemm") and len(dims) != 2:
        return f"its weight has rank {len(dims)}, and the int8 kernels take rank 2"
    if node.op == "Gemm" and (node.attrs or (bias is not None and shape_of(bias) != dims[1:])):
        return "its form (transA, or a bias that is not one number per column) has no int8 kernel"
    if node.op == "MatMul":
        rank = shape_of(node.inputs[0])
        if rank is not None and len(rank) < 2:
            return "its activation has rank 1"
    if node.op == "Conv" and len(dims) not in (3, 4, 5):
        return f"a Conv of rank {len(dims)} has no int8 kernel here"
    if 0 in dims:
        return "its weight is empty"
    return None
