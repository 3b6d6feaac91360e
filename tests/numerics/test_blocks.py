"""Parameters by block against the definition written down block by block, and what they promise of the error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbits_support import run_kernel

from onnxq.numerics import affine, block_search, blocks, packing, rounding
from onnxq.numerics.blocks import choose, quantize_packed
from onnxq.numerics.dtypes import INT2, INT4, INT8, INT16, UINT2, UINT4, UINT8

TYPES = (INT2, UINT2, INT4, UINT4, INT8, UINT8)
SEARCHES = ("absmax", "mse")
few = settings(deadline=None, max_examples=40)
SEEDS = st.integers(0, 2**32 - 1)
any_type = st.sampled_from(TYPES)
any_search = st.sampled_from(SEARCHES)


def weight(seed, inputs=None, outputs=None):
    """[K, N] of a random size: columns of several sizes, a few heavy entries, some blocks of zeros."""
    rng = np.random.default_rng(seed)
    inputs, outputs = inputs or int(rng.integers(1, 70)), outputs or int(rng.integers(1, 9))
    w = rng.standard_t(4, size=(inputs, outputs)) * rng.uniform(0.01, 10.0, outputs) + rng.choice([0.0, 0.5])
    w[: inputs // 3, rng.random(outputs) < 0.2] = 0.0
    return w.astype(np.float32)


def parts(w, size):
    return [w[first : first + size] for first in range(0, len(w), size)]


def squared_errors(w, params):
    """[ceil(K / B), N] in float64."""
    error = affine.dequantize(affine.quantize(w, params), params).astype(np.float64) - w
    return np.array([np.square(part).sum(axis=0) for part in parts(error, params.block_size)]).reshape(
        params.scale.shape)


@given(SEEDS, any_type, st.integers(1, 40), st.booleans())
@few
def test_absolute_maximum_block_by_block(seed, dtype, size, symmetric):
    w = weight(seed)
    params = choose(w, dtype, size, symmetric)
    assert (params.axis, params.block_size, params.dtype) == (0, size, dtype)
    middle = 2 ** (dtype.bits - 1)
    for b, part in enumerate(parts(w, size)):
        for n in range(w.shape[1]):
            column = part[:, n]
            if symmetric:
                extreme = min(column, key=lambda value: (-abs(value), value))
                expected, zero = np.float32(extreme / -middle if extreme else 1.0), dtype.qmin + middle
            else:
                found = affine.choose(column.min(), column.max(), dtype)
                expected, zero = found.scale, found.zero_point
            assert params.scale[b, n] == expected
            assert params.zero_point[b, n] == zero


@given(SEEDS, any_type, st.integers(1, 40))
@few
def test_the_largest_weight_is_kept_and_others_are_within_a_step(seed, dtype, size):
    """Half a step off where the code is not clipped; the code above the highest is one step off at most."""
    w = weight(seed)
    params = choose(w, dtype, size, symmetric=True)
    off = np.abs(affine.dequantize(affine.quantize(w, params), params) - w)
    for b, part in enumerate(parts(w, size)):
        scale = np.abs(params.scale[b])
        assert (off[b * size : b * size + len(part)] <= scale * (1 + 1e-6)).all()
        largest = np.abs(part).argmax(axis=0)
        signed = part[largest, range(w.shape[1])]
        tied = (part == -signed).any(axis=0)  # of a pair that differs in sign one saturates
        np.testing.assert_array_equal(off[b * size + largest, range(w.shape[1])][~tied], 0.0)


def test_a_symmetric_block_by_hand():
    w = np.float32([[0.5, -0.5], [4, -4], [-3.6, 3.6], [0, 0]])
    params = choose(w, INT4, 4, symmetric=True)
    assert params.scale.tolist() == [[-0.5, 0.5]]
    codes = affine.quantize(w, params)
    assert codes.T.tolist() == [[-1, -8, 7, 0], [-1, -8, 7, 0]]
    assert affine.dequantize(codes, params).T.tolist() == [[0.5, 4, -3.5, 0], [-0.5, -4, 3.5, 0]]


def test_an_asymmetric_block_is_widened_to_contain_0():
    params = choose(np.float32([[2], [5], [-1], [-3]]), UINT4, 2, symmetric=False)
    np.testing.assert_allclose(params.scale[:, 0], [5 / 15, 3 / 15], rtol=1e-7)
    assert params.zero_point[:, 0].tolist() == [0, 15]


@given(SEEDS, any_type, st.integers(1, 40), st.booleans())
@few
def test_the_search_for_the_least_error_loses_nowhere(seed, dtype, size, symmetric):
    w = weight(seed)
    plain, searched = (squared_errors(w, choose(w, dtype, size, symmetric, search)) for search in SEARCHES)
    # a rounding error in float32 is known to 2**-24 of the weight, and both ranges are judged by such
    largest = np.array([np.abs(part).max(axis=0) for part in parts(w, size)])
    assert (np.sqrt(searched) <= np.sqrt(plain) + 4 * np.sqrt(size) * 2.0**-24 * largest).all()


def every_range(w, dtype, symmetric):
    """Scales and zero points for one block [B, 1]: a fine grid of them."""
    most = np.abs(w).max()
    zeros = [dtype.qmin + 2 ** (dtype.bits - 1)] if symmetric else range(dtype.qmin, dtype.qmax + 1)
    for size in most * np.geomspace(0.3, 2.2, 150) / 2 ** (dtype.bits - 1):
        for sign in (1, -1) if symmetric else (1,):
            for zero in zeros:
                zero_point = np.array([[zero]], dtype.storage)
                yield affine.QuantParams(np.float32([[sign * size]]), zero_point, dtype, 0, len(w))


@given(SEEDS, st.sampled_from([(INT2, True), (INT4, True), (UINT2, False)]), st.booleans())
@settings(deadline=None, max_examples=10)
def test_the_search_comes_near_the_best_there_is(seed, kind, weighed):
    """Of all ranges on a fine grid; its few steps miss a dip here and there."""
    dtype, symmetric = kind
    rng = np.random.default_rng(seed)
    found, best = 0.0, 0.0
    for _ in range(6):
        w = rng.normal(size=(16, 1)).astype(np.float32)
        importance = rng.uniform(0.1, 3.0, 16) if weighed else np.ones(16)

        def error(params, w=w, importance=importance):
            off = affine.dequantize(affine.quantize(w, params), params) - w
            return float(importance @ np.square(off[:, 0]))

        found += error(choose(w, dtype, 16, symmetric, "mse", importance=importance if weighed else None))
        best += min(map(error, every_range(w, dtype, symmetric)))
    assert found <= 1.1 * best


@given(SEEDS, any_type, st.sampled_from([8, 16]), st.booleans())
@few
def test_a_hessian_counts_errors_of_outputs(seed, dtype, size, symmetric):
    """Never more output error within the blocks than by the absolute maximum; its size has no influence."""
    rng = np.random.default_rng(seed)
    w = weight(seed)
    x = rng.normal(size=(40, 3)) @ rng.normal(size=(3, len(w))) + 0.3 * rng.normal(size=(40, len(w)))
    hessian = x.T @ x
    found = choose(w, dtype, size, symmetric, "mse", hessian=hessian)
    for params, slack in ((found, 1 + 1e-4), (choose(w, dtype, size, symmetric), None)):
        off = affine.dequantize(affine.quantize(w, params), params).astype(np.float64) - w
        errors = [np.einsum("kn,kl,ln->n", off[k : k + size], hessian[k : k + size, k : k + size], off[k : k + size])
                  for k in range(0, len(w), size)]
        if slack:
            searched = np.array(errors) / slack
        else:
            floor = 1e-9 * np.abs(hessian).max() * np.square(w).max() * size
            assert (searched <= np.array(errors) + floor).all()
    same = choose(w, dtype, size, symmetric, "mse", hessian=hessian * 4.0**30)
    np.testing.assert_array_equal(same.scale, found.scale)


def test_what_a_hessian_gains():
    """Inputs that move together: the errors of their outputs fall by more than the squared errors alone make them."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(300, 8)) @ rng.normal(size=(8, 64)) + 0.3 * rng.normal(size=(300, 64))
    w, hessian = rng.normal(size=(64, 32)).astype(np.float32), x.T @ x
    errors = []
    for keywords in ({}, {"hessian": hessian}):
        params = choose(w, INT4, 16, True, "mse", **keywords)
        errors.append(rounding.output_error(w, affine.quantize(w, params), params, hessian).sum())
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_importance_decides_what_is_kept(symmetric):
    """Inputs that nobody reads don't count: the others are kept as if they were alone, and their size is no matter."""
    w = np.random.default_rng(7).normal(size=(32, 50)).astype(np.float32)
    importance = np.where(np.arange(32) % 2, 0.0, 1e30)
    off = []
    for counts in (None, importance):
        params = choose(w, INT4, 32, symmetric, "mse", importance=counts)
        off.append(np.square(affine.dequantize(affine.quantize(w, params), params) - w)[::2].sum())
    assert off[1] < 0.9 * off[0]
    same = choose(w, INT4, 32, symmetric, "mse", importance=importance * 1e-60)
    np.testing.assert_array_equal(same.scale, params.scale)


