"""Two levels of scales: what codes promise to integer kernels, and that searching finds what a grid does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.numerics import affine, rounding, two_level
from onnxq.numerics.dtypes import INT4

few = settings(max_examples=40)
SEEDS = st.integers(0, 2**32 - 1)


def weight(seed, inputs=None, outputs=None):
    """[K, N]: columns of several sizes, some heavy entries, blocks and columns of zeros."""
    rng = np.random.default_rng(seed)
    inputs, outputs = inputs or int(rng.integers(1, 90)), outputs or int(rng.integers(1, 9))
    w = rng.standard_t(4, size=(inputs, outputs)) * rng.uniform(0.01, 10.0, outputs)
    w[: inputs // 3, rng.random(outputs) < 0.2] = 0.0
    w[:, rng.random(outputs) < 0.1] = 0.0
    return w.astype(np.float32)


def hessian_of(inputs, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60, 3)) @ rng.normal(size=(3, inputs)) + 0.3 * rng.normal(size=(60, inputs))
    return x.T @ x


def errors(w, codes, scale):
    """[N] in float64."""
    return np.square(codes * scale.astype(np.float64) - w).sum(axis=0)


@given(SEEDS, st.integers(1, 40), st.sampled_from(["absmax", "mse"]))
@few
def test_codes_are_levels_times_multiples_that_pairs_of_products_hold(seed, size, search):
    w = weight(seed)
    found = two_level.choose(w, size, search)
    assert (found.block_size, found.multiples.dtype, found.scale.dtype) == (size, np.int8, np.float32)
    assert found.multiples.shape == (-(-len(w) // size), w.shape[1])
    assert (found.multiples != 0).all()
    assert (found.multiples >= -8).all()
    assert (found.multiples <= 7).all()
    assert (found.scale > 0).all()
    codes = two_level.nearest(w, found)
    levels = found.levels(codes)
    assert (levels >= -8).all()
    assert (levels <= 7).all()
    spread = np.repeat(found.multiples, size, axis=0)[: len(w)].astype(int)
    np.testing.assert_array_equal(codes, levels * spread)
    assert np.abs(codes.astype(int)).max(initial=0) <= 64
    np.testing.assert_array_equal(codes[w == 0], 0)
    np.testing.assert_array_equal(affine.dequantize(codes, found.channels),
                                  (codes * found.scale).astype(np.float32))


@given(SEEDS, st.integers(1, 40))
@few
def test_levels_are_the_nearest(seed, size):
    w = weight(seed)
    found = two_level.choose(w, size)
    codes = two_level.nearest(w, found)
    step = np.repeat(found.multiples, size, axis=0)[: len(w), :, None].astype(float) * found.scale[:, None]
    every = np.arange(-8, 8) * step  # [K, N, 16]
    best = np.abs(every - w[..., None]).min(axis=-1)
    np.testing.assert_allclose(np.abs(codes * found.scale.astype(float) - w), best, rtol=1e-5,
                               atol=1e-6 * np.abs(w).max(initial=0))


@given(SEEDS, st.integers(1, 40))
@few
def test_searching_more_loses_nowhere(seed, size):
    w = weight(seed)
    plain, searched = (errors(w, two_level.nearest(w, f), f.scale)
                       for f in (two_level.choose(w, size, search) for search in ("absmax", "mse")))
    # errors are compared in float32, where one of a weight is known to 2**-24 of it
    assert (np.sqrt(searched) <= np.sqrt(plain) + 4 * np.sqrt(len(w)) * 2.0**-24 * np.abs(w).max(axis=0)).all()


def test_it_comes_near_the_best_multiples_of_a_fine_grid_of_scales():
    """All multiples of each block, for 40 scales of the channel."""
    w = weight(5, 32, 6)
    w[:, 0] = np.random.default_rng(0).normal(size=32)
    found = two_level.choose(w, 8)
    best = np.full(w.shape[1], np.inf)
    for share in np.linspace(0.6, 1.2, 40):
        scale = np.where(np.abs(w).max(axis=0) > 0, np.abs(w).max(axis=0) * share / 64, 1)
        blocks = []
        for block in w.astype(float).reshape(4, 8, 6):
            steps = np.array([m for m in range(-8, 8) if m])[:, None, None] * scale
            rest = np.clip(np.rint(block / steps), -8, 7) * steps - block
            blocks.append(np.square(rest).sum(axis=1).min(axis=0))
        best = np.minimum(best, np.sum(blocks, axis=0))
    assert errors(w, two_level.nearest(w, found), found.scale).sum() <= 1.15 * best.sum()


def test_it_is_nearly_as_good_as_scales_of_float():
    """Normal weights, blocks of 16: 4 bits with a float scale per block leave about 0.0052 of the square."""
    w = np.random.default_rng(1).normal(size=(512, 64)).astype(np.float32)
    found = two_level.choose(w)
    assert errors(w, two_level.nearest(w, found), found.scale).sum() / np.square(w).sum() < 0.0065


@given(SEEDS, st.sampled_from([8, 16]))
@few
def test_gptq_keeps_outputs_better_than_nearest_levels(seed, size):
    w = np.random.default_rng(seed).normal(size=(48, 12)).astype(np.float32)
    hessian = hessian_of(48, seed)
    start = two_level.choose(w, size, "mse", hessian)
    codes, found = two_level.gptq(w, hessian, start)
    assert found.multiples is start.multiples
    found.levels(codes)  # they still are levels of 4 bits
    tempered = rounding.damped(hessian, 0.01)

    def error(codes, scale):
        rest = codes * scale.astype(float) - w
        return np.einsum("kn,kn->n", rest, tempered @ rest)

    plain = two_level.choose(w, size)
    assert error(codes, found.scale).sum() < error(two_level.nearest(w, plain), plain.scale).sum()
    # each output's scale is the best for its codes
    for change in (0.999, 1.001):
        assert (error(codes, found.scale) <= error(codes, found.scale * change) * (1 + 1e-6)).all()


def test_a_block_by_hand():
    """The scale is a 56th of the largest weight: its block has steps of 7 scales, the other one steps of 1."""
    w = np.float32([[56], [-28], [7], [0], [2], [-7], [7], [0]])
    found = two_level.choose(w, 4, "absmax")
    assert found.scale.tolist() == [1.0]
    assert found.multiples.ravel().tolist()[1] in (1, -1)
    codes = two_level.nearest(w, found)
    np.testing.assert_array_equal(codes[4:, 0], [2, -7, 7, 0])
    assert found.blocks.dtype is INT4


def test_what_it_refuses():
    w = np.float32([[1, np.nan]])
    with pytest.raises(ValueError, match="NaN"):
        two_level.choose(w)
    with pytest.raises(ValueError, match="no matrix"):
        two_level.choose(np.ones(4, np.float32))
    found = two_level.TwoLevel(np.float32([1]), np.int8([[3]]), 2)
    with pytest.raises(ValueError, match="4-bit multiples"):
        found.levels(np.int8([[3], [4]]))
    with pytest.raises(ValueError, match="4-bit multiples"):
        found.levels(np.int8([[3], [24]]))
