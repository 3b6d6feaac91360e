"""Channels that are taken out of a network, with the layers that make them: fewer products, and not only zeros."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnxq.calibration import observer
from onnxq.errors import UsageError
from onnxq.graph import Graph, Node, Tensor, shape_of, up_to
from onnxq.numerics.channel_pruning import DAMPING, remove
from onnxq.numerics.compensation import Drift
from onnxq.numerics.sampling import View
from onnxq.passes.absorbing import LAST
from onnxq.passes.heads import heads
from onnxq.passes.manager import Context
from onnxq.passes.transform.remove_channels import RemoveChannels
from onnxq.passes.widening import region
from onnxq.plan import Narrowed, Plan
from onnxq.planner.pruning import Calibrated, Seen
from onnxq.planner.readers import Group, every_group
from onnxq.planner.scales import finite
from onnxq.recipe import Calibration
from onnxq.sparsity import Sparsity

Floats = npt.NDArray[np.float32]

WIDEST = 8192  # inputs of a layer: the work grows with the cube
LANES = 16  # channels that stay are a multiple of it where there are more: kernels multiply as many side by side


@dataclass(frozen=True)
class Taken:
    """What one tensor lost, and the squared change of what is made of it, over its squares."""

    rewrite: Narrowed
    error: float

    def reason(self) -> str:
        """For the report."""
        gone = self.rewrite.channels - len(self.rewrite.kept)
        what = "channels" if self.rewrite.size == 1 else "heads"
        return (f"{gone} of the {self.rewrite.channels} {what} of its input are taken out, for which the others make "
                f"up but for {self.error:.2%}")


def candidates(graph: Graph, spared: frozenset[str]) -> list[Group]:
    """Tensors whose channels can go: all that reads them are layers alike, what makes them is narrowed, too."""
    found = []
    for group in every_group(graph):
        names = frozenset(n.name for n in group.layers)
        views = set(group.views)
        if names & spared or len(views) > 1 or group.channels * group.views[0].repeat > WIDEST:
            continue
        above = region(graph, group.tensor, names, group.channels, group.axis)
        if above is not None and not {c.node for c in above.constants} & spared:
            found.append(group)
    return found


def attentions(graph: Graph, spared: frozenset[str]) -> list[tuple[Group, int]]:
    """Tensors that join heads which can go, with the columns of a head."""
    found = []
    for group in every_group(graph):
        names = frozenset(n.name for n in group.layers)
        attention = heads(graph, group.tensor, names) if group.axis == LAST and group.channels <= WIDEST else None
        if attention is not None and not (names | {c.node for c in attention.constants}) & spared:
            found.append((group, attention.size))
    return found


def narrow(graph: Graph, asked: Sparsity, spared: Collection[str], by: Calibrated, how: Calibration) -> list[Taken]:
    """Take the shares that are asked for out of each candidate: channels or heads that the others make up for best.

    One tensor after the other, from the first to the last: its layers are observed with all before them narrowed, and
    make up for what those are off by. Tensors of which no rows are seen stay as they are. Raises ModelError for weights
    with NaN or infinities.
    """
    made: list[Taken] = []
    kept = frozenset(spared)
    tasks: list[tuple[Group, int, int]] = []
    if asked.channels_share:
        tasks += [(group, 1, _count(group.channels, asked.channels_share)) for group in candidates(graph, kept)]
    if asked.heads_share:
        tasks += [(group, size, int(group.channels // size * asked.heads_share + 1e-9))
                  for group, size in attentions(graph, kept)]
    order = {n.name: k for k, n in enumerate(graph.nodes)}
    for group, size, count in sorted(tasks, key=lambda task: order[str(task[0].layers[0].name)]):
        drift = _observed(graph, group, made, by, how) if count else None
        if drift is not None and drift.count:
            made.append(_removed(graph, group, drift, count, size))
    return made


def _observed(graph: Graph, group: Group, made: Sequence[Taken], by: Calibrated, how: Calibration) -> Drift:
    """What a group's layers read, in float and with what is narrowed before them so."""
    whole = up_to(graph, [group.name]) if graph.producer(group.tensor) is not None else graph
    nodes = {n.name for n in whole.nodes}
    before = {one.rewrite.tensor: part for one in made if (part := _within(one.rewrite, nodes)) is not None}
    twin = whole.copy() if before else None
    if twin is not None:
        RemoveChannels().run(twin, Context(plan=Plan("", "", narrowed=before)))
    seen = Seen(group.views[0], paired=twin is not None)
    observer.fold(whole, {}, by.data, how, by.options, by.progress, [{group.name: seen}], twin)
    return seen.drift


