"""Sum of two -> Add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Node
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class SumToAdd(Pass):
    """Sum(a, b) -> Add(a, b): onnxruntime has an integer kernel for Add alone.

    Never in front of a LayerNormalization: the Add would be fused into SkipLayerNormalization, which is slower.
    """

    name: ClassVar[str] = "sum-to-add"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Rename one Sum."""
        if node.op != "Sum" or node.domain:
            return False
        if len(node.inputs) != 2:
            return context.skip(node, f"it adds {len(node.inputs)} tensors")
        if any(user.op == "LayerNormalization" for user in graph.consumers(node.outputs[0])):
            return context.skip(node, "as an Add before LayerNormalization it would be slower")
        node.op = "Add"
        return True
