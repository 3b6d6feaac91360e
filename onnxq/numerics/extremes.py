"""The smallest and largest values of a tensor or of its channels, folded in batch by batch.

Common rules: batches have any real dtype, empty ones count for nothing. Infinities are counted in `infinite` and
otherwise ignored; NaN raises ValueError and leaves everything as it was. `result()` always contains 0.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.errors import UsageError

NAN = "a batch holds NaN; leave out the rows that cause it or keep the tensor float"


class MinMax:
    """The smallest and the largest finite value, `low` and `high` (inf and -inf before there is any).

    `count` is the number of finite values seen.
    """

    def __init__(self) -> None:
        self.count = 0
        self.infinite = 0
        self.low = math.inf
        self.high = -math.inf

    @property
    def absmax(self) -> float:
        """The largest magnitude; 0.0 before there is any."""
        return max(-self.low, self.high, 0.0)

    def update(self, x: npt.NDArray[Any]) -> None:
        """Fold in a batch of any shape; ValueError when it holds NaN."""
        x = np.asarray(x)
        if x.size == 0:
            return
        with np.errstate(invalid="ignore"):  # some numpy builds warn about NaN here
            low, high = float(x.min()), float(x.max())
        if math.isnan(low):
            raise ValueError(NAN)
        finite = x.size
        if math.isinf(low) or math.isinf(high):
            mask = np.isfinite(x)
            finite = int(np.count_nonzero(mask))
            low = float(x.min(where=mask, initial=math.inf))
            high = float(x.max(where=mask, initial=-math.inf))
        self.count += finite
        self.infinite += x.size - finite
        self.low, self.high = min(self.low, low), max(self.high, high)

    def merge(self, other: MinMax) -> None:
        """Fold in everything that `other` has seen."""
        self.count += other.count
        self.infinite += other.infinite
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def result(self) -> tuple[float, float]:
        """(smallest value, largest value), widened to contain 0."""
        return with_zero(self.low, self.high)


class MovingAverage:
    """Exponential averages of the minima and of the maxima of the batches.

    The first batch with a finite value gives the averages, each later one moves them: average += constant * (value of
    the batch - average). So the result depends on the order and the sizes of the batches, and two of these can't be
    merged; it lies within the true minimum and maximum, widened to contain 0. A batch without finite values moves
    nothing.
    Source: Jacob et al. 2018 (arXiv:1712.05877, section 3.1); 0.01 is the constant that calibrators commonly use.

    constant: above 0, up to 1 (the last batch alone); UsageError otherwise.
    """

    def __init__(self, constant: float = 0.01) -> None:
        if not 0.0 < constant <= 1.0:
            raise UsageError(f"constant is {constant}; use a number above 0 and up to 1, e.g. 0.01")
        self.constant = constant
        self.count = 0
        self.infinite = 0
        self.low = math.inf
        self.high = -math.inf

    def update(self, x: npt.NDArray[Any]) -> None:
        """Fold in a batch of any shape; ValueError when it holds NaN."""
        batch = MinMax()
        batch.update(x)
        self.infinite += batch.infinite
        if batch.count == 0:
            return
        if self.count == 0:
            self.low, self.high = batch.low, batch.high
        else:
            self.low += self.constant * (batch.low - self.low)
            self.high += self.constant * (batch.high - self.high)
        self.count += batch.count

    def result(self) -> tuple[float, float]:
        """(average minimum, average maximum), widened to contain 0."""
        return with_zero(self.low, self.high)


class PerChannel:
    """The smallest and the largest finite value of each channel along `axis`: float64 [C] each, C from the first batch.

    `low` and `high` are inf and -inf where a channel had no finite value yet. The other axes of a batch may have any
    number and any lengths; a negative `axis` counts from the end. `count` is the number of finite values, all channels
    together.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.count = 0
        self.infinite = 0
        self.low: npt.NDArray[np.float64] = np.zeros(0)
        self.high: npt.NDArray[np.float64] = np.zeros(0)

    @property
    def absmax(self) -> npt.NDArray[np.float64]:
        """The largest magnitude of each channel [C]; 0.0 where there was no finite value."""
        return np.maximum(np.maximum(-self.low, self.high), 0.0)

    def update(self, x: npt.NDArray[Any]) -> None:
        """Fold in a batch; ValueError when it holds NaN, or has no such axis or another number of channels."""
        x = np.asarray(x)
        if not -x.ndim <= self.axis < x.ndim:
            raise ValueError(f"a batch of rank {x.ndim} has no axis {self.axis}; use an axis that every batch has")
        self._check_channels(x.shape[self.axis])
        others = tuple(i for i in range(x.ndim) if i != self.axis % x.ndim)
        channels = x.shape[self.axis]
        low, high, finite = np.full(channels, math.inf), np.full(channels, -math.inf), x.size
        if x.size:
            with np.errstate(invalid="ignore"):  # some numpy builds warn about NaN here
                low, high = x.min(axis=others).astype(np.float64), x.max(axis=others).astype(np.float64)
            if np.isnan(low).any():
                raise ValueError(NAN)
            if np.isinf(low).any() or np.isinf(high).any():
                mask = np.isfinite(x)
                finite = int(np.count_nonzero(mask))
                low = x.min(axis=others, where=mask, initial=math.inf).astype(np.float64)
                high = x.max(axis=others, where=mask, initial=-math.inf).astype(np.float64)
        self._fold(low, high)
        self.count += finite
        self.infinite += x.size - finite

    def merge(self, other: PerChannel) -> None:
        """Fold in everything that `other` has seen; ValueError when it has another number of channels."""
        if other.low.size:
            self._check_channels(other.low.size)
            self._fold(other.low, other.high)
        self.count += other.count
        self.infinite += other.infinite

    def result(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(smallest values [C], largest values [C]), each pair widened to contain 0."""
        return np.minimum(self.low, 0.0) + 0.0, np.maximum(self.high, 0.0) + 0.0

    def _check_channels(self, channels: int) -> None:
        if self.low.size and channels != self.low.size:
            raise ValueError(f"a batch has {channels} channels along axis {self.axis}, those before it "
                             f"{self.low.size}; use the axis of the channels")

    def _fold(self, low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]) -> None:
        if self.low.size:
            low, high = np.minimum(self.low, low), np.maximum(self.high, high)
        self.low, self.high = low, high


def with_zero(low: float, high: float) -> tuple[float, float]:
    """The range widened to contain 0, which is never -0.0."""
    return min(low, 0.0) + 0.0, max(high, 0.0) + 0.0
