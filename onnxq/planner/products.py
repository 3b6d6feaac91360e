"""MatMul of two computed tensors, as in attention: integer products of uint8 and int8 codes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant, shape_of
from onnxq.plan import FLOAT, NodePlan
from onnxq.planner import given
from onnxq.schemes import Scheme
from onnxq.targets import Target

_REASON = "both that it multiplies are int8, as asked by attention: int8; its result is float"


@dataclass(frozen=True)
class Product:
    """The tensors that a MatMul reads as codes: `first` becomes uint8, `second` int8."""

    first: Tensor
    second: Tensor


def lower_products(graph: Graph, nodes: dict[str, NodePlan], kept: Collection[str], scheme: Scheme,
                   target: Target) -> list[Product]:
    """Turn float verdicts on such MatMuls into those of the target's kernel; gives what is to be calibrated.

    `kept` names nodes that stay float. They join no region: the kernel wants int8 codes of what is on the right, those
    of regions are uint8, and it hands on float.
    """
    lowering = target.lowerings.get(("MatMul", "computed"))
    found: list[Product] = []
    if lowering is None or "MatMul" not in scheme.operators:
        return found
    for node in graph.nodes:
        verdict = nodes[node.name]
        if node.op != "MatMul" or node.domain or node.name in kept or verdict.scheme != FLOAT:
            continue
        if any(is_constant(t) for t in node.inputs):
            continue
        misfit = _misfit(graph, node)
        if misfit is not None:
            nodes[node.name] = NodePlan(node.name, node.op, FLOAT, FLOAT, misfit)
            continue
        found.append(Product(*node.inputs))
        nodes[node.name] = NodePlan(node.name, node.op, scheme.name, lowering, _REASON, int_inputs=(0, 1),
                                    result=node.outputs[0].name)
    return found


def _misfit(graph: Graph, node: Node) -> str | None:
    """Why a MatMul of computed tensors stays float; None when the kernel takes it."""
    first, second = node.inputs
    if any(dtype_of(t) not in (None, np.float32) for t in node.inputs):
        return "it does not work on float32"
    ranks = {len(shape_of(t) or ()) for t in node.inputs}
    if len(ranks) != 1 or ranks.pop() < 2:
        return "what it multiplies are no matrices of one rank"
    if first.name == second.name or graph.only_consumer(second) is None:
        return "what is on its right is read by other nodes, too, and its codes are int8"
    makers = [graph.producer(t) for t in node.inputs]
    if any(maker is not None and given.is_quantized(graph, maker) for maker in makers):
        return "beside it are codes that the model came with, which are not quantized twice"
    names = [f"{second.name}.s8.{part}" for part in ("q", "scale", "zero_point", "dq")]
    taken = next((name for name in names if graph.has(name)), None)
    return None if taken is None else f"the model has a tensor {taken!r} already, a name that its codes would take"
