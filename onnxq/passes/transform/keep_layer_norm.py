"""Add -> LayerNormalization kept from a slow fusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Node, is_constant
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class KeepLayerNorm(Pass):
    """Add(a, b) -> LayerNormalization  =>  Sum(a, b) -> LayerNormalization, where the target lists the fusion as slow.

    The runtime fuses Add and LayerNormalization into SkipLayerNormalization, which takes several times as long as the
    two; it does not look at Sum, which computes the same (ONNX Sum-13, bit for bit).
    """

    name: ClassVar[str] = "keep-layer-norm"
    weighed: ClassVar[bool] = True

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Rename the Add in front of one LayerNormalization."""
        if node.op != "LayerNormalization" or context.target is None:
            return False
        if "SkipLayerNormalization" not in context.target.slow_fusions:
            return False
        add = graph.producer(node.inputs[0])
        if add is None or add.op != "Add" or add.domain:
            return False
        if graph.only_consumer(add.outputs[0]) is None:
            return context.skip(node, f"the sum of {add.name} is read elsewhere too, which the runtime does not fuse")
        verdict = context.plan.node(add.name)
        if verdict is not None and verdict.scheme != "float":
            return context.skip(node, f"{add.name} is quantized")
        if any(is_constant(t) for t in add.inputs):
            return context.skip(node, f"{add.name} adds a constant, which is not the fusion's form")
        add.op = "Sum"
        return True
