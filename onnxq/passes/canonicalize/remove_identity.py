"""Identity(x) -> x; Dropout in inference -> x; Cast to the type that x has -> x."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Node, dtype_of
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class RemoveIdentity(Pass):
    """Drop Identity, Cast and CastLike to the type that is there, and Dropout that gives no mask and does not train.

    Source: ONNX Dropout-13.
    """

    name: ClassVar[str] = "remove-identity"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Let the node's readers take its input."""
        if node.op not in ("Cast", "CastLike", "Dropout", "Identity") or node.domain:
            return False
        if node.op.startswith("Cast") and not _same_type(node):
            return False
        if node.op == "Dropout":
            mask = node.outputs[1] if len(node.outputs) > 1 else None
            if mask is not None and mask.name and (len(mask.outputs) or graph.is_output(mask)):
                return context.skip(node, "its mask is read")
            training = graph.optional_input(node, 2)
            if training is not None and graph.scalar(training) != 0:
                return context.skip(node, "it may train")
        before = len(graph.nodes)
        graph.bypass(node)
        return len(graph.nodes) < before or context.skip(node, "it joins a graph input or weight to an output")


def _same_type(node: Node) -> bool:
    dtype = dtype_of(node.inputs[0])
    return dtype is not None and dtype == dtype_of(node.outputs[0])
