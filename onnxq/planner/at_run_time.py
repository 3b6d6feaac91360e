"""Linear layers of a static scheme that find their scales at run time: where measuring says that this is faster, or
calibration that one scale for all rows costs too much accuracy."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from onnxq.graph import Graph
from onnxq.plan import TENSOR, TOKEN, NodePlan
from onnxq.planner.chains import chain
from onnxq.schemes import Scheme
from onnxq.targets import Target

_FASTER = "int8 weights; what it reads is quantized at run time, which was measured to be faster than in advance"


def per_tensor(graph: Graph, nodes: dict[str, NodePlan], wanted: Collection[str], barred: Collection[str],
               scheme: Scheme, target: Target) -> None:
    """Turn the float verdicts on the linear layers in `wanted` into those of the kernel that quantizes what it reads.

    `barred` names nodes that no kernel takes in (inside bodies, or kept float).
    """
    _lower(graph, nodes, dict.fromkeys(wanted, _FASTER), barred, scheme, target, TENSOR)


def per_token(graph: Graph, nodes: dict[str, NodePlan], wanted: Mapping[str, str], barred: Collection[str],
              scheme: Scheme, target: Target) -> None:
    """The same into those with a scale for each row; `wanted` maps a node to the reason."""
    _lower(graph, nodes, wanted, barred, scheme, target, TOKEN)


def _lower(graph: Graph, nodes: dict[str, NodePlan], wanted: Mapping[str, str], barred: Collection[str],
           scheme: Scheme, target: Target, granularity: str) -> None:
    for node in graph.nodes:
        if node.name not in wanted or node.name in barred:
            continue
        link, lowering = chain(graph, node, barred), target.lowerings[(node.op, granularity)]
        add = link.bias_add.name if link.bias_add is not None else None
        nodes[node.name] = NodePlan(node.name, node.op, scheme.name, lowering, wanted[node.name], int_inputs=(0,),
                                    result=link.unclamped.name, weight=node.inputs[1].name, activation=granularity,
                                    bias_add=add)
        if link.bias_add is not None:
            nodes[link.bias_add.name] = NodePlan(link.bias_add.name, link.bias_add.op, scheme.name, lowering,
                                                 f"computed by the kernel of {node.name}", part_of=node.name)
