"""Codes of a weight that keep a layer's output, not each weight by itself, near the float one.

A layer y = x w has K inputs and N outputs: x [R, K], w [K, N]. With H = x^T x over calibration rows and e the error of
a column of w, the squared error of that output over those rows is e^T H e. Rounding to nearest minimises each entry of
e by itself; here the errors of inputs that move together are set off against one another.

A *level* is a code less its zero point, so w ~ level * scale; `exact` is w / scale, the level it would have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.numerics import affine
from onnxq.numerics.affine import QuantParams, quantize

Floats = npt.NDArray[np.float64]

CHUNK = 4096  # rows of a product in float32, which loses about sqrt(CHUNK) * 2**-24 of the sum
WIDE = 1e12  # activations beyond it, or all of them below its inverse, are squared in float64

ATTEMPTS = 5  # at a Cholesky factor, each with ten times the damping of the last
LEAST_DAMPING = 1e-6  # where none was asked for and none does not do
LEAST_PIVOT = 1e-12  # of the largest diagonal entry; what is below is what rounding left of 0

SWEEPS = 2  # over the blocks of a column, each scale in turn; more gain next to nothing

PAIR = 128  # what two codes of a sign may add up to: see affine.largest_pair


class Hessian:
    """Running sum x^T x, float64 [K, K], over rows x [K]; `count` is the number of rows.

    Half of what mathematics calls the Hessian of the squared output error. Memory: K * K doubles, as many float32 while
    a batch is folded in, and CHUNK rows.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum: Floats = np.zeros((0, 0))

    def update(self, x: npt.NDArray[Any]) -> None:
        """Fold in the rows of a batch [.., K] of any real dtype.

        Products are summed in float32 over at most CHUNK rows, then in float64.
        ValueError, with nothing folded in, for NaN, infinities, a scalar or another K than before.
        """
        x = np.asarray(x)
        if x.ndim == 0:
            raise ValueError("a scalar has no inputs to sum over; pass rows [.., K]")
        self._fit(x.shape[-1])
        rows: npt.NDArray[Any] = x.reshape(-1, x.shape[-1])
        if not rows.size:
            self.count += len(rows)
            return
        least, most = float(rows.min()), float(rows.max())  # NaN when any is
        if not np.isfinite([least, most]).all():
            raise ValueError("activations hold NaN or infinities; leave that batch out or keep the node float")
        peak = max(-least, most)
        dtype = np.float32 if 1 / WIDE < peak < WIDE else np.float64
        for first in range(0, len(rows), CHUNK):
            part: npt.NDArray[Any] = rows[first : first + CHUNK].astype(dtype, copy=False)
            self._sum += part.T @ part
        self.count += len(rows)

    def merge(self, other: Hessian) -> None:
        """Fold in everything that `other` has seen. ValueError when it has another K."""
        if other._sum.size:
            self._fit(len(other._sum))
            self._sum += other._sum
        self.count += other.count

    def result(self) -> Floats:
        """The sum [K, K], a copy; [0, 0] before the first batch."""
        return self._sum.copy()

    def _fit(self, inputs: int) -> None:
        if not self._sum.size:
            self._sum = np.zeros((inputs, inputs))
        elif len(self._sum) != inputs:
            raise ValueError(f"rows of {inputs} inputs follow rows of {len(self._sum)}; use one statistic per layer")


def damped(hessian: Floats, damping: float) -> Floats:
    """hessian [K, K] with `damping` times the mean of its positive diagonal entries added to the diagonal, as a copy.

    It keeps errors small that the calibration rows did not ask to be small. Rows without a positive entry stay as
    they are.
    """
    result = np.array(hessian, dtype=np.float64)
    diagonal = result.diagonal()
    live = np.flatnonzero(diagonal > 0)
    if live.size:
        result[live, live] += damping * diagonal[live].mean()
    return result


def output_error(w: npt.NDArray[np.float32], codes: npt.NDArray[Any], params: QuantParams, hessian: Floats) -> Floats:
    """Squared error of each output, summed over the rows of the hessian: (wq - w)^T H (wq - w), float64 [N].

    w float32 [K, N], codes [K, N] with wq = (codes - zero point) * scale, params and hessian as for gptq; ValueError
    likewise. Roundings that leave a sum below 0 are taken for 0.
    """
    grid = _grid(w, params, hessian, None, False, codes)
    error = grid.levels - grid.exact
    for rows, unit in zip(grid.blocks(), grid.unit, strict=True):
        error[rows] *= unit
    squares = _dot(error, hessian @ error)
    return np.asarray(np.maximum(squares, 0.0) * np.square(grid.scale[:1]).prod(axis=0))


