"""How far a tensor is from its reference, in constant memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Elements worked on in float64 at a time (8 MB an array).
CHUNK = 1 << 20


@dataclass
class Comparison:
    """A tensor against its reference, folded in batch by batch; sums in float64.

    An element that is the same infinity in both is equal and adds nothing to the sums. Where the shapes differ, the
    result holds NaN, or either has an infinity or NaN that the other has not, there is no meaningful figure: sqnr_db is
    -inf, cosine 0 and max_abs inf from then on.
    """

    count: int = 0
    _max_abs: float = 0.0
    _signal: float = 0.0
    _energy: float = 0.0
    _noise: float = 0.0
    _dot: float = 0.0
    _broken: bool = False

    def update(self, reference: Array, result: Array) -> None:
        """Fold in a batch: two real arrays of one shape."""
        reference, result = np.asarray(reference), np.asarray(result)
        self.count += reference.size
        if reference.shape != result.shape:
            self._broken = True
            return
        a, b = reference.ravel(), result.ravel()
        for start in range(0, a.size, CHUNK):
            self._fold(a[start : start + CHUNK].astype(np.float64), b[start : start + CHUNK].astype(np.float64))

    def _fold(self, a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> None:
        both_finite = np.isfinite(a) & np.isfinite(b)
        if not both_finite.all():
            if not (both_finite | (a == b)).all():
                self._broken = True
                return
            a, b = a[both_finite], b[both_finite]
        # not np.dot: BLAS would wake threads, which fight with those that the runtime leaves spinning
        self._signal += float(np.einsum("i,i->", a, a))
        self._energy += float(np.einsum("i,i->", b, b))
        self._dot += float(np.einsum("i,i->", a, b))
        difference = a - b
        self._noise += float(np.einsum("i,i->", difference, difference))
        self._max_abs = max(self._max_abs, float(np.abs(difference, out=difference).max(initial=0.0)))

    @property
    def sqnr_db(self) -> float | None:
        """10 log10(sum(reference**2) / sum((reference - result)**2)) in dB; None when the two are identical."""
        if self._broken:
            return -math.inf
        if self._noise == 0.0:
            return None
        return 10.0 * math.log10(self._signal / self._noise) if self._signal > 0.0 else -math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two; 1 when both are all zeros, 0 when only one is."""
        if self._broken:
            return 0.0
        if self._signal == 0.0 or self._energy == 0.0:
            return float(self._signal == self._energy)
        cosine = self._dot / math.sqrt(self._signal) / math.sqrt(self._energy)
        return min(max(cosine, -1.0), 1.0)  # rounding may leave it just outside

    @property
    def max_abs(self) -> float:
        """The largest absolute difference."""
        return math.inf if self._broken else self._max_abs
