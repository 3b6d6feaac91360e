"""PRelu of one slope -> LeakyRelu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Node, dtype_of, is_constant
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class PReluToLeaky(Pass):
    """PRelu(x, s) -> LeakyRelu(x) with alpha = s, where s is one stored number for all channels.

    LeakyRelu has an integer kernel, and onnxruntime fuses it into a Conv. Source: ONNX PRelu-16, LeakyRelu-16.
    """

    name: ClassVar[str] = "prelu-to-leaky"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Rename one PRelu."""
        if node.op != "PRelu" or node.domain or dtype_of(node.outputs[0]) != "float32":
            return False
        if not is_constant(node.inputs[1]):
            return context.skip(node, "its slope is computed")
        slopes = graph.read(node.inputs[1])
        if not slopes.size or (slopes != slopes.flat[0]).any():
            return context.skip(node, "it has a slope per channel")
        alpha = float(slopes.flat[0])
        node.op = "LeakyRelu"
        node.attrs["alpha"] = alpha
        del node.inputs[1]
        return True
