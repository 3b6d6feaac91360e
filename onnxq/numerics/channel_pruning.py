"""Which input channels of a layer to take out, and what the weights of the others become in their stead.

A layer is w [K, N] on rows x [K]; its hessian H [K, K] is the sum of outer products of rows (rounding.Hessian).
Channels go by groups G, first the one whose loss costs the outputs least once all others make up for it,

    error(G) = tr( w_G^T ((H^-1)_GG)^-1 w_G )
    w <- w - (H^-1)_:G ((H^-1)_GG)^-1 w_G          H^-1 <- H^-1 - (H^-1)_:G ((H^-1)_GG)^-1 (H^-1)_G:

so that what is left is the least-squares fit of the layer's outputs by the channels that stay. Source: Optimal Brain
Surgeon by structures (ZipLM, arXiv 2302.04089).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq.numerics.rounding import damped

Floats = npt.NDArray[np.float64]

DAMPING = 0.01
STEPS = 64  # at most: of many groups some go at once, the cheapest ones, which others make up for together
ATTEMPTS = 5  # tenfold dampings until a hessian can be inverted


@dataclass(frozen=True, eq=False)
class Removal:
    """kept: groups that stay, int64 in ascending order; weight: float32 [K', N] of the inputs that stay; error: what
    their outputs are off by, squared and summed over rows, relative to the float outputs'."""

    kept: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float32]
    error: float


def remove(w: npt.NDArray[np.float32], hessian: Floats, count: int, size: int = 1, damping: float = DAMPING) -> Removal:
    """Take out `count` groups of `size` neighbouring inputs of w [K, N], and fit the others to the outputs.

    `hessian` [K, K] is symmetric and finite; its scale has no influence; `damping` times the mean of its diagonal is
    added to that, tenfold where it can't be inverted. Inputs that are always 0 go first. Work: K^3 and count * K^2 *
    size. ValueError for shapes that don't fit, NaN or infinities, and when no group would stay.
    """
    w = np.asarray(w, np.float64)
    if w.ndim != 2 or hessian.shape != (len(w), len(w)) or len(w) % size:
        raise ValueError(f"w {list(w.shape)}, hessian {list(hessian.shape)} and groups of {size} don't fit; use "
                         "[K, N], [K, K] and a divisor of K")
    if not (np.isfinite(w).all() and np.isfinite(hessian).all()):
        raise ValueError("a weight or hessian holds NaN or infinities; repair the weights or keep the node float")
    groups = len(w) // size
    if not 0 <= count < groups:
        raise ValueError(f"{count} of {groups} groups can't go; leave one at least")
    inverse = _inverse(hessian, damping)
    silent = hessian.diagonal() <= 0
    left, alive = np.where(silent[:, None], 0.0, w), np.ones(groups, bool)
    while count > groups - alive.sum():
        some = _cheapest(left, inverse, alive, size)[: min(-(-count // STEPS), count - groups + alive.sum())]
        rows = _inputs(some, size)
        share = np.linalg.solve(inverse[np.ix_(rows, rows)], inverse[rows])  # ((H^-1)_GG)^-1 (H^-1)_G:
        left -= share.T @ left[rows]
        inverse -= inverse[:, rows] @ share
        left[rows], alive[some] = 0.0, False
    kept = np.flatnonzero(alive)
    left[silent] = w[silent]  # those that stay may be heard on other data
    rest, power = left - w, float(np.einsum("kn,kn->", w, hessian @ w))
    error = float(np.einsum("kn,kn->", rest, hessian @ rest)) / power if power > 0 else 0.0
    return Removal(kept, left[_inputs(kept, size)].astype(np.float32), max(error, 0.0))


def _inputs(groups: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    return (groups[:, None] * size + np.arange(size)).reshape(-1)


def _cheapest(w: Floats, inverse: Floats, alive: npt.NDArray[np.bool_], size: int) -> npt.NDArray[np.int64]:
    """Groups, of those that stay so far first the ones whose loss costs least."""
    if size == 1:
        scores = np.square(w).sum(axis=1) / np.where(alive, inverse.diagonal(), 1.0)
    else:
        shape = (len(alive), size, -1)
        blocks = inverse.reshape(len(alive), size, len(alive), size)[range(len(alive)), :, range(len(alive))]
        blocks = np.where(alive[:, None, None], blocks, np.eye(size))
        scores = np.einsum("gkn,gkn->g", w.reshape(shape), np.linalg.solve(blocks, w.reshape(shape)))
    return np.argsort(np.where(alive, scores, np.inf), kind="stable")


def _inverse(hessian: Floats, damping: float) -> Floats:
    """Of the damped hessian; the identity where it is 0."""
    if not hessian.diagonal().max(initial=0.0) > 0:
        return np.eye(len(hessian))
    dead = hessian.diagonal() <= 0
    for _ in range(ATTEMPTS):
        tempered = damped(hessian, damping)
        tempered[dead, dead] = tempered.diagonal().max()
        try:
            factor = np.linalg.inv(np.linalg.cholesky(tempered))
            return np.asarray(factor.T @ factor)
        except np.linalg.LinAlgError:
            damping *= 10
    return np.asarray(np.diag(1 / tempered.diagonal()))
