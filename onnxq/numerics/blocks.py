"""Weights in blocks along their inputs, each block with its own scale and zero point: what weight-only kernels read.

A weight is w [K, N], K inputs and N outputs; blocks of B run along K, the last one may be short. Its parameters are
QuantParams(scale, zero_point, dtype, axis=0, block_size=B), scale and zero_point [ceil(K / B), N]. Work goes by chunks
of some blocks and columns that stay in the processor's cache, in threads: numpy lets go of the interpreter in between.

*Symmetric*: the zero point is the middle code, 2**(bits - 1) above qmin. There is one code more below the middle than
above, so the scale takes the sign that suits the block: negative scales are as good as positive ones to
(q - zero_point) * scale, to onnxruntime's kernels as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnxq.numerics import affine, packing
from onnxq.numerics.affine import LARGEST_SCALE, SMALLEST_SCALE, QuantParams
from onnxq.numerics.dtypes import DType
from onnxq.numerics.packing import Blobs

Floats = npt.NDArray[np.float32]
Search = Literal["absmax", "mse"]
Found = tuple[Floats, npt.NDArray[Any]]  # scale and zero point [b, c] of a chunk x [b, B, c]

CELLS = 1 << 16  # weights of a chunk: with the arrays made of them they fit the second level cache of a core
COLUMNS = 512  # of a chunk: 2 kB of a row of the weight at a time

# Factors of the range that just holds a block, by bits, that the search for the least squared error tries. What is best
# for normally distributed weights is near 0.9 for 4 bits and 0.4 to 0.7 for 2; 8 bits gain by the choice of sign alone.
FACTORS = {2: 1 - 0.07 * np.arange(11), 4: 1 - 0.02 * np.arange(11), 8: 1 - 0.01 * np.arange(3)}


def choose(w: npt.NDArray[Any], dtype: DType, block_size: int, symmetric: bool,
           search: Search = "absmax") -> QuantParams:
    """Parameters for w [K, N], float32 or float16, by blocks of `block_size` along axis 0.

    "absmax": a range that just holds the block. Symmetric: scale = m / -2**(bits - 1) with m the weight of the largest
    magnitude (of two that differ in sign the negative one), which gets the code qmin; other signs of that size
    saturate. Asymmetric: as affine.choose. A block of zeros gets scale 1.0.
    "mse": of ranges shrunk by FACTORS the one with the least squared error, never worse than "absmax". Symmetric: with
    either sign of the scale, from the one that gives m the code qmin or qmax on. Asymmetric: both ends alike first,
    then each by itself.
    Scales are normal float32 numbers. Extra memory: some arrays of CELLS per thread.
    ValueError for NaN or infinities, another shape and types that are not of 2, 4 or 8 bits.
    """
    layout = _layout(w, dtype, block_size)
    scale = np.empty((layout.blocks, layout.outputs), np.float32)
    zero_point = np.empty(scale.shape, dtype.storage)

    def work(chunk: _Chunk) -> None:
        scale[chunk.place], zero_point[chunk.place] = _searched(chunk.read(w), dtype, symmetric, search)

    _each(layout, work)
    return QuantParams(scale, zero_point, dtype, 0, block_size)


def quantize_packed(w: npt.NDArray[Any], dtype: DType, block_size: int, symmetric: bool,
                    search: Search = "absmax") -> Blobs:
    """packing.pack_matmul(affine.quantize(w, params), params) for params = choose(..), in one go over w.

    Arguments, memory and errors as for choose; ValueError, too, for blocks that don't fill bytes.
    """
    layout = _layout(w, dtype, block_size)
    bits = dtype.bits
    if block_size * bits % 8:
        raise ValueError(f"blocks of {block_size} codes of {dtype.name} don't fill bytes; use larger ones")
    codes = np.empty((layout.outputs, layout.blocks, block_size * bits // 8), np.uint8)
    scales = np.empty(codes.shape[:2], np.float32)
    zero_points = np.empty(codes.shape[:2], dtype.storage)

    def work(chunk: _Chunk) -> None:
        x = chunk.read(w)
        scale, zero_point = _searched(x, dtype, symmetric, search)
        place = chunk.place[::-1]
        scales[place], zero_points[place] = scale.T, zero_point.T
        zeros = packing.stored(zero_point, dtype)
        packing.pack_blocks(_codes(x, scale, zeros, block_size, 2**bits - 1), bits, codes[place])

    _each(layout, work)
    return codes, scales, packing.pack_zero_points(zero_points, dtype)


@dataclass(frozen=True)
class _Layout:
    """Where the blocks of a weight [inputs, outputs] lie; `size` is that of a whole block."""

    inputs: int
    outputs: int
    size: int

    @property
    def blocks(self) -> int:
        """How many blocks a column has, a short one included."""
        return -(-self.inputs // self.size)

    def chunks(self) -> Iterator[_Chunk]:
        """All of the weight; a short block comes by itself."""
        whole = self.inputs // self.size
        columns = min(max(CELLS // self.size, 1), COLUMNS)
        step = max(CELLS // (self.size * max(min(columns, self.outputs), 1)), 1)
        for left in range(0, self.outputs, columns):
            right = min(left + columns, self.outputs)
            for first in range(0, whole, step):
                last = min(first + step, whole)
                yield _Chunk(slice(first * self.size, last * self.size), (slice(first, last), slice(left, right)))
            if whole < self.blocks:
                yield _Chunk(slice(whole * self.size, self.inputs), (slice(whole, whole + 1), slice(left, right)))


@dataclass(frozen=True)
class _Chunk:
    """Some blocks of some columns: `rows` of the weight, `place` (blocks, columns) in its parameters."""

    rows: slice
    place: tuple[slice, slice]

    def read(self, w: npt.NDArray[Any]) -> Floats:
        """[b, B, c], a view where w is float32."""
        part = w[self.rows, self.place[1]].astype(np.float32, copy=False)
        return part.reshape(self.place[0].stop - self.place[0].start, -1, part.shape[1])


def _layout(w: npt.NDArray[Any], dtype: DType, block_size: int) -> _Layout:
    if w.ndim != 2 or w.dtype not in (np.float32, np.float16):
        raise ValueError(f"a weight is {w.dtype} {list(w.shape)}; use float32 or float16 [K, N]")
    if dtype.bits not in FACTORS or block_size < 1:
        raise ValueError(f"no blocks of {block_size} {dtype.name}; use 1 or more of 2, 4 or 8 bits")
    return _Layout(w.shape[0], w.shape[1], block_size)


def _each(layout: _Layout, work: Callable[[_Chunk], None]) -> None:
    """Do `work` on all chunks, on all processors that this process may use."""
    threads = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    chunks = list(layout.chunks())
    if min(threads, len(chunks)) < 2:
        for chunk in chunks:
            work(chunk)
        return
    with ThreadPoolExecutor(min(threads, len(chunks))) as pool:
        for _ in pool.map(work, chunks):
            pass


def _codes(x: Floats, scale: Floats, zeros: npt.NDArray[np.uint8], size: int, most: int) -> npt.NDArray[np.uint8]:
    """Stored codes [b, size, c] of x [b, B, c] as affine.quantize rounds them; a short block ends with its zeros."""
    with np.errstate(over="ignore"):
        levels = x / scale[:, None]
    np.rint(levels, out=levels)
    levels += zeros[:, None]
    np.clip(levels, 0, most, out=levels)
    codes = levels.astype(np.uint8)
    if codes.shape[1] < size:
        filler = np.broadcast_to(zeros[:, None], (len(zeros), size - codes.shape[1], zeros.shape[1]))
        codes = np.concatenate([codes, filler], axis=1)
    return codes


# ------------------------------------------------------------------ searches, each over a chunk x [b, B, c]


def _searched(x: Floats, dtype: DType, symmetric: bool, search: Search) -> Found:
    low, high = x.min(axis=1), x.max(axis=1)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("a weight holds NaN or infinities; repair it or keep the node float")
    if symmetric:
        scale = _signed_scale(low, high, dtype)
        if search == "mse":
            scale = _least_symmetric(x, scale, dtype)
        return scale, np.full(scale.shape, dtype.qmin + 2 ** (dtype.bits - 1), dtype.storage)
    if search == "mse":
        return _least_asymmetric(x, low, high, dtype)
    params = affine.choose(low, high, dtype)
    return params.scale, params.zero_point


def _signed_scale(low: Floats, high: Floats, dtype: DType) -> Floats:
    """The scale [b, c] that gives the weight of the largest magnitude the code qmin."""
    return _normal(np.where(-low >= high, low, high) / np.float32(-(2 ** (dtype.bits - 1))))


def _normal(scale: npt.NDArray[Any]) -> Floats:
    """`scale` as normal numbers of the same sign; 1.0 in place of 0."""
    size = np.clip(np.abs(scale), SMALLEST_SCALE, LARGEST_SCALE)
    return np.where(scale == 0, np.float32(1), np.copysign(size, scale)).astype(np.float32)


def _least_symmetric(x: Floats, scale: Floats, dtype: DType) -> Floats:
    """The factor of `scale`, of either sign, with the least squared error; the first of equals."""
    half = 2.0 ** (dtype.bits - 1)
    best, least = scale, _squared_error(x, scale, half, dtype)
    for factor in (*FACTORS[dtype.bits][1:], *-FACTORS[dtype.bits] * half / (half - 1)):
        trial = _normal(scale * factor)
        error = _squared_error(x, trial, half, dtype)
        better = error < least
        best, least = np.where(better, trial, best), np.where(better, error, least)
    return best


def _least_asymmetric(x: Floats, low: Floats, high: Floats, dtype: DType) -> Found:
    """Scale and zero point of the shrunk range with the least squared error; the first of equals."""
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    best = affine.choose(low, high, dtype)
    scale, zero_point = best.scale, best.zero_point
    least = _squared_error(x, scale, packing.stored(zero_point, dtype), dtype)
    factors = np.ones((2, *low.shape), np.float32)
    for ends in ([0, 1], [0], [1]):
        start = factors.copy()
        for factor in FACTORS[dtype.bits][1:]:
            trial = start.copy()
            trial[ends] *= factor
            params = affine.choose(low * trial[0], high * trial[1], dtype)
            error = _squared_error(x, params.scale, packing.stored(params.zero_point, dtype), dtype)
            better = error < least
            least = np.where(better, error, least)
            scale, zero_point = np.where(better, params.scale, scale), np.where(better, params.zero_point, zero_point)
            factors = np.where(better, trial, factors)
    return scale, zero_point


def _squared_error(x: Floats, scale: Floats, zeros: npt.NDArray[Any] | float, dtype: DType) -> Floats:
    """Squared rounding error [b, c] of x, summed over each block; `zeros` are stored codes, [b, c] or one for all."""
    least = -np.asarray(zeros, np.float32)
    if least.ndim:
        least = least[:, None]
    with np.errstate(over="ignore", invalid="ignore"):  # an error beyond float32 is never the smaller one
        levels = x / scale[:, None]
        error = np.rint(levels)
        np.clip(error, least, least + np.float32(2**dtype.bits - 1), out=error)
        error -= levels
        return np.asarray(np.einsum("bkc,bkc->bc", error, error) * np.square(scale))
