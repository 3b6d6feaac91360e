"""A saved Plan for another compilation of the same model."""

from __future__ import annotations

from onnxq.errors import UsageError
from onnxq.graph import Graph, shape_of
from onnxq.numerics.affine import QuantParams
from onnxq.plan import Plan


def replayed(plan: Plan, graph: Graph) -> Plan:
    """A saved Plan for the graph that it was made for. Raises UsageError when it names other nodes or weights."""
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
                _check_blocks(tensor.name, [int(d or 0) for d in dims], params)
            elif params is not None and params.axis is not None and dims[params.axis] != params.scale.size:
                raise UsageError(f"the plan was made for another model: the weights {tensor.name!r} have "
                                 f"{dims[params.axis]} channels, not {params.scale.size}; make a plan of this model "
                                 "with --save-plan DIR")
    return plan


def _check_blocks(name: str, dims: list[int], params: QuantParams) -> None:
    assert params.axis is not None
    assert params.block_size is not None
    wanted = [-(-d // params.block_size) if k == params.axis else d for k, d in enumerate(dims)]
    if wanted != list(params.scale.shape):
        raise UsageError(f"the plan was made for another model: the weights {name!r} have {wanted} blocks, not "
                         f"{list(params.scale.shape)}; make a plan of this model with --save-plan DIR")


def check_smoothings(plan: Plan, graph: Graph) -> None:
    """Whether the tensors whose channels a Plan scales are those of a graph. Raises UsageError when they are not."""
    reads = {n.name: n.inputs[0].name for n in graph.nodes if len(n.inputs)}
    for one in plan.smoothings.values():
        wrong = next((name for name in one.layers if reads.get(name) != one.tensor), None)
        if wrong is not None:
            raise UsageError(f"the plan was made for another model: {wrong!r} does not read {one.tensor!r} in this "
                             "one; make a plan of this model with --save-plan DIR")
