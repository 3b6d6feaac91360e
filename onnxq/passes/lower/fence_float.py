"""A node that shall stay float between DQ and Q is kept float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Node, is_constant
from onnxq.passes.lower.pattern import DEQUANTIZE, QUANTIZE
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class FenceFloat(Pass):
    """DQ -> op -> Q  =>  DQ -> op -> Sum -> Q, where the Plan keeps op float.

    The runtime rewrites DQ -> op -> Q to an integer kernel whatever the Plan says, and even quantizes a Conv's float
    weights. A Sum of one tensor is the identity, no rewrite of the runtime matches it, and it costs one copy.
    """

    name: ClassVar[str] = "fence-float"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Fence one node."""
        verdict, target = context.plan.node(node.name), context.target
        if verdict is None or verdict.scheme != "float" or target is None or node.op not in target.pairs_with_q:
            return False
        data = [t for t in node.inputs if t.name and not is_constant(t)]
        makers = [graph.producer(t) for t in data]
        if not data or any(m is None or m.op != DEQUANTIZE for m in makers):
            return False
        last = self._before_q(graph, node)
        if last is None:
            return False
        result = last.outputs[0]
        before = graph.like(result, f"{result.name}.unfenced", "float32")
        graph.set_output(last, 0, before)
        graph.add_node("Sum", f"{node.name}/fence", [before], [result])
        return True

    @staticmethod
    def _before_q(graph: Graph, node: Node) -> Node | None:
        """The last node before Q: the node itself, or a Relu or Clip that the runtime would absorb."""
        users = graph.consumers(node.outputs[0])
        if len(users) == 1 and users[0].op in ("Relu", "Clip"):
            node = users[0]
            users = graph.consumers(node.outputs[0])
        return node if users and all(u.op == QUANTIZE for u in users) else None