def _within(one: Narrowed, nodes: Collection[str]) -> Narrowed | None:
    """What is left of a rewrite where some of its layers are cut off; None where all are."""
    here = [k for k, name in enumerate(one.layers) if name in nodes]
    parts = tuple(one.layers[k] for k in here), tuple(one.weights[k] for k in here)
    return replace(one, layers=parts[0], weights=parts[1]) if here else None


def say(plan: Plan, taken: Sequence[Taken]) -> None:
    """Put into the verdicts of a Plan what its layers lost."""
    for one in taken:
        for verdict in [plan.nodes[name] for name in one.rewrite.layers if name in plan.nodes]:
            plan.nodes[verdict.node] = replace(verdict, reason=f"{verdict.reason}; {one.reason()}")


def notice(taken: Sequence[Taken]) -> str:
    """For the report."""
    if not taken:
        return ("no channels can be taken out: no layer reads what layers alone make, with nothing between but what "
                "works channel by channel")
    said = []
    for what, some in (("channels", [t.rewrite for t in taken if t.rewrite.size == 1]),
                       ("heads", [t.rewrite for t in taken if t.rewrite.size > 1])):
        gone, of = sum(one.channels - len(one.kept) for one in some), sum(one.channels for one in some)
        said += [f"{gone} of {of} {what} are taken out, at {len(some)} tensor{'s' * (len(some) > 1)}"] * bool(some)
    return "; ".join(said)


def check(plan: Plan, graph: Graph) -> None:
    """Whether the tensors that a Plan narrows are those of a graph. Raises UsageError when they are not."""
    nodes = {n.name: n for n in graph.nodes}
    for one in plan.narrowed.values():
        layers = [nodes.get(name) for name in one.layers]
        wrong = next((name for name, n in zip(one.layers, layers, strict=True)
                      if n is None or n.inputs[0].name != one.tensor), None)
        if wrong is None and _fits(graph, one, nodes[one.layers[0]].inputs[0]):
            continue
        raise UsageError(f"the plan was made for another model: {wrong or one.layers[0]!r} does not read "
                         f"{one.channels} channels of {one.tensor!r} in this one; make a plan of this model with "
                         "--save-plan DIR")


def _fits(graph: Graph, one: Narrowed, tensor: Tensor) -> bool:
    nodes = {n.name: n for n in graph.nodes}
    for name, weight in zip(one.layers, one.weights, strict=True):
        wanted = [int(d or 0) for d in shape_of(nodes[name].inputs[1]) or ()]
        along = 1 if nodes[name].op == "Conv" else 0
        if len(wanted) <= along or wanted[along] != one.channels * one.size:
            return False
        wanted[along] = len(one.kept) * one.size
        if list(weight.shape) != wanted:
            return False
    if one.size == 1:
        return region(graph, tensor, frozenset(one.layers), one.channels, one.axis) is not None
    found = heads(graph, tensor, frozenset(one.layers))
    return found is not None and (found.count, found.size) == (one.channels, one.size)


def _count(channels: int, share: float) -> int:
    """How many of the channels go: so many that what stays fills lanes."""
    left = max(math.ceil(channels * (1 - share) - 1e-9), 1)
    if left > LANES:
        left = min(-(-left // LANES) * LANES, channels)
    return channels - left


def _removed(graph: Graph, group: Group, drift: Drift, count: int, size: int) -> Taken:
    view = group.views[0]
    weights = [_matrix(node, finite(graph, node.inputs[1], node)) for node in group.layers]
    aim = drift.target(np.concatenate(weights, axis=1), DAMPING)
    found = remove(aim, drift.hessian(), count, view.repeat * size)
    parts = np.split(found.weight, np.cumsum([w.shape[1] for w in weights])[:-1], axis=1)
    shaped = tuple(_shaped(part, node, view) for part, node in zip(parts, group.layers, strict=True))
    names = tuple(n.name for n in group.layers)
    channels = group.channels // size
    return Taken(Narrowed(group.name, names, group.axis, channels, found.kept, shaped, size), found.error)


def _matrix(node: Node, weight: Floats) -> Floats:
    """[K, N] of a layer's weight, of a Conv's [M, C, ..] with a filter's weights by channels."""
    return weight if node.op != "Conv" else weight.reshape(len(weight), -1).T


def _shaped(matrix: Floats, node: Node, view: View) -> Floats:
    if node.op != "Conv":
        return np.ascontiguousarray(matrix)
    return np.ascontiguousarray(matrix.T).reshape(matrix.shape[1], -1, *view.kernel)
