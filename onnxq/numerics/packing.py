"""Codes of 2, 4 and 8 bits in the bytes that operators read, each layout with its exact inverse.

A code travels unsigned where blocks have parameters: *stored* = code - qmin, so int4 -8 .. 7 is stored as 0 .. 15 and
its zero point moves along with it. The zero point that kernels take for granted, 2**(bits - 1), is that of symmetric
signed codes. Bytes fill from their low bits up:

    4 bits   | b a |    | d c |                  a, b, c .. are codes in turn; the high bits of a byte are on the left
    2 bits   | d c b a |    | h g f e |

Source: com.microsoft MatMulNBits-1 and GatherBlockQuantized-1; ONNX TensorProto, opset 25.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.numerics.affine import QuantParams
from onnxq.numerics.dtypes import DType

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Blobs = tuple[Bytes, npt.NDArray[np.float32], Bytes | None]  # codes, scales and, where kernels need them, zero points

_BITS = (2, 4, 8)


def pack_bits(stored: Bytes, bits: int, axis: int = -1) -> Bytes:
    """[.., ceil(n * bits / 8), ..] for `stored` [.., n, ..], codes of `bits` bits in turn along `axis`, low bits first.

    What is left of the last byte is 0. ValueError for a width other than 2, 4 and 8.
    """
    _check_bits(bits)
    each = 8 // bits
    if each == 1:
        return stored.copy()
    codes = np.moveaxis(stored, axis, 0)
    packed = np.zeros((-(-len(codes) // each), *codes.shape[1:]), np.uint8)
    for place in range(each):
        part = codes[place::each]
        packed[: len(part)] |= part << np.uint8(place * bits)
    return np.moveaxis(packed, 0, axis)


def unpack_bits(packed: Bytes, bits: int, count: int, axis: int = -1) -> Bytes:
    """The first `count` codes along `axis`, as they were before pack_bits. ValueError where there are fewer."""
    _check_bits(bits)
    each = 8 // bits
    if not 0 <= count <= packed.shape[axis] * each:
        raise ValueError(f"{packed.shape[axis]} bytes hold no {count} codes of {bits} bits; pass the count packed")
    bytes_ = np.moveaxis(packed, axis, 0)
    codes = np.empty((count, *bytes_.shape[1:]), np.uint8)
    for place in range(each):
        part = codes[place::each]
        part[...] = (bytes_[: len(part)] >> np.uint8(place * bits)) & np.uint8(2**bits - 1)
    return np.moveaxis(codes, 0, axis)


def pack_flat(q: Array, dtype: DType) -> Bytes:
    """The raw data of an ONNX tensor of `dtype`: [ceil(q.size * bits / 8)], all of q [..] in C order, low bits first.

    Codes keep their sign, in two's complement: int4 -1 is the nibble f. 8 bits are their own bytes.
    """
    return pack_bits(q.astype(np.uint8).reshape(-1) & np.uint8(2**dtype.bits - 1), dtype.bits)


def unpack_flat(packed: Bytes, dtype: DType, shape: tuple[int, ...]) -> Array:
    """Codes of `shape`, dtype.storage, as they were before pack_flat."""
    codes = unpack_bits(packed, dtype.bits, int(np.prod(shape, dtype=np.int64))).reshape(shape)
    if not dtype.signed:
        return codes
    spare = np.uint8(8 - dtype.bits)
    return (codes << spare).view(np.int8) >> spare.view(np.int8)  # the shift back brings the sign down


def pack_matmul(q: Array, params: QuantParams) -> Blobs:
    """Inputs B, scales and zero_points of MatMulNBits for codes q [K, N] in blocks of B along axis 0.

    codes uint8 [N, ceil(K / B), B * bits / 8], scales float32 [N, ceil(K / B)], zero points uint8
    [N, ceil(ceil(K / B) * bits / 8)] or None where all are 2**(bits - 1). For column n, 4 bits, B 16:

        codes[n, 0]   | q1 q0 | .. | q15 q14 |      codes[n, 1]   | q17 q16 | ..      zero_points[n]   | z1 z0 | ..

    Where K is no multiple of B the last block ends with the block's zero point.
    ValueError where the parameters are not by block along axis 0, for types that are not of 2, 4 or 8 bits and blocks
    that don't fill bytes.
    """
    size = _block_size(params, 0)
    inputs, outputs = q.shape
    codes = np.empty((outputs, len(params.scale), size * params.dtype.bits // 8), np.uint8)
    whole = inputs // size
    pack_blocks(stored(q[: whole * size], params.dtype).reshape(whole, size, outputs), params.dtype.bits,
                codes[:, :whole])
    if whole < len(params.scale):
        last = np.repeat(stored(params.zero_point[whole:], params.dtype), size, axis=0)
        last[: inputs - whole * size] = stored(q[whole * size :], params.dtype)
        pack_blocks(last[None], params.dtype.bits, codes[:, whole:])
    zero_points = pack_zero_points(stored(params.zero_point.T, params.dtype), params.dtype.bits)
    return codes, np.ascontiguousarray(params.scale.T), zero_points


def unpack_matmul(blobs: Blobs, dtype: DType, inputs: int, block_size: int) -> tuple[Array, QuantParams]:
    """(codes [K, N], parameters) as they were before pack_matmul; K is `inputs`."""
    packed, scales, zero_points = blobs
    codes = unpack_bits(packed, dtype.bits, block_size).reshape(len(packed), packed.shape[1] * block_size)[:, :inputs]
    zeros = _zero_points(zero_points, dtype, scales)
    params = QuantParams(np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T), dtype, 0, block_size)
    return np.ascontiguousarray(_codes(codes, dtype).T), params


def pack_gather(q: Array, params: QuantParams) -> Blobs:
    """Inputs data, scales and zero_points of GatherBlockQuantized for codes q [V, D] in blocks of B along axis 1.

    codes uint8 [V, D * bits / 8], scales float32 [V, ceil(D / B)], zero points uint8 [V, ceil(ceil(D / B) * bits / 8)]
    or None where all are 2**(bits - 1). For row v, 4 bits: codes[v]   | q1 q0 | q3 q2 | ..   across blocks.
    ValueError as in pack_matmul, and where D does not fill bytes: the operator takes the width from the bytes.
    """
    _block_size(params, 1)
    if q.shape[1] * params.dtype.bits % 8:
        raise ValueError(f"rows of {q.shape[1]} codes of {params.dtype.name} don't fill bytes; use more bits")
    codes = pack_bits(stored(q, params.dtype), params.dtype.bits)
    zero_points = pack_zero_points(stored(params.zero_point, params.dtype), params.dtype.bits)
    return np.ascontiguousarray(codes), params.scale, zero_points


def unpack_gather(blobs: Blobs, dtype: DType, block_size: int) -> tuple[Array, QuantParams]:
    """(codes [V, D], parameters) as they were before pack_gather."""
    packed, scales, zero_points = blobs
    codes = unpack_bits(packed, dtype.bits, packed.shape[1] * 8 // dtype.bits)
    zeros = np.ascontiguousarray(_zero_points(zero_points, dtype, scales))
    return np.ascontiguousarray(_codes(codes, dtype)), QuantParams(scales, zeros, dtype, 1, block_size)


def stored(q: Array, dtype: DType) -> Bytes:
    """Codes of `dtype` less qmin, uint8, in the shape of q."""
    return np.asarray(q.astype(np.uint8) - np.uint8(dtype.qmin % 256))


def pack_blocks(blocks: Bytes, bits: int, out: Bytes) -> None:
    """Fill out [N, b, B * bits / 8], part of the codes of MatMulNBits, from stored codes [b, B, N]."""
    packed = blocks if bits == 8 else pack_bits(blocks, bits, axis=1)  # fewer bytes to transpose
    np.copyto(out, packed.transpose(2, 0, 1))


def pack_zero_points(codes: Bytes, bits: int) -> Bytes | None:
    """[R, ceil(b * bits / 8)] for stored zero points [R, b]; None where all of them are what kernels default to."""
    if (codes == 2 ** (bits - 1)).all():
        return None
    return np.ascontiguousarray(pack_bits(codes, bits))


def _zero_points(packed: Bytes | None, dtype: DType, scales: Array) -> Array:
    """Zero points of `dtype` in the shape of scales [R, b]."""
    if packed is None:
        return _codes(np.full(scales.shape, 2 ** (dtype.bits - 1), np.uint8), dtype)
    return _codes(unpack_bits(packed, dtype.bits, scales.shape[1]), dtype)


def _codes(codes: Bytes, dtype: DType) -> Array:
    """Stored codes as codes of `dtype`."""
    return np.asarray(codes + np.uint8(dtype.qmin % 256)).view(dtype.storage)


def _block_size(params: QuantParams, axis: int) -> int:
    """The block size of parameters by block along `axis`; ValueError for others."""
    _check_bits(params.dtype.bits)
    if params.block_size is None or params.axis != axis:
        raise ValueError(f"parameters along axis {params.axis} are not by block along axis {axis}; see blocks.choose()")
    if params.block_size * params.dtype.bits % 8:
        raise ValueError(f"blocks of {params.block_size} {params.dtype.name} codes don't fill bytes; use larger ones")
    return params.block_size


def _check_bits(bits: int) -> None:
    if bits not in _BITS:
        raise ValueError(f"codes of {bits} bits are not packed; use 2, 4 or 8 bits")
