"""Ranges of activations, chosen by the error that they cause at layers' results and at the model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np

from onnxq.calibration.observer import Statistic
from onnxq.graph import Graph
from onnxq.numerics import clipping, smoothing
from onnxq.numerics.histogram import Histogram
from onnxq.numerics.ranges import Percentile
from onnxq.plan import TOKEN, NodePlan
from onnxq.planner import trying
from onnxq.planner.readers import BINS, Group, Halves, activation, readers, sampled
from onnxq.planner.smoothing import Searching
from onnxq.recipe import Recipe
from onnxq.targets import Target

Range: TypeAlias = tuple[float, float]
Method: TypeAlias = Callable[[Histogram], Range]

_SHARES = (0.7, 0.8, 0.9, 1.1, 1.2)  # below 1 the rarest values saturate, above it unseen ones find room
MINMAX = "minmax"
_PERCENTS = (99.999, 99.99)
MSE = "mse"
# times the error of the extremes, at the layers' results (of a tensor that no layer reads: on itself), to be tried;
# what gains less at linear layers gained nothing on the models measured, and cost the rarest rows of one (minilm: least
# cosine 0.995 instead of 0.998), whichever way its outputs went on average
_PROMISING, _PROMISING_OF_ROWS = 0.9, 0.5
_MOST = 24  # tensors that are tried, those first that promise most: each takes as long as running the model


def _extremes(seen: Histogram, share: float = 1.0) -> Range:
    return share * min(seen.extremes.low, 0.0), share * max(seen.extremes.high, 0.0)


def _percentile(seen: Histogram, percent: float) -> Range:
    found = Percentile(percent, seen.bins)
    found.histogram = seen
    return found.result()


def methods(by: Searching) -> dict[str, Method]:
    """The ways to a range, by name: those of the calibration's `ranges`, and shares of the one between the extremes."""
    spec = activation(by.scheme)
    assert spec.dtype is not None
    kind = spec.dtype
    return {
        MINMAX: _extremes,
        **{f"{share:g} of minmax": partial(_extremes, share=share) for share in _SHARES},
        **{f"percentile {percent:g}": partial(_percentile, percent=percent) for percent in _PERCENTS},
        MSE: lambda seen: clipping.mse(seen, kind, spec.symmetric),
        "entropy": lambda seen: clipping.entropy(seen, kind, spec.symmetric),
    }


@dataclass(frozen=True)
class Chosen:
    """A range, the method that it comes from, the error that it causes at the layers' results relative to these, and
    the error with a range for each row in its place (None where a row is no token)."""

    bounds: Range
    method: str
    error: float = 0.0
    by_row: float | None = None


@dataclass(frozen=True)
class _Rivals:
    """Ranges of one tensor by method, that between the extremes first, each with its error before anything is tried."""

    ranges: dict[str, Range]
    errors: dict[str, float]
    by_row: float | None = None

    @property
    def promise(self) -> float:
        """By how much the error falls at most."""
        return self.errors[MINMAX] - min(self.errors.values())

    def chosen(self, bounds: Range | None) -> Chosen:
        """One of the ranges; None for the first."""
        method = next((name for name, one in self.ranges.items() if one == bounds), MINMAX)
        return Chosen(self.ranges[method], method, self.errors[method], self.by_row)


def choose(graph: Graph, nodes: Mapping[str, NodePlan], wanted: list[Group], by: Searching,
           beside: Sequence[Mapping[str, Statistic]] = (), others: Sequence[str] = ()) -> dict[str, Chosen]:
    """Tensor -> its range, for what the `wanted` groups read and for `others`, which no layer reads.

    That between the extremes, unless another one causes less error at the model's outputs with nothing else quantized.
    Tried are the least squared error and, for layers, what causes the least error at their results, on rows of the
    other half of the data than the range is taken from. A layer's own result does not decide: behind it a maximum may
    pick the very rows that are rare. `beside` is observed in the same run.
    """
    known, found = methods(by) if wanted or others else {}, dict[str, _Rivals]()
    histograms = {name: Histogram(BINS) for name in others}
    for group, halves in sampled(graph, wanted, by.data, by.how, by.options, by.progress, [*beside, histograms],
                                 histograms=True):
        found[group.name] = _of_layers(graph, group, halves, known, by)
    for name, histogram in histograms.items():
        found[name] = _of_codes(histogram, known, by)
    ranked = sorted((name for name in found if len(found[name].ranges) > 1), key=lambda name: -found[name].promise)
    tries = {name: list(found[name].ranges.values()) for name in ranked[:_MOST]}
    best = trying.best(graph, nodes, tries, by) if tries else {}
    return {name: rivals.chosen(best.get(name)) for name, rivals in found.items()}


