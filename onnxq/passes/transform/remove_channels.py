"""layer(x) -> layer'(x without some channels)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.errors import GraphError
from onnxq.graph import Graph, shape_of
from onnxq.passes.absorbing import unused
from onnxq.passes.heads import heads, keep
from onnxq.passes.manager import Context, Pass
from onnxq.passes.transform.smooth import tell
from onnxq.passes.widening import region, widen
from onnxq.plan import Narrowed

NARROWED = ".narrowed"


@dataclass(frozen=True)
class RemoveChannels(Pass):
    """MatMul(x, W) -> MatMul(x', W'), x' [.., C'] the channels of x [.., C] that stay, W' float32 [K', N]; likewise
    Gemm, and Conv on x' [N, C', ..] with W' [M, C', ..].

    The layers above make no other channels any more: their columns or filters are taken out, and what lies between
    gets narrower. Where x joins the heads of an attention, whole heads go, from Q, K and V on. W' is the Plan's: what
    makes up for the channels that are gone.
    Source: ZipLM (arXiv 2302.04089); MatMul-13, Gemm-13, Conv-11.
    """

    name: ClassVar[str] = "remove-channels"

    def run(self, graph: Graph, context: Context) -> bool:
        """Narrow what the Plan names."""
        changed = False
        for found in context.plan.narrowed.values():
            changed |= self._narrow(graph, found)
        return changed

    @staticmethod
    def _narrow(graph: Graph, found: Narrowed) -> bool:
        nodes = {n.name: n for n in graph.nodes}
        layers = [nodes[name] for name in found.layers]
        x, along = layers[0].inputs[0], 1 if layers[0].op == "Conv" else 0
        if (shape_of(layers[0].inputs[1]) or ())[along] != found.channels * found.size:
            return False  # they are gone already
        readers = frozenset(found.layers)
        attention = heads(graph, x, readers) if found.size > 1 else None
        above = region(graph, x, readers, found.channels, found.axis) if found.size == 1 else None
        if above is not None:
            widen(graph, above, found.kept, NARROWED)
            tell(graph, above.tensors)
        elif attention is not None:
            keep(graph, attention, found.kept, NARROWED)
            tell(graph, attention.places)
        else:
            raise GraphError(f"no channels of {x.name!r} can be taken out as the plan says; this is a bug in onnxq")
        for node, weight in zip(layers, found.weights, strict=True):
            name = unused(graph, node.inputs[1].name, NARROWED)
            graph.replace_input(node, 1, graph.constant(name, np.asarray(weight, np.float32)))
        return True
