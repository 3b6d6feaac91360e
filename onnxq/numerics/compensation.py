"""Weights that make up for what a layer reads being off: its input carries the errors of the layers before it.

A layer y = x w, x [R, K], w [K, N], will read a in place of x once those layers are quantized. The weights t for which
a t is nearest to x w are what its codes should stand for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.numerics.rounding import CHUNK, Floats, Hessian

_STILL = 1e-5  # of an input's squares: what float32 leaves of the variance of a constant


class Drift:
    """Running sums a^T a (`own`), float64 [K', K'], and a^T x (`cross`), float64 [K', K], over rows a [R, K'] and
    x [R, K]; K' is K but for a layer that is narrowed already."""

    def __init__(self) -> None:
        self._own = Hessian()
        self._cross: Floats = np.zeros((0, 0))

    @property
    def count(self) -> int:
        """The rows seen."""
        return self._own.count

    def update(self, a: npt.NDArray[Any], x: npt.NDArray[Any] | None = None) -> None:
        """Fold in rows; products are summed in float32 over at most CHUNK of them. ValueError as for Hessian.

        Without x in all updates nothing is known of how far off a is, and target() gives w.
        """
        if x is None:
            self._own.update(a)
            return
        if a.shape[:-1] != x.shape[:-1]:
            raise ValueError(f"rows {list(a.shape)} and {list(x.shape)} don't pair; pass the same rows of both")
        self._own.update(a)
        if not self._cross.size:
            self._cross = np.zeros((a.shape[-1], x.shape[-1]))
        for first in range(0, len(a), CHUNK):
            self._cross += a[first:first + CHUNK].T @ x[first:first + CHUNK]

    def merge(self, other: Drift) -> None:
        """Fold in everything that `other` has seen."""
        self._own.merge(other._own)
        if other._cross.size:
            self._cross = self._cross + other._cross if self._cross.size else other._cross.copy()

    def hessian(self) -> Floats:
        """a^T a, [K, K]."""
        return self._own.result()

    def target(self, w: npt.NDArray[np.float32], damping: float) -> npt.NDArray[np.float32]:
        """The weights that make up for what is off; see Sums.target."""
        return self.sums().target(w, damping)

    def sums(self) -> Sums:
        """What was seen."""
        own = self._own.result()
        return Sums(own, self._cross.copy() if self._cross.size else None, np.zeros(len(own)), np.zeros(len(own)))

    def centred(self) -> Sums:
        """What was seen of all inputs but the last one, which was always 1, about their means.

        Inputs that never moved, but for the rounding of float32, have sums of 0.
        """
        own = self._own.result()
        count, total = own[-1, -1], own[-1, :-1]
        mean = total / max(count, 1.0)
        about = own[:-1, :-1] - np.outer(total, mean)
        still = about.diagonal() <= _STILL * own.diagonal()[:-1]
        about[still] = about[:, still] = 0.0
        if not self._cross.size:
            return Sums(about, None, mean, mean)
        before: Floats = self._cross[-1, :-1] / max(count, 1.0)
        cross = self._cross[:-1, :-1] - np.outer(total, before)
        cross[still] = 0.0
        return Sums(about, cross, mean, before)


@dataclass(frozen=True, eq=False)
class Sums:
    """a^T a (`own`), float64 [K', K'], and a^T x (`cross`, None: a is x), float64 [K', K], about means of a (`mean`,
    float64 [K']) and of x (`before`, float64 [K]), or about 0."""

    own: Floats
    cross: Floats | None
    mean: Floats
    before: Floats

    def target(self, w: npt.NDArray[np.float32], damping: float) -> npt.NDArray[np.float32]:
        """t float32 [K, N], which minimises |a t - x w|^2 + damping * mean(diag(a^T a)) * |t - w|^2.

        Inputs that were always 0 keep their weights. Source: ridge regression about w; as the target of GPTQ,
        asymmetric calibration (arXiv 2504.02692).
        """
        diagonal = self.own.diagonal()
        live = np.flatnonzero(diagonal > 0)
        if not live.size or self.cross is None:
            return w
        part = self.own[np.ix_(live, live)]
        ridge = damping * float(diagonal[live].mean())
        wanted = w[live].astype(np.float64)
        # of what has to change: t = w + (a^T a + ridge)^-1 (a^T x - a^T a) w
        change = np.linalg.solve(part + ridge * np.eye(live.size),
                                 (self.cross - self.own)[np.ix_(live, live)] @ wanted)
        found = np.array(w, np.float32)
        found[live] += change.astype(np.float32)
        return found

    def fitted(self, w: npt.NDArray[np.float32], start: npt.NDArray[np.float32],
               damping: float) -> npt.NDArray[np.float32]:
        """t float32 [K', N], which minimises |a t - x w|^2 + damping * mean(diag(a^T a)) * |t - start|^2, w [K, N].

        Inputs that were always 0 keep the weights of `start`.
        """
        diagonal = self.own.diagonal()
        live = np.flatnonzero(diagonal > 0)
        found = np.array(start, np.float32)
        if live.size and self.cross is not None:
            ridge = damping * float(diagonal[live].mean())
            change = self.cross[live] @ w - self.own[live] @ start
            found[live] += np.linalg.solve(self.own[np.ix_(live, live)] + ridge * np.eye(live.size),
                                           change).astype(np.float32)
        return found

    def without_last(self) -> Sums:
        """Of all inputs but the last one."""
        cross = self.cross[:-1, :-1] if self.cross is not None else None
        return Sums(self.own[:-1, :-1], cross, self.mean[:-1], self.before[:-1])

    def shift(self, w: npt.NDArray[np.float32], kept: npt.NDArray[np.int64],
              fitted: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """What to add to each output of `fitted` [K', N], on the inputs `kept` of a, for the mean of those of w [K, N]
        on x: float32 [N]."""
        return np.asarray(self.before @ w - self.mean[kept] @ fitted, np.float32)
