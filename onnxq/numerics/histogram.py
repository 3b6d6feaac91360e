"""One two-sided histogram for every range that needs a distribution: exact counts in constant memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.errors import UsageError
from onnxq.numerics.extremes import MinMax

# Values binned at a time: their temporaries (a float and an index each, 3 MB) stay in the cache.
CHUNK = 1 << 18

# Exponent of the narrowest histogram, [-2**-100, 2**-100]: values / bin width then stays within float32.
SMALLEST_EXPONENT = -100


# Values counted one by one; of what comes later every THINNED-th counts for all. A 99.999th percentile of so many rests
# on more than a hundred values, and counting takes longer than many a model that makes the values.
ENOUGH = 1 << 24
THINNED = 7  # a prime: no axis of a tensor is stepped over in time with it


class Histogram:
    """Counts of finite values in bins over [-r, r), r a power of two that doubles as larger values come.

    Bin k holds [k * w, (k + 1) * w), w = 2 r / bins, -bins/2 <= k < bins/2, and one more counter holds the values r
    themselves: counts[i] [bins + 1] is that of k = i - bins/2. Doubling r adds up the bins 2 k and 2 k + 1. As r, w and
    bins are powers of two this is exact (short of underflow): the counts are the same whatever the order and the sizes
    of the batches, and whether they were fed to one histogram or to several that were merged. That holds for the first
    ENOUGH values; in later batches every THINNED-th value counts as THINNED of them.

    `extremes` holds the true minimum and maximum, `zeros` the number of values that are exactly 0 (they are in the bin
    k = 0, too): 0 has a code of its own, so the searches in `clipping` leave them out.
    bins: a power of two from 4 to 65536; UsageError otherwise.
    """

    def __init__(self, bins: int) -> None:
        if bins not in [1 << power for power in range(2, 17)]:
            raise UsageError(f"bins is {bins}; use a power of two from 4 to 65536, e.g. 2048")
        self.bins = bins
        self.extremes = MinMax()
        self.zeros = 0
        self.counts: npt.NDArray[np.int64] = np.zeros(bins + 1, dtype=np.int64)
        self._exponent = SMALLEST_EXPONENT  # r = 2**exponent

    @property
    def bin_width(self) -> float:
        """The width w of a bin."""
        return math.ldexp(2.0 / self.bins, self._exponent)

    def update(self, x: npt.NDArray[Any]) -> None:
        """Fold in a batch of any shape and real dtype; infinities are left out. ValueError when it holds NaN."""
        x = np.asarray(x)
        infinite, weight = self.extremes.infinite, THINNED if self.extremes.count >= ENOUGH else 1
        self.extremes.update(x)
        values = x.ravel(order="K")
        if self.extremes.infinite != infinite:
            values = values[np.isfinite(values)]
        values = values[::weight]
        if values.size == 0:
            return
        self._widen(_exponent(self.extremes.absmax))
        # Wide enough for every value: float32 for float16, float32 and small integers, float64 for all others.
        work = np.result_type(values.dtype, np.float32)
        per_width = work.type(math.ldexp(self.bins / 2, -self._exponent))
        buffer = np.empty(min(CHUNK, values.size), dtype=work)
        for start in range(0, values.size, CHUNK):
            chunk = values[start : start + CHUNK]
            self.zeros += weight * int(np.count_nonzero(chunk == 0))
            index = buffer[: chunk.size]
            np.multiply(chunk, per_width, out=index, dtype=work)
            np.floor(index, out=index)
            index += self.bins // 2
            self.counts += weight * np.bincount(index.astype(np.intp), minlength=self.bins + 1)

    def merge(self, other: Histogram) -> None:
        """Fold in everything that `other` has seen; ValueError when it has another number of bins."""
        if other.bins != self.bins:
            raise ValueError(f"histograms of {self.bins} and {other.bins} bins don't merge; make both with the same")
        self._widen(other._exponent)
        self.counts += _widened(other.counts, self._exponent - other._exponent)
        self.extremes.merge(other.extremes)
        self.zeros += other.zeros

    def within(self) -> tuple[int, npt.NDArray[np.int64]]:
        """(k of the first bin, counts of the n bins from there [n]) for the bins between the extremes and 0.

        Exact zeros are left out; values that are exactly r count in the bin below. n is at least 1.
        """
        low, high = self.extremes.result()
        half = self.bins // 2
        first = math.floor(low / self.bin_width)
        last = min(math.floor(high / self.bin_width), half - 1)
        kept = self.counts[:-1].copy()
        kept[half] -= self.zeros
        kept[-1] += self.counts[-1]
        return first, kept[first + half : last + half + 1]

    def _widen(self, exponent: int) -> None:
        """Double r until it is at least 2**exponent."""
        if exponent > self._exponent:
            self.counts = _widened(self.counts, exponent - self._exponent)
            self._exponent = exponent


def _exponent(magnitude: float) -> int:
    """The smallest e with magnitude <= 2**e, but at least SMALLEST_EXPONENT."""
    mantissa, exponent = math.frexp(magnitude)  # magnitude = mantissa * 2**exponent, 0.5 <= mantissa < 1
    if mantissa == 0.5:
        exponent -= 1  # a power of two is its own r
    return SMALLEST_EXPONENT if magnitude == 0.0 else max(exponent, SMALLEST_EXPONENT)


def _widened(counts: npt.NDArray[np.int64], doublings: int) -> npt.NDArray[np.int64]:
    """The counts [bins + 1] as they would be for an r that has been doubled so many times."""
    half = counts.size // 2
    merged = np.zeros_like(counts)
    target = np.arange(-half, half + 1) >> doublings  # floor(k / 2**doublings)
    np.add.at(merged, target + half, counts)
    return merged
