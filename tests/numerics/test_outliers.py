"""Narrow codes and a few protected ones: how many there are, what the others are off by, and who is protected."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.numerics import affine, outliers

few = settings(max_examples=40)
SEEDS = st.integers(0, 2**32 - 1)


def weight(seed, axis=1):
    """[K, N] (or [N, K, 1]) with heavy tails, of columns of several sizes."""
    rng = np.random.default_rng(seed)
    inputs, outputs = int(rng.integers(8, 200)), int(rng.integers(1, 12))
    w = rng.standard_t(4, size=(inputs, outputs)) * rng.uniform(0.01, 10.0, outputs)
    w[:, rng.random(outputs) < 0.1] = 0.0
    return w.astype(np.float32) if axis == 1 else np.ascontiguousarray(w.T.astype(np.float32))[:, :, None]


@given(SEEDS, st.sampled_from(outliers.BITS), st.sampled_from([0.0, 0.01, 0.03, 0.1]), st.sampled_from([0, 1]))
@few
def test_no_more_are_protected_than_may_be(seed, bits, fraction, axis):
    w = weight(seed, axis)
    params = outliers.choose(w, axis, bits, fraction)
    codes = affine.quantize(w, params)
    assert (params.axis, params.dtype.name) == (axis, "int8")
    assert outliers.protected(codes, bits) <= fraction * w.size
    # nothing saturates, so each is off by half a step at most
    step = np.moveaxis(np.broadcast_to(params.scale, np.moveaxis(w, axis, -1).shape), -1, axis)
    assert (np.abs(affine.dequantize(codes, params) - w) <= step * 0.500001 + 1e-12).all()
    wide = outliers.limits(w, params, bits)
    np.testing.assert_array_equal(wide == 127, np.abs(codes.astype(int)) > outliers.narrow(bits))
    assert (np.abs(codes.astype(int)) <= wide).all()


@given(SEEDS, st.sampled_from([0.01, 0.05]))
@few
def test_fractions_go_where_they_narrow_steps_the_most(seed, fraction):
    """The sum of squared scales is no larger than with the same fraction of each channel."""
    w = weight(seed)
    each = int(fraction * len(w))
    equal = np.sort(np.abs(w), axis=0)[len(w) - 1 - each] / 7
    equal = np.maximum(equal, np.abs(w).max(axis=0) / 127)
    scale = outliers.choose(w, 1, 4, fraction).scale
    present = np.abs(w).max(axis=0) > 0
    found, plain = (np.square(s[present], dtype=np.float64).sum() for s in (scale, equal))
    # a multiplier reaches only the corners of the hull: one channel may be left with what it would take for the next
    slack = np.square(np.abs(w).max(axis=0)[present] / 7, dtype=np.float64).max(initial=0.0)
    assert found <= plain + slack


def test_by_hand():
    """Ten weights of 1 to 10 sevenths and one of 40: it is protected, and 8, 9 and 10 are where they may be, too."""
    w = np.float32([1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 40])[:, None] / 7
    params = outliers.choose(w, 1, 4, 1 / 11)
    np.testing.assert_allclose(params.scale, [1 / 7])
    assert affine.quantize(w, params)[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 40]
    assert outliers.limits(w, params, 4)[:, 0].tolist() == [7] * 10 + [127]
    np.testing.assert_allclose(outliers.choose(w, 1, 4, 0.0).scale, [40 / 49])


def test_largest_weights_and_pairs_bound_scales_from_below():
    w = np.zeros((1000, 1), np.float32)
    w[0] = 1.0
    w[1:6] = 0.001
    assert outliers.choose(w, 1, 4, 0.01).scale[0] == np.float32(1 / 127)
    assert outliers.choose(w, 1, 4, 0.01, least=[2.0]).scale[0] == np.float32(2 / 127)
    assert outliers.choose(np.zeros((4, 2), np.float32), 1).scale.tolist() == [1.0, 1.0]


def test_beyond_so_many_times_the_root_mean_square():
    w = np.random.default_rng(0).normal(size=(4000, 2)).astype(np.float32) * [1, 3]
    w = w.astype(np.float32)
    wanted = 3 * np.sqrt(np.square(w).mean(axis=0)) / 7
    np.testing.assert_allclose(outliers.choose(w, 1, 4, sigma=3.0).scale, wanted, rtol=1e-6)
    codes = affine.quantize(w, outliers.choose(w, 1, 4, sigma=3.0))
    assert 0.0005 < outliers.protected(codes, 4) / w.size < 0.005  # 0.0027 of normal numbers, and half a step


def test_what_it_refuses():
    with pytest.raises(ValueError, match="NaN"):
        outliers.choose(np.float32([[np.nan]]), 1)
