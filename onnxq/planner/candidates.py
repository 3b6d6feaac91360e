"""The work of one kernel, and the forms that could do it: what measured lowering chooses among."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.graph import Graph, Node, cut, dtype_of, expose_codes, is_constant, shape_of
from onnxq.numerics import affine
from onnxq.numerics.affine import QuantParams
from onnxq.numerics.dtypes import by_name
from onnxq.passes.lower import lower
from onnxq.passes.manager import Context, PassManager
from onnxq.passes.quantize import quantize
from onnxq.passes.transform import transform
from onnxq.plan import FLOAT, TENSOR, TOKEN, NodePlan, Plan
from onnxq.planner.joining import LINEAR
from onnxq.targets import Target

Array = npt.NDArray[Any]

# they only change how many axes there are: nothing is copied, whatever the type
FREE = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True)
class Unit:
    """What one kernel computes in integers, or several that share their quantized input.

    `kernel` is what the Plan wants; `nodes` are those with a kernel, `members` also what these compute along (a bias
    Add, a Relu). `reads` are the computed tensors that come as codes, `makes` the results that are codes; a result that
    is float is in neither.
    """

    nodes: tuple[str, ...]
    op: str
    kernel: str
    members: tuple[str, ...]
    reads: tuple[str, ...]
    makes: tuple[str, ...]

    @property
    def name(self) -> str:
        """That of its first node."""
        return self.nodes[0]


@dataclass
class Form:
    """A candidate as a graph of its own, which takes and gives codes where the unit does, with arrays to feed."""

    graph: Graph
    feed: dict[str, Array]


def units(plan: Plan, graph: Graph) -> list[Unit]:
    """What the Plan runs in integers, in execution order; bodies of If, Loop and Scan are left out."""
    nodes = {n.name: n for n in graph.nodes}
    parts: dict[str, list[str]] = defaultdict(list)
    for verdict in plan.nodes.values():
        if verdict.part_of is not None and verdict.is_int:
            parts[verdict.part_of].append(verdict.node)
    groups: dict[tuple[str, ...], list[NodePlan]] = {}
    for verdict in plan.quantized():
        if verdict.node in nodes:
            shared = verdict.activation == TOKEN  # one set of row scales serves all readers of a tensor
            key = ("", nodes[verdict.node].inputs[0].name) if shared else (verdict.node,)
            groups.setdefault(key, []).append(verdict)
    return [_unit(group, parts, nodes) for group in groups.values()]


def _unit(group: Sequence[NodePlan], parts: Mapping[str, list[str]], nodes: Mapping[str, Node]) -> Unit:
    first = group[0]
    static = first.activation not in (TENSOR, TOKEN)
    read = [nodes[v.node].inputs[k] for v in group for k in v.int_inputs] if static else []
    made = [(v.result, *v.more_results) for v in group if v.int_output]
    return Unit(tuple(v.node for v in group), first.op, first.lowering,
                tuple(m for v in group for m in (v.node, *parts[v.node])),
                tuple(dict.fromkeys(t.name for t in read if not is_constant(t))),
                tuple(t for names in made for t in names if t))


def forms(unit: Unit, plan: Plan, target: Target) -> dict[str, Plan]:
    """Candidate kernel -> the part of a Plan that runs the unit so; `float` is among them and comes first.

    What the scheme decided on, and for linear layers of a static scheme the kernel that finds its scale at run time.
    """
    verdicts = {m: plan.nodes[m] for m in unit.members}
    found = {FLOAT: {m: NodePlan(m, v.op, FLOAT, FLOAT, "") for m, v in verdicts.items()},
             unit.kernel: verdicts}
    at_run_time = target.lowerings.get((unit.op, TENSOR))
    if unit.op in LINEAR and unit.reads and not unit.makes and at_run_time and plan.nodes[unit.name].int_inputs == (0,):
        found[at_run_time] = {m: replace(v, lowering=at_run_time, activation=TENSOR) for m, v in verdicts.items()}
    return {name: replace(plan, nodes=nodes) for name, nodes in found.items()}


def emit(graph: Graph, unit: Unit, part: Plan, target: Target, values: Mapping[str, Array],
         fmt: str) -> tuple[Form, Form]:
    """(the unit as the compiler would write it in a format, its QDQ twin); `values` are what the unit reads.

    Both take the same codes, so that their results can be compared.
    """
    small, context = cut(graph, unit.members, values), Context(target)
    context.plan = part.to_time()
    PassManager([*transform(part.dropped), *quantize()]).run(small, context)
    twin = small.copy()
    PassManager(lower(fmt)).run(small, context)
    return _fed(small, values), _fed(twin, values)


def _fed(graph: Graph, values: Mapping[str, Array]) -> Form:
    codes = expose_codes(graph)
    feed = {t.name: values[t.name] for t in graph.inputs if t.name in values}
    for name, found in codes.items():
        dtype = by_name(str(found.zero_point.dtype))
        params = QuantParams(np.asarray(found.scale), np.asarray(found.zero_point), dtype)
        feed[found.name] = affine.quantize(values[name], params)
    return Form(graph, feed)


def inputs_of(graph: Graph, unit: Unit) -> list[str]:
    """The computed tensors that a unit reads from outside of it, weights not among them."""
    members = set(unit.members)
    made = {t.name for n in graph.nodes if n.name in members for t in n.outputs}
    read = [t for n in graph.nodes if n.name in members for t in n.inputs]
    return list(dict.fromkeys(t.name for t in read if t.name and not is_constant(t) and t.name not in made))


def description(graph: Graph, unit: Unit, feeds: Sequence[Mapping[str, Array]]) -> dict[str, Any]:
    """What decides how long a unit takes, as plain data: operators, attributes, shapes and types, not the values."""
    members = set(unit.members)
    return describe([n for n in graph.nodes if n.name in members], graph, feeds)


def describe(nodes: Sequence[Node], graph: Graph, feeds: Sequence[Mapping[str, Array]]) -> dict[str, Any]:
    """The same of some nodes of a graph."""
    names = {t: str(k) for k, t in enumerate(dict.fromkeys(t.name for n in nodes for t in [*n.inputs, *n.outputs]))}
    constants = [t for n in nodes for t in n.inputs if is_constant(t)]
    return {
        "operators": [[n.op, sorted((k, str(v)) for k, v in n.attrs.items()), [names[t.name] for t in n.inputs],
                       [names[t.name] for t in n.outputs]] for n in nodes],
        "constants": sorted({f"{names[t.name]}: {dtype_of(t)} {shape_of(t)}" for t in constants}),
        "small": sorted({f"{names[t.name]}: {graph.read(t).tolist()}" for t in constants if _small(t)}),
        "inputs": [sorted(f"{names[k]}: {v.dtype} {v.shape}" for k, v in feed.items() if k in names) for feed in feeds],
    }


def _small(tensor: Any) -> bool:
    """Shapes, axes and permutations: they decide what is done, as attributes do."""
    return int(np.prod([int(d or 0) for d in shape_of(tensor) or ()])) <= 8
