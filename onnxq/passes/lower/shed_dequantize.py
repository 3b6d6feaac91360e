"""Q and DQ nodes that lowering left without readers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class ShedDequantize(Pass):
    """Drop what nobody reads any more; DequantizeLinear between two integer operators above all."""

    name: ClassVar[str] = "shed-dequantize"

    def run(self, graph: Graph, context: Context) -> bool:
        """Whether anything was dropped."""
        return graph.prune()
