"""DQ -> Add, Concat, pool or data movement -> Q  =>  the same on codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import CONTRIB, Graph, Node, Tensor
from onnxq.passes.lower import pattern
from onnxq.passes.lower.pattern import Codes
from onnxq.passes.manager import Context, Pass
from onnxq.plan import GIVEN

_ARITHMETIC = frozenset({"Add", "AveragePool", "Concat", "GlobalAveragePool"})
_MOVEMENT = frozenset({"Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class LowerJoining(Pass):
    """QLinearAdd, QLinearConcat, QLinear(Global)AveragePool of com.microsoft; MaxPool, Reshape and such as they are.

    Data movement keeps scale and zero point, so the operator runs on uint8 codes. Source: com.microsoft operators of
    those names, version 1; ONNX MaxPool-12 (uint8).
    """

    name: ClassVar[str] = "lower-joining"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Lower one node that joined an int8 region."""
        verdict = context.plan.node(node.name)
        if verdict is None or not verdict.int_output or node.domain or node.op not in _MOVEMENT | _ARITHMETIC:
            return False
        if verdict.lowering == GIVEN:
            return False
        read = [pattern.read(graph, node.inputs[k]) for k in verdict.int_inputs]
        codes = [c for c in read if c is not None and pattern.activation(c)]
        found = pattern.stored(graph, node.outputs[0], context.absorbed)
        if len(codes) < len(read) or found is None or not pattern.activation(found.codes):
            return context.skip(node, "not everything around it is uint8 codes")
        attrs, result = dict(node.attrs), [found.codes.scale, found.codes.zero_point]
        if node.op in _MOVEMENT:
            if not pattern.same_scale(graph, codes[0], found.codes):
                return context.skip(node, "the model stores its result at another scale")
            rest = list(node.inputs)[1:]
            pattern.finish(graph, node, found, node.op, [codes[0].q, *rest], attrs, None)
            return True
        pattern.finish(graph, node, found, verdict.lowering, self._inputs(node, codes, result), attrs, CONTRIB)
        return True

    @staticmethod
    def _inputs(node: Node, codes: list[Codes], result: list[Tensor]) -> list[Tensor | None]:
        read: list[Tensor | None] = [t for c in codes for t in c.inputs]
        return [*result, *read] if node.op == "Concat" else [*read, *result]
