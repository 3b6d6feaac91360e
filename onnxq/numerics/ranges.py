"""Running ranges of a tensor's values, folded in batch by batch in constant memory.

Each range takes batches of any shape, empty ones too, and of any real dtype. `count` is the number of finite values
seen. Infinities are counted in `infinite` and otherwise ignored; NaN raises ValueError and leaves the range as it was.
`result()` is (minimum, maximum) and always contains 0; without any finite value it is (0.0, 0.0).
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnxq.errors import UsageError

# Values binned at a time: their temporaries (a float and an index each, 3 MB) stay in the cache.
CHUNK = 1 << 18

# Exponent of the narrowest histogram, [-2**-100, 2**-100]: values / bin width then stays within float32.
SMALLEST_EXPONENT = -100

# The options that each method takes.
OPTIONS: dict[str, tuple[str, ...]] = {"minmax": (), "percentile": ("percent", "bins")}


class Range(Protocol):
    """What calibration asks of a range."""

    @property
    def count(self) -> int:
        """Number of finite values seen."""

    def update(self, x: npt.NDArray[Any]) -> None:
        """Fold in a batch of values, of any shape."""

    def result(self) -> tuple[float, float]:
        """(minimum, maximum), containing 0."""


class MinMax:
    """The smallest and the largest finite value, `low` and `high` (inf and -inf before there is any)."""

    def __init__(self) -> None:
        self.count = 0
        self.infinite = 0
        self.low = math.inf
        self.high = -math.inf

    def update(self, x: npt.NDArray[Any]) -> None:
        """Fold in a batch of any shape; ValueError when it holds NaN."""
        x = np.asarray(x)
        if x.size == 0:
            return
        with np.errstate(invalid="ignore"):  # some numpy builds warn about NaN here
            low, high = float(x.min()), float(x.max())
        if math.isnan(low):
            raise ValueError("a batch holds NaN; leave out the rows that cause it or keep the tensor float")
        finite = x.size
        if math.isinf(low) or math.isinf(high):
            mask = np.isfinite(x)
            finite = int(np.count_nonzero(mask))
            low = float(x.min(where=mask, initial=math.inf))
            high = float(x.max(where=mask, initial=-math.inf))
        self.count += finite
        self.infinite += x.size - finite
        self.low, self.high = min(self.low, low), max(self.high, high)

    def result(self) -> tuple[float, float]:
        """(smallest value, largest value), widened to contain 0."""
        return _with_zero(self.low, self.high)


class Percentile:
    """The range that `percent` of the values lie in, with (100 - percent) / 2 percent of them cut off on each side.

    The values are counted in a histogram over [-r, r), r a power of two that doubles as larger values come: bin k holds
    [k * w, (k + 1) * w), w = 2 r / bins, -bins/2 <= k < bins/2, and one more counter holds the values r themselves.
    Doubling r adds up the bins 2 k and 2 k + 1. As r, w and bins are powers of two this is exact (short of underflow):
    the counts are the same whatever the order and the sizes of the batches.

    The lower bound is where the count from below reaches t = count * (100 - percent) / 200, by linear interpolation
    within its bin; the upper bound likewise from above. They lie within one bin width of the ceil(t)-th smallest and
    largest value, and never outside the true minimum and maximum.

    percent: above 0, up to 100 (the same as MinMax); bins: a power of two from 4 to 65536. UsageError otherwise.
    """

    def __init__(self, percent: float = 99.999, bins: int = 2048) -> None:
        if not 0.0 < percent <= 100.0:
            raise UsageError(f"percent is {percent}; use a number above 0 and up to 100, e.g. 99.999")
        if bins not in [1 << power for power in range(2, 17)]:
            raise UsageError(f"bins is {bins}; use a power of two from 4 to 65536, e.g. 2048")
        self.percent = percent
        self.bins = bins
        self._extremes = MinMax()
        self._exponent = SMALLEST_EXPONENT  # r = 2**exponent
        self._counts = np.zeros(bins + 1, dtype=np.int64)  # _counts[i] counts bin k = i - bins/2

    @property
    def count(self) -> int:
        """Number of finite values seen."""
        return self._extremes.count

    @property
    def infinite(self) -> int:
        """Number of infinities seen and ignored."""
        return self._extremes.infinite

    @property
    def bin_width(self) -> float:
        """The width w of a bin."""
        return math.ldexp(2.0 / self.bins, self._exponent)

    def update(self, x: npt.NDArray[Any]) -> None:
        """Fold in a batch of any shape; ValueError when it holds NaN."""
        x = np.asarray(x)
        infinite = self._extremes.infinite
        self._extremes.update(x)
        values = x.ravel(order="K")
        if self._extremes.infinite != infinite:
            values = values[np.isfinite(values)]
        if values.size == 0:
            return
        self._widen()
        # Wide enough for every value: float32 for float16, float32 and small integers, float64 for all others.
        work = np.result_type(values.dtype, np.float32)
        per_width = work.type(math.ldexp(self.bins / 2, -self._exponent))
        buffer = np.empty(min(CHUNK, values.size), dtype=work)
        for start in range(0, values.size, CHUNK):
            chunk = values[start : start + CHUNK]
            index = buffer[: chunk.size]
            np.multiply(chunk, per_width, out=index, dtype=work)
            np.floor(index, out=index)
            index += self.bins // 2
            self._counts += np.bincount(index.astype(np.intp), minlength=self.bins + 1)

    def result(self) -> tuple[float, float]:
        """(lower bound, upper bound), widened to contain 0."""
        if self.count == 0:
            return 0.0, 0.0
        tail = self.count * (100.0 - self.percent) / 200.0
        first, last = self._extremes.low, self._extremes.high
        low = (self._reach(self._counts, tail) - self.bins // 2) * self.bin_width
        high = (self.bins // 2 + 1 - self._reach(self._counts[::-1], tail)) * self.bin_width
        return _with_zero(min(max(low, first), last), min(max(high, first), last))

    def _widen(self) -> None:
        """Double r until no value seen lies outside [-r, r]."""
        magnitude = max(-self._extremes.low, self._extremes.high)
        mantissa, exponent = math.frexp(magnitude)  # magnitude = mantissa * 2**exponent, 0.5 <= mantissa < 1
        if mantissa == 0.5:
            exponent -= 1  # a power of two is its own r
        if magnitude == 0.0 or exponent <= self._exponent:
            return
        half = self.bins // 2
        merged = np.zeros_like(self._counts)
        doublings = exponent - self._exponent
        target = np.arange(-half, half + 1) >> doublings  # floor(k / 2**doublings)
        np.add.at(merged, target + half, self._counts)
        self._counts, self._exponent = merged, exponent

    @staticmethod
    def _reach(counts: npt.NDArray[np.int64], tail: float) -> float:
        """Where the running sum of `counts` [bins + 1] reaches `tail`, in bins from the beginning."""
        total = np.cumsum(counts)
        index = int(np.searchsorted(total, max(tail, 0.5)))  # without a tail: the first bin that holds a value
        inside = tail - float(total[index] - counts[index])
        return index + inside / float(counts[index])


def _with_zero(low: float, high: float) -> tuple[float, float]:
    return min(low, 0.0) + 0.0, max(high, 0.0) + 0.0  # + 0.0 turns -0.0 into 0.0


def make(method: str, **options: Any) -> Range:
    """A new range: "minmax", or "percentile" with the options `percent` and `bins`.

    UsageError with the known names for any other method or option.
    """
    if method not in OPTIONS:
        raise UsageError(f"unknown range method {method!r}; use one of {', '.join(OPTIONS)}")
    for name in options:
        if name not in OPTIONS[method]:
            known = ", ".join(OPTIONS[method]) or "no options"
            raise UsageError(f"range method {method!r} does not know the option {name!r}; it takes {known}")
    return MinMax() if method == "minmax" else Percentile(**options)
