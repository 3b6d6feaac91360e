"""MatMulInteger, Cast, Mul of per-token codes  =>  MatMulIntegerToFloat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import CONTRIB, Graph, Node
from onnxq.passes.manager import Context, Pass
from onnxq.passes.quantize.per_token import ONE, ZERO_CODE
from onnxq.plan import TOKEN


@dataclass(frozen=True)
class LowerPerToken(Pass):
    """One kernel that multiplies codes and applies the weights' scales; the rows' scales stay a Mul behind it.

    c uint8 [..., K] and Wq int8 [K, N] -> float32 [..., N], c at scale 1 and zero point 0.
    Source: com.microsoft MatMulIntegerToFloat-1.
    """

    name: ClassVar[str] = "lower-per-token"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Lower one MatMulInteger that the Plan made."""
        verdict = context.plan.node(node.name)
        if verdict is None or verdict.activation != TOKEN or node.op != "MatMulInteger":
            return False
        cast = graph.only_consumer(node.outputs[0])
        scale = graph.only_consumer(cast.outputs[0]) if cast is not None else None
        if cast is None or scale is None or scale.op != "Mul":
            return context.skip(node, "the operators around it are not those that onnxq wrote")
        codes, weight = node.inputs[:2]
        w_scale, result = scale.inputs[1], scale.outputs[0]
        for old in (scale, cast, node):
            graph.remove(old)
        graph.add_node("MatMulIntegerToFloat", verdict.node, [
            codes, weight, graph.made(ONE), w_scale, graph.made(ZERO_CODE),
            graph.made(f"{verdict.weight}.zero_point")], [result], {}, CONTRIB)
        return True
