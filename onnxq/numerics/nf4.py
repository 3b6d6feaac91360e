"""NF4: 4-bit codes for 16 values that split a normal distribution evenly, each block with its largest magnitude.

The weight [K, N] of MatMulBnb4 lies flat, column after column ([N, K] in C order), in blocks of B that run on from one
column into the next; two codes share a byte, high bits first (packing.pack_high):

    weight    w[0, 0] w[1, 0] | w[2, 0] w[3, 0] | .. w[K-1, 0] w[0, 1] ..       byte   | a b | c d | ..
    absmax    of the first B of them, of the next B ..

Source: QLoRA (arXiv 2305.14314), appendix E, for the values; com.microsoft MatMulBnb4-1 (quant_type 1) for the layout.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.numerics.packing import Bytes, pack_high, unpack_high

Floats = npt.NDArray[np.float32]

VALUES: Floats = np.array([
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0], np.float32)

_CELLS = 1 << 17  # weights of a chunk


def quantize(w: npt.NDArray[Any], block_size: int) -> tuple[Bytes, Floats]:
    """(codes uint8 [ceil(K * N / 2)], absmax float32 [ceil(K * N / B)]) of w [K, N], float32 or float16.

    Each weight over its block's largest magnitude gets the code of the nearest of VALUES, of two as near the lower one.
    A block of zeros has absmax 0 and code 7, which stands for 0. Extra memory: some chunks.
    ValueError for NaN or infinities, another shape and blocks that are odd or empty.
    """
    if w.ndim != 2 or w.dtype not in (np.float32, np.float16) or block_size < 2 or block_size % 2:
        raise ValueError(f"a weight is {w.dtype} {list(w.shape)} in blocks of {block_size}; use float32 or float16 "
                         "[K, N] and an even size")
    inputs, outputs = w.shape
    codes = np.zeros(-(-w.size // 2), np.uint8)
    absmax = np.zeros(-(-w.size // block_size), np.float32)
    whole = block_size // math.gcd(max(inputs, 1), block_size)  # columns after which a block ends
    step = whole * max(_CELLS // (max(inputs, 1) * whole), 1)
    for left in range(0, outputs if inputs else 0, step):
        flat = w[:, left : left + step].T.astype(np.float32).reshape(-1)
        blocks = np.pad(flat, (0, -flat.size % block_size)).reshape(-1, block_size)
        most = np.maximum(blocks.max(axis=1), -blocks.min(axis=1))
        if not np.isfinite(most).all():
            raise ValueError("a weight holds NaN or infinities; repair it or keep the node float")
        blocks /= np.where(most > 0, most, 1)[:, None]
        first = left * inputs
        packed = pack_high(_nearest(blocks).reshape(-1)[: flat.size])
        codes[first // 2 : first // 2 + packed.size] = packed
        absmax[first // block_size : first // block_size + len(most)] = most
    return codes, absmax


def dequantize(codes: Bytes, absmax: Floats, shape: tuple[int, int], block_size: int) -> Floats:
    """The weight [K, N] = `shape` that codes stand for: VALUES[code] * absmax in float32."""
    inputs, outputs = shape
    flat = VALUES[unpack_high(codes, inputs * outputs)] * np.repeat(absmax, block_size)[: inputs * outputs]
    return np.ascontiguousarray(flat.reshape(outputs, inputs).T)


def _nearest(x: Floats) -> Bytes:
    """Codes of x between -1 and 1: how many of the middles between neighbouring values lie below."""
    codes = np.zeros(x.shape, np.uint8)
    for middle in (VALUES[1:] + VALUES[:-1]) / np.float32(2):
        codes += x > middle
    return codes
