"""Moments against sums over everything at once, in exact arithmetic where it matters."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.numerics import moments
from onnxq.numerics.moments import Moments, Outside

no_deadline = settings(deadline=None)
VALUES = st.floats(-1e4, 1e4, width=32)
BATCHES = st.lists(hnp.arrays(np.float32, hnp.array_shapes(min_side=0, max_side=5), elements=VALUES), max_size=5)
EMPTY = (0, 0, 0, 0.0, 0.0, 0.0, 0.0)


def fed(*batches):
    found = Moments()
    for batch in batches:
        found.update(np.asarray(batch))
    return found


def exact(values):
    """(count, low, high, mean, std, excess kurtosis, range_parm) by rational numbers."""
    numbers = [Fraction(float(v)) for v in np.asarray(values).ravel()]
    if not numbers:
        return EMPTY
    count = len(numbers)
    mean = sum(numbers) / count
    second, fourth = (sum((v - mean) ** k for v in numbers) / count for k in (2, 4))
    std = math.sqrt(second)
    kurtosis = float(fourth / second**2) - 3 if second else 0.0
    absmax = max(map(abs, numbers))
    return count, min(numbers), max(numbers), float(mean), std, kurtosis, float(absmax) / std if second else 0.0


def figures(found):
    low, high = (found.extremes.low, found.extremes.high) if found.count else (0, 0)
    return found.count, low, high, found.mean, found.std, found.kurtosis, found.range_parm


def assert_close(found, wanted):
    got = figures(found)
    assert got[:3] == tuple(map(float, wanted[:3]))
    assert got[3] == pytest.approx(wanted[3], rel=1e-9, abs=1e-12 * found.extremes.absmax)
    # a mean as large as range_parm deviations is rounded by that share of one of them
    assert got[4:] == pytest.approx(wanted[4:], rel=1e-9 + wanted[-1] * 2.0**-52, abs=1e-9)


def test_by_hand():
    found = fed([1.0, 2.0], [], [3.0, 10.0])
    # mean 4, deviations -3, -2, -1, 6: squares 50, fourth powers 81 + 16 + 1 + 1296
    assert figures(found) == pytest.approx((4, 1, 10, 4.0, math.sqrt(12.5), 1394 / 4 / 12.5**2 - 3,
                                            10 / math.sqrt(12.5)))


def test_before_there_is_any_value_and_without_spread():
    assert figures(Moments()) == EMPTY
    assert figures(fed([], np.zeros((0, 3)))) == EMPTY
    found = fed(np.full(1000, 0.1, np.float32), np.full((3, 7), 0.1, np.float32))
    assert (found.std, found.kurtosis, found.range_parm) == (0.0, 0.0, 0.0)
    assert found.mean == float(np.float32(0.1))


def test_known_distributions():
    x = np.random.default_rng(0).normal(3.0, 2.0, 1 << 20)
    found = fed(*np.split(x, 16))
    assert (found.mean, found.std, found.kurtosis) == pytest.approx((3.0, 2.0, 0.0), abs=0.02)
    assert fed(np.linspace(-1, 1, 100001)).kurtosis == pytest.approx(-1.2, abs=1e-3)  # of the uniform one
    assert fed([-1.0, 1.0]).kurtosis == -2.0  # the least there is


@no_deadline
@given(BATCHES)
def test_in_batches_equals_all_at_once(batches):
    whole = np.concatenate([b.ravel() for b in batches]) if batches else np.zeros(0, np.float32)
    assert_close(fed(*batches), exact(whole))


@no_deadline
@given(BATCHES, BATCHES)
def test_merging_equals_seeing_both(first, second):
    merged = fed(*first)
    merged.merge(fed(*second))
    whole = [b.ravel() for b in (*first, *second)]
    assert_close(merged, exact(np.concatenate(whole) if whole else np.zeros(0, np.float32)))


@no_deadline
@given(hnp.arrays(np.float32, st.integers(2, 60), elements=st.floats(-1, 1, width=32)), st.integers(1, 20))
def test_a_large_mean_cancels_nothing(values, size):
    """Sums of plain fourth powers would leave nothing of a spread of 1 around 2**20."""
    shifted = (values + np.float32(2**20)).astype(np.float32)
    assert_close(fed(*np.split(shifted, range(size, len(shifted), size))), exact(shifted))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_reach_of_float32(scale):
    values = (np.random.default_rng(1).normal(size=4000) * scale).astype(np.float32)
    found, wanted = fed(values), exact(values)
    assert figures(found)[3:] == pytest.approx(wanted[3:], rel=1e-9)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.uint8, np.int64])
def test_other_dtypes(dtype):
    values = np.arange(50).astype(dtype)
    assert_close(fed(values), exact(values))


def test_chunks_are_merged(monkeypatch):
    values = np.random.default_rng(2).standard_normal(1000).astype(np.float32)
    monkeypatch.setattr(moments, "CHUNK", 7)
    assert_close(fed(values), exact(values))


def test_infinities_are_counted_and_nothing_else_and_nan_is_refused():
    found = fed([1.0, np.inf, 3.0], [-np.inf])
    assert (found.count, found.infinite, found.mean, found.extremes.absmax) == (2, 2, 2.0, 3.0)
    with pytest.raises(ValueError, match="NaN"):
        found.update(np.float32([1.0, np.nan]))
    assert (found.count, found.mean) == (2, 2.0)


def test_a_batch_stays_as_it_was():
    batch = np.arange(6.0).reshape(2, 3)
    fed(batch, batch.T)
    np.testing.assert_array_equal(batch, np.arange(6.0).reshape(2, 3))


@no_deadline
@given(BATCHES, VALUES, VALUES)
def test_outside_counts_what_lies_beyond_either_bound(batches, one, other):
    found = Outside(min(one, other), max(one, other))
    for batch in batches:
        found.update(batch)
    values = [float(v) for batch in batches for v in batch.ravel()]
    assert found.count == len(values)
    assert found.outside == sum(v < found.low or v > found.high for v in values)
    assert found.share == (found.outside / len(values) if values else 0.0)


def test_outside_counts_infinities_and_refuses_nan():
    found = Outside(-1.0, 1.0)
    found.update(np.float32([-np.inf, np.inf, 0.0, 1.0]))
    assert (found.count, found.outside, found.share) == (4, 2, 0.5)
    with pytest.raises(ValueError, match="NaN"):
        found.update(np.float32([np.nan]))
    assert found.count == 4
