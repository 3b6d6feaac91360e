"""Reshape -> Transpose -> Reshape that reorders channels  =>  Gather."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, shape_of
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class ShuffleToGather(Pass):
    """[N, C, H, W] -> [N, G, C/G, H, W] -> [N, C/G, G, H, W] -> [N, C, H, W]  =>  Gather of C channels, axis 1.

    The channel shuffle of "ShuffleNet" (1707.01083), section 3.1. A Gather copies whole planes; the Transpose of rank 5
    meets the channels-last layout of the runtime's integer Convs and becomes several, element by element (0.3x float
    for the whole network). Source: ONNX Gather-13.
    """

    name: ClassVar[str] = "shuffle-to-gather"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Rewrite the three nodes around one Transpose."""
        if node.op != "Transpose" or node.domain or node.attrs.get("perm") != [0, 2, 1, *range(3, _rank(node))]:
            return False
        apart, together = graph.producer(node.inputs[0]), graph.only_consumer(node.outputs[0])
        if apart is None or together is None or {apart.op, together.op} != {"Reshape"}:
            return False
        before, split, after = (shape_of(t) or () for t in (apart.inputs[0], node.inputs[0], together.outputs[0]))
        if graph.only_consumer(node.inputs[0]) is None:
            return context.skip(node, f"the result of {apart.name} is read elsewhere too")
        known = [d for shape in (before[1:], split[1:], after[1:]) for d in shape]
        if not known or not all(isinstance(d, int) for d in known):
            return context.skip(node, "the sizes around it are not known")
        if before[1:] != after[1:] or len(split) != len(before) + 1 or split[3:] != before[2:]:
            return False
        groups, channels = (int(d or 0) for d in split[1:3])
        order = np.arange(groups * channels).reshape(groups, channels).T.reshape(-1)
        source, result, name = apart.inputs[0], together.outputs[0], node.name
        for old in (apart, node, together):
            graph.remove(old)
        graph.add_node("Gather", name, [source, graph.constant(f"{name}.order", order)], [result], {"axis": 1})
        return True


def _rank(node: Node) -> int:
    return len(shape_of(node.inputs[0]) or ())
