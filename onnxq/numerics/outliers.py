"""int8 weights of which all but a few need fewer bits: what low-bit sparse quantization (W8A8S) stores.

The scale of a channel is that with which its weights up to a threshold t fill `bits` bits; the few beyond it, the
protected ones, get larger codes of the same scale, up to those of int8:

    scale = max(t / (2**(bits - 1) - 1), max|w| / 127)          codes of weights up to t: -(2**(bits - 1) - 1) and up

Kernels read the codes as they are; in a file the narrow ones take `bits` each (see encodings). Thresholds are found
for a weight as a whole: where a few large weights widen a channel's steps more, more of them are protected.
Source: the parameters `fraction` and `sigma_factor` of msModelSlim's sparse quantization, as documented; the division
of a fraction among channels is this module's.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxq.numerics.affine import LARGEST_SCALE, SMALLEST_SCALE, QuantParams
from onnxq.numerics.dtypes import INT8

Floats = npt.NDArray[np.float32]

BITS = (4, 5, 6)
FRACTION = 0.01
_SHARE = 8  # times the fraction: as much of one channel may be protected at most
_ROUNDS = 50  # of bisection


def choose(w: Floats, axis: int, bits: int = 4, fraction: float = FRACTION, sigma: float | None = None,
           least: npt.ArrayLike = 0.0) -> QuantParams:
    """Symmetric int8 parameters per channel along `axis` for float32 w of any rank.

    `fraction` of all weights at most are protected, where that narrows steps the most: the sum of squared thresholds is
    the least. With `sigma` those beyond sigma times the root mean square of their channel are, instead. `least`, [C]
    or a scalar: scales are at least least / 127. Channels of zeros get scale 1.0.
    Extra memory: the magnitudes of w, sorted. ValueError for NaN or infinities.
    """
    rows = np.moveaxis(np.abs(np.asarray(w, np.float32)), axis, -1)
    rows = rows.reshape(-1, rows.shape[-1])
    if not np.isfinite(rows).all():
        raise ValueError("a weight holds NaN or infinities; repair it or keep the node float")
    most = rows.max(axis=0, initial=0.0)
    if not len(rows):
        within = most
    elif sigma is not None:
        within = sigma * np.sqrt(np.square(rows, dtype=np.float64).mean(axis=0))
    else:
        within = _thresholds(rows, fraction)
    scale = np.maximum(np.minimum(within, most) / narrow(bits), np.maximum(most, least) / INT8.qmax)
    scale = np.clip(np.where(scale > 0, scale, 1.0), SMALLEST_SCALE, LARGEST_SCALE).astype(np.float32)
    return QuantParams(scale, np.zeros(scale.shape, np.int8), INT8, axis % w.ndim)


def narrow(bits: int) -> int:
    """The largest code of a weight that is not protected."""
    return (1 << (bits - 1)) - 1


def limits(w: Floats, params: QuantParams, bits: int) -> npt.NDArray[np.int8]:
    """How large the codes of w may be, of its shape: what is protected keeps all of int8, others stay narrow.

    A weight is protected whose nearest code is not narrow.
    """
    shape = [1] * w.ndim
    shape[params.axis or 0] = -1
    wide = np.abs(np.rint(w / params.scale.reshape(shape))) > narrow(bits)
    return np.where(wide, np.int8(INT8.qmax), np.int8(narrow(bits)))


def protected(codes: npt.NDArray[np.int8], bits: int) -> int:
    """How many codes are not narrow."""
    return int(np.count_nonzero(np.abs(codes.astype(np.int16)) > narrow(bits)))


def _thresholds(magnitudes: Floats, fraction: float) -> Floats:
    """[C]: thresholds of columns, beyond which no more than `fraction` of all magnitudes [R, C] lie.

    Column c protects n_c weights, so that its threshold t_c(n_c) is the largest of the others. By the multiplier m of
    min sum t_c(n_c)^2 + m n_c, which bisection raises until there are few enough.
    """
    count = min(int(np.ceil(_SHARE * fraction * len(magnitudes))) + 1, len(magnitudes))
    largest = np.sort(np.partition(magnitudes, len(magnitudes) - count, axis=0)[-count:], axis=0)[::-1]
    squares = np.square(largest, dtype=np.float64)
    numbers = np.arange(count)[:, None]
    budget = int(fraction * magnitudes.size)

    def taken(multiplier: float) -> npt.NDArray[np.int64]:
        return np.asarray(np.argmin(squares + multiplier * numbers, axis=0))

    low, high = 0.0, float(squares.max(initial=0.0)) + 1e-30
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (low, middle) if taken(middle).sum() <= budget else (middle, high)
    return np.asarray(largest[taken(high), np.arange(largest.shape[1])], np.float32)
