"""Products that are scaled -> products of what is scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import FLOAT32, Graph, Node, dtype_of, is_constant
from onnxq.passes.manager import Context, Pass

_FUSED = "com.microsoft.FusedMatMul"


@dataclass(frozen=True)
class ScaleFirst(Pass):
    """MatMul(q, k) * c or / c -> MatMul(q * c, k), for |c| < 1 or a divisor beyond 1, where the target computes in
    float16: scores of attention pass 65504 before they are scaled, not after.

    Not where the target has FusedMatMul, to which onnxruntime fuses both: it scales in float32.
    """

    name: ClassVar[str] = "scale-first"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Scale the first operand of one product."""
        target = context.target
        if target is None or target.floats != "float16" or _FUSED in (target.operators or {_FUSED}):
            return False
        if node.op != "MatMul" or node.domain or any(is_constant(t) for t in node.inputs):
            return False
        user = graph.only_consumer(node.outputs[0])
        if user is None or user.op not in ("Div", "Mul") or user.domain or dtype_of(node.outputs[0]) not in (
                None, FLOAT32):
            return False
        index = 1 if user.inputs[0] is node.outputs[0] else 0
        number = graph.scalar(user.inputs[index])
        if not number or (user.op == "Div" and index == 0):
            return False
        factor = 1 / number if user.op == "Div" else number
        if abs(factor) >= 1:
            return context.skip(node, "it is not scaled down")
        if graph.has(f"{node.name}.scaled"):
            return context.skip(node, "its first operand is scaled already; a second scale stays behind it")
        scale = graph.constant(f"{node.name}.scale", np.asarray(factor, np.float32))
        scaled = graph.like(node.inputs[0], f"{node.name}.scaled", FLOAT32)
        graph.add_node("Mul", f"{node.name}/scaled", [node.inputs[0], scale], [scaled])
        graph.replace_input(node, 0, scaled)
        graph.replace_input(user, 0, node.outputs[0])
        graph.bypass(user)
        return True
