"""DQ -> Add, Concat, pool or data movement -> Q  =>  the same on codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import CONTRIB, Graph, Node, Tensor
from onnxq.passes.lower import pattern
from onnxq.passes.lower.pattern import Codes
from onnxq.passes.manager import Context, Pass

_MOVEMENT = frozenset({"Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class LowerJoining(Pass):
    """QLinearAdd, QLinearConcat, QLinear(Global)AveragePool of com.microsoft; MaxPool, Reshape and the like as they are.

    Data movement keeps scale and zero point, so the operator runs on uint8 codes. Source: com.microsoft operators of
    those names, version 1; ONNX MaxPool-12 (uint8).
    """

    name: ClassVar[str] = "lower-joining"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Lower one node that joined an int8 region."""
        verdict = context.plan.node(node.name)
        if verdict is None or not verdict.int_output or verdict.weight is not None or node.domain:
            return False
        read = [pattern.read(graph, node.inputs[k]) for k in verdict.int_inputs]
        codes = [c for c in read if c is not None and pattern.per_tensor(c) and pattern.unsigned(c)]
        found = pattern.stored(graph, node.outputs[0], context.absorbed)
        if len(codes) < len(read) or found is None:
            return context.skip(node, "not everything around it is uint8 codes")
        attrs, result = dict(node.attrs), [found.codes.scale, found.codes.zero_point]
        if node.op in _MOVEMENT:
            rest = list(node.inputs)[1:]
            pattern.finish(graph, node, found, node.op, [codes[0].q, *rest], attrs, None)
            return True
        pattern.finish(graph, node, found, verdict.lowering, self._inputs(node, codes, result), attrs, CONTRIB)
        return True

    @staticmethod
    def _inputs(node: Node, codes: list[Codes], result: list[Tensor]) -> list[Tensor | None]:
        read: list[Tensor | None] = [t for c in codes for t in c.inputs]
        return [*result, *read] if node.op == "Concat" else [*read, *result]
