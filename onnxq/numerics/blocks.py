"""Weights in blocks along their inputs, each block with its own scale and zero point: what weight-only kernels read.

A weight is w [K, N], K inputs and N outputs; blocks of B run along K, the last one may be short. Its parameters are
QuantParams(scale, zero_point, dtype, axis=0, block_size=B), scale and zero_point [ceil(K / B), N]. Work goes by chunks
of some blocks and columns that stay in the processor's caches. In one thread: two were no faster, as numpy's calls on a
chunk are too short to be worth handing the interpreter over.

*Symmetric*: the zero point is the middle code, 2**(bits - 1) above qmin. There is one code more below the middle than
above, so the scale takes the sign that suits the block: negative scales are as good as positive ones to
(q - zero_point) * scale, to onnxruntime's kernels as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnxq.numerics import block_search, packing
from onnxq.numerics.affine import QuantParams
from onnxq.numerics.block_search import Floats, Measure
from onnxq.numerics.dtypes import DType
from onnxq.numerics.packing import Blobs

Search = Literal["absmax", "mse"]

CELLS = 1 << 17  # weights of a chunk: enough that calls of numpy cost little, few enough for the caches of a core
SLAB = 32 << 20  # bytes of a mapped weight that are copied ahead
COLUMNS = 512  # of a chunk: 2 kB of a row of the weight at a time


def choose(w: npt.NDArray[Any], dtype: DType, block_size: int, symmetric: bool, search: Search = "absmax",
           importance: npt.ArrayLike | None = None, hessian: npt.NDArray[np.float64] | None = None) -> QuantParams:
    """Parameters for w [K, N], float32 or float16, by blocks of `block_size` along axis 0.

    "absmax": a range that just holds the block. Symmetric: scale = m / -2**(bits - 1) with m the weight of the largest
    magnitude (of two that differ in sign the negative one), which gets the code qmin; other signs of that size
    saturate. Asymmetric: as affine.choose. A block of zeros gets scale 1.0.
    "mse": of that range shrunk by block_search.FACTORS, with either sign of the scale (symmetric) or neighbouring zero
    points (asymmetric), and the scale fitted to the codes, the one with the least squared error; never worse than
    "absmax". `importance` [K], at least 0: what the squared error of an input counts, e.g. mean x^2.
    `hessian` [K, K], e.g. Hessian.result(): the error is that of the outputs instead, e^T H e with the part of it that
    belongs to the block, as if other blocks were exact. Only one of the two; their size has no influence.
    Scales are normal float32 numbers. Extra memory: some arrays of CELLS, with a hessian K * B floats.
    Source: of "mse" the searches of llama.cpp's k-quants; of the hessian AWQ's clipping (arXiv 2306.00978), which
    compares outputs of some rows.
    ValueError for NaN or infinities, another shape and types that are not of 2, 4 or 8 bits.
    """
    layout, find = _search(w, dtype, block_size, symmetric, search, importance, hessian)
    scale = np.empty((layout.blocks, layout.outputs), np.float32)
    zero_point = np.empty(scale.shape, dtype.storage)
    for chunk in layout.chunks():
        scale[chunk.place], zeros = find(chunk, chunk.read(w))
        zero_point[chunk.place] = zeros + np.float32(dtype.qmin)
    return QuantParams(scale, zero_point, dtype, 0, block_size)


def quantize_packed(w: npt.NDArray[Any], dtype: DType, block_size: int, symmetric: bool, search: Search = "absmax",
                    importance: npt.ArrayLike | None = None, hessian: npt.NDArray[np.float64] | None = None) -> Blobs:
    """packing.pack_matmul(affine.quantize(w, params), params) for params = choose(..), in one go over w.

    Arguments, memory and errors as for choose; ValueError, too, for blocks that don't fill bytes.
    """
    bits = dtype.bits
    if block_size * bits % 8:
        raise ValueError(f"blocks of {block_size} {dtype.name} codes don't fill bytes; use larger ones")
    layout, find = _search(w, dtype, block_size, symmetric, search, importance, hessian)
    codes = np.empty((layout.outputs, layout.blocks, block_size * bits // 8), np.uint8)
    scales = np.empty(codes.shape[:2], np.float32)
    zero_points = np.empty(codes.shape[:2], np.uint8)
    whole = importance is not None or hessian is not None
    for blocks, columns, part in [(slice(None), slice(None), w)] if whole else slabs(w, block_size):
        for chunk in _Layout(part.shape[0], part.shape[1], block_size).chunks():
            x, place = chunk.read(part), chunk.place[::-1]
            scale, zeros = find(chunk, x)
            zeros = np.broadcast_to(np.asarray(zeros, np.float32), scale.shape)
            scales[columns, blocks][place], zero_points[columns, blocks][place] = scale.T, zeros.T
            packing.pack_blocks(_codes(x, scale, zeros, block_size, 2**bits - 1), bits, codes[columns, blocks][place])
    return codes, scales, packing.pack_zero_points(zero_points, bits)


def slabs(w: npt.NDArray[Any], block_size: int) -> Iterator[tuple[slice, slice, npt.NDArray[Any]]]:
    """(blocks, columns, values) of w [K, N] in pieces of about SLAB bytes as they lie in memory, whole blocks each.

    What is mapped from a file is copied, the next piece while one is worked on: pages are read in their order, and by
    another core. Anything else comes in one piece, as it is.
    """
    if not isinstance(w, np.memmap) or w.nbytes <= SLAB:
        yield slice(None), slice(None), w
        return
    lines = bool(w.flags.c_contiguous)  # else the columns are what lies together
    count, unit = (w.shape[0], block_size) if lines else (w.shape[1], 1)
    step = max(SLAB * count // w.nbytes // unit, 1) * unit
    starts = range(0, count, step)

    def copied(first: int) -> npt.NDArray[Any]:
        return np.array(w[first : first + step] if lines else w[:, first : first + step], order="K")

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(copied, 0)
        for first in starts:
            part = coming.result()
            if first + step < count:
                coming = pool.submit(copied, first + step)
            blocks = slice(first // unit, -(-(first + len(part)) // unit)) if lines else slice(None)
            yield blocks, slice(None) if lines else slice(first, first + step), part


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


Find = Callable[[_Chunk, Floats], block_search.Found]


def _search(w: npt.NDArray[Any], dtype: DType, block_size: int, symmetric: bool, search: Search,
            importance: npt.ArrayLike | None, hessian: npt.NDArray[np.float64] | None) -> tuple[_Layout, Find]:
    """Where the blocks lie, and what finds the scales and stored zero points of a chunk."""
    if w.ndim != 2 or w.dtype not in (np.float32, np.float16):
        raise ValueError(f"a weight is {w.dtype} {list(w.shape)}; use float32 or float16 [K, N]")
    if dtype.bits not in block_search.FACTORS or block_size < 1:
        raise ValueError(f"no blocks of {block_size} {dtype.name}; use 1 or more of 2, 4 or 8 bits")
    layout = _Layout(w.shape[0], w.shape[1], block_size)
    if search == "absmax" and importance is None and hessian is None:
        return layout, lambda chunk, x: block_search.tight(x, dtype, symmetric)
    if search != "mse" or (importance is not None and hessian is not None):
        raise ValueError("importance and hessian are two ways to count errors; use one at a time, and \"mse\"")
    roots = None if importance is None else _roots(importance, layout)
    blocks = None if hessian is None else _checked_blocks(hessian, layout)

    def find(chunk: _Chunk, x: Floats) -> block_search.Found:
        measure = Measure(None if roots is None else roots[chunk.rows].reshape(x.shape[:2]),
                          None if blocks is None else blocks[chunk.place[0], : x.shape[1], : x.shape[1]])
        return block_search.least_error(x, dtype, symmetric, measure)

    return layout, find


def _roots(importance: npt.ArrayLike, layout: _Layout) -> Floats:
    """[K]: square roots of the importance, the largest 1."""
    values = np.asarray(importance, np.float64)
    if values.shape != (layout.inputs,) or not (np.isfinite(values).all() and values.min(initial=0.0) >= 0):
        raise ValueError(f"importance {list(values.shape)} is not {layout.inputs} numbers of at least 0; pass one each")
    most = max(float(values.max(initial=0.0)), np.finfo(np.float64).tiny)
    return np.asarray(np.sqrt(values / most), np.float32)


def _checked_blocks(hessian: npt.NDArray[np.float64], layout: _Layout) -> Floats:
    if hessian.shape != (layout.inputs, layout.inputs) or not np.isfinite(hessian).all():
        raise ValueError(f"a hessian {list(hessian.shape)} is not finite and [{layout.inputs}, {layout.inputs}]; "
                         "collect it from all inputs of the layer")
    return diagonal_blocks(hessian, layout.size)


def diagonal_blocks(hessian: npt.NDArray[np.float64], size: int) -> Floats:
    """[ceil(K / B), B, B]: the blocks of `size` B on the diagonal of a finite hessian [K, K], whose largest entry is
    taken for 1; 0 after a short one."""
    most = max(hessian.diagonal().max(initial=0.0), np.finfo(np.float64).tiny)
    found = np.zeros((-(-len(hessian) // size), size, size), np.float32)
    for block, first in zip(found, range(0, len(hessian), size), strict=True):
        part = hessian[first : first + size, first : first + size]
        block[: len(part), : len(part)] = part / most
    return found


def _codes(x: Floats, scale: Floats, zeros: Floats, size: int, most: int) -> npt.NDArray[np.uint8]:
    """Stored codes [b, size, c] of x [b, B, c] as affine.quantize rounds them; a short block ends with its zeros."""
    with np.errstate(over="ignore"):
        levels = x / scale[:, None]
    np.rint(levels, out=levels)
    levels += zeros[:, None]
    np.clip(levels, 0, most, out=levels)
    codes = levels.astype(np.uint8)
    if codes.shape[1] < size:
        filler = np.repeat(zeros[:, None].astype(np.uint8), size - codes.shape[1], axis=1)
        codes = np.concatenate([codes, filler], axis=1)
    return codes
