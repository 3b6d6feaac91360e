"""W -> W with zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Tensor, is_constant
from onnxq.passes.manager import Context, Pass

PRUNED = ".pruned"


@dataclass(frozen=True)
class Prune(Pass):
    """op(x, W) -> op(x, W'), W' float32 of the same shape as W: the weights that the Plan has pruned, as `W.pruned`.

    Every node that reads W reads W', so a weight that several nodes share stays one. Results change by what pruning
    costs. Sources of W': SparseGPT (2301.00774), Wanda (2306.11695).
    """

    name: ClassVar[str] = "prune"

    def run(self, graph: Graph, context: Context) -> bool:
        """Put in each pruned weight of the Plan."""
        weights: dict[str, Tensor] = {t.name: t for node in graph.nodes for t in node.inputs
                                      if is_constant(t) and t.name in context.plan.pruned}
        for name, weight in weights.items():
            graph.redirect(weight, graph.constant(f"{name}{PRUNED}", context.plan.pruned[name]))
        return bool(weights)
