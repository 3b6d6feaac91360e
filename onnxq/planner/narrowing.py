"""Channels that are taken out of a network, with the layers that make them: fewer products, and not only zeros."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnxq.calibration import observer
from onnxq.errors import UsageError
from onnxq.graph import Graph, shape_of, up_to
from onnxq.numerics.channel_pruning import Layer, damping, remove
from onnxq.numerics.compensation import Drift
from onnxq.numerics.filters import from_matrix, to_matrix
from onnxq.numerics.sampling import View
from onnxq.passes.channels import Family
from onnxq.passes.families import family, fits
from onnxq.passes.manager import Context
from onnxq.passes.transform.remove_channels import RemoveChannels, bias_of
from onnxq.plan import Narrowed, Plan
from onnxq.planner.narrowable import Candidate, Reading, Stays, candidates
from onnxq.planner.pruning import Calibrated, Seen
from onnxq.planner.refitting import Columns, refit
from onnxq.planner.scales import finite
from onnxq.recipe import Calibration
from onnxq.sparsity import Sparsity

LANES = 16  # channels that stay are a multiple of it where there are more: kernels multiply as many side by side


@dataclass(frozen=True, eq=False)
class Taken:
    """What goes together, and for each layer that reads some of it: how many of how many groups it loses, and the
    squared change of its result, over its squares. `tensors` are so many that are read."""

    rewrite: Narrowed
    lost: tuple[tuple[int, int], ...]
    errors: tuple[float, ...]
    tensors: int

    @property
    def what(self) -> str:
        """Channels or heads."""
        return "heads" if self.rewrite.heads else "channels"

    @property
    def total(self) -> tuple[int, int]:
        """How many of how many go; of heads those of queries."""
        one = self.rewrite
        return self.lost[0] if one.heads else (one.count - len(one.kept), one.count)

    def reason(self, layer: int) -> str:
        """For the report, of one of its layers."""
        gone, of = self.lost[layer]
        return (f"{gone} of the {of} {self.what} of its input are taken out, for which the others make up but for "
                f"{self.errors[layer]:.2%}")


@dataclass(frozen=True)
class Narrowing:
    """What is taken out of a network, and layers that go on reading all, with the reason."""

    taken: tuple[Taken, ...] = ()
    stays: tuple[Stays, ...] = ()

    @property
    def rewrites(self) -> dict[str, Narrowed]:
        """For a Plan."""
        return {one.rewrite.tensor: one.rewrite for one in self.taken}

    def say(self, plan: Plan) -> None:
        """Put into the verdicts of a Plan what its layers lost, or why they did not."""
        told = {name: one.reason(k) for one in self.taken for k, name in enumerate(one.rewrite.layers)}
        told |= {one.layer: one.reason for one in self.stays}
        for name, reason in told.items():
            if name in plan.nodes:
                verdict = plan.nodes[name]
                plan.nodes[name] = replace(verdict, reason=f"{verdict.reason}; {reason}")

    def notice(self) -> str:
        """For the report."""
        if not self.taken:
            return ("no channels can be taken out: no layer reads what layers alone make, with nothing between but "
                    "what works channel by channel")
        said = []
        for what in ("channels", "heads"):
            some = [one for one in self.taken if one.what == what]
            gone, of = (sum(counts) for counts in zip(*(one.total for one in some), strict=True)) if some else (0, 0)
            places = sum(one.tensors for one in some)
            said += [f"{gone} of {of} {what} are taken out, at {places} tensor{'s' * (places > 1)}"] * bool(some)
        return "; ".join(said)


def narrow(graph: Graph, asked: Sparsity, spared: Collection[str], by: Calibrated, how: Calibration) -> Narrowing:
    """Take the shares that are asked for out of what goes together: those that the others make up for best.

    One family after the other, by the first layer that reads it: its layers are observed with all before them narrowed,
    and make up for what those are off by; at the end for what went above them later, too. Tensors of which no rows are
    seen stay as they are. Raises ModelError for weights with NaN or infinities.
    """
    found, stays = candidates(graph, frozenset(spared))
    made: list[Taken] = []
    columns: dict[str, Columns] = {}
    current = graph.copy()
    for one in found:
        counts = _counts(one, asked)
        drifts = _observed(graph, current, one, made, by, how) if any(counts) else {}
        if drifts and all(drift.count for drift in drifts.values()):
            made.append(_removed(current, one, drifts, counts))
            _note(graph, one, made[-1].rewrite, columns)
            RemoveChannels().run(current, Context(plan=Plan("", "", narrowed=Narrowing((made[-1],)).rewrites)))
    fitted = refit(graph, current, [one.rewrite for one in made], columns, by, how)
    made = [replace(one, rewrite=rewrite) for one, rewrite in zip(made, fitted, strict=True)]
    asking = {False: asked.channels_share, True: asked.heads_share}
    return Narrowing(tuple(made), tuple(one for one in stays if asking[one.heads]))


def _note(graph: Graph, one: Candidate, rewrite: Narrowed, columns: dict[str, Columns]) -> None:
    """Note the outputs that layers have left."""
    nodes = {n.name: n for n in graph.nodes}
    stays = np.zeros(rewrite.count, bool)
    stays[rewrite.kept] = True
    made = {name: np.flatnonzero(stays[part.ids]) for (name, index), part in one.family.constants.items()
            if index == 1 and nodes[name].op in ("Conv", "MatMul", "Gemm")}
    for name in rewrite.layers:
        outputs = int((shape_of(nodes[name].inputs[1]) or ())[0 if nodes[name].op == "Conv" else 1] or 0)
        left = columns[name].last if name in columns else np.arange(outputs)
        columns[name] = Columns(left, left)
    for name, left in made.items():
        late = name in columns and name not in rewrite.layers
        columns[name] = Columns(columns[name].then if late else left, left)


def _counts(one: Candidate, asked: Sparsity) -> list[int]:
    """How many groups of each bundle go."""
    bundles = one.family.bundles()
    sizes = np.bincount(bundles[bundles >= 0]).tolist()
    if one.family.attends:
        return [min(int(size * asked.heads_share + 1e-9), size - 1) for size in sizes]
    return [_count(size, asked.channels_share) if size else 0 for size in sizes]


def _count(channels: int, share: float) -> int:
    """How many of the channels go: so many that what stays fills lanes."""
    left = max(math.ceil(channels * (1 - share) - 1e-9), 1)
    if left > LANES:
        left = min(-(-left // LANES) * LANES, channels)
    return channels - left


def _observed(graph: Graph, current: Graph, one: Candidate, made: Sequence[Taken], by: Calibrated,
              how: Calibration) -> dict[tuple[str, View], Drift]:
    """What layers read, in float and with what is narrowed before them so; with a 1 behind each row."""
    names = list(dict.fromkeys(reading.tensor for reading in one.readings))
    whole = up_to(graph, names)
    nodes = {n.name for n in whole.nodes}
    paired = any(name in nodes for taken in made for name in taken.rewrite.layers)
    seen = {(reading.tensor, reading.view): Seen(reading.view, paired, constant=True) for reading in one.readings}
    beside = [{name: statistic} for (name, _), statistic in seen.items()]
    observer.fold(whole, {}, by.data, how, by.options, by.progress, beside, up_to(current, names) if paired else None)
    return {key: statistic.drift for key, statistic in seen.items()}


def _removed(graph: Graph, one: Candidate, drifts: dict[tuple[str, View], Drift], counts: Sequence[int]) -> Taken:
    """Choose groups by all layers that read them, and fit these to what they made of all."""
    nodes = {n.name: n for n in graph.nodes}
    sums, layers, weights = [], [], []
    for reading in one.readings:
        node, drift = nodes[reading.layer], drifts[reading.tensor, reading.view]
        seen = drift.centred() if bias_of(graph, node) is not None else drift.sums().without_last()
        weights.append(to_matrix(finite(graph, node.inputs[1], node), node.op == "Conv"))
        sums.append(seen)
        share = damping(len(seen.own), drift.count)
        layers.append(Layer(seen.target(weights[-1], share), seen.own, reading.groups(), share))
    found = remove(layers, one.family.bundles(), counts)
    stays = np.zeros(one.family.count, bool)
    stays[found.kept] = True
    shaped, shifts, lost = [], [], []
    for k, reading in enumerate(one.readings):
        node, fitted = nodes[reading.layer], found.weights[k]
        kept = np.flatnonzero(stays[reading.groups()])
        has_bias = bias_of(graph, node) is not None
        shift = sums[k].shift(weights[k], kept, fitted) if has_bias else np.zeros(0, np.float32)
        makes = one.family.constants.get((reading.layer, 1))
        if makes is not None:  # it reads what it makes, by way of an Add
            fitted, shift = fitted[:, stays[makes.ids]], shift[stays[makes.ids]] if has_bias else shift
        shaped.append(from_matrix(fitted, reading.view.kernel, node.op == "Conv"))
        shifts.append(shift)
        lost.append(_lost(one.family, reading, stays))
    rewrite = Narrowed(one.readings[0].tensor, tuple(r.layer for r in one.readings), one.family.count, found.kept,
                       tuple(shaped), tuple(shifts), one.grouped, one.family.attends)
    return Taken(rewrite, tuple(lost), found.errors, len({r.tensor for r in one.readings}))


def _lost(found: Family, reading: Reading, stays: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """How many of how many channels or heads of what a layer reads go; several heads may be one group."""
    ids = np.unique(reading.ids)
    if found.attends:
        sides = [part.ids for part in found.tensors.values() if not part.runs and len(part.ids) < len(reading.ids)]
        ids = max(sides, key=len, default=ids)
    return int((~stays[ids]).sum()), len(ids)


def check(plan: Plan, graph: Graph) -> None:
    """Whether what a Plan narrows is that of a graph. Raises UsageError when it is not."""
    current = graph.copy()
    for one in plan.narrowed.values():
        nodes = {n.name: n for n in current.nodes}
        wrong = next((name for name in one.layers if name not in nodes), None)
        if wrong is None and not _fits(current, one):
            wrong = one.layers[0]
        if wrong is not None:
            raise UsageError(f"the plan was made for another model: {wrong!r} does not read {one.count} "
                             f"{'heads' if one.heads else 'channels'} of {one.tensor!r} in this one; make a plan of "
                             "this model with --save-plan DIR")
        RemoveChannels().run(current, Context(plan=Plan("", "", narrowed={one.tensor: one})))


def _fits(graph: Graph, one: Narrowed) -> bool:
    nodes = {n.name: n for n in graph.nodes}
    first = nodes[one.layers[0]]
    found = family(graph, first, one.grouped) if first.inputs[0].name == one.tensor else None
    if found is None or not fits(found, one.count, one.kept, one.layers):
        return False
    stays = np.zeros(found.count, bool)
    stays[one.kept] = True
    for name, weight, shift in zip(one.layers, one.weights, one.shifts, strict=True):
        conv, dims = nodes[name].op == "Conv", [int(d or 0) for d in shape_of(nodes[name].inputs[1]) or ()]
        makes = found.constants.get((name, 1))
        ids = found.readers[name]
        if len(dims) < 2 or dims[1 if conv else 0] != len(ids):
            return False
        dims[1 if conv else 0] = int(stays[ids].sum())
        dims[0 if conv else 1] = int(stays[makes.ids].sum()) if makes is not None else dims[0 if conv else 1]
        if list(weight.shape) != dims or shift.size not in (0, dims[0 if conv else 1]):
            return False
        if shift.size and bias_of(graph, nodes[name]) is None:
            return False
    return True
