"""Ranges of what layers read, chosen by the error that they cause at the layers' results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np

from onnxq.calibration.observer import Statistic
from onnxq.graph import Graph
from onnxq.numerics import clipping, smoothing
from onnxq.numerics.histogram import Histogram
from onnxq.numerics.ranges import Percentile
from onnxq.planner.readers import Group, Halves, activation, readers, sampled
from onnxq.planner.smoothing import Searching

Range: TypeAlias = tuple[float, float]
Method: TypeAlias = Callable[[Histogram], Range]

_SHARES = (0.7, 0.8, 0.9, 1.1, 1.2)  # below 1 the rarest values saturate, above it unseen ones find room
_PERCENTS = (99.999, 99.99)
_BETTER = 0.8  # times the error of the extremes: what gains less on a sample gained nothing on the models measured


def _extremes(seen: Histogram, share: float = 1.0) -> Range:
    return share * min(seen.extremes.low, 0.0), share * max(seen.extremes.high, 0.0)


def _percentile(seen: Histogram, percent: float) -> Range:
    found = Percentile(percent, seen.bins)
    found.histogram = seen
    return found.result()


def methods(by: Searching) -> dict[str, Method]:
    """The ways to a range, by name: those of the calibration's `ranges`, and shares of the one between the extremes."""
    spec = activation(by.scheme)
    return {
        "minmax": _extremes,
        **{f"{share:g} of minmax": partial(_extremes, share=share) for share in _SHARES},
        **{f"percentile {percent:g}": partial(_percentile, percent=percent) for percent in _PERCENTS},
        "mse": lambda seen: clipping.mse(seen, spec.dtype, spec.symmetric),
        "entropy": lambda seen: clipping.entropy(seen, spec.dtype, spec.symmetric),
    }


def choose(graph: Graph, wanted: list[Group], by: Searching,
           beside: Sequence[Mapping[str, Statistic]] = ()) -> dict[str, tuple[Range, str]]:
    """Tensor -> (range, method): the method that causes the least squared error at its layers' results, on rows of the
    other half of the data than the range is taken from. `beside` is observed in the same run."""
    found: dict[str, tuple[Range, str]] = {}
    known = methods(by)
    for group, halves in sampled(graph, wanted, by.data, by.how, by.options, by.progress, beside, histograms=True):
        name = _best(graph, group, halves, known, by)
        seen, unseen = halves.histograms
        seen.merge(unseen)
        found[group.name] = known[name](seen), name
    return found


def _best(graph: Graph, group: Group, halves: Halves, known: Mapping[str, Method], by: Searching) -> str:
    samples = halves.results()
    if samples is None:
        return "minmax"
    layers, spec = readers(graph, group, samples[1], by.scheme, by.target), activation(by.scheme)
    results, ones = [layer.results() for layer in layers], np.ones(group.channels, np.float32)
    rounded = [layer.settled() for layer in layers]
    errors = {name: smoothing.error(rounded, spec, ones, *method(halves.histograms[0]), results)
              for name, method in known.items()}
    best = min(errors, key=lambda name: errors[name])
    return best if errors[best] < _BETTER * errors["minmax"] else "minmax"
