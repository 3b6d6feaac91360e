"""DQ -> Add, Mul, Concat, pool or activation -> Q  =>  the same on codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import CONTRIB, Graph, Node, Tensor
from onnxq.passes import pattern
from onnxq.passes.lower.pool_to_conv import KERNEL as POOLED_BY_CONV
from onnxq.passes.manager import Context, Pass
from onnxq.passes.pattern import Codes
from onnxq.plan import GIVEN

_JOINING = frozenset({"Add", "AveragePool", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid"})


@dataclass(frozen=True)
class LowerJoining(Pass):
    """QLinearAdd, QLinearMul, QLinearConcat, QLinearSigmoid, QLinearLeakyRelu and the pools of com.microsoft.

    They take uint8 codes with one scale per tensor and make such, with the attributes of the float operator.
    Source: com.microsoft operators of those names, version 1.
    """

    name: ClassVar[str] = "lower-joining"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Lower one node that joined an int8 region."""
        verdict = context.plan.node(node.name)
        if verdict is None or not verdict.int_output or node.domain or node.op not in _JOINING:
            return False
        if verdict.lowering in (GIVEN, POOLED_BY_CONV):
            return False
        read = [pattern.read(graph, t) for t in node.inputs]
        codes = [c for c in read if c is not None and pattern.activation(c)]
        found = pattern.stored(graph, node.outputs[0], context.absorbed)
        if len(codes) < len(read) or found is None or not pattern.activation(found.codes):
            return context.skip(node, "not everything around it is uint8 codes")
        result = [found.codes.scale, found.codes.zero_point]
        pattern.finish(graph, node, found, verdict.lowering, self._inputs(node, codes, result), dict(node.attrs),
                       CONTRIB)
        return True

    @staticmethod
    def _inputs(node: Node, codes: list[Codes], result: list[Tensor]) -> list[Tensor | None]:
        read: list[Tensor | None] = [t for c in codes for t in c.inputs]
        return [*result, *read] if node.op == "Concat" else [*read, *result]
