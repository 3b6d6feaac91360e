"""Weights of a layer that become 0, and what the others become to make up for them.

A layer y = x w has K inputs and N outputs: x [R, K], w [K, N]. With H = x^T x over calibration rows and e the change of
a column of w, the squared change of that output over those rows is e^T H e (see numerics.rounding).

What is wanted is a share of zeros, 0 to 1, or a Pattern. Of n weights that compete, a share makes floor(share * n +
0.5) zeros; of equal scores the earlier one goes first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq.numerics.rounding import Floats, damped, upper_factor

Weights = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

BLOCK = 128  # inputs whose weights compete for zeros
COLUMNS = 1024  # outputs that are refitted at a time
STEPS = 30  # of conjugate gradients: more change nothing that a model's result shows


@dataclass(frozen=True)
class Pattern:
    """Of every `size` inputs that follow one another an output reads `kept` at most: 2:4 is Pattern(2, 4)."""

    kept: int
    size: int

    def __post_init__(self) -> None:
        """ValueError unless some of the inputs stay and some go."""
        if not 0 < self.kept < self.size:
            raise ValueError(f"{self} prunes nothing or everything; keep some of the inputs, such as 2:4")

    def __str__(self) -> str:
        return f"{self.kept}:{self.size}"

    @property
    def share(self) -> float:
        """That of zeros."""
        return 1 - self.kept / self.size

    @staticmethod
    def parse(text: str) -> Pattern:
        """The pattern that is written N:M. ValueError for anything else."""
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
        if found is None:
            raise ValueError(f"{text!r} is no pattern; write how many of how many inputs stay, such as 2:4")
        return Pattern(int(found[1]), int(found[2]))


Wanted = float | Pattern


def magnitude(w: Weights, wanted: Wanted) -> Mask:
    """Which weights of w [K, N] stay, bool [K, N]: the largest ones of all, or of each group of a pattern.

    ValueError for NaN or infinities, a share outside of 0 to 1, and inputs that no groups of a pattern make up.
    """
    scores = np.abs(_checked(w, wanted))
    if isinstance(wanted, Pattern):
        return _largest_of_groups(scores, wanted)
    return ~_smallest(scores.reshape(-1), _count(wanted, scores.size)).reshape(scores.shape)


def wanda(w: Weights, norms: Floats, wanted: Wanted) -> Mask:
    """Which weights stay, bool [K, N]: of each output those with the largest |w| * |x|, or of each of its groups.

    norms: [K], the Euclidean norm of each input over calibration rows; its scale has no influence. ValueError as for
    magnitude, and for norms that don't fit. Source: Wanda (arXiv 2306.11695).
    """
    scores = np.abs(_checked(w, wanted))
    if norms.shape != (len(scores),) or not np.isfinite(norms).all():
        raise ValueError(f"norms {list(norms.shape)} don't fit w {list(w.shape)}; give a finite one for each input")
    scores = scores * norms[:, None]
    if isinstance(wanted, Pattern):
        return _largest_of_groups(scores, wanted)
    gone = np.zeros(scores.shape, np.bool_)
    first = np.argsort(scores, axis=0, kind="stable")[: _count(wanted, len(scores))]
    np.put_along_axis(gone, first, True, axis=0)
    return ~gone


def sparsegpt(w: Weights, hessian: Floats, wanted: Wanted, damping: float = 0.01, block: int = BLOCK) -> Weights:
    """w with zeros, float32 [K, N], each input's others making up for the zeros of those before it.

    w: [K, N]. hessian: [K, K], symmetric, e.g. Hessian.result(); its scale has no influence. Inputs go in their order.
    Of `block` inputs, or those of a group, the weights go that would cost least once all later ones make up for them:
    w^2 / [H^-1]_jj over the inputs from there on, as they are by then. Blocks compete as a whole, so that outputs may
    differ in their share; w has floor(share * K * N + 0.5) zeros. Inputs with a diagonal of 0 go first, and make up for
    nothing. Where the damped hessian has no Cholesky factor, the weights are those of `magnitude`.

    Source: SparseGPT (arXiv 2301.00774), in the form of rounding.gptq: with U the upper Cholesky factor of the damped
    hessian, U U^T, [H^-1]_jj over the inputs from j on is 1 / U_jj^2, and with e_i the changes of those before, input
    j is moved by -sum(e_i U_ij / U_jj). ValueError as for magnitude, and for a hessian that doesn't fit.
    """
    exact = _checked(w, wanted)
    if hessian.shape != (len(exact), len(exact)) or not np.isfinite(hessian).all():
        raise ValueError(f"hessian {list(hessian.shape)} doesn't fit w {list(w.shape)}; give a finite [K, K]")
    live = hessian.diagonal() > 0
    filled = np.array(hessian, np.float64)
    filled[~live, ~live] = 1.0
    upper = upper_factor(filled, damping)
    if upper is None:
        return np.where(magnitude(w, wanted), w, np.float32(0))
    pivots = np.where(live, upper.diagonal(), 0.0)
    feedback = upper.T / upper.diagonal()[:, None]
    found, changes = np.empty_like(exact), np.zeros_like(exact)
    step = wanted.size if isinstance(wanted, Pattern) else block
    for first in range(0, len(exact), step):
        rows = slice(first, first + step)
        now = exact[rows] - feedback[rows, :first] @ changes[:first]
        scores = np.square(now * pivots[rows, None])
        if isinstance(wanted, Pattern):
            kept = _largest_of_groups(scores, wanted)
        else:
            done = _count(wanted, (first + len(now)) * now.shape[1]) - _count(wanted, first * now.shape[1])
            kept = ~_smallest(scores.reshape(-1), done).reshape(now.shape)
        for i in range(len(now)):
            j = first + i
            moved = now[i] - feedback[j, first:j] @ changes[first:j]
            found[j] = np.where(kept[i], moved, 0.0)
            changes[j] = found[j] - exact[j]
    return found.astype(np.float32)


def refit(w: Weights, pruned: Weights, hessian: Floats, damping: float = 0.01, steps: int = STEPS) -> Weights:
    """`pruned` [K, N] with the weights other than 0 moved to where the outputs are nearest to those of w, float32.

    By the damped hessian [K, K], output for output: least squares over the inputs that an output still reads, by
    conjugate gradients with the diagonal as preconditioner. No step raises the error of the damped problem. ValueError
    as for sparsegpt.
    """
    exact = _checked(w, 0.0)
    if hessian.shape != (len(exact), len(exact)) or not np.isfinite(hessian).all() or pruned.shape != w.shape:
        raise ValueError(f"pruned {list(pruned.shape)} and hessian {list(hessian.shape)} don't fit w {list(w.shape)}; "
                         "give [K, N] and a finite [K, K]")
    tempered = damped(hessian, damping)
    diagonal = tempered.diagonal()[:, None]
    inverse = np.divide(1.0, diagonal, out=np.zeros_like(diagonal), where=diagonal > 0)
    found = np.empty_like(pruned)
    for first in range(0, exact.shape[1], COLUMNS):
        part = slice(first, first + COLUMNS)
        found[:, part] = _descended(exact[:, part], pruned[:, part].astype(np.float64), tempered, inverse, steps)
    return found


def relative_error(w: Weights, pruned: Weights, hessian: Floats) -> float:
    """Squared change of all outputs over their squares, summed over the rows of the hessian; 0 where these are 0."""
    size = float(np.einsum("kn,kn->", w, hessian @ w))
    change = pruned.astype(np.float64) - w
    return max(float(np.einsum("kn,kn->", change, hessian @ change)), 0.0) / size if size > 0 else 0.0


# ------------------------------------------------------------------ parts


def _descended(exact: Floats, x: Floats, hessian: Floats, inverse: Floats, steps: int) -> Floats:
    """x after `steps` of conjugate gradients on the entries that are not 0; inverse [K, 1] is that of the diagonal."""
    kept = x != 0
    left = -(hessian @ (x - exact)) * kept
    way = left * inverse
    size = np.einsum("kn,kn->n", left, way)
    for _ in range(steps):
        moved = hessian @ way
        curve = np.einsum("kn,kn->n", way, moved)
        length = np.divide(size, curve, out=np.zeros_like(size), where=curve > 0)
        x = x + length * way
        left -= length * moved * kept
        ahead = left * inverse
        new = np.einsum("kn,kn->n", left, ahead)
        way = ahead + np.divide(new, size, out=np.zeros_like(size), where=size > 0) * way
        size = new
    return x


def _checked(w: Weights, wanted: Wanted) -> Floats:
    """w as float64. ValueError for what can't be pruned so."""
    values = np.asarray(w, np.float64)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"w {list(values.shape)} is no matrix of finite weights; repair it or leave the layer dense")
    if not isinstance(wanted, Pattern) and not 0 <= wanted <= 1:
        raise ValueError(f"a share of {wanted} is none; give 0 to 1")
    if isinstance(wanted, Pattern) and len(values) % wanted.size:
        raise ValueError(f"{len(values)} inputs make no groups of {wanted.size}; leave the layer dense")
    return values


def _count(share: float, of: int) -> int:
    return int(share * of + 0.5)


def _smallest(scores: Floats, count: int) -> Mask:
    """Which `count` of the scores [n] are the smallest ones."""
    found = np.zeros(scores.size, np.bool_)
    found[np.argsort(scores, kind="stable")[:count]] = True
    return found


def _largest_of_groups(scores: Floats, pattern: Pattern) -> Mask:
    """Which `pattern.kept` of each `pattern.size` scores along the first axis of [K, N] are the largest ones."""
    groups = scores.reshape(-1, pattern.size, scores.shape[1])
    ranks = np.argsort(np.argsort(groups, axis=1, kind="stable"), axis=1, kind="stable")
    return np.asarray(ranks >= pattern.size - pattern.kept).reshape(scores.shape)
