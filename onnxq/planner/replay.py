"""A saved Plan for another compilation of the same model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxq.errors import UsageError
from onnxq.graph import Graph, shape_of
from onnxq.numerics.affine import QuantParams
from onnxq.passes.blocks import layout
from onnxq.plan import UNTOUCHED, Plan
from onnxq.planner import weight_only
from onnxq.schemes import TensorSpec
from onnxq.targets import Target, runtimes


def replayed(plan: Plan, graph: Graph, target: Target) -> Plan:
    """A saved Plan for the graph that it was made for. Raises UsageError when it names other nodes or weights, or
    kernels that the target's onnxruntime lacks."""
    ops = {n.name: n.op for n, _ in graph.walk()}
    named = [*ops, *plan.nodes, *plan.added, *plan.maskings]
    wrong = next((n for n in named if n not in ops or plan.node(n) is None or plan.nodes[n].op != ops[n]),
                 None)
    if wrong is not None:
        raise UsageError(f"the plan was made for another model: the two differ in node {wrong!r}; make a plan of this "
                         "model with --save-plan DIR")
    for node, _ in graph.walk():
        for tensor in node.inputs:
            params, dims = plan.weights.get(tensor.name), shape_of(tensor) or ()
            if params is not None and params.block_size is not None:
                _check_blocks(tensor.name, params, dims)
            elif params is not None and params.axis is not None and dims[params.axis] != params.scale.size:
                raise UsageError(f"the plan was made for another model: the weights {tensor.name!r} have "
                                 f"{dims[params.axis]} channels, not {params.scale.size}; make a plan of this model "
                                 "with --save-plan DIR")
    _check_kernels(plan, graph, target)
    return plan


def _check_kernels(plan: Plan, graph: Graph, target: Target) -> None:
    nodes = {n.name: n for n, _ in graph.walk()}
    for verdict in plan.quantized():
        form = layout(plan, verdict.weight) if verdict.weight is not None else None
        why = None
        if form is not None and verdict.activation == UNTOUCHED:
            spec = TensorSpec(form.dtype.name, form.dtype.signed, "block", block_size=form.block_size)
            why = weight_only.no_kernel(nodes[verdict.node], spec, target)
        elif verdict.lowering in runtimes.KERNELS and verdict.lowering not in target.lowerings.values():
            why = f"{target.name} has no such kernel"
        if why is not None:
            raise UsageError(f"the plan runs {verdict.node!r} as {verdict.lowering}, and {why} with onnxruntime "
                             f"{target.since}; name a later --runtime, or make a plan for this one with --save-plan "
                             "DIR")


def _check_blocks(name: str, params: QuantParams, dims: Sequence[int | str | None]) -> None:
    dims = [int(dims[0] or 0), int(np.prod([int(d or 0) for d in dims[1:]]))]
    wanted = [-(-int(d or 0) // (params.block_size or 1)) if axis == params.axis else d for axis, d in enumerate(dims)]
    if list(params.scale.shape) != wanted:
        raise UsageError(f"the plan was made for another model: the weights {name!r} are {list(dims)}, whose blocks "
                         f"have {wanted} scales and not {list(params.scale.shape)}; make a plan of this model with "
                         "--save-plan DIR")


def check_smoothings(plan: Plan, graph: Graph) -> None:
    """Whether the tensors whose channels a Plan scales are those of a graph. Raises UsageError when they are not."""
    reads = {n.name: n.inputs[0].name for n in graph.nodes if len(n.inputs)}
    for one in plan.smoothings.values():
        wrong = next((name for name in one.layers if reads.get(name) != one.tensor), None)
        if wrong is not None:
            raise UsageError(f"the plan was made for another model: {wrong!r} does not read {one.tensor!r} in this "
                             "one; make a plan of this model with --save-plan DIR")
