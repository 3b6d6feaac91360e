"""How far the probabilities of one model are from another's, in constant memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

CHUNK = 1 << 20  # scores worked on in float64 at a time (8 MB an array)


@dataclass
class Divergence:
    """Mean over positions of KL(softmax(reference) || softmax(result)) in nats, folded in batch by batch.

    Where labels are drawn from the reference's probabilities, this is by how much the mean cross-entropy rises.
    """

    count: int = 0
    _sum: float = 0.0

    def update(self, reference: Array, result: Array) -> None:
        """Fold in scores [.., V] of any real dtype; NaN and shapes that differ make the mean infinite from then on."""
        if reference.shape != result.shape or not reference.ndim:
            self._sum = math.inf
            return
        size = max(reference.shape[-1], 1)
        a, b = reference.reshape(-1, size), result.reshape(-1, size)
        step = max(1, CHUNK // size)
        for start in range(0, len(a), step):
            first, second = (_logarithms(x[start : start + step]) for x in (a, b))
            with np.errstate(invalid="ignore"):
                terms = np.where(first > -np.inf, np.exp(first) * (first - second), 0.0)
            total = float(terms.sum())
            self._sum += total if not math.isnan(total) else math.inf
        self.count += len(a)

    @property
    def mean(self) -> float:
        """Nats per position, at least 0; 0 before the first one."""
        return max(self._sum / self.count, 0.0) if self.count else self._sum


def _logarithms(scores: Array) -> npt.NDArray[np.float64]:
    """log softmax of rows [R, V]."""
    x = scores.astype(np.float64)
    with np.errstate(invalid="ignore"):  # a row of -inf has no probabilities
        x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x
