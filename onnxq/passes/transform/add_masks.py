"""A mask that selects scores -> a mask that is added to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, Tensor
from onnxq.passes import masks
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class AddMasks(Pass):
    """Where(c, s, fill) -> Add(s, Where(c, 0, f)), where the Plan gives f; likewise Where(c, fill, s).

    c bool, broadcast to the scores s float32 [..., K]; f is so far below all scores that s + f is f, bit for bit.
    The new Where works on the mask alone, and once for all layers that share it; the runtime's Where takes several
    times as long as its Add (ONNX Where-16, Add-14).
    """

    name: ClassVar[str] = "add-masks"
    weighed: ClassVar[bool] = True

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Rewrite one Where, which keeps its name and result."""
        fill = context.plan.added.get(node.name)
        if fill is None or node.op == "Add":
            return False
        found = masks.selection(graph, node)
        if found is None:
            return context.skip(node, "it does not select between computed scores and one stored number")
        scores, mask = found.scores, _mask(graph, found, fill)
        node.op = "Add"
        node.inputs.clear()
        node.inputs.extend([scores, mask])
        return True


def _mask(graph: Graph, found: masks.Selected, fill: float) -> Tensor:
    """What is added, made once for all Wheres of the same condition and number."""
    name = f"{found.condition.name}.{'hides' if found.hides else 'shows'}{fill:.3g}"
    if graph.has(name):
        return graph.made(name)
    zero = graph.constant(f"{name}.zero", np.asarray(0.0, np.float32))
    number = graph.constant(f"{name}.fill", np.asarray(fill, np.float32))
    mask = graph.like(found.condition, name, np.float32)
    graph.add_node("Where", name, [found.condition, *((number, zero) if found.hides else (zero, number))], [mask])
    return mask
