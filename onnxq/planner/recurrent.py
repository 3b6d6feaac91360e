"""LSTMs for the kernel that quantizes what it reads at run time, under static schemes, too: there is no static one."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from onnxq.graph import Graph, Node, dtype_of, is_constant, shape_of
from onnxq.plan import FLOAT, TENSOR, NodePlan
from onnxq.planner import given
from onnxq.schemes import Scheme
from onnxq.targets import Target

_NAMES = ("lstm.q", "lstm.scale", "lstm.zero_point")  # what the pass calls the parts of a weight


def lower_lstms(graph: Graph, nodes: dict[str, NodePlan], kept: Collection[str], scheme: Scheme,
                target: Target) -> None:
    """Turn float verdicts on LSTMs into those of the target's kernel; bodies of If, Loop and Scan included.

    `kept` names nodes that a user wants float. Nothing happens where the scheme does not quantize LSTMs, or wants
    activations quantized more finely than the kernel does (one scale for all of x, one for each step's states).
    """
    granularity = scheme.activations.granularity if scheme.activations is not None else ""
    lowering = target.lowerings.get(("LSTM", granularity))
    if lowering is None or "LSTM" not in scheme.operators:
        return
    for node, holder in graph.walk():
        verdict = nodes.get(node.name)
        if node.op != "LSTM" or node.domain or node.name in kept or verdict is None or verdict.scheme != FLOAT:
            continue
        misfit = _misfit(graph, holder, node, target)
        if misfit is not None:
            nodes[node.name] = NodePlan(node.name, node.op, FLOAT, FLOAT, misfit)
            continue
        nodes[node.name] = NodePlan(
            node.name, node.op, scheme.name, lowering,
            "int8 weights; its input and each step's states are quantized at run time", int_inputs=(0,),
            result=next((t.name for t in node.outputs if t.name), None), stored=tuple(t.name for t in node.inputs[1:3]),
            activation=TENSOR)


def _misfit(graph: Graph, holder: Graph, node: Node, target: Target) -> str | None:
    """Why an LSTM stays float; None when the kernel takes it and gains."""
    for weight in node.inputs[1:3]:
        if given.decodes(holder, weight):
            return "its weights are stored as int8 already"
        if not is_constant(weight):
            return "its weights are computed"
        if dtype_of(weight) != np.float32:
            return "it does not work on float32"
        taken = next((name for name in (f"{weight.name}.{part}" for part in _NAMES) if graph.has(name)), None)
        if taken is not None:
            return f"the model has a tensor {taken!r} already, a name that its codes would take"
    if node.attrs.get("layout", 0):
        return "its layout is batch first, which the int8 kernel does not take"
    hidden = int((shape_of(node.inputs[2]) or (0,))[-1] or 0)
    if hidden < target.least_hidden:
        return f"hidden size {hidden} is below {target.least_hidden}: quantizing each step costs more than int8 gains"
    return None
