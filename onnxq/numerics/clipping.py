"""Where to clip a distribution before it is quantized: searches over a histogram for a (minimum, maximum).

Every candidate is judged with the scale and zero point that affine.choose gives for it. Exact zeros are left out: they
always have a code of their own, so they have no error (a Relu makes half of a tensor zero). Among equals the widest
candidate wins. Results lie within the true minimum and maximum widened to 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from onnxq.numerics import affine
from onnxq.numerics.dtypes import DType
from onnxq.numerics.extremes import with_zero
from onnxq.numerics.histogram import Histogram

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

# Thresholds that the entropy search tries, evenly spaced in their logarithm (.8 % apart for 8 bits and 2048 bins).
THRESHOLDS = 256

# A bin with more than PEAK * (u + 4) values, u the median of the bins up to WINDOW around it, holds repeated values.
PEAK = 2
WINDOW = 16

# What a code is taken to hold when it stands for clipped values only, in counts; without it the divergence is infinite.
PSEUDO_COUNT = 0.5

# Factors that the search for the squared error shrinks a bound by: 1 to 1/256 in steps of 8 %, then close by in 2 %.
COARSE: Floats = 2.0 ** (-np.arange(65) / 8)
FINE: Floats = 2.0 ** (np.arange(-8, 9) / 32)


def entropy(histogram: Histogram, dtype: DType, symmetric: bool = False) -> tuple[float, float]:
    """The range [max(low, -t), min(high, t)], of the true [low, high] and a threshold t, that keeps most information.

    The t with the least `divergence` is taken, of whole bin widths from all down to half as many as the type has
    levels: below, bins don't show what codes lose. So for types of more levels than bins this is min-max.
    """
    low, high = histogram.extremes.result()
    first, counts = histogram.within()
    farthest, nearest = max(-first, first + counts.size), (dtype.qmax - dtype.qmin) / 2
    if not counts.any() or farthest <= nearest:
        return low, high
    thresholds = np.unique(np.rint(np.geomspace(farthest, nearest, THRESHOLDS)).astype(np.int64))[::-1]
    best = thresholds[np.argmin(divergence(histogram, thresholds, dtype, symmetric))] * histogram.bin_width
    return with_zero(float(max(low, -best)), float(min(high, best)))


def divergence(histogram: Histogram, thresholds: Integers, dtype: DType, symmetric: bool = False) -> Floats:
    """What quantization to each range [max(low, -t), min(high, t)] loses, t a threshold in bin widths: nats [T].

    Of N values other than 0, c[i] lie in bin i. P is the distribution of the values clipped to the range: c[i] / N
    inside, the clipped values added to the two bins at its ends. Q is what is left of the unclipped values when bins
    that share a code can't be told apart: the count of each code, spread evenly over the bins that P has there, over N.
    The bins of a code are those whose centres affine.quantize gives that code. The loss is the divergence KL(P||Q) =
    sum P log(P / Q). Source: S. Migacz, 8-bit Inference with TensorRT, GTC 2017, except that
    - inside a range, a bin of repeated values (see PEAK) counts as much as those around it: padding, clamped values or
      the background of images have some code, too; sharing them out among bins would seem to lose all information;
    - Q is over N, not over the number of values inside, so a range that loses nearly all values doesn't look perfect;
    - a code that only clipped values fall on holds PSEUDO_COUNT values, so that a gap before an outlier is finite;
    - (bins of the code - 1) / 2N is taken off per code, what random counts of an even distribution diverge on average
      (Miller 1955): without it, few values make wide ranges look bad.
    Time and memory: T * levels, by running sums over the bins. The histogram must hold a value other than 0.
    """
    first, counts = histogram.within()
    borders = _borders(histogram, thresholds, dtype, symmetric) - first
    rows, bottom, top = np.arange(len(borders)), borders[:, 0], borders[:, -1]
    total = _running(counts)
    counts = _without_peaks(counts)
    mass = np.diff(_running(counts)[borders])  # values of each code
    spread = np.diff(_running(counts > 0)[borders])  # bins among which Q shares them out
    within = _running(_xlogx(counts))
    loss = within[top] - within[bottom]  # N * KL(P||Q) in parts; sum c log c of the bins inside is the first
    clipped = []
    for outside, last in ((total[bottom], bottom), (total[-1] - total[top], top - 1)):
        code = (borders <= last[:, None]).sum(axis=1) - 1
        held = counts[last]
        spread[rows, code] += (outside > 0) & (held == 0)
        loss += _xlogx(held + outside) - _xlogx(held)
        clipped.append((outside, code))
    log_q = np.log(np.where(mass > 0, mass / np.maximum(spread, 1), PSEUDO_COUNT))
    loss -= (mass * log_q).sum(axis=1)
    for outside, code in clipped:
        loss -= outside * log_q[rows, code]
    loss -= np.maximum(spread - 1, 0).sum(axis=1) / 2
    return np.asarray(loss / total[-1])


def _without_peaks(counts: Integers) -> Integers:
    """The counts [n], those of bins with repeated values lowered to what is usual around them."""
    around = sliding_window_view(np.pad(counts, WINDOW, mode="symmetric"), 2 * WINDOW + 1)
    usual = np.median(around, axis=1).astype(np.int64)  # of an odd number of counts: one of them
    return np.where(counts > PEAK * (usual + 4), usual, counts)


def _borders(histogram: Histogram, thresholds: Integers, dtype: DType, symmetric: bool) -> Integers:
    """[T, levels + 1]: with a threshold of T, code j has the bins from borders[:, j] up to borders[:, j + 1]."""
    low, high = histogram.extremes.result()
    first, counts = histogram.within()
    reach = thresholds * histogram.bin_width
    scale, lowest = _grid(np.maximum(low, -reach), np.minimum(high, reach), histogram.bin_width, dtype, symmetric)
    bottom = np.maximum(first, -thresholds)[:, None]
    top = np.minimum(first + counts.size, thresholds)[:, None]
    # Bin i has its centre at i + 1/2, so code k has the bins from (k - 1/2) * scale - 1/2 on.
    codes = lowest + np.arange(dtype.qmax - dtype.qmin + 1)
    lower = np.clip(np.ceil((codes - 0.5) * scale - 0.5), bottom, top).astype(np.int64)
    lower[:, :1] = bottom  # values below the lowest code get it all the same
    return np.concatenate([lower, top], axis=1)


def mse(histogram: Histogram, dtype: DType, symmetric: bool = False) -> tuple[float, float]:
    """The range whose quantization has the least expected squared error, as far as a search finds it.

    First both sides are cut at a common threshold, the larger magnitude times COARSE. Symmetric: then at that threshold
    times FINE. Asymmetric: then each side by itself at its own extreme times COARSE, then each at its bound times FINE.
    See squared_error for what is compared.
    """
    lowest, highest = histogram.extremes.result()
    widest = max(-lowest, highest)

    def best(lows: Floats, highs: Floats) -> tuple[float, float]:
        least = int(np.argmin(squared_error(histogram, lows, highs, dtype, symmetric)))
        return float(lows[least]), float(highs[least])

    def cut(thresholds: Floats) -> tuple[float, float]:
        return best(np.maximum(lowest, -thresholds), np.minimum(highest, thresholds))

    low, high = cut(widest * COARSE)
    if symmetric:
        return with_zero(*cut(_tries(max(-low, high), widest, near=True)))
    for near in (False, True):
        highs = _tries(high, highest, near)
        low, high = best(np.full(highs.size, low), highs)
        lows = -_tries(-low, -lowest, near)
        low, high = best(lows, np.full(lows.size, high))
    return with_zero(low, high)


def _tries(bound: float, extreme: float, near: bool) -> Floats:
    """Candidates for a bound, both at least 0, from the widest down; the present one is among them."""
    tries = np.minimum(bound * FINE, extreme) if near else np.append(extreme * COARSE, bound)
    return np.unique(tries)[::-1]


def squared_error(histogram: Histogram, lows: Floats, highs: Floats, dtype: DType, symmetric: bool = False) -> Floats:
    """The expected squared quantization error, summed over the values, of each range [T], in squared bin widths.

    The values are taken to be spread evenly within their bins. With t a value in bin widths, k its code less the zero
    point (the nearest multiple of the scale, within the code range) and u = t - k * scale its error, a bin has its
    count times the integral of u * u over it. The antiderivative is G(t) = k * scale**3 / 12 + u**3 / 3: continuous
    where the code changes, as u goes from scale/2 to -scale/2 there; beyond the outermost code u is the clipping error.
    So the result is exact for bins finer and coarser than the codes (there it tends to scale**2 / 12 per value).
    """
    first, counts = histogram.within()
    scale, lowest = _grid(lows, highs, histogram.bin_width, dtype, symmetric)
    edges = first + np.arange(counts.size + 1.0)
    k = np.clip(np.rint(edges / scale), lowest, lowest + dtype.qmax - dtype.qmin)
    u = edges - k * scale
    antiderivative = k * (scale**3 / 12) + u * u * u / 3
    return np.asarray(np.diff(antiderivative) @ counts.astype(np.float64))


def _grid(lows: Floats, highs: Floats, width: float, dtype: DType, symmetric: bool) -> tuple[Floats, Integers]:
    """(scale in bin widths, lowest code less the zero point), [T, 1] each, that affine gives the candidates [T]."""
    params = affine.choose(lows, highs, dtype, symmetric)
    return params.scale.astype(np.float64)[:, None] / width, dtype.qmin - params.zero_point.astype(np.int64)[:, None]


def _running(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sums of the first 0, 1 .. n of the values [n]: [n + 1]."""
    return np.concatenate([np.zeros(1, np.result_type(values.dtype, np.int64)), np.cumsum(values)])


def _xlogx(counts: Integers) -> Floats:
    """x log x; 0 for 0."""
    return np.asarray(counts * np.log(np.maximum(counts, 1)))
