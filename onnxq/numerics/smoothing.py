"""Scaling the channels of what layers read, so that activations and weights share the difficulty of quantizing.

x w = (x / s) (s w) for any s > 0 per channel. Outliers in a few channels of x widen its one range; divided by s they
leave more codes to all others, while the weights, which have a scale per output channel, take them on.
Sources: SmoothQuant (2211.10438), s = max|x|^alpha / max|w|^(1 - alpha); with alpha and beta searched apart, and with
the error of the layer's quantized result as what is minimized, as Flex Smooth Quant of msModelSlim does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from onnxq.numerics import affine
from onnxq.numerics.dtypes import UINT8, DType

Floats = npt.NDArray[np.float32]

# a step of 0.1 is as fine as rows that the search has not seen can tell
ALPHAS = tuple(k / 10 for k in range(11))
BETAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6)
_LEAST = 1e-5  # of an extreme; below that of the largest one a channel counts as one of zeros


@dataclass(frozen=True)
class Reader:
    """A layer that reads the channels: `rows` float32 [R, K] of its input, its `weight` float32 [K, N], and what gives
    that weight back as its codes say, [K, N] to [K, N]; channel c stands for columns c * repeat .. of a row."""

    rows: Floats
    weight: Floats
    decoded: Callable[[Floats], Floats]
    repeat: int = 1

    def settled(self) -> Reader:
        """The same with its weight as its codes say, for many tries of what is done to the rows."""
        values = self.decoded(self.weight)
        return Reader(self.rows, self.weight, lambda _: values, self.repeat)

    def results(self) -> Floats:
        """The float result, [R, N]."""
        return np.asarray(self.rows @ self.weight)


@dataclass(frozen=True)
class Activation:
    """How x is quantized: per row, or at one range per tensor; symmetric or not; or not at all, for `dtype` None."""

    dtype: DType | None = UINT8
    symmetric: bool = False
    per_row: bool = False

    def decoded(self, x: Floats, low: float, high: float) -> Floats:
        """x [R, K] rounded to codes and back; `low` and `high` bound all of it where it is not quantized per row."""
        if self.dtype is None:
            return x
        if self.per_row:
            low_row, high_row = np.minimum(x.min(axis=1), 0), np.maximum(x.max(axis=1), 0)
            params = affine.choose(low_row, high_row, self.dtype, self.symmetric, axis=0)
        else:
            params = affine.choose(low, high, self.dtype, self.symmetric)
        return affine.dequantize(affine.quantize(x, params), params)


@dataclass(frozen=True)
class Found:
    """The best factors: s = max|x|^alpha / max|w|^beta, and the relative squared errors with and without them, on rows
    that the extremes were not taken from."""

    alpha: float
    beta: float
    error: float
    plain: float

    @property
    def gain_db(self) -> float:
        """By how much the signal to noise ratio of the results grows."""
        return decibels(self.error) - decibels(self.plain)


def decibels(error: float) -> float:
    """The signal to noise ratio in dB that a relative squared error is, at most 300."""
    return -10 * math.log10(max(error, 1e-30))


def factors(x_extreme: npt.ArrayLike, w_extreme: npt.ArrayLike, alpha: float, beta: float) -> Floats:
    """s, float32 [C], with a geometric mean of 1, from max|x| and max|w| of each channel [C].

    A channel in which x was always 0 gets a factor like its neighbours': a small one would blow up what it holds on
    other data.
    """
    x = np.asarray(x_extreme, np.float64)
    live = x > _LEAST * x.max()
    x = np.where(live, x, np.exp(np.log(x[live]).mean()) if live.any() else 1.0)
    w = np.maximum(np.asarray(w_extreme, np.float64), _LEAST)
    logs = alpha * np.log(x) - beta * np.log(w)
    return np.asarray(np.exp(logs - logs.mean())).astype(np.float32)


def weight_extreme(readers: Sequence[Reader]) -> npt.NDArray[np.float64]:
    """[C]: the largest magnitude in each channel of the weights of all readers."""
    return np.asarray(np.max([np.abs(r.weight).max(axis=1).reshape(-1, r.repeat).max(axis=1) for r in readers], axis=0),
                      np.float64)


def extreme(low: npt.ArrayLike, high: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """max|x| [C] from the extremes [C]."""
    return np.maximum(np.abs(np.asarray(low, np.float64)), np.abs(np.asarray(high, np.float64)))


def error(readers: Sequence[Reader], activation: Activation, s: Floats, low: float, high: float,
          results: Sequence[Floats], alike: bool = True) -> float:
    """The squared error of the readers' quantized results relative to the float `results`, averaged over rows and
    readers.

    s [C] are the factors; low and high the range of x / s. `alike`: each row counts by what it is itself, as where
    normalisations behind a layer bring rows to one size: the error of a row of outliers, a hundred times as large as
    others, then tells nothing about those. Rows below the median count as if they were as large as that. Otherwise
    all rows count by their mean.
    """
    return errors(readers, activation, s, low, high, results)[0 if alike else 1]


def errors(readers: Sequence[Reader], activation: Activation, s: Floats, low: float, high: float,
           results: Sequence[Floats]) -> tuple[float, float]:
    """`error` with rows alike, and otherwise."""
    own = mean = 0.0
    for reader, wanted in zip(readers, results, strict=True):
        columns = np.repeat(s, reader.repeat)
        x = activation.decoded(reader.rows / columns, low, high)
        off = x @ reader.decoded(reader.weight * columns[:, None]) - wanted
        noise = np.square(off).sum(axis=1, dtype=np.float64)
        energy = np.square(wanted).sum(axis=1, dtype=np.float64)
        own += float(np.mean(noise / np.maximum(np.maximum(energy, np.median(energy)), 1e-30)))
        mean += float(noise.mean() / max(float(energy.mean()), 1e-30))
    return own / len(readers), mean / len(readers)


@dataclass
class Search:
    """Searches alpha and beta for readers of one tensor whose extremes, low and high [C], other rows gave.

    `tie` [C] names the source channel of each channel, where several have to share a factor (grouped heads); `alike`
    says how rows count (see error). Where each row has its own range and rows count alike, the geometric mean of both
    errors is what is minimized: rows of outliers, which some models grow and hardly read, must not lose more than the
    others gain (minilm: 6 dB for 3, and a cosine of 0.9991 instead of 0.9995).
    """

    readers: Sequence[Reader]
    activation: Activation
    low: Floats
    high: Floats
    tie: npt.NDArray[np.int64] | None = None
    alike: bool = True
    tried: dict[tuple[float, float], float] = field(default_factory=dict, init=False)

    def run(self, alpha: float | None = None, beta: float | None = None) -> Found:
        """First alpha with beta = 1 - alpha, then beta, then alpha again beside it; both can be fixed."""
        self.results = [r.results() for r in self.readers]
        self.weights = weight_extreme(self.readers)
        plain = self._error(0.0, 0.0)
        if alpha is not None:
            self._error(alpha, 1 - alpha if beta is None else beta)
            del self.tried[0.0, 0.0]
        else:
            for a in ALPHAS[1:]:
                self._error(a, 1 - a if beta is None else beta)
        best = self._best()
        if best[0] and alpha is None and beta is None:
            for b in BETAS:
                self._error(best[0], b)
            best = self._best()
            for a in (best[0] - 0.2, best[0] - 0.1, best[0] + 0.1):
                if 0 <= a <= 1:
                    self._error(a, best[1])
        a, b = self._best()
        return Found(a, b, self.tried[a, b], plain)

    def _best(self) -> tuple[float, float]:
        return min(self.tried, key=lambda pair: self.tried[pair])

    def _error(self, alpha: float, beta: float) -> float:
        pair = round(alpha, 3), round(beta, 3)
        if pair not in self.tried:
            s = self.factors(*pair, self.low, self.high)
            low, high = float((self.low / s).min()), float((self.high / s).max())
            own, mean = errors(self.readers, self.activation, s, low, high, self.results)
            both = self.alike and self.activation.per_row
            self.tried[pair] = math.sqrt(own * mean) if both else own if self.alike else mean
        return self.tried[pair]

    def factors(self, alpha: float, beta: float, low: Floats, high: Floats) -> Floats:
        """The factors of each channel for these extremes."""
        x, w = extreme(low, high), self.weights
        if self.tie is not None:
            x, w = shared(x, self.tie), shared(w, self.tie)
        return factors(x, w, alpha, beta)


def split(low: npt.ArrayLike, high: npt.ArrayLike, extra: int) -> npt.NDArray[np.int64]:
    """The source of each of C + `extra` channels, ascending int64, for which the largest extreme of a copy is least.

    Copies of a channel of extremes low and high [C] share its values evenly. Source: outlier channel splitting
    (1901.09504), here of activations: always the channel whose copies are largest gets one more.
    """
    sizes = extreme(low, high)
    copies = np.ones(sizes.size, np.int64)
    for _ in range(extra):
        copies[int(np.argmax(sizes / copies))] += 1
    return np.repeat(np.arange(sizes.size), copies)


def shared(values: npt.NDArray[np.float64], tie: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """[C]: the largest of the values [C] among all channels of the same source `tie` [C]."""
    largest = np.zeros(int(tie.max()) + 1)
    np.maximum.at(largest, tie, values)
    return np.asarray(largest[tie])
