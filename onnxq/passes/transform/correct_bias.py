"""bias -> bias + the mean error that int8 makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Conv(x, W, b) -> Conv(x, W, b + e), likewise ConvTranspose and Gemm; b and e float32 [C].

    e is the Plan's mean error of the quantized layer, per channel; the float graph is off by it until it is quantized.
    """

    name: ClassVar[str] = "correct-bias"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Correct one node's bias."""
        shift = context.plan.bias_shifts.get(node.name)
        corrected = f"{node.name}.bias.corrected"
        if shift is None or graph.has(corrected):
            return False
        bias = np.asarray(graph.read(node.inputs[2]), np.float32)
        graph.replace_input(node, 2, graph.constant(corrected, bias + shift))
        return True
