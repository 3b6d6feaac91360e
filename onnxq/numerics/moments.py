"""The shape of a tensor's distribution, and what lies outside of a range, batch by batch in constant memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.numerics.extremes import NAN, MinMax

# Values worked on in float64 at a time: their temporaries (2 MB each) stay in the cache.
CHUNK = 1 << 18


class Moments:
    """Count, extremes, mean, standard deviation and kurtosis of all finite values; sums in float64.

    Batches have any shape and any real dtype, within float32's range: float64 holds the fourth powers of that.
    Infinities are counted in `infinite` and otherwise ignored; NaN raises ValueError and leaves everything as it was.
    Each chunk's sums of powers are taken around its own mean and merged, so that a large mean cancels nothing.
    Source: Pébay, Formulas for Robust, One-Pass Parallel Computation of Covariances and Arbitrary-Order Statistical
    Moments (SAND2008-6212), equations 1.4 and 2.1 with p = 3 and 4; Chan, Golub and LeVeque for the second.
    """

    def __init__(self) -> None:
        self.extremes = MinMax()
        self.count = 0
        self.mean = 0.0
        self._powers = (0.0, 0.0, 0.0)  # sums of (x - mean)**2, **3 and **4

    @property
    def infinite(self) -> int:
        """Number of infinities seen and ignored."""
        return self.extremes.infinite

    @property
    def std(self) -> float:
        """Standard deviation of the values seen, sqrt(mean of (x - mean)**2); 0.0 before there is any."""
        return math.sqrt(self._powers[0] / self.count) if self.count else 0.0

    @property
    def kurtosis(self) -> float:
        """Excess kurtosis, mean of ((x - mean) / std)**4 - 3, at least -2; 0.0, as a normal one's, without spread."""
        squares, _, fourth = self._powers
        return max(self.count * (fourth / squares) / squares - 3.0, -2.0) if squares * squares > 0.0 else 0.0

    @property
    def range_parm(self) -> float:
        """max(|max|, |min|) / std: how many standard deviations a range over all values has to reach.

        0.0 without spread: all codes of a constant are exact. Source: msModelSlim's range_parm, with one standard
        deviation over all data for its greatest over batches.
        """
        return self.extremes.absmax / self.std if self.std > 0.0 else 0.0

    def update(self, x: npt.NDArray[Any]) -> None:
        """Fold in a batch of any shape; ValueError when it holds NaN."""
        x = np.asarray(x)
        infinite = self.extremes.infinite
        self.extremes.update(x)
        values = x.ravel(order="K")
        if self.extremes.infinite != infinite:
            values = values[np.isfinite(values)]
        for start in range(0, values.size, CHUNK):
            self._fold(*_moments(values[start : start + CHUNK].astype(np.float64)))

    def merge(self, other: Moments) -> None:
        """Fold in everything that `other` has seen."""
        self.extremes.merge(other.extremes)
        self._fold(other.count, other.mean, other._powers)

    def _fold(self, b: int, mean: float, powers: tuple[float, float, float]) -> None:
        a, n = self.count, self.count + b
        if b == 0:
            return
        d = mean - self.mean
        (a2, a3, a4), (b2, b3, b4) = self._powers, powers
        self._powers = (
            a2 + b2 + d**2 * a * b / n,
            a3 + b3 + d**3 * a * b * (a - b) / n**2 + 3 * d * (a * b2 - b * a2) / n,
            a4 + b4 + d**4 * a * b * (a * a - a * b + b * b) / n**3 + 6 * d**2 * (a * a * b2 + b * b * a2) / n**2
            + 4 * d * (a * b3 - b * a3) / n)
        self.mean += d * b / n
        self.count = n


class Outside:
    """How many of the values seen lie below `low` or above `high`; infinities count, NaN raises ValueError."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.count = 0
        self.outside = 0

    @property
    def share(self) -> float:
        """The share of all values, from 0 to 1; 0.0 before there is any."""
        return self.outside / self.count if self.count else 0.0

    def update(self, x: npt.NDArray[Any]) -> None:
        """Fold in a batch of any shape; ValueError when it holds NaN."""
        x = np.asarray(x)
        if x.size and np.isnan(x.min()):
            raise ValueError(NAN)
        self.count += x.size
        self.outside += int(np.count_nonzero(x < self.low) + np.count_nonzero(x > self.high))


def _moments(values: npt.NDArray[np.float64]) -> tuple[int, float, tuple[float, float, float]]:
    """(count, mean, sums of (x - mean)**2, **3 and **4) of a chunk with at least one value, which is overwritten."""
    first = float(values[0])
    values -= first  # a constant chunk has no spread at all, not one of rounding errors
    shift = float(values.mean())
    values -= shift
    squares = values * values
    # not `squares @ values`: BLAS would wake threads, which fight with those that the runtime leaves spinning
    third, fourth = (float(np.einsum("i,i->", squares, other)) for other in (values, squares))
    return values.size, first + shift, (float(squares.sum()), third, fourth)