@given(SEEDS, st.sampled_from([INT2, INT4, UINT4]), st.booleans())
@few
def test_the_scale_fits_the_codes(seed, dtype, symmetric):
    """The refitted scale is the root of the derivative of the squared error over the codes that it was fitted to."""
    x = np.random.default_rng(seed).normal(size=(2, 16, 3)).astype(np.float32)
    scale, zeros = block_search.tight(x, dtype, symmetric)
    error, fitted = block_search.Measure().of(x, scale, zeros, dtype)
    zeros = np.broadcast_to(np.float32(zeros), scale.shape)[:, None]
    levels = np.clip(np.rint(x / scale[:, None]), -zeros, 2**dtype.bits - 1 - zeros).astype(np.float64)
    expected = (levels * x).sum(axis=1) / np.square(levels).sum(axis=1)
    np.testing.assert_allclose(fitted, expected, rtol=1e-5)
    np.testing.assert_allclose(error, np.square(levels * expected[:, None] - x).sum(axis=1), rtol=1e-4)


@pytest.mark.parametrize(("dtype", "symmetric", "gain"), [(INT2, True, 0.87), (UINT2, False, 0.7), (INT4, True, 0.92),
                                                          (UINT4, False, 0.95), (INT8, True, 0.94)])
def test_the_search_gains(dtype, symmetric, gain):
    """Normal weights in blocks of 32. At 8 bits the choice of the sign gains."""
    w = np.random.default_rng(5).normal(size=(512, 64)).astype(np.float32)
    plain, searched = (squared_errors(w, choose(w, dtype, 32, symmetric, search)).sum() for search in SEARCHES)
    assert searched < gain * plain


