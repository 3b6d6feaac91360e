"""Packed codes against pictures drawn by hand, ONNX's own packing and what onnxruntime's kernels make of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbits_support import run_kernel
from onnx import TensorProto, helper, numpy_helper

from onnxq.numerics import affine
from onnxq.numerics.affine import QuantParams
from onnxq.numerics.dtypes import INT2, INT4, INT8, INT16, UINT2, UINT4, UINT8
from onnxq.numerics.packing import (
    pack_bits,
    pack_flat,
    pack_gather,
    pack_matmul,
    unpack_bits,
    unpack_flat,
    unpack_gather,
    unpack_matmul,
)

TYPES = (INT2, UINT2, INT4, UINT4, INT8, UINT8)
no_deadline = settings(deadline=None)
SEEDS = st.integers(0, 2**32 - 1)
any_type = st.sampled_from(TYPES)


def by_block(rng, dtype, inputs, outputs, size, default, axis=0):
    """(codes, parameters) at random, scales of either sign; zero points the ones kernels default to or any."""
    codes = rng.integers(dtype.qmin, dtype.qmax, (inputs, outputs), endpoint=True)
    shape = (-(-inputs // size), outputs)
    scale = (rng.choice([-1, 1], shape) * rng.uniform(0.5, 2.0, shape)).astype(np.float32)
    zeros = rng.integers(dtype.qmin, dtype.qmax, shape, endpoint=True)
    if default:
        zeros[...] = dtype.qmin + 2 ** (dtype.bits - 1)
    codes, zeros = codes.astype(dtype.storage), zeros.astype(dtype.storage)
    if axis == 1:
        codes, scale, zeros = codes.T.copy(), scale.T.copy(), zeros.T.copy()
    return codes, QuantParams(scale, zeros, dtype, axis, size)


def assert_same(found, codes, params):
    np.testing.assert_array_equal(found[0], codes)
    np.testing.assert_array_equal(found[1].scale, params.scale)
    np.testing.assert_array_equal(found[1].zero_point, params.zero_point)
    assert found[0].dtype == codes.dtype
    assert (found[1].axis, found[1].block_size, found[1].dtype) == (params.axis, params.block_size, params.dtype)


# ------------------------------------------------------------------ bits


def test_low_bits_first_by_hand():
    assert pack_bits(np.uint8([1, 2, 15]), 4).tolist() == [0x21, 0x0F]
    assert pack_bits(np.uint8([1, 2, 3, 0, 2]), 2).tolist() == [0b00_11_10_01, 0b10]
    assert pack_bits(np.uint8([7, 200]), 8).tolist() == [7, 200]
    assert pack_bits(np.uint8([[1, 2], [3, 4], [5, 6]]), 4, axis=0).tolist() == [[0x31, 0x42], [0x05, 0x06]]


@given(SEEDS, st.sampled_from([2, 4, 8]), st.integers(0, 20), st.sampled_from([0, 1, 2, -1]))
@no_deadline
def test_bits_come_back(seed, bits, count, axis):
    shape = [3, 2, 4]
    shape[axis] = count
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)
    packed = pack_bits(codes, bits, axis)
    assert packed.size == codes.size // max(count, 1) * -(-count * bits // 8)
    np.testing.assert_array_equal(unpack_bits(packed, bits, count, axis), codes)


@given(SEEDS, any_type, st.lists(st.integers(0, 5), max_size=3))
@no_deadline
def test_flat_codes_are_packed_as_by_onnx(seed, dtype, shape):
    codes = np.random.default_rng(seed).integers(dtype.qmin, dtype.qmax, shape, endpoint=True).astype(dtype.storage)
    packed = pack_flat(codes, dtype)
    tensor = helper.make_tensor("q", TensorProto.DataType.Value(dtype.name.upper()), shape, packed.tobytes(), raw=True)
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(dtype.storage), codes)
    found = unpack_flat(packed, dtype, tuple(shape))
    np.testing.assert_array_equal(found, codes)
    assert found.dtype == dtype.storage


# ------------------------------------------------------------------ MatMulNBits


def test_a_column_by_hand():
    """Blocks of 4, the second short: it ends with its zero point."""
    params = QuantParams(np.float32([[0.5], [2]]), np.int8([[0], [-5]]), INT4, 0, 4)
    codes, scales, zeros = pack_matmul(np.int8([[-8], [7], [0], [1], [2]]), params)
    assert codes.tolist() == [[[0xF0, 0x98], [0x3A, 0x33]]]
    assert scales.tolist() == [[0.5, 2]]
    assert zeros.tolist() == [[0x38]]


@given(SEEDS, any_type, st.integers(0, 70), st.integers(0, 5), st.sampled_from([16, 32]), st.booleans())
@no_deadline
def test_matmul_blobs_come_back(seed, dtype, inputs, outputs, size, default):
    codes, params = by_block(np.random.default_rng(seed), dtype, inputs, outputs, size, default)
    blobs = pack_matmul(codes, params)
    blocks = -(-inputs // size)
    assert blobs[0].shape == (outputs, blocks, size * dtype.bits // 8)
    assert blobs[1].shape == (outputs, blocks)
    if default:
        assert blobs[2] is None
    elif blobs[2] is not None:
        assert blobs[2].shape == (outputs, -(-blocks * dtype.bits // 8))
    assert_same(unpack_matmul(blobs, dtype, inputs, size), codes, params)


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("default", [True, False], ids=["default", "zero points"])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("inputs", [128, 100])
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.name)
def test_the_kernel_reads_what_was_packed(dtype, inputs, size, default, level):
    """Scales are of either sign. At level 4 the kernel rounds x to 8 bits by block, half of max|x| / 127 off."""
    rng = np.random.default_rng(size + inputs)
    codes, params = by_block(rng, dtype, inputs, 6, size, default)
    blobs = pack_matmul(codes, params)
    x = rng.normal(size=(3, inputs)).astype(np.float32)
    found = run_kernel("MatMulNBits", x, list(blobs), K=inputs, N=6, bits=dtype.bits, block_size=size,
                       accuracy_level=level)
    w = affine.dequantize(codes, params).astype(np.float64)
    rounding = np.abs(x) * inputs * 2.0**-24  # of each product and sum in float32
    if level == 4:
        padded = np.pad(np.abs(x), ((0, 0), (0, -inputs % size))).reshape(3, -1, size)
        rounding = rounding + np.repeat(padded.max(axis=2), size, axis=1)[:, :inputs] * (0.5 / 127)
    assert (np.abs(found - x.astype(np.float64) @ w) <= 1.01 * rounding @ np.abs(w)).all()


# ------------------------------------------------------------------ GatherBlockQuantized


@given(SEEDS, any_type, st.integers(0, 5), st.integers(0, 17), st.booleans())
@no_deadline
def test_gather_blobs_come_back(seed, dtype, rows, quads, default):
    codes, params = by_block(np.random.default_rng(seed), dtype, 4 * quads, rows, 16, default, axis=1)
    blobs = pack_gather(codes, params)
    assert blobs[0].shape == (rows, quads * dtype.bits // 2)
    assert_same(unpack_gather(blobs, dtype, 16), codes, params)


@pytest.mark.parametrize("default", [True, False], ids=["default", "zero points"])
@pytest.mark.parametrize("width", [64, 72])
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.name)
def test_the_kernel_gathers_what_was_packed(dtype, width, default):
    codes, params = by_block(np.random.default_rng(width), dtype, width, 5, 32, default, axis=1)
    wanted = np.array([[4, 0], [2, 2]])
    found = run_kernel("GatherBlockQuantized", wanted, list(pack_gather(codes, params)), at=1, bits=dtype.bits,
                       block_size=32, gather_axis=0, quantize_axis=1)
    np.testing.assert_allclose(found, affine.dequantize(codes, params)[wanted], rtol=2.0**-22)


# ------------------------------------------------------------------ refusals


def test_what_does_not_fit_is_refused():
    codes, params = by_block(np.random.default_rng(0), INT4, 32, 4, 16, True)
    with pytest.raises(ValueError, match="by block along axis 1"):
        pack_gather(codes, params)
    with pytest.raises(ValueError, match="by block along axis 0"):
        pack_matmul(codes, QuantParams(np.float32(1), np.int8(0)[()], INT4))
    with pytest.raises(ValueError, match="don't fill bytes"):
        pack_matmul(*by_block(np.random.default_rng(0), INT4, 32, 4, 3, True))
    with pytest.raises(ValueError, match="don't fill bytes"):
        pack_gather(*by_block(np.random.default_rng(0), INT2, 6, 4, 16, True, axis=1))
    with pytest.raises(ValueError, match="2, 4 or 8 bits"):
        pack_matmul(*by_block(np.random.default_rng(0), INT16, 32, 4, 16, True))
    with pytest.raises(ValueError, match="no 5 codes"):
        unpack_bits(np.zeros(2, np.uint8), 4, 5)
