"""Linear layers of a static scheme that find their scale at run time, where measuring says that this is faster."""

from __future__ import annotations

from collections.abc import Collection

from onnxq.graph import Graph
from onnxq.plan import TENSOR, NodePlan
from onnxq.planner.chains import chain
from onnxq.recipe import Scheme
from onnxq.targets import Target


def lower_at_run_time(graph: Graph, nodes: dict[str, NodePlan], wanted: Collection[str], barred: Collection[str],
                      scheme: Scheme, target: Target) -> None:
    """Turn the float verdicts on the linear layers in `wanted` into those of the kernel that quantizes what it reads.

    `barred` names nodes that no kernel takes in (inside bodies, or kept float).
    """
    for node in graph.nodes:
        if node.name not in wanted:
            continue
        link, lowering = chain(graph, node, barred), target.lowerings[(node.op, TENSOR)]
        add = link.bias_add.name if link.bias_add is not None else None
        nodes[node.name] = NodePlan(
            node.name, node.op, scheme.name, lowering,
            "int8 weights; what it reads is quantized at run time, which was measured to be faster than in advance",
            int_inputs=(0,), result=link.unclamped.name, weight=node.inputs[1].name, activation=TENSOR, bias_add=add)
        if link.bias_add is not None:
            nodes[link.bias_add.name] = NodePlan(link.bias_add.name, link.bias_add.op, scheme.name, lowering,
                                                 f"computed by the kernel of {node.name}", part_of=node.name)
