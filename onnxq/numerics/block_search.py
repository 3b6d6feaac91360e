"""Scale and zero point of each block: what blocks.choose does with one chunk of a weight.

A chunk is x float32 [b, B, c]: b blocks of B inputs, c columns. Zero points are *stored* ones here, code - qmin (see
packing), as float32 [b, c] or one number for all; what a search finds is (scale float32 [b, c], stored zero points).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq.numerics import affine, packing
from onnxq.numerics.affine import LARGEST_SCALE, SMALLEST_SCALE
from onnxq.numerics.dtypes import DType

Floats = npt.NDArray[np.float32]
Zeros = Floats | float
Found = tuple[Floats, Zeros]
Measured = tuple[Floats, Floats]  # error and scale [b, c]

# Factors of the range that just holds a block, by bits, that are tried. What is best for normally distributed weights
# is near 0.9 for 4 bits and 0.4 to 0.7 for 2, and twice as many steps gain little; 8 bits gain by the sign alone.
FACTORS = {2: 1 - 0.14 * np.arange(5), 4: 1 - 0.04 * np.arange(5), 8: np.ones(1)}
OFFSETS = (0, 1, -1)  # of a zero point from the nearest one
REFITS = 2  # of the scale to the codes that the best scale so far gives


@dataclass(frozen=True, eq=False)
class Measure:
    """What errors e [b, B, c] of a chunk count: e^T H e with `hessian` H [b, B, B], else (`roots` [b, B] * e)**2."""

    roots: Floats | None = None
    hessian: Floats | None = None

    def of(self, x: Floats, scale: Floats, zeros: Zeros, dtype: DType) -> Measured:
        """The error of x rounded to nearest, and its scale.

        Without a hessian the scale is first fitted to the codes, in closed form: with levels l and r = l - x / scale,
        scale * (1 - l.r / l.l) has the least error, scale**2 * (r.r - (l.r)**2 / l.l). With one it stays as it is:
        what is nearest for a scale that fits these codes may be worse than these are.
        """
        with np.errstate(all="ignore"):  # an error beyond float32 is never the smaller one
            if self.hessian is not None:
                return self.at(x, scale, zeros, dtype), scale
            levels, rest = _rounded(x, scale, zeros, dtype)
            if self.roots is not None:
                levels *= self.roots[:, :, None]
                rest *= self.roots[:, :, None]
            size = _dot(levels, levels)
            shift = _ratio(_dot(levels, rest), size)
            error = _dot(rest, rest) - shift**2 * size
            return error * np.square(scale), scale - scale * shift

    def at(self, x: Floats, scale: Floats, zeros: Zeros, dtype: DType) -> Floats:
        """The error of x rounded to nearest with this scale as it is, whatever its sign."""
        with np.errstate(all="ignore"):
            _, rest = _rounded(x, scale, zeros, dtype)
            if self.roots is not None:
                rest *= self.roots[:, :, None]
            return _dot(rest, rest if self.hessian is None else self.hessian @ rest) * np.square(scale)

    def refitted(self, x: Floats, scale: Floats, zeros: Zeros, dtype: DType) -> Measured:
        """The same of a scale that fits the codes of `scale`."""
        if self.hessian is None:
            return self.of(x, scale, zeros, dtype)
        with np.errstate(all="ignore"):
            levels, rest = _rounded(x, scale, zeros, dtype)
            shift = _ratio(_dot(levels, self.hessian @ rest), _dot(levels, self.hessian @ levels))
            scale = scale - scale * shift
        return self.of(x, scale, zeros, dtype)


def tight(x: Floats, dtype: DType, symmetric: bool) -> Found:
    """The range that just holds each block, widened to contain 0. ValueError for NaN and infinities."""
    low, high = _bounds(x)
    if symmetric:
        return _signed_scale(low, high, dtype), 2.0 ** (dtype.bits - 1)
    params = affine.choose(low, high, dtype)
    return params.scale, packing.stored(params.zero_point, dtype).astype(np.float32)


def least_error(x: Floats, dtype: DType, symmetric: bool, measure: Measure) -> Found:
    """Of the ranges tried the one with the least error; the first of equals. ValueError for NaN and infinities."""
    trials = _trials(*_bounds(x), dtype, symmetric)
    first, zeros = next(trials)
    least, best = measure.of(x, first, zeros, dtype)
    for trial, trial_zeros in trials:
        error, scale = measure.of(x, trial, trial_zeros, dtype)
        better = error < least
        least, best = np.where(better, error, least), np.where(better, scale, best)
        if not symmetric:
            zeros = np.where(better, trial_zeros, zeros)
    for _ in range(REFITS):
        error, scale = measure.refitted(x, best, zeros, dtype)
        better = error < least
        least, best = np.where(better, error, least), np.where(better, scale, best)
    return _normal(best), zeros


def _normal(scale: Floats) -> Floats:
    """`scale` as normal float32 numbers of the same sign; 1.0 in place of 0."""
    size = np.clip(np.abs(scale), SMALLEST_SCALE, LARGEST_SCALE)
    return np.where(scale == 0, 1, np.copysign(size, scale)).astype(np.float32)


def _trials(low: Floats, high: Floats, dtype: DType, symmetric: bool) -> Iterator[Found]:
    """What is tried; the range that just holds each block comes first."""
    if symmetric:
        scale, half = _signed_scale(low, high, dtype), 2.0 ** (dtype.bits - 1)
        # by a negative factor the weight of the largest magnitude gets the code qmax, one less than -qmin
        for factor in (*FACTORS[dtype.bits], *-FACTORS[dtype.bits] * half / (half - 1)):
            yield scale * np.float32(factor), half
        return
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    for factor in FACTORS[dtype.bits]:
        params = affine.choose(low * factor, high * factor, dtype)
        zeros = packing.stored(params.zero_point, dtype).astype(np.float32)
        for offset in OFFSETS:
            yield params.scale, np.clip(zeros + offset, 0, 2**dtype.bits - 1)


def _bounds(x: Floats) -> tuple[Floats, Floats]:
    low, high = x.min(axis=1), x.max(axis=1)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("a weight holds NaN or infinities; repair it or keep the node float")
    return low, high


def _signed_scale(low: Floats, high: Floats, dtype: DType) -> Floats:
    """The scale [b, c] that gives the weight of the largest magnitude the code qmin."""
    most = np.where(-low >= high, low, high)
    return _normal(np.asarray(most / np.float32(-(2 ** (dtype.bits - 1))), np.float32))


def _rounded(x: Floats, scale: Floats, zeros: Zeros, dtype: DType) -> tuple[Floats, Floats]:
    """Levels, code less zero point, nearest to x / scale, and what they are off by."""
    exact = x / scale[:, None]
    levels = np.rint(exact)
    if isinstance(zeros, float):
        np.clip(levels, -zeros, 2**dtype.bits - 1 - zeros, out=levels)
    else:  # a third of the time that clip takes for arrays
        np.maximum(levels, -zeros[:, None], out=levels)
        np.minimum(levels, (2**dtype.bits - 1 - zeros)[:, None], out=levels)
    return levels, np.subtract(levels, exact, out=exact)


def _ratio(a: Floats, b: Floats) -> Floats:
    """a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(b), where=b > 0)


def _dot(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.einsum("bkc,bkc->bc", a, b))
