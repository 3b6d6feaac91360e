"""Ranges of what layers read, chosen by the error that they cause at the layers' results."""

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
from onnxq.plan import TOKEN
from onnxq.planner.readers import Group, Halves, activation, readers, sampled
from onnxq.planner.smoothing import Searching
from onnxq.recipe import Recipe
from onnxq.targets import Target

Range: TypeAlias = tuple[float, float]
Method: TypeAlias = Callable[[Histogram], Range]

_SHARES = (0.7, 0.8, 0.9, 1.1, 1.2)  # below 1 the rarest values saturate, above it unseen ones find room
MINMAX = "minmax"
_PERCENTS = (99.999, 99.99)
# times the error of the extremes: what gains less on a sample gained nothing on the models measured, and cost the
# rarest rows of one (minilm: least cosine 0.995 instead of 0.998)
_BETTER = 0.5


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
        "mse": lambda seen: clipping.mse(seen, kind, spec.symmetric),
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


def choose(graph: Graph, wanted: list[Group], by: Searching,
           beside: Sequence[Mapping[str, Statistic]] = ()) -> dict[str, Chosen]:
    """Tensor -> its range: by the method that causes the least squared error at its layers' results, on rows of the
    other half of the data than the range is taken from. `beside` is observed in the same run."""
    found: dict[str, Chosen] = {}
    known = methods(by) if wanted else {}
    for group, halves in sampled(graph, wanted, by.data, by.how, by.options, by.progress, beside, histograms=True):
        best = _best(graph, group, halves, known, by)
        seen, unseen = halves.histograms
        seen.merge(unseen)
        found[group.name] = replace(best, bounds=known[best.method](seen))
    return found


def _best(graph: Graph, group: Group, halves: Halves, known: Mapping[str, Method], by: Searching) -> Chosen:
    samples = halves.results()
    if samples is None:
        return Chosen((0.0, 0.0), MINMAX)
    layers, spec = readers(graph, group, samples[1], by.scheme, by.target), activation(by.scheme)
    results, ones = [layer.results() for layer in layers], np.ones(group.channels, np.float32)
    rounded = [layer.settled() for layer in layers]
    errors = {name: smoothing.error(rounded, spec, ones, *method(halves.histograms[0]), results, by.alike)
              for name, method in known.items()}
    best = min(errors, key=lambda name: errors[name])
    method = best if errors[best] < _BETTER * errors[MINMAX] else MINMAX
    if group.axis == 1:
        return Chosen((0.0, 0.0), method, errors[method])
    for_all = errors[method] if by.alike else smoothing.error(rounded, spec, ones, *known[method](halves.histograms[0]),
                                                              results)
    by_row = smoothing.error(rounded, replace(spec, per_row=True), ones, 0.0, 0.0, results)
    return Chosen((0.0, 0.0), method, for_all, by_row)


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
