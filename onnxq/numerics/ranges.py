"""Running ranges of a tensor's values, folded in batch by batch in constant memory.

Each range takes batches of any shape, empty ones too, and of any real dtype. `count` is the number of finite values
seen. Infinities are counted in `infinite` and otherwise ignored; NaN raises ValueError and leaves the range as it was.
`result()` is (minimum, maximum), lies within the true minimum and maximum widened to 0, and always contains 0; without
any finite value it is (0.0, 0.0). All but MovingAverage have `merge(other)`, after which the range is what it would be
had it seen all batches of both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnxq.errors import UsageError
from onnxq.numerics import clipping
from onnxq.numerics.dtypes import UINT8, DType
from onnxq.numerics.extremes import MinMax, MovingAverage, with_zero
from onnxq.numerics.histogram import Histogram


class Range(Protocol):
    """What calibration asks of a range."""

    @property
    def count(self) -> int:
        """Number of finite values seen."""

    def update(self, x: npt.NDArray[Any]) -> None:
        """Fold in a batch of values, of any shape."""

    def result(self) -> tuple[float, float]:
        """(minimum, maximum), containing 0."""


class _FromHistogram:
    """What the ranges over a histogram share: all but the result."""

    def __init__(self, bins: int) -> None:
        self.histogram = Histogram(bins)

    @property
    def count(self) -> int:
        """Number of finite values seen."""
        return self.histogram.extremes.count

    @property
    def infinite(self) -> int:
        """Number of infinities seen and ignored."""
        return self.histogram.extremes.infinite

    def update(self, x: npt.NDArray[Any]) -> None:
        """Fold in a batch of any shape; ValueError when it holds NaN."""
        self.histogram.update(x)

    def merge(self, other: _FromHistogram) -> None:
        """Fold in everything that `other` has seen; ValueError when its histogram has another number of bins."""
        self.histogram.merge(other.histogram)


class Percentile(_FromHistogram):
    """The range that `percent` of the values lie in, with (100 - percent) / 2 percent of them cut off on each side.

    The lower bound is where the count from below reaches t = count * (100 - percent) / 200, by linear interpolation
    within its bin; the upper bound likewise from above. They lie within one bin width of the ceil(t)-th smallest and
    largest value, and never outside the true minimum and maximum.

    percent: above 0, up to 100 (the same as MinMax); bins: those of a Histogram. UsageError otherwise.
    """

    def __init__(self, percent: float = 99.999, bins: int = 2048) -> None:
        if not 0.0 < percent <= 100.0:
            raise UsageError(f"percent is {percent}; use a number above 0 and up to 100, e.g. 99.999")
        super().__init__(bins)
        self.percent = percent

    def result(self) -> tuple[float, float]:
        """(lower bound, upper bound), widened to contain 0."""
        if self.count == 0:
            return 0.0, 0.0
        half, width, counts = self.histogram.bins // 2, self.histogram.bin_width, self.histogram.counts
        tail = self.count * (100.0 - self.percent) / 200.0
        first, last = self.histogram.extremes.low, self.histogram.extremes.high
        low = (self._reach(counts, tail) - half) * width
        high = (half + 1 - self._reach(counts[::-1], tail)) * width
        return with_zero(min(max(low, first), last), min(max(high, first), last))

    @staticmethod
    def _reach(counts: npt.NDArray[np.int64], tail: float) -> float:
        """Where the running sum of `counts` [bins + 1] reaches `tail`, in bins from the beginning."""
        total = np.cumsum(counts)
        index = int(np.searchsorted(total, max(tail, 0.5)))  # without a tail: the first bin that holds a value
        inside = tail - float(total[index] - counts[index])
        return index + inside / float(counts[index])


class Entropy(_FromHistogram):
    """The range [-t, t], within the true one, whose codes keep the most of the distribution: see clipping.entropy.

    dtype, symmetric: how affine.choose will be called for the range. bins: those of a Histogram. With more of them a
    range may shrink further (down to half as many bin widths as the type has levels, on each side), but peaks that no
    code could show anyway count for more, and the range of a Gelu shrinks too far.
    """

    def __init__(self, dtype: DType = UINT8, symmetric: bool = False, bins: int = 2048) -> None:
        super().__init__(bins)
        self.dtype = dtype
        self.symmetric = symmetric

    def result(self) -> tuple[float, float]:
        """(lower bound, upper bound), containing 0."""
        return clipping.entropy(self.histogram, self.dtype, self.symmetric)


class MSE(_FromHistogram):
    """The range with the least expected squared quantization error: see clipping.mse.

    dtype, symmetric: how affine.choose will be called for the range. bins: those of a Histogram.
    """

    def __init__(self, dtype: DType = UINT8, symmetric: bool = False, bins: int = 2048) -> None:
        super().__init__(bins)
        self.dtype = dtype
        self.symmetric = symmetric

    def result(self) -> tuple[float, float]:
        """(lower bound, upper bound), containing 0."""
        return clipping.mse(self.histogram, self.dtype, self.symmetric)


_KINDS: dict[str, Callable[..., Range]] = {
    "minmax": MinMax, "moving-average": MovingAverage, "percentile": Percentile, "entropy": Entropy, "mse": MSE,
}

# The options that each method takes.
OPTIONS: dict[str, tuple[str, ...]] = {
    "minmax": (), "moving-average": ("constant",), "percentile": ("percent", "bins"),
    "entropy": ("dtype", "symmetric", "bins"), "mse": ("dtype", "symmetric", "bins"),
}


def make(method: str, **options: Any) -> Range:
    """A new range: "minmax", "moving-average", "percentile", "entropy" or "mse", with the OPTIONS of its class.

    UsageError with the known names for any other method or option.
    """
    if method not in OPTIONS:
        raise UsageError(f"unknown range method {method!r}; use one of {', '.join(OPTIONS)}")
    for name in options:
        if name not in OPTIONS[method]:
            known = ", ".join(OPTIONS[method]) or "no options"
            raise UsageError(f"range method {method!r} does not know the option {name!r}; it takes {known}")
    return _KINDS[method](**options)
