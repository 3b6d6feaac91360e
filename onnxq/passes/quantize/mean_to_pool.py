"""DQ -> ReduceMean over height and width -> Q  =>  DQ -> GlobalAveragePool -> Q."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, shape_of
from onnxq.passes import pattern
from onnxq.passes.manager import Context, Pass

KERNEL = "QLinearGlobalAveragePool"


@dataclass(frozen=True)
class MeanToPool(Pass):
    """The mean of x [N, C, ...] over all axes but the first two, which has an integer kernel under another name.

    Without keepdims, a Squeeze of the codes [N, C, 1, ...] stands behind Q. In float the ReduceMean stays, which is the
    faster of the two there. Source: ONNX GlobalAveragePool-1, Squeeze-13.
    """

    name: ClassVar[str] = "mean-to-pool"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Rewrite one ReduceMean that the Plan gives to the kernel of GlobalAveragePool."""
        verdict = context.plan.node(node.name)
        if node.op != "ReduceMean" or verdict is None or verdict.lowering != KERNEL:
            return False
        found = pattern.stored(graph, node.outputs[0], context.absorbed)
        dims = shape_of(node.inputs[0])
        if found is None or dims is None or pattern.read(graph, node.inputs[0]) is None:
            return context.skip(node, "not everything around it is codes")
        keeps = bool(node.attrs.get("keepdims", 1))
        node.op = "GlobalAveragePool"
        node.attrs.clear()
        while len(node.inputs) > 1:  # the axes
            del node.inputs[-1]
        if not keeps:
            pooled = [*dims[:2], *[1] * (len(dims) - 2)]
            node.outputs[0].shape = pooled
            codes = found.codes.q
            whole = graph.variable(f"{node.name}.mean.q", codes.dtype, pooled)
            graph.set_output(found.quantize, 0, whole)
            axes = graph.constant(f"{node.name}.mean.axes", np.arange(2, len(dims)))
            graph.add_node("Squeeze", f"{node.name}/squeeze", [whole, axes], [codes])
        return True