@given(SEEDS, any_type, st.sampled_from([4, 16, 32]), st.booleans(), any_search, st.booleans())
@few
def test_one_go_gives_the_bytes_of_three_steps(seed, dtype, size, symmetric, search, half):
    w = weight(seed)
    if half:
        w = w.astype(np.float16)
    params = choose(w, dtype, size, symmetric, search)
    expected = packing.pack_matmul(affine.quantize(w, params), params)
    for one, other in zip(quantize_packed(w, dtype, size, symmetric, search), expected, strict=True):
        assert (one is None) == (other is None)
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [16, 32, 256])
def test_chunks_make_no_difference(monkeypatch, size, symmetric):
    w = weight(3, 700, 90)
    whole = quantize_packed(w, INT4, size, symmetric)
    monkeypatch.setattr(blocks, "COLUMNS", 7)
    monkeypatch.setattr(blocks, "CELLS", 2000)
    for found, expected in zip(quantize_packed(w, INT4, size, symmetric), whole, strict=True):
        np.testing.assert_array_equal(found, expected)
    params = choose(w, INT4, size, symmetric)
    np.testing.assert_array_equal(params.scale, whole[1].T)


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("dtype", [INT2, INT4, INT8], ids=lambda dtype: dtype.name)
def test_the_kernel_multiplies_by_negative_scales(dtype, level):
    """Both signs occur; level 4 rounds x to 8 bits by block, half of max|x| / 127 off at most."""
    w = np.random.default_rng(1).normal(size=(96, 16)).astype(np.float32)
    packed = quantize_packed(w, dtype, 32, True)
    assert (packed[1] < 0).any()
    assert (packed[1] > 0).any()
    x = np.random.default_rng(2).normal(size=(2, 96)).astype(np.float32)
    found = run_kernel("MatMulNBits", x, list(packed), K=96, N=16, bits=dtype.bits, block_size=32, accuracy_level=level)
    kept = affine.dequantize(*packing.unpack_matmul(packed, dtype, 96, 32)).astype(np.float64)
    rounding = np.abs(x).max() * (0.5 / 127 if level else 96 * 2.0**-24)
    assert (np.abs(found - x @ kept) <= 1.01 * rounding * np.abs(kept).sum(axis=0)).all()


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e38])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_stay_normal(scale, search, symmetric):
    w = np.random.default_rng(4).uniform(-3, 3, (32, 4)) * scale
    params = choose(w.astype(np.float32), INT4, 16, symmetric, search)
    size = np.abs(params.scale)
    assert (size >= affine.SMALLEST_SCALE).all()
    assert np.isfinite(size).all()


