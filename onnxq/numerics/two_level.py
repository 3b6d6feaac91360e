"""4-bit weights that integer kernels read as int8: a scale for each output, a small whole number for each block.

A weight w [K, N] is level * multiple * scale: levels of 4 bits, multiples int8 [ceil(K / B), N] of 4 bits too, which B
inputs of an output share, and scale float32 [N]. What level * multiple gives is an int8 code of the output's scale:

    w[k, n]  ~  (level[k, n] * multiple[k // B, n]) * scale[n]          -8 <= level, multiple <= 7

Codes lie within -56 and 64, so that two of them times uint8 activations add up within 16 bits on any processor (see
affine.largest_pair). Source: the scales of scales of llama.cpp's k-quants; QServe (arXiv 2405.04532), whose second
level is a whole number so that int8 kernels can read what comes of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.numerics import affine, blocks, rounding
from onnxq.numerics.affine import QuantParams
from onnxq.numerics.block_search import Floats, Measure
from onnxq.numerics.dtypes import INT4, INT8

BLOCK_SIZE = 16
LOWEST, HIGHEST = INT4.qmin, INT4.qmax  # of levels and multiples
# Of the scale with which the widest block may get the multiple LOWEST; with the first one HIGHEST holds it, too.
# Smaller ones make all other multiples finer.
SHARES = {"absmax": (8 / 7,), "mse": (8 / 7, 1.07, 1.0, 0.93)}
# Multiples tried of either sign, from the one that just holds a block: smaller ones saturate, and mostly win.
STEPS = {"absmax": (-1, 0), "mse": (-3, -2, -1, 0)}
ROUNDS = 2  # of GPTQ and scales fitted to its levels


@dataclass(frozen=True, eq=False)
class TwoLevel:
    """The two levels of scales: scale float32 [N], multiples int8 [ceil(K / B), N] without 0, B = block_size."""

    scale: Floats
    multiples: npt.NDArray[np.int8]
    block_size: int

    @property
    def blocks(self) -> QuantParams:
        """What levels stand for: parameters of int4 by block, along axis 0."""
        scale = np.asarray(self.multiples * self.scale, np.float32)
        return QuantParams(scale, np.zeros(scale.shape, np.int8), INT4, 0, self.block_size)

    @property
    def channels(self) -> QuantParams:
        """What codes stand for: parameters of int8 for each output, along axis 1."""
        return QuantParams(self.scale, np.zeros(self.scale.shape, np.int8), INT8, 1)

    def codes(self, levels: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
        """int8 codes [K, N] of levels [K, N]."""
        return np.asarray(levels * self._spread(len(levels)), np.int8)

    def levels(self, codes: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
        """The levels [K, N] of codes [K, N]. ValueError where a code is no multiple of its block's."""
        spread = self._spread(len(codes))
        levels = np.asarray(codes // spread, np.int8)
        if not np.array_equal(levels * spread, codes) or levels.min(initial=0) < LOWEST or levels.max(
                initial=0) > HIGHEST:
            raise ValueError("codes are not 4-bit multiples of their blocks'; find them with these parameters")
        return levels

    def _spread(self, inputs: int) -> npt.NDArray[np.int8]:
        return np.repeat(self.multiples, self.block_size, axis=0)[:inputs]


def choose(w: npt.NDArray[np.float32], block_size: int = BLOCK_SIZE, search: blocks.Search = "mse",
           hessian: npt.NDArray[np.float64] | None = None) -> TwoLevel:
    """Two levels of scales for w [K, N].

    Of multiples of either sign that just hold their blocks, and of some smaller ones (STEPS), those that leave the
    least squared error, or the least e^T H e within blocks of `hessian` [K, K]; "mse" tries more of them than "absmax",
    for several scales (SHARES). A column of zeros gets scale 1.0.
    Extra memory: some arrays of blocks.CELLS weights, with a hessian K * B floats.
    ValueError for NaN, infinities and another shape.
    """
    w = np.asarray(w, np.float32)
    if w.ndim != 2 or not np.isfinite(w).all():
        raise ValueError(f"a weight {list(w.shape)} holds NaN or infinities, or is no matrix; repair it or keep the "
                         "node float")
    diagonal = None if hessian is None else blocks.diagonal_blocks(hessian, block_size)
    scale = np.empty(w.shape[1], np.float32)
    multiples = np.empty((-(-len(w) // block_size), w.shape[1]), np.int8)
    for columns, x in _columns(w, block_size):
        scale[columns], multiples[:, columns] = _least_error(x, search, diagonal)
    return TwoLevel(scale, multiples, block_size)


def nearest(w: npt.NDArray[np.float32], found: TwoLevel) -> npt.NDArray[np.int8]:
    """int8 codes [K, N] of w [K, N] with its levels rounded to nearest, halves to even."""
    return found.codes(affine.quantize(np.asarray(w, np.float32), found.blocks))


def gptq(w: npt.NDArray[np.float32], hessian: npt.NDArray[np.float64], found: TwoLevel,
         damping: float = 0.01) -> tuple[npt.NDArray[np.int8], TwoLevel]:
    """(int8 codes [K, N], scales fitted to them): levels by rounding.gptq and each output's scale in turn.

    The scale of an output is that with the least e^T H e for its codes, H the damped hessian: q^T H w / q^T H q. Of
    ROUNDS each output keeps the best by that measure. ValueError as for rounding.gptq.
    """
    tempered = rounding.damped(hessian, damping)
    aim = tempered @ w
    whole = np.einsum("kn,kn->n", aim, w)
    best, scale, least = np.zeros(w.shape, np.int8), found.scale, np.full(w.shape[1], np.inf)
    for _ in range(ROUNDS):
        codes = found.codes(rounding.gptq(w, hessian, found.blocks, damping))
        levels = codes.astype(np.float64)
        along, size = np.einsum("kn,kn->n", levels, aim), np.einsum("kn,kn->n", levels, tempered @ levels)
        fitted = np.where(size > 0, along / np.where(size > 0, size, 1), found.scale).astype(np.float32)
        fitted = np.where(np.abs(fitted) < affine.SMALLEST_SCALE, found.scale, fitted)
        found = replace(found, scale=fitted)
        error = whole - 2 * fitted * along + np.square(fitted, dtype=np.float64) * size
        better = error < least
        least = np.where(better, error, least)
        best, scale = np.where(better, codes, best), np.where(better, fitted, scale)
    return best, replace(found, scale=scale)


def _columns(w: Floats, size: int) -> Iterator[tuple[slice, Floats]]:
    """Some columns at a time, as [nb, B, c] filled up with zeros."""
    inputs = -(-len(w) // size) * size
    step = max(blocks.CELLS // max(inputs, 1), 1)
    for left in range(0, w.shape[1], step):
        part = w[:, left : left + step]
        if inputs > len(w):
            part = np.concatenate([part, np.zeros((inputs - len(w), part.shape[1]), np.float32)])
        yield slice(left, left + part.shape[1]), part.reshape(-1, size, part.shape[1])


def _least_error(x: Floats, search: blocks.Search, hessian: Floats | None) -> tuple[Floats, npt.NDArray[Any]]:
    """(scale [c], multiples [nb, c]) for x [nb, B, c]."""
    low, high = x.min(axis=1), x.max(axis=1)
    widest = np.maximum(-low, high).max(axis=0)
    measure, best = Measure(hessian=hessian), None
    for share in SHARES[search]:
        scale = np.maximum(widest * np.float32(share / (LOWEST * LOWEST)), affine.SMALLEST_SCALE)
        scale = np.where(widest > 0, scale, 1).astype(np.float32)
        multiples, errors = _multiples(x, low, high, scale, search, measure)
        total = errors.sum(axis=0, dtype=np.float64)
        if best is None:
            best = total, scale, multiples
        better = total < best[0]
        best = (np.where(better, total, best[0]), np.where(better, scale, best[1]),
                np.where(better, multiples, best[2]))
    assert best is not None
    return best[1], best[2]


def _multiples(x: Floats, low: Floats, high: Floats, scale: Floats, search: blocks.Search,
               measure: Measure) -> tuple[Floats, Floats]:
    """(multiples, their errors) [nb, c] of blocks for a scale [c]."""
    found, least = np.ones_like(low), np.full_like(low, np.inf)
    sides = ((1, np.maximum(-low / -LOWEST, high / HIGHEST)), (-1, np.maximum(high / -LOWEST, -low / HIGHEST)))
    for sign, step in sides:
        holding, most = np.ceil(step / scale * (1 - 1e-6)), HIGHEST if sign > 0 else -LOWEST
        for fewer in STEPS[search]:
            multiples = (sign * np.clip(holding + fewer, 1, most)).astype(np.float32)
            errors = measure.at(x, multiples * scale, 0.0 - LOWEST, INT4)
            better = errors < least
            found, least = np.where(better, multiples, found), np.where(better, errors, least)
    return found, least
