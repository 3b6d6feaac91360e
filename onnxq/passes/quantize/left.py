"""MatMul(W, x) -> MatMul(DQ(Wq), DQ(Q(x))) * row scale, W being stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, Tensor, shape_of
from onnxq.numerics import affine
from onnxq.passes.manager import Context, Pass
from onnxq.passes.quantize.per_token import ONE
from onnxq.plan import STATIC

_SHIFT = 128  # from int8 codes to uint8 ones of the same meaning


@dataclass(frozen=True)
class QuantizeLeft(Pass):
    """W x => s * (Wq' x'), W float32 [M, K] and x float32 [.., K, N].

    Wq is uint8 [M, K] with zero point 128, s float32 [M, 1] the scales of its rows; x' is x rounded to int8 codes and
    back, at one scale. The fast kernel multiplies uint8 by int8 in this order, and takes one scale for its left side,
    so s is a Mul behind it. Source: ONNX MatMul-13; com.microsoft MatMulIntegerToFloat-1 is what this becomes.
    """

    name: ClassVar[str] = "quantize-left"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Quantize one MatMul."""
        verdict = context.plan.node(node.name)
        if node.op != "MatMul" or verdict is None or verdict.activation != STATIC or not verdict.is_int:
            return False
        weight, x = node.inputs
        if verdict.weight != weight.name:
            return False
        graph.replace_input(node, 0, self._weight(graph, weight, context))
        graph.replace_input(node, 1, signed_pair(graph, x, context))
        result = node.outputs[0]
        sums = graph.like(result, f"{node.name}.sums", "float32")
        graph.set_output(node, 0, sums)
        graph.add_node("Mul", f"{node.name}/scale", [sums, graph.made(f"{weight.name}.scale")], [result])
        return True

    @staticmethod
    def _weight(graph: Graph, weight: Tensor, context: Context) -> Tensor:
        params, name = context.plan.weights[weight.name], weight.name
        codes = affine.quantize(graph.read(weight), params).astype(np.int16) + _SHIFT
        graph.constant(f"{name}.scale", np.broadcast_to(params.scale.reshape(-1, 1), (len(codes), 1)))
        parts = [graph.constant(f"{name}.q", codes.astype(np.uint8)),
                 graph.shared_constant(ONE, np.asarray(1, np.float32)),
                 graph.constant(f"{name}.zero_point", np.asarray(_SHIFT, np.uint8))]
        decoded = graph.variable(f"{name}.dq", "float32", shape_of(weight))
        graph.add_node("DequantizeLinear", f"{name}/dequantize", parts, [decoded])
        return decoded


def signed_pair(graph: Graph, x: Tensor, context: Context) -> Tensor:
    """x rounded to int8 codes and back: those of its uint8 scale, less 128; made once for all its readers."""
    name = f"{x.name}.s8"
    if not graph.has(f"{name}.q"):
        params = context.plan.activations[x.name]
        scale = graph.constant(f"{name}.scale", params.scale)
        zero_point = graph.constant(f"{name}.zero_point", np.asarray(int(params.zero_point) - _SHIFT, np.int8))
        codes, decoded = graph.like(x, f"{name}.q", "int8"), graph.like(x, f"{name}.dq", "float32")
        graph.add_node("QuantizeLinear", f"{name}/quantize", [x, scale, zero_point], [codes])
        graph.add_node("DequantizeLinear", f"{name}/dequantize", [codes, scale, zero_point], [decoded])
    return graph.made(f"{name}.dq")
