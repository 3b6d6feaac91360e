"""MatMul(a, b) -> MatMul(DQ(Q(a)), DQ(Q(b))), both being computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Node, is_constant
from onnxq.passes.manager import Context, Pass
from onnxq.passes.quantize.left import signed_pair
from onnxq.plan import STATIC


@dataclass(frozen=True)
class QuantizeProducts(Pass):
    """a b => a' b', a float32 [.., M, K] and b float32 [.., K, N]; b' is b rounded to int8 codes and back, one scale.

    a becomes uint8 codes as all activations do (quantize-activations). The fast kernel multiplies uint8 by int8 in this
    order. Source: ONNX MatMul-13, QuantizeLinear-13; com.microsoft MatMulIntegerToFloat-1 is what this becomes.
    """

    name: ClassVar[str] = "quantize-products"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Quantize what is on the right of one MatMul."""
        verdict = context.plan.node(node.name)
        if node.op != "MatMul" or verdict is None or not verdict.is_int or verdict.activation != STATIC:
            return False
        second = node.inputs[1]
        maker = graph.producer(second)
        if verdict.int_inputs != (0, 1) or is_constant(second) or (maker is not None
                                                                   and maker.op == "DequantizeLinear"):
            return False
        graph.replace_input(node, 1, signed_pair(graph, second, context))
        return True
