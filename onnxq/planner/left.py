"""MatMul with its constant on the left side: integer products of uint8 weights and int8 activations."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant, shape_of
from onnxq.plan import FLOAT, NodePlan
from onnxq.planner import given
from onnxq.schemes import Scheme
from onnxq.targets import Target


def lower_left(graph: Graph, nodes: dict[str, NodePlan], kept: Collection[str], scheme: Scheme,
               target: Target) -> list[Tensor]:
    """Turn float verdicts on MatMul(W, x) into those of the target's kernel; gives the tensors x, to be calibrated.

    `kept` names nodes that a user wants float. Such a node joins no region: its kernel wants int8 codes of x, those of
    regions are uint8, and hands on float.
    """
    lowering = target.lowerings.get(("MatMul", "left"))
    if lowering is None or "MatMul" not in scheme.operators:
        return []
    activations: list[Tensor] = []
    for node in graph.nodes:
        verdict = nodes[node.name]
        if node.op != "MatMul" or node.domain or node.name in kept or verdict.scheme != FLOAT:
            continue
        if not is_constant(node.inputs[0]) or is_constant(node.inputs[1]):
            continue
        misfit = _misfit(graph, node, target)
        if misfit is not None:
            nodes[node.name] = NodePlan(node.name, node.op, FLOAT, FLOAT, misfit)
            continue
        weight, x = node.inputs
        activations.append(x)
        nodes[node.name] = NodePlan(
            node.name, node.op, scheme.name, lowering, "int8 weights on the left side; its result is float",
            int_inputs=(1,), result=node.outputs[0].name, weight=weight.name)
    return activations


def _misfit(graph: Graph, node: Node, target: Target) -> str | None:
    """Why such a MatMul stays float; None when the kernel takes it and gains."""
    weight, x = node.inputs
    dims = shape_of(weight) or ()
    if len(dims) != 2:
        return f"its weight has rank {len(dims)}, and the int8 kernels take rank 2"
    if any(dtype_of(t) not in (None, np.float32) for t in (weight, x)):
        return "it does not work on float32"
    if len(shape_of(x) or (1, 1)) < 2:
        return "its activation has rank 1"
    for letter, size in zip("MK", dims, strict=True):
        if int(size or 0) < target.small_left:
            return (f"its constant is on the left side, and {letter} = {size} is below {target.small_left}: converting "
                    "costs more than int8 gains")
    if len(graph.consumers(weight)) > 1:
        return "its constant is on the left side and read by other nodes, too"
    maker = graph.producer(x)
    if maker is not None and given.is_quantized(graph, maker):
        return "beside it are codes that the model came with, which are not quantized twice"
    names = [f"{weight.name}.{part}" for part in ("q", "scale", "zero_point", "dq")]
    names += [f"{x.name}.s8.{part}" for part in ("q", "scale", "zero_point", "dq")] + [f"{node.name}.sums"]
    taken = next((name for name in names if graph.has(name)), None)
    return None if taken is None else f"the model has a tensor {taken!r} already, a name that its codes would take"
