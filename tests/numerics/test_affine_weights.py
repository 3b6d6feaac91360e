import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.numerics.affine import BIAS_LIMIT, bias_params, largest_pair, quantize, weight_params
from onnxq.numerics.dtypes import INT4, INT8

FLOAT32 = np.finfo(np.float32)
MODERATE = st.floats(-1e4, 1e4, width=32)

no_deadline = settings(deadline=None)


def tensors(max_dims=3):
    return hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=max_dims, max_side=6), elements=MODERATE)


def squared_error(w, params):
    """Per channel along axis 0, in float64, from the formula rather than through quantize()."""
    scale = params.scale.astype(np.float64).reshape(-1, *[1] * (w.ndim - 1))
    codes = np.clip(np.rint(w.astype(np.float64) / scale), params.dtype.qmin, params.dtype.qmax)
    return ((codes * scale - w) ** 2).reshape(w.shape[0], -1).sum(axis=1)


@no_deadline
@given(tensors(4), st.sampled_from([INT4, INT8]))
def test_weight_scales_from_the_absolute_maximum(w, dtype):
    params = weight_params(w, 0, dtype)
    assert params.axis == 0
    assert not params.zero_point.any()
    for channel, scale in zip(w, params.scale, strict=True):
        largest = float(np.abs(channel).max())
        assert scale == (np.float32(max(largest / dtype.qmax, FLOAT32.tiny)) if largest else 1.0)
    assert np.abs(quantize(w, params).astype(int)).max() <= dtype.qmax


@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1])
def test_weight_axis(axis):
    w = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    params = weight_params(w, axis)
    expected = np.abs(w).max() if axis is None else np.abs(np.moveaxis(w, axis, 0)).reshape(w.shape[axis], -1).max(1)
    np.testing.assert_array_equal(params.scale, np.float32(expected.astype(np.float64) / 127))
    assert quantize(w, params).shape == w.shape


@no_deadline
@given(tensors(4), st.sampled_from([INT4, INT8]))
def test_mse_scales_are_never_worse(w, dtype):
    plain, best = squared_error(w, weight_params(w, 0, dtype)), squared_error(w, weight_params(w, 0, dtype, mse=True))
    # float32 rounds each dequantized value to one part in 2**24 of at most qmax steps: errors near half a step agree
    # to a few parts in 2**24 * qmax; smaller ones differ by that times the squared step.
    scale = np.abs(w).reshape(w.shape[0], -1).max(axis=1).astype(np.float64) / dtype.qmax
    assert (best <= plain + scale**2 * w[0].size * 1e-4).all()


@pytest.mark.parametrize(("dtype", "grid"), [(INT8, 0.02), (INT4, 0.04)])
def test_mse_scales_are_the_best_of_the_grid(dtype, grid):
    w = np.random.default_rng(1).laplace(size=(8, 300)).astype(np.float32)
    params = weight_params(w, 0, dtype, mse=True)
    absmax = np.abs(w).max(axis=1).astype(np.float64) / dtype.qmax
    candidates = [np.float32(absmax * (1 - grid * k)) for k in range(11)]
    errors = [squared_error(w, replace(params, scale=scale)) for scale in candidates]
    np.testing.assert_allclose(squared_error(w, params), np.min(errors, axis=0), rtol=1e-4)
    assert (squared_error(w, params) < errors[0]).any()


def test_mse_gains_much_for_four_bits():
    w = np.random.default_rng(2).standard_normal((16, 1024)).astype(np.float32)
    gain = squared_error(w, weight_params(w, 0, INT4, mse=True)) / squared_error(w, weight_params(w, 0, INT4))
    assert gain.mean() < 0.75


