"""Weights that make up for errors in what a layer reads, against least squares solved directly."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import random
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.numerics.compensation import Drift
from onnxq.numerics.rounding import CHUNK

K, N, ROWS = 12, 5, 200
Array = np.ndarray


def rows(seed: int = 0, off: float = 0.1) -> tuple[Array, Array]:
    """(what a layer will read, what it read in float)."""
    x = random(ROWS, K, seed=seed)
    return x + np.float32(off) * random(ROWS, K, seed=seed + 1), x


def seen(a: Array, x: Array, parts: int = 1) -> Drift:
    drift = Drift()
    for one, other in zip(np.array_split(a, parts), np.array_split(x, parts), strict=True):
        drift.update(one, other)
    return drift


def direct(a: Array, x: Array, w: Array, damping: float) -> Array:
    """argmin over t of |a t - x w|^2 + damping * mean(diag(a^T a)) * |t - w|^2: rows that stand for the second term
    are appended to the first, and numpy's least squares solves it, in float64."""
    a, x, w = (v.astype(np.float64) for v in (a, x, w))
    pull = np.sqrt(damping * np.square(a).sum(axis=0).mean()) * np.eye(a.shape[1])
    return np.linalg.lstsq(np.vstack([a, pull]), np.vstack([x @ w, pull @ w]), rcond=None)[0]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), damping=st.sampled_from([1e-3, 0.01, 1.0]), off=st.sampled_from([0.01, 0.3, 2.0]))
def test_the_target_solves_least_squares(seed: int, damping: float, off: float) -> None:
    a, x = rows(seed, off)
    w = random(K, N, seed=seed)
    found = seen(a, x, 3).target(w, damping)
    assert (found.shape, found.dtype) == ((K, N), np.float32)
    # sums of float32 products of 200 rows
    np.testing.assert_allclose(found, direct(a, x, w, damping), rtol=0, atol=1e-4 * np.abs(w).max())


def test_inputs_as_in_float_keep_the_weights() -> None:
    _, x = rows()
    w = random(K, N)
    np.testing.assert_array_equal(seen(x, x).target(w, 0.01), w)


def test_the_target_brings_results_nearer() -> None:
    a, x = rows(off=0.5)
    w = random(K, N)
    before, after = (np.square(a @ t - x @ w).sum() for t in (w, seen(a, x).target(w, 0.01)))
    assert after < before
    more = np.square(a @ seen(a, x).target(w, 100.0) - x @ w).sum()
    assert after < more < before, "more damping is more of the weights as they are"


def test_parts_merge_to_the_whole() -> None:
    a, x = rows()
    whole, first, second = seen(a, x), seen(a[:50], x[:50]), seen(a[50:], x[50:])
    first.merge(second)
    assert (first.count, second.count) == (ROWS, ROWS - 50)
    np.testing.assert_allclose(first.hessian(), whole.hessian(), rtol=0, atol=1e-5 * whole.hessian().max())
    w = random(K, N)
    np.testing.assert_allclose(first.target(w, 0.01), whole.target(w, 0.01), rtol=0, atol=1e-4)


@pytest.mark.parametrize("into", ["empty", "seen"])
def test_merging_with_one_that_saw_nothing(into: str) -> None:
    a, x = rows()
    one, other = (Drift(), seen(a, x)) if into == "empty" else (seen(a, x), Drift())
    one.merge(other)
    w = random(K, N)
    np.testing.assert_array_equal(one.target(w, 0.01), seen(a, x).target(w, 0.01))
    assert one.count == ROWS
    if into == "empty":  # what was merged is not what is added to later
        one.update(a, x)
        np.testing.assert_array_equal(other.target(w, 0.01), seen(a, x).target(w, 0.01))


def test_dead_inputs_keep_their_weights() -> None:
    a, x = rows()
    a[:, [2, 7]] = 0
    w, live = random(K, N), np.delete(np.arange(K), [2, 7])
    found = seen(a, x).target(w, 0.01)
    np.testing.assert_array_equal(found[[2, 7]], w[[2, 7]])
    few = seen(a[:, live], x[:, live]).target(w[live], 0.01)
    np.testing.assert_allclose(found[live], few, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(seen(np.zeros_like(a), x).target(w, 0.01), w)


def test_more_rows_than_are_summed_at_once() -> None:
    a, x = random(CHUNK + 40, 4), random(CHUNK + 40, 4, seed=1)
    w = random(4, 3)
    np.testing.assert_allclose(seen(a, x).target(w, 0.01), direct(a, x, w, 0.01), rtol=0, atol=1e-3)


def test_rows_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows \[3, 4\] and \[2, 4\] don't pair; pass the same rows of both"):
        Drift().update(random(3, 4), random(2, 4))
    with pytest.raises(ValueError, match="NaN or infinities"):
        Drift().update(np.full((3, 4), np.nan, np.float32), random(3, 4))


def with_ones(rows: Array) -> Array:
    return np.pad(rows, ((0, 0), (0, 1)), constant_values=np.float32(1))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), parts=st.integers(1, 3))
def test_about_means_weights_and_bias_are_those_of_least_squares(seed: int, parts: int) -> None:
    """Fitted with a free number for each output, by numpy's least squares on rows with a 1 behind them."""
    a, x = rows(seed, 0.3)
    a, x = a + 2 * random(K, seed=5), x + 2 * random(K, seed=6)
    w = random(K, N, seed=seed)
    sums = seen(with_ones(a), with_ones(x), parts).centred()
    found = sums.target(w, 1e-9)
    shift = sums.shift(w, np.arange(K), found)
    assert (shift.shape, shift.dtype) == ((N,), np.float32)
    best = np.linalg.lstsq(with_ones(a).astype(np.float64), x.astype(np.float64) @ w, rcond=None)[0]
    np.testing.assert_allclose(np.vstack([found, shift]), best, rtol=0, atol=2e-3 * np.abs(best).max())


def test_what_never_moves_is_left_to_the_bias() -> None:
    _, x = rows()
    x[:, 3] = 1.7
    w = random(K, N)
    drift = Drift()
    drift.update(with_ones(x))
    sums = drift.centred()
    assert not sums.own[3].any()
    assert not sums.own[:, 3].any()
    np.testing.assert_array_equal(sums.target(w, 0.01), w)
    kept = np.delete(np.arange(K), 3)
    np.testing.assert_allclose(sums.shift(w, kept, w[kept]), 1.7 * w[3], rtol=0, atol=1e-5)


def test_the_last_input_can_be_left_out() -> None:
    a, x = rows()
    w = random(K, N)
    found = seen(with_ones(a), with_ones(x)).sums().without_last()
    np.testing.assert_allclose(found.target(w, 0.01), seen(a, x).target(w, 0.01), rtol=0, atol=1e-6)
