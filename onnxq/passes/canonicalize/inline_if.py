"""If of a constant -> the branch that it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Node, inline, is_constant
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class InlineIf(Pass):
    """If(constant) -> the nodes of the branch that is taken, under their names, and an Identity for each result.

    Source: ONNX If-16.
    """

    name: ClassVar[str] = "inline-if"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Replace one If."""
        if node.op != "If" or node.domain or not is_constant(node.inputs[0]):
            return False
        taken = "then_branch" if graph.read(node.inputs[0]).reshape(-1)[0] else "else_branch"
        inline(graph, node, taken)
        return True