def _of_layers(graph: Graph, group: Group, halves: Halves, known: Mapping[str, Method], by: Searching) -> _Rivals:
    """Those that promise something at the results of the layers which read a tensor."""
    samples = halves.results()
    if samples is None:
        return _merged([MINMAX], {MINMAX: 0.0}, halves, known)
    layers, spec = readers(graph, group, samples[1], by.scheme, by.target), activation(by.scheme)
    results, ones = [layer.results() for layer in layers], np.ones(group.channels, np.float32)
    rounded = [layer.settled() for layer in layers]
    bounds = {name: method(halves.histograms[0]) for name, method in known.items()}
    errors = {name: smoothing.error(rounded, spec, ones, *bounds[name], results, by.alike) for name in known}
    enough = (_PROMISING if group.axis == 1 else _PROMISING_OF_ROWS) * errors[MINMAX]
    promising = {name for name in (MSE, min(errors, key=lambda name: errors[name])) if errors[name] < enough}
    names = [name for name in known if name in {MINMAX, *promising}]
    if group.axis == 1:
        return _merged(names, errors, halves, known)
    if not by.alike:
        errors = {name: smoothing.error(rounded, spec, ones, *bounds[name], results) for name in names}
    by_row = smoothing.error(rounded, replace(spec, per_row=True), ones, 0.0, 0.0, results)
    return _merged(names, errors, halves, known, by_row)


def _merged(names: Sequence[str], errors: Mapping[str, float], halves: Halves, known: Mapping[str, Method],
            by_row: float | None = None) -> _Rivals:
    """The ranges of all the data."""
    seen, unseen = halves.histograms
    seen.merge(unseen)
    return _Rivals({name: known[name](seen) for name in names}, {name: errors[name] for name in names}, by_row)


def _of_codes(seen: Histogram, known: Mapping[str, Method], by: Searching) -> _Rivals:
    """Those that promise something for the values of a tensor."""
    spec = activation(by.scheme)
    ranges = {name: known[name](seen) for name in (MINMAX, MSE)}
    lows, highs = np.array(list(ranges.values())).T
    first, counts = seen.within()
    energy = float(np.square(first + np.arange(counts.size) + 0.5) @ counts)
    assert spec.dtype is not None
    errors = clipping.squared_error(seen, lows, highs, spec.dtype, spec.symmetric) / max(energy, 1.0)
    names = [MINMAX] + [MSE] * bool(errors[1] < _PROMISING * errors[0])
    return _Rivals({name: ranges[name] for name in names}, dict(zip(names, errors.tolist(), strict=False)))


def escaped(group: Group, chosen: Chosen, recipe: Recipe, target: Target) -> dict[str, str]:
    """Node -> why it finds a scale for each row: the group's layers, where the best range costs them too much."""
    below = recipe.escape.below
    ops = {node.op for node in group.layers}
    if below is None or chosen.by_row is None or any((op, TOKEN) not in target.lowerings for op in ops):
        return {}
    static, by_row = (smoothing.decibels(e) for e in (chosen.error, chosen.by_row))
    if static >= below or by_row - static < recipe.escape.gain:
        return {}
    reason = (f"int8 weights; a scale for each row is found at run time: {by_row:.1f} dB at its result on data not "
              f"searched on, {static:.1f} with one for all")
    return {node.name: reason for node in group.layers}
