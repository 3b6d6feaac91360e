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

BLOCK = 32  # inputs whose weights compete for zeros
COLUMNS = 1024  # outputs that are refitted at a time, and compete for exchanges
STEPS, FEW_STEPS = 30, 8  # of conjugate gradients, at last and between exchanges: more gain next to nothing
ROUNDS = 8  # of exchanges
EXCHANGED = 0.01  # of all weights, in a round at most; half as many after a round that gained nothing


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
    factor = upper_factor(hessian[np.ix_(live, live)], damping)
    if factor is None:
        return np.where(magnitude(w, wanted), w, np.float32(0))
    upper = np.eye(len(exact))
    upper[np.ix_(live, live)] = factor
    pivots = np.where(live, upper.diagonal(), 0.0)
    feedback = upper.T / upper.diagonal()[:, None]
    found, changes = np.empty_like(exact), np.zeros_like(exact)
    step = wanted.size if isinstance(wanted, Pattern) else block
    for first in range(0, len(exact), step):
        rows = slice(first, first + step)
        start = exact[rows] - feedback[rows, :first] @ changes[:first]
        now, inside = np.array(start), feedback[rows, rows]
        for i in range(1, len(now)):  # as they are once nothing of the block changes any more
            now[i] -= inside[i, :i] @ (now[:i] - exact[rows][:i])
        scores = np.square(now * pivots[rows, None])
        if isinstance(wanted, Pattern):
            kept = _largest_of_groups(scores, wanted)
        else:
            done = _count(wanted, (first + len(now)) * now.shape[1]) - _count(wanted, first * now.shape[1])
            kept = ~_smallest(scores.reshape(-1), done).reshape(now.shape)
        for i in range(len(now)):
            j = first + i
            moved = start[i] - inside[i, :i] @ changes[first:j]
            found[j] = np.where(kept[i], moved, 0.0)
            changes[j] = found[j] - exact[j]
    return found.astype(np.float32)


def refit(w: Weights, pruned: Weights, hessian: Floats, damping: float = 0.01, steps: int = STEPS) -> Weights:
    """`pruned` [K, N] with the weights other than 0 moved to where the outputs are nearest to those of w, float32.

    By the damped hessian [K, K], output for output: least squares over the inputs that an output still reads, by
    conjugate gradients with the diagonal as preconditioner. No step raises the error of the damped problem. ValueError
    as for sparsegpt.
    """
    return exchange(w, pruned, hessian, None, damping, 0, steps)


def exchange(w: Weights, pruned: Weights, hessian: Floats, pattern: Pattern | None = None, damping: float = 0.01,
             rounds: int = ROUNDS, steps: int = STEPS) -> Weights:
    """`pruned` [K, N] with zeros moved to where they cost less, and the other weights refitted, float32.

    While others stay, a zero that may be another number again lowers the squared error of its output by (H e)_k^2 /
    H_kk, and a weight that becomes 0 raises it by w_k^2 H_kk. In each round the zeros that gain most are exchanged for
    the weights that cost least, of COLUMNS outputs together or, with a pattern, of one group; the rest is refitted, and
    what does not lower the error of the damped hessian is taken back. The number of zeros stays, as do patterns.
    ValueError as for sparsegpt.
    """
    exact = _checked(w, 0.0 if pattern is None else pattern)
    if hessian.shape != (len(exact), len(exact)) or not np.isfinite(hessian).all() or pruned.shape != w.shape:
        raise ValueError(f"pruned {list(pruned.shape)} and hessian {list(hessian.shape)} don't fit w {list(w.shape)}; "
                         "give [K, N] and a finite [K, K]")
    tempered = damped(hessian, damping)
    found = np.empty(exact.shape, np.float32)
    for first in range(0, exact.shape[1], COLUMNS):
        part = slice(first, first + COLUMNS)
        search = _Search(exact[:, part], tempered, pattern)
        found[:, part] = search.run(pruned[:, part].astype(np.float64), rounds, steps)
    return found


def relative_error(w: Weights, pruned: Weights, hessian: Floats) -> float:
    """Squared change of all outputs over their squares, summed over the rows of the hessian; 0 where these are 0."""
    size = float(np.einsum("kn,kn->", w, hessian @ w))
    change = pruned.astype(np.float64) - w
    return max(float(np.einsum("kn,kn->", change, hessian @ change)), 0.0) / size if size > 0 else 0.0


# ------------------------------------------------------------------ parts


@dataclass(frozen=True, eq=False)
class _Search:
    """Of the weights that stand for `exact` [K, N] best by a hessian [K, K], those of a pattern if there is one."""

    exact: Floats
    hessian: Floats
    pattern: Pattern | None

    def run(self, x: Floats, rounds: int, steps: int) -> Floats:
        """x after some rounds of exchanges and a last refit."""
        kept, share = x != 0, EXCHANGED
        if rounds:
            x = self.refitted(x, kept, FEW_STEPS)
            least = self.error(x)
        for _ in range(rounds):
            tried = self.exchanged(x, kept, int(share * x.size) + 1)
            if tried is None:
                break
            moved = self.refitted(np.where(tried, x, 0.0), tried, FEW_STEPS)
            error = self.error(moved)
            if error < least:
                x, kept, least = moved, tried, error
            else:
                share /= 2
        return self.refitted(x, kept, steps)

    def error(self, x: Floats) -> float:
        change = x - self.exact
        return float(np.einsum("kn,kn->", change, self.hessian @ change))

    def exchanged(self, x: Floats, kept: Mask, count: int) -> Mask | None:
        """`kept` after at most `count` exchanges; None where none gains anything."""
        diagonal = self.hessian.diagonal()[:, None]
        slope = self.hessian @ (x - self.exact)
        gain = np.divide(np.square(slope), diagonal, out=np.zeros_like(x), where=(diagonal > 0) & ~kept)
        cost = np.where(kept, np.square(x) * diagonal, np.inf)
        freed, gone = self.best(gain, cost, min(count, x.size))
        better = gain.reshape(-1)[freed] > cost.reshape(-1)[gone]
        if not better.any():
            return None
        found = kept.reshape(-1).copy()
        found[freed[better]], found[gone[better]] = True, False
        return found.reshape(kept.shape)

    def best(self, gain: Floats, cost: Floats, count: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """The places of `count` zeros that gain most, and of as many weights that cost least to go for them."""
        if self.pattern is None:
            return (np.argsort(-gain.reshape(-1), kind="stable")[:count],
                    np.argsort(cost.reshape(-1), kind="stable")[:count])
        size, outputs = self.pattern.size, gain.shape[1]
        first, column = np.divmod(np.arange(gain.size // size), outputs)
        most, least = (part.reshape(-1, size, outputs) for part in (gain, cost))
        freed = (first * size + most.argmax(axis=1).reshape(-1)) * outputs + column
        gone = (first * size + least.argmin(axis=1).reshape(-1)) * outputs + column
        wanted = np.argsort((least.min(axis=1) - most.max(axis=1)).reshape(-1), kind="stable")[:count]
        return freed[wanted], gone[wanted]

    def refitted(self, x: Floats, kept: Mask, steps: int) -> Floats:
        """x after some steps of conjugate gradients on the entries that are kept, whose others are 0."""
        diagonal = self.hessian.diagonal()[:, None]
        inverse = np.divide(1.0, diagonal, out=np.zeros_like(diagonal), where=diagonal > 0)
        left = -(self.hessian @ (x - self.exact)) * kept
        way = left * inverse
        size = np.einsum("kn,kn->n", left, way)
        for _ in range(steps):
            moved = self.hessian @ way
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