def test_weights_without_inputs_or_outputs():
    for shape in ((0, 3), (3, 0)):
        w = np.zeros(shape, np.float32)
        assert choose(w, INT4, 16, True).scale.shape == (-(-shape[0] // 16), shape[1])
        assert quantize_packed(w, UINT4, 16, False)[0].shape == (shape[1], -(-shape[0] // 16), 8)


@pytest.mark.parametrize(("w", "dtype", "size", "says"), [
    (np.float32([[1], [np.nan]]), INT4, 2, "NaN"),
    (np.float32([[1], [np.inf]]), INT4, 2, "NaN"),
    (np.float32([1, 2]), INT4, 2, r"\[K, N\]"),
    (np.float64([[1], [2]]), INT4, 2, "float32 or float16"),
    (np.float32([[1], [2]]), INT16, 2, "2, 4 or 8 bits"),
    (np.float32([[1], [2]]), INT4, 0, "no blocks"),
])
def test_what_does_not_fit_is_refused(w, dtype, size, says):
    for call in (choose, quantize_packed):
        with pytest.raises(ValueError, match=says):
            call(w, dtype, size, True)
    with pytest.raises(ValueError, match="fill bytes"):
        quantize_packed(np.ones((4, 4), np.float32), INT4, 3, True)


@pytest.mark.parametrize(("keywords", "says"), [
    ({"importance": np.ones(3), "search": "absmax"}, "mse"),
    ({"hessian": np.eye(3), "importance": np.ones(3)}, "one at a time"),
    ({"importance": np.ones(2)}, "3 numbers"),
    ({"importance": np.float32([1, -1, 1])}, "at least 0"),
    ({"importance": np.float32([1, np.nan, 1])}, "at least 0"),
    ({"hessian": np.eye(2)}, "hessian"),
    ({"hessian": np.diag([1, np.inf, 1])}, "hessian"),
])
def test_counts_that_do_not_fit_are_refused(keywords, says):
    with pytest.raises(ValueError, match=says):
        choose(np.ones((3, 2), np.float32), INT4, 2, True, **{"search": "mse", **keywords})


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("inputs", [96, 100, 33])
def test_what_is_mapped_is_packed_piece_by_piece(tmp_path, monkeypatch, transposed, inputs):
    """The same bytes as of an array in memory, whatever the pieces and the order in the file."""
    w = weight(3, inputs, 40)
    np.save(tmp_path / "w.npy", np.ascontiguousarray(w.T) if transposed else w)
    mapped = np.load(tmp_path / "w.npy", mmap_mode="r")
    mapped = mapped.T if transposed else mapped
    monkeypatch.setattr(blocks, "SLAB", 2000)
    pieces = list(blocks.slabs(mapped, 32))
    assert len(pieces) > 1
    assert max(part.nbytes for _, _, part in pieces) <= max(2000, 32 * 40 * 4)
    both = (quantize_packed(values, UINT4, 32, False) for values in (mapped, w))
    for found, wanted in zip(*both, strict=True):
        np.testing.assert_array_equal(found, wanted)