@pytest.mark.parametrize("mse", [False, True])
def test_channels_of_zeros_and_empty_weights_get_scale_one(mse):
    w = np.array([[0, 0], [1, -2]], dtype=np.float32)
    params = weight_params(w, 0, mse=mse)
    assert params.scale[0] == 1.0
    np.testing.assert_array_equal(quantize(w, params)[0], [0, 0])
    np.testing.assert_array_equal(weight_params(np.zeros((2, 0), np.float32), 0, mse=mse).scale, [1, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        weight_params(np.array([[1.0, bad]], dtype=np.float32), 0)


@pytest.mark.parametrize("axis", [0, 1])
def test_mse_takes_at_most_three_extra_arrays(axis):
    w = np.random.default_rng(3).standard_normal((512, 1024)).astype(np.float32)
    tracemalloc.start()
    try:
        weight_params(w, axis, mse=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * w.nbytes


def test_huge_weights_keep_the_absolute_maximum():
    w = np.array([[3e38, -1e38]], dtype=np.float32)
    np.testing.assert_array_equal(weight_params(w, 0, mse=True).scale, weight_params(w, 0).scale)


positive = st.floats(2.0**-60, 2.0**40, width=32)
biases = st.floats(-(2.0**40), 2.0**40, width=32)


@no_deadline
@given(positive, st.lists(st.tuples(positive, biases), min_size=1, max_size=5))
def test_bias_fits_and_scales_grow_only_where_needed(x_scale, channels):
    w_scale = np.array([channel[0] for channel in channels], dtype=np.float32)
    bias = np.array([channel[1] for channel in channels], dtype=np.float32)
    new_scale, codes = bias_params(x_scale, w_scale, bias)
    assert new_scale.dtype == np.float32
    assert codes.dtype == np.int32
    product = np.float32(x_scale) * new_scale
    assert product.dtype == np.float32
    assert (np.abs(codes.astype(np.int64)) <= BIAS_LIMIT).all()
    for i in range(len(channels)):
        assert codes[i] == round(float(bias[i]) / float(product[i]))
        before = float(np.float32(x_scale) * w_scale[i])
        fits = before >= FLOAT32.tiny and abs(float(bias[i])) / before <= BIAS_LIMIT
        needed = max(abs(float(bias[i])) / BIAS_LIMIT, FLOAT32.tiny) / x_scale
        assert new_scale[i] == w_scale[i] if fits else needed <= float(new_scale[i]) <= needed * (1 + 2.0**-21)


def test_bias_by_hand():
    w_scale, codes = bias_params(0.5, np.array([0.25, 0.5], np.float32), np.array([1.0, -0.125 * 3], np.float32))
    np.testing.assert_array_equal(w_scale, np.array([0.25, 0.5], np.float32))
    np.testing.assert_array_equal(codes, [8, -2])  # -1.5 to even


def test_one_weight_scale_for_all_channels_follows_the_largest_bias():
    bias = np.array([0.0, 1.0, -(2.0**31)], np.float32)
    w_scale, codes = bias_params(np.array([1.0]), np.float32(1.0), bias)
    assert w_scale.shape == ()
    assert 2.0 <= float(w_scale) <= 2.0 * (1 + 2.0**-21)
    assert codes[0] == 0
    assert -(2**30) <= codes[2] <= -(2**30) * (1 - 2.0**-20)


def test_a_product_below_the_normal_float32_is_lifted():
    w_scale, codes = bias_params(1e-30, np.array([1e-20, 1e-20], np.float32), np.array([0.0, 1e-38], np.float32))
    product = np.float32(1e-30) * w_scale
    assert (product >= FLOAT32.tiny).all()
    np.testing.assert_array_equal(codes, [0, 1])


@pytest.mark.parametrize(
    ("x_scale", "w_scale", "bias", "message"),
    [
        (1.0, [1.0], [np.nan], "NaN or infinities"),
        (1.0, [1.0], [np.inf], "NaN or infinities"),
        (0.0, [1.0], [1.0], "not positive"),
        (1.0, [-1.0], [1.0], "not positive"),
        (1.0, [1.0, 1.0], [1.0], "does not fit"),
        (1.0, 1.0, 1.0, "does not fit"),
        (1e-38, [1.0], [3e38], "no float32 scale"),
        (1e30, [1e30], [1.0], "no float32 scale"),
    ],
)
def test_bias_errors(x_scale, w_scale, bias, message):
    with pytest.raises(ValueError, match=message):
        bias_params(x_scale, w_scale, bias)


def test_no_bias_channels():
    w_scale, codes = bias_params(1.0, 1.0, np.zeros(0, np.float32))
    assert w_scale == 1.0
    assert codes.shape == (0,)


# ------------------------------------------------------------------ pairs


def test_pairs_of_one_sign_add_up_and_opposite_ones_do_not():
    rows = np.float32([[1, 2, 3, -4], [-1, -2, 5, 0], [0, 0, 0, 0]])
    assert largest_pair(rows).tolist() == [4.0, 5.0, 0.0]  # 1 + 2 < |-4|; 3 and -4 may not hide one another


def test_the_last_of_an_odd_number_stands_alone_and_inner_axes_are_not_crossed():
    assert largest_pair(np.float32([[1, 2, 7]])).tolist() == [7.0]
    assert largest_pair(np.float32([[[1, 2, 4], [5, 6, 3]]])).tolist() == [11.0]  # not 4 + 5


@no_deadline
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=MODERATE))
def test_two_products_of_codes_stay_within_16_bits(w):
    codes = quantize(w, weight_params(w, 0, least=largest_pair(w))).astype(int)
    padded = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2))).reshape(len(codes), -1, 2)
    for worst in (np.maximum(padded, 0), np.minimum(padded, 0)):
        assert np.abs(255 * worst.sum(axis=-1)).max(initial=0) <= 2**15 - 1


def test_room_is_left_even_where_every_pair_rounds_up():
    w = np.float32([[63.5, 63.5], [127, 0], [127, 127]])  # 63.5 / 127 * 127 rounds to 64, twice
    codes = quantize(w, weight_params(w, 0, least=largest_pair(w))).astype(int)
    assert codes.sum(axis=1).max() <= 128
