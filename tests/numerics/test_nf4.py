"""NF4 against the quantiles that define it, every pair of values, and what onnxruntime's kernel makes of the bytes."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbits_support import run_kernel

from onnxq.numerics import nf4

no_deadline = settings(deadline=None)


def test_values_are_quantiles_of_a_normal_distribution():
    """Eight steps from the quantile .9677083 to the median above it, seven below (arXiv 2305.14314, appendix E)."""
    quantile, last = NormalDist().inv_cdf, 0.9677083
    above = [quantile(p) for p in np.linspace(last, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(last, 0.5, 8)[:-1]]
    expected = np.array(sorted([*above, 0.0, *below])) / quantile(last)
    np.testing.assert_allclose(nf4.VALUES, expected, atol=1e-6)


def test_a_weight_by_hand():
    """Blocks of 2 along columns of 3, the last one short: (4, -4), (0, 1), (-2, 0)."""
    w = np.float32([[4, 1], [-4, -2], [0, 0]])
    codes, absmax = nf4.quantize(w, 2)
    assert codes.tolist() == [0xF0, 0x7F, 0x07]
    assert absmax.tolist() == [4, 1, 2]
    np.testing.assert_array_equal(nf4.dequantize(codes, absmax, (3, 2), 2), w)


@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(0, 6), st.sampled_from([2, 16, 64]), st.booleans())
@no_deadline
def test_each_weight_gets_the_nearest_value(seed, inputs, outputs, size, chunks):
    rng = np.random.default_rng(seed)
    w = (rng.normal(size=(inputs, outputs)) * rng.choice([0, 1, 100], outputs)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        if chunks:
            patch.setattr(nf4, "_CELLS", 1)
        codes, absmax = nf4.quantize(w, size)
    assert codes.shape == (-(-w.size // 2),)
    flat, most = w.T.reshape(-1), np.repeat(absmax, size)[: w.size]
    np.testing.assert_array_equal(absmax, [np.abs(flat[k : k + size]).max() for k in range(0, w.size, size)])
    found = nf4.dequantize(codes, absmax, (inputs, outputs), size).T.reshape(-1)
    nearest = np.abs(nf4.VALUES[:, None] * most - flat).min(axis=0) if w.size else flat
    assert (np.abs(found - flat) <= nearest * (1 + 1e-5) + 1e-7 * most).all()
    assert (found[flat == 0] == 0).all()


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("inputs", [64, 50])
def test_the_kernel_reads_what_was_packed(inputs, size):
    """The product is summed in float32: each term and sum is off by 2**-24 of it at most."""
    rng = np.random.default_rng(inputs)
    w, x = rng.normal(size=(inputs, 6)).astype(np.float32), rng.normal(size=(3, inputs)).astype(np.float32)
    codes, absmax = nf4.quantize(w, size)
    found = run_kernel("MatMulBnb4", x, [codes, absmax], K=inputs, N=6, block_size=size, quant_type=1)
    kept = nf4.dequantize(codes, absmax, (inputs, 6), size).astype(np.float64)
    assert (np.abs(found - x @ kept) <= inputs * 2.0**-23 * (np.abs(x) @ np.abs(kept))).all()


@pytest.mark.parametrize(("w", "size", "says"), [
    (np.float32([[1], [np.nan]]), 2, "NaN"),
    (np.float32([[1], [-np.inf]]), 2, "NaN"),
    (np.float32([1, 2]), 2, r"\[K, N\]"),
    (np.float32([[1], [2]]), 3, "even size"),
    (np.float32([[1], [2]]), 0, "even size"),
])
def test_what_does_not_fit_is_refused(w, size, says):
    with pytest.raises(ValueError, match=says):
        nf4.quantize(w, size)