def gptq(w: npt.NDArray[np.float32], hessian: Floats, params: QuantParams, damping: float = 0.01, block: int = 128,
         lowest: int | None = None, pairs: bool = False,
         kept: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[Any]:
    """Codes [K, N], params.dtype.storage, rounded one input after the other, each making up for those before it.

    w: float32 [K, N]. hessian: [K, K], symmetric, e.g. Hessian.result(); its scale has no influence. params: per
    tensor, per channel along axis 1, or by block along axis 0; each input keeps the scale of its block, in whatever
    order. lowest: the least code allowed; None for the least of the type by block, and where nearest rounding has it in
    that column, and for one more elsewhere. pairs: inputs 2i and 2i + 1 get codes of which those of one sign add up to
    PAIR at most (zero points 0): the later one of a pair takes what the first left. kept: bool [K, N]; where it is
    False the level is 0, and others make up for it.

    Inputs go by falling diagonal; of each block only what concerns later blocks is left to one product. Inputs with
    a diagonal of 0 are rounded to nearest and make up for nothing. Where the damped hessian has no Cholesky factor,
    damping is raised tenfold; after ATTEMPTS of that all inputs are rounded to nearest.
    With U the upper Cholesky factor of the damped hessian, U U^T, the error of the damped problem is at most
    sum(scale**2 U_kk**2) / 4 for columns in which no code was clipped; a column may come out worse than nearest.

    Source: GPTQ (arXiv 2210.17323) with act-order, in the form of Babai's nearest plane (arXiv 2507.18553):
    with e_i = level - exact of inputs already rounded, input j is rounded to exact_j - sum(e_i U_ij / U_jj). The same
    codes as from the Cholesky factor of the inverse, without an inverse.
    ValueError for shapes that don't fit, NaN or infinities, and a `lowest` that hides 0.
    """
    grid = _grid(w, params, hessian, lowest, pairs, kept=kept)
    diagonal = hessian.diagonal()
    order = np.argsort(-diagonal, kind="stable")
    order = order[diagonal[order] > 0]
    feedback = _feedback(hessian[np.ix_(order, order)], damping)
    if feedback is None:
        order = order[:0]
    else:
        _round_in_turn(grid, order, feedback, block)
    left = np.setdiff1d(np.arange(len(w)), order)
    nearest = quantize(w, params) if left.size else w
    for k in left:
        grid.levels[k] = grid.fit(k, nearest[k] - grid.zero_point[k // grid.size])
    return grid.codes(params)


def gptq_refit(w: npt.NDArray[np.float32], hessian: Floats, params: QuantParams, damping: float = 0.01,
               rounds: int = 2) -> tuple[npt.NDArray[Any], QuantParams]:
    """(codes [K, N], parameters) by gptq and refit in turn, `rounds` times; each column keeps the best that it had.

    The best by the error of the damped hessian, so no column is worse than gptq followed by one refit. w, hessian and
    damping as for gptq, params by block along axis 0; ValueError likewise.
    """
    tempered = damped(hessian, damping)
    codes = gptq(w, hessian, params, damping)
    params, least = _refit(w, codes, params, tempered)
    best, scale = codes, params.scale
    for _ in range(rounds - 1):
        codes = gptq(w, hessian, params, damping)
        params, error = _refit(w, codes, params, tempered)
        better = error < least
        least = np.where(better, error, least)
        best, scale = np.where(better, codes, best), np.where(better, params.scale, scale)
    return best, replace(params, scale=scale)


def refit(w: npt.NDArray[np.float32], codes: npt.NDArray[Any], params: QuantParams, hessian: Floats) -> QuantParams:
    """`params` with scales for which `codes` give less output error: scales of the blocks of a column in turn.

    w, params by block along axis 0 and hessian as for gptq; codes [K, N]. With e the error of a column and l the
    levels of a block, g = (H e) of its inputs, the scale that is best while others stay is less by l.g / l.Hl. All are
    taken SWEEPS times, from the first inputs on; no step raises the error. Zero points stay. ValueError as for gptq.
    """
    return _refit(w, codes, params, hessian)[0]


@dataclass(frozen=True, eq=False)
class _Grid:
    """Levels of a weight, to be chosen in place: exact and levels [K, N], the others by block of `size` inputs [b, N].

    unit: what a level of the block is in terms of one of the first block; all 1.0 where there is one block only.
    """

    exact: Floats
    levels: Floats
    scale: Floats
    unit: Floats
    zero_point: Floats
    low: Floats
    high: Floats
    size: int
    pairs: bool
    kept: npt.NDArray[np.bool_] | None

    def fit(self, k: int, wanted: Floats) -> Floats:
        """The allowed levels of input k nearest to `wanted`, [N] each, given the level of its neighbour."""
        low, high = self.limits(k)
        return np.clip(np.rint(wanted), low, high)

    def limits(self, k: int) -> tuple[Floats, Floats]:
        """The least and the largest level of input k, [N] each; 0 is always between them."""
        low, high = self.low[k // self.size], self.high[k // self.size]
        if self.kept is not None:
            low, high = low * self.kept[k], high * self.kept[k]
        if not self.pairs or k ^ 1 >= len(self.levels):
            return low, high
        other = self.levels[k ^ 1]  # 0, which limits nothing, while it is not chosen
        low = np.maximum(low, -PAIR - np.minimum(other, 0.0))
        return low, np.minimum(high, PAIR - np.maximum(other, 0.0))

    def blocks(self) -> list[slice]:
        """The inputs of each block."""
        return [slice(first, first + self.size) for first in range(0, len(self.scale) * self.size, self.size)]

    def codes(self, params: QuantParams) -> npt.NDArray[Any]:
        """The levels as codes."""
        codes = np.empty(self.levels.shape, params.dtype.storage)
        for rows, zero_point in zip(self.blocks(), self.zero_point, strict=True):
            codes[rows] = self.levels[rows] + zero_point
        return codes


def _grid(w: npt.NDArray[np.float32], params: QuantParams, hessian: Floats, lowest: int | None, pairs: bool,
          codes: npt.NDArray[Any] | None = None, kept: npt.NDArray[np.bool_] | None = None) -> _Grid:
    """The levels of w [K, N]: those of `codes`, or 0 where none are given. ValueError for what does not fit."""
    w = np.asarray(w, dtype=np.float32)
    if kept is not None and kept.shape != w.shape:
        raise ValueError(f"kept {list(kept.shape)} doesn't fit w {list(w.shape)}; give one for each weight")
    if w.ndim != 2 or hessian.shape != (len(w), len(w)) or (codes is not None and codes.shape != w.shape):
        raise ValueError(f"w {list(w.shape)}, hessian {list(hessian.shape)} and codes don't fit; "
                         "use [K, N], [K, K] and [K, N]")
    if not (np.isfinite(w).all() and np.isfinite(hessian).all()):
        raise ValueError("a weight or hessian holds NaN or infinities; repair the weights or keep the node float")
    if pairs and params.zero_point.any():
        raise ValueError("pairs are limited for symmetric signed codes only; use zero points of 0")
    size = params.block_size or max(len(w), 1)
    scale, zero_point = (_by_block(part, params, w.shape, size) for part in (params.scale, params.zero_point))
    least = _least(w, params, lowest) - zero_point
    grid = _Grid(np.empty(w.shape), np.zeros(w.shape), scale, scale / scale[:1], zero_point, least,
                 params.dtype.qmax - zero_point, size, pairs, kept)
    for b, rows in enumerate(grid.blocks()):
        grid.exact[rows] = w[rows] / scale[b]
        if codes is not None:
            grid.levels[rows] = codes[rows] - zero_point[b]
    return grid


def _by_block(part: npt.NDArray[Any], params: QuantParams, shape: tuple[int, ...], size: int) -> Floats:
    """A scale or zero point as float64 [b, N], b = 1 where all inputs share it. ValueError where it does not fit."""
    if params.block_size is None:
        if part.size == 1 or (params.axis in (1, -1) and part.shape == shape[1:]):
            return np.broadcast_to(part.reshape(1, -1).astype(np.float64), (1, shape[1]))
    elif params.axis in (0, -2) and part.shape == (-(-shape[0] // size), shape[1]):
        return part.astype(np.float64)
    raise ValueError(f"parameters of shape {list(part.shape)} along axis {params.axis} don't fit w {list(shape)}; use "
                     "one per tensor, or per channel along axis 1, or by block along axis 0")


def _least(w: npt.NDArray[np.float32], params: QuantParams, lowest: int | None) -> Floats:
    """The least code that may be chosen, [N] or [1]: see `lowest` of gptq."""
    if lowest is not None:
        if not params.dtype.qmin <= lowest <= params.zero_point.min(initial=params.dtype.qmax):
            raise ValueError(f"lowest is {lowest}; use a code of {params.dtype.name} up to the zero point")
        return np.array([float(lowest)])
    if params.block_size is not None:
        return np.array([float(params.dtype.qmin)])
    used = (quantize(w, params) == params.dtype.qmin).any(axis=0)
    return np.where(used, float(params.dtype.qmin), params.dtype.qmin + 1.0)


def _refit(w: npt.NDArray[np.float32], codes: npt.NDArray[Any], params: QuantParams,
           hessian: Floats) -> tuple[QuantParams, Floats]:
    """What refit gives, and the error [N] that is left."""
    if params.block_size is None:
        raise ValueError("scales are refitted by block only; choose the parameters with blocks.choose()")
    grid = _grid(w, params, hessian, None, False, codes)
    scale = grid.scale.astype(np.float32)
    error = affine.dequantize(codes, params).astype(np.float64) - w
    gradient = hessian @ error
    for _ in range(SWEEPS):
        for b, rows in enumerate(grid.blocks()):
            levels = grid.levels[rows]
            curve = _dot(levels, hessian[rows, rows] @ levels)
            step = np.divide(_dot(levels, gradient[rows]), curve, out=np.zeros_like(curve), where=curve > 0)
            new = (scale[b] - step).astype(np.float32)
            new = np.where(np.abs(new) < affine.SMALLEST_SCALE, scale[b], new)
            moved = levels * (new.astype(np.float64) - scale[b])
            scale[b] = new
            error[rows] += moved
            gradient += hessian[:, rows] @ moved
    return replace(params, scale=scale), _dot(error, gradient)


def _dot(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.einsum("kn,kn->n", a, b))


def upper_factor(hessian: Floats, damping: float) -> Floats | None:
    """U [n, n], upper triangle with a positive diagonal: U U^T is the damped hessian; None where there is none.

    Damping is raised tenfold up to ATTEMPTS times. numpy has lower factors only: with L that of the hessian back to
    front, U is L back to front.
    """
    for _ in range(ATTEMPTS):
        try:
            lower = np.linalg.cholesky(damped(hessian, damping)[::-1, ::-1])
        except np.linalg.LinAlgError:
            lower = np.zeros_like(hessian)
        pivots = lower.diagonal()
        if pivots.size == 0 or pivots.min() ** 2 > LEAST_PIVOT * hessian.diagonal().max():
            return np.asarray(lower[::-1, ::-1])
        damping = max(10 * damping, LEAST_DAMPING)
    return None


def _feedback(hessian: Floats, damping: float) -> Floats | None:
    """[n, n], lower triangle: what the errors of inputs before each one move it by; None without a Cholesky factor.

    For the upper factor U of the damped hessian U U^T, entry (j, i) is U_ij / U_jj.
    """
    upper = upper_factor(hessian, damping)
    return None if upper is None else np.asarray(upper.T / upper.diagonal()[:, None])


def _round_in_turn(grid: _Grid, order: npt.NDArray[np.intp], feedback: Floats, block: int) -> None:
    """Choose the levels of the inputs in `order` [n], each after what `feedback` [n, n] makes of the errors before."""
    errors = np.zeros((len(order), grid.exact.shape[1]))  # in levels of the first block
    for first in range(0, len(order), block):
        rows = slice(first, first + block)
        units = grid.unit[order[rows] // grid.size]
        wanted = grid.exact[order[rows]] - feedback[rows, :first] @ errors[:first] / units
        for i, k in enumerate(order[rows]):
            j = first + i
            grid.levels[k] = grid.fit(k, wanted[i] - feedback[j, first:j] @ errors[first:j] / units[i])
            errors[j] = (grid.levels[k] - grid.exact[k]) * units[i]
