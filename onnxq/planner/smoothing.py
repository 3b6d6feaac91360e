"""Which tensors' channels are scaled, and by which factors: what costs layers the least error on calibrated rows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.calibration.readers import Dataset
from onnxq.graph import Graph, save
from onnxq.numerics import smoothing
from onnxq.numerics.sampling import Sample
from onnxq.passes.absorbing import Absorber, absorber
from onnxq.passes.families import plain
from onnxq.plan import FLOAT, GIVEN, NodePlan, Plan, Smoothing
from onnxq.planner.readers import Group, activation, groups, readers, sampled
from onnxq.recipe import Calibration, Outliers
from onnxq.runtime.compare import least_sqnr
from onnxq.runtime.session import Session, SessionOptions
from onnxq.schemes import Scheme
from onnxq.targets import Target

# what it has to gain at the layers' results, in dB: less than that is noise of the sample, and any change is one
_LEAST_GAIN, _LEAST_GAIN_OF_SPLIT, _LEAST_GAIN_OF_WEIGHTS = 1.0, 0.5, 0.3
_SAME_DB = 50.0  # roundings of a deep model in another order leave 80 and more
Floats = npt.NDArray[np.float32]

_LANES = 16  # channels are repeated up to a multiple of it, by as many where it is one


@dataclass(frozen=True)
class Smoothed:
    """A Smoothing with what it gained on rows that the search had not seen."""

    rewrite: Smoothing
    found: smoothing.Found

    def reason(self) -> str:
        """For the report."""
        how = "by the constants above" if self.rewrite.absorbed else "by a Mul"
        if self.rewrite.source is not None:
            how += f" and {self.rewrite.source.size - int(self.rewrite.source.max()) - 1} copies of channels"
        before, after = (smoothing.decibels(e) for e in (self.found.plain, self.found.error))
        return (f"its input's outliers are moved into its weights {how} (alpha {self.found.alpha:g}, beta "
                f"{self.found.beta:g}): {before:.1f} to {after:.1f} dB on data not searched on")


@dataclass(frozen=True)
class Searching:
    """What a search needs besides the graph. `alike`: whether rows count by what each is itself, as in a model that
    normalises them."""

    scheme: Scheme
    target: Target
    outliers: Outliers
    data: Dataset
    how: Calibration
    options: SessionOptions
    progress: Callable[[int], None] | None = None
    alike: bool = True


@dataclass(frozen=True)
class _Way:
    """What can be done above a group's tensor: `above` takes its factors (None: a Mul does), `wider` whether channels
    can be repeated there."""

    above: Absorber | None
    wider: bool


def find(graph: Graph, nodes: dict[str, NodePlan], codes: frozenset[str], by: Searching) -> list[Smoothed]:
    """The Smoothings that gain, for the layers that `nodes` make integer. `codes` names tensors that integer kernels
    make as codes: no Mul can stand before their readers."""
    ways: dict[str, _Way] = {}
    wanted = []
    for group in groups(graph, nodes):
        layers = frozenset(n.name for n in group.layers)
        above = absorber(graph, group.tensor, layers, group.channels, group.axis)
        late = by.outliers.at_run_time and not by.scheme.is_weight_only  # a Mul gains weights less than it takes
        if above is None and (not late or group.name in codes or group.axis != -1):
            continue
        wide = group.axis == -1 and (above is None or above.tie is None) and not by.scheme.is_weight_only
        ways[group.name] = _Way(above, wide and plain(graph, layers, group.channels) is not None)
        wanted.append(group)
    held = sampled(graph, wanted, by.data, by.how, by.options, by.progress)
    searched = (_search(graph, group, ways[group.name], halves.results(), by) for group, halves in held)
    return [found for found in searched if found is not None]


def _search(graph: Graph, group: Group, way: _Way, halves: tuple[Sample, Sample] | None,
            by: Searching) -> Smoothed | None:
    if halves is None:
        return None
    seen, unseen = halves
    low: Floats = np.minimum(seen.low, unseen.low)
    high: Floats = np.maximum(seen.high, unseen.high)
    layers, spec = readers(graph, group, unseen, by.scheme, by.target), activation(by.scheme)
    search = smoothing.Search(layers, spec, seen.low, seen.high,
                              way.above.tie if way.above is not None else None, by.alike)
    found = search.run(by.outliers.alpha, by.outliers.beta)
    s, source = search.factors(found.alpha, found.beta, low, high), None
    wide = _wider(layers, seen, spec, group, by) if way.wider and by.outliers.split else None
    if wide is not None and replace(wide, plain=found.error).gain_db > _LEAST_GAIN_OF_SPLIT:
        found = replace(wide, plain=found.plain)
        source = smoothing.split(low, high, _extra(group))
        copies = _copies(source)
        sizes = smoothing.extreme(low, high)[source] / copies
        s = np.asarray(smoothing.factors(sizes, search.weights[source], found.alpha, found.beta) * copies)
    if found.gain_db < (_LEAST_GAIN_OF_WEIGHTS if by.scheme.is_weight_only else _LEAST_GAIN):
        return None
    names = tuple(n.name for n in group.layers)
    rewrite = Smoothing(group.name, names, s, group.axis, way.above is not None, source)
    return Smoothed(rewrite, found)


def _wider(layers: list[smoothing.Reader], seen: Sample, spec: smoothing.Activation, group: Group,
           by: Searching) -> smoothing.Found:
    """The best factors with the largest channels repeated, each copy with its share of the values."""
    source = smoothing.split(seen.low, seen.high, _extra(group))
    copies = _copies(source)
    search = smoothing.Search([smoothing.Reader(layer.rows[:, source] / copies, layer.weight[source], layer.decoded)
                               for layer in layers], spec, seen.low[source] / copies, seen.high[source] / copies,
                              alike=by.alike)
    return search.run(by.outliers.alpha, by.outliers.beta)


def _extra(group: Group) -> int:
    return -group.channels % _LANES or _LANES


def _copies(source: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """float32 [C]: how many channels have the same source as each."""
    return np.asarray(np.bincount(source)[source], np.float32)


def use(plan: Plan, smoothed: Mapping[str, Smoothed]) -> None:
    """Put into a Plan, made for the graph with all channels scaled, what its layers need of that, and say so."""
    for name, one in smoothed.items():
        verdicts = [plan.nodes[layer] for layer in one.rewrite.layers]
        if all(v.scheme in (FLOAT, GIVEN) for v in verdicts):
            plan.nodes.pop(f"{name}/smooth", None)
            continue
        plan.smoothings[name] = one.rewrite
        for verdict in verdicts:
            if verdict.is_int:
                plan.nodes[verdict.node] = replace(verdict, reason=f"{verdict.reason}; {one.reason()}")


def same(graph: Graph, rewritten: Graph, feed: Mapping[str, npt.NDArray[Any]], options: SessionOptions) -> bool:
    """Whether two float graphs give the same outputs for a feed, within rounding."""
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        save(graph, before)
        save(rewritten, after)
        plain = SessionOptions(threads=options.threads)
        least = least_sqnr(Session(before, plain), Session(after, plain), [feed])
    return least is None or least >= _SAME_DB


def notice(plan: Plan) -> str | None:
    """For the report: how many tensors have their channels scaled; None when none has."""
    if not plan.smoothings:
        return None
    muls = sum(not s.absorbed for s in plan.smoothings.values())
    split = sum(s.source is not None for s in plan.smoothings.values())
    how = [f"{muls} by a Mul"] * bool(muls) + [f"{split} with channels repeated"] * bool(split)
    many = len(plan.smoothings)
    return (f"outliers in what layers read are moved into their weights at {many} tensor{'s' * (many > 1)}"
            f"{' (' + ', '.join(how) + ')' if how else ''}")
