"""How far each layer's result is from float's when that layer alone is quantized.

Every layer gets a shadow in a copy of the float graph: the same operators, with the bias Add and the Relu or Clip that
its kernel computes along, quantized by the very passes that write the model. It reads the float input, so its error is
its own: codes of what it reads, of its weights, and of its result where that is stored as codes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from onnxq.calibration import observer
from onnxq.calibration.observer import Statistic
from onnxq.calibration.readers import Dataset
from onnxq.graph import Graph, Node, Tensor, dtype_of
from onnxq.numerics.comparison import Comparison
from onnxq.passes.manager import Context, PassManager
from onnxq.passes.quantize import quantize
from onnxq.passes.transform.correct_bias import CorrectBias
from onnxq.plan import Plan
from onnxq.planner.sensitivity import Layer
from onnxq.recipe import Calibration
from onnxq.runtime.session import SessionOptions

GROUP = 16  # layers whose results of one batch are in memory together
_ALONE, _ALL, _OUTPUT = "alone", "accumulated", "output"


@dataclass
class Errors:
    """Node -> its result against float's: `alone` with nothing else quantized, `accumulated` with everything, if that
    was asked for; `outputs` likewise with everything, by the name of a graph output."""

    alone: dict[str, Comparison] = field(default_factory=dict)
    accumulated: dict[str, Comparison] = field(default_factory=dict)
    outputs: dict[str, Comparison] = field(default_factory=dict)


def errors(graph: Graph, plan: Plan, layers: Sequence[Layer], data: Dataset, how: Calibration, options: SessionOptions,
           progress: Callable[[int], None] | None = None, twin: Graph | None = None,
           beside: Mapping[str, Sequence[Statistic]] = MappingProxyType({})) -> Errors:
    """Compare the layers, a GROUP in each streamed run. `progress` gets the rows done in all `runs`.

    `twin` is the whole model quantized, for the accumulated error; `beside` are statistics of what layers read, all
    folded in once.
    """
    found, left = Errors(), dict(beside)
    before = done = 0

    def step(rows: int) -> None:
        nonlocal done
        done = before + rows
        if progress is not None:
            progress(done)

    for start in range(0, len(layers), GROUP):
        group = layers[start:start + GROUP]
        pairs = {(_ALONE, n.node): (n.makes, 0, shadow_of(n.makes)) for n in group}
        if twin is not None:
            pairs |= {(_ALL, n.node): (n.makes, 1, n.makes) for n in group}
        if twin is not None and start == 0:
            pairs |= {(_OUTPUT, t.name): (t.name, 1, t.name) for t in graph.outputs if dtype_of(t) == np.float32}
        graphs = [shadow(graph, plan, group), *([twin] if twin is not None else [])]
        statistics = {n.reads: left.pop(n.reads) for n in group if n.reads in left}
        for (kind, name), comparison in observer.compare(graphs, pairs, data, how, options, step, statistics).items():
            {_ALONE: found.alone, _ALL: found.accumulated, _OUTPUT: found.outputs}[kind][name] = comparison
        before = done
    return found


def runs(count: int) -> int:
    """Streamed runs over the data for so many layers."""
    return -(-count // GROUP)


def shadow_of(name: str) -> str:
    """The name of a tensor's counterpart that a shadow makes."""
    return f"{name}.alone"


def shadow(graph: Graph, plan: Plan, layers: Sequence[Layer]) -> Graph:
    """A copy of the float graph in which each layer's quantized form stands beside it and makes `shadow_of(result)`."""
    copy = graph.copy()
    nodes = {n.name: n for n in copy.nodes}
    parts: dict[str, list[str]] = defaultdict(list)
    for node in copy.nodes:
        verdict = plan.node(node.name)
        if verdict is not None and verdict.part_of is not None:
            parts[verdict.part_of].append(node.name)
    part = replace(plan, nodes={}, activations=dict(plan.activations), bias_shifts={})
    for layer in layers:
        members = [layer.node, *parts[layer.node]]
        if all(t.name != layer.makes for name in members for t in nodes[name].outputs):
            # a Relu or Clip that stays, in front of the codes: see Target.symmetric
            members.append(next(n.name for n in copy.nodes if any(t.name == layer.makes for t in n.outputs)))
        _clone(copy, [nodes[name] for name in members])
        for name in members:
            _plan_clone(part, plan, name)
    context = Context(plan=part)
    PassManager([CorrectBias(), *quantize()]).run(copy, context)
    return copy


def _clone(graph: Graph, members: Sequence[Node]) -> None:
    """The members once more; what one of them reads of another is read of its clone."""
    made: dict[str, Tensor] = {}
    for node in members:
        inputs = [made.get(t.name, t) if t.name else None for t in node.inputs]
        outputs = [graph.like(t, shadow_of(t.name)) if t.name else graph.variable(f"{node.name}.{k}.alone")
                   for k, t in enumerate(node.outputs)]
        made.update((t.name, clone) for t, clone in zip(node.outputs, outputs, strict=True) if t.name)
        graph.add_node(node.op, shadow_of(node.name), inputs, outputs, dict(node.attrs))


def _plan_clone(part: Plan, plan: Plan, name: str) -> None:
    """The verdict on a node for its clone, with the scale of its result and the shift of its bias."""
    verdict = plan.nodes[name]
    result, bias_add, part_of = (shadow_of(old) if old is not None else None
                                 for old in (verdict.result, verdict.bias_add, verdict.part_of))
    part.nodes[shadow_of(name)] = replace(verdict, node=shadow_of(name), result=result, bias_add=bias_add,
                                          part_of=part_of)
    if verdict.result is not None and verdict.result in plan.activations:
        part.activations[shadow_of(verdict.result)] = plan.activations[verdict.result]
    if name in plan.bias_shifts:
        part.bias_shifts[shadow_of(name)] = plan.bias_shifts[name]
