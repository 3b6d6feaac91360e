import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.errors import UsageError
from onnxq.numerics import histogram as numerics_histogram
from onnxq.numerics.histogram import Histogram

no_deadline = settings(deadline=None)
FINITE = st.floats(-(2.0**40), 2.0**40, width=32).filter(lambda value: value == 0 or abs(value) > 2.0**-40)
BATCHES = st.lists(hnp.arrays(np.float32, st.integers(0, 12), elements=FINITE), max_size=6)
BINS = st.sampled_from([4, 64, 2048])


def fed(batches, bins):
    histogram = Histogram(bins)
    for batch in batches:
        histogram.update(np.asarray(batch, np.float32))
    return histogram


def assert_same(a, b):
    np.testing.assert_array_equal(a.counts, b.counts)
    assert (a.bin_width, a.zeros) == (b.bin_width, b.zeros)
    assert (a.extremes.low, a.extremes.high) == (b.extremes.low, b.extremes.high)
    assert (a.extremes.count, a.extremes.infinite) == (b.extremes.count, b.extremes.infinite)


@no_deadline
@given(BATCHES, BINS)
def test_counts_against_a_loop(batches, bins):
    histogram = fed(batches, bins)
    values = [float(value) for batch in batches for value in batch]
    expected = dict.fromkeys(range(-bins // 2, bins // 2 + 1), 0)
    for value in values:
        expected[math.floor(value / histogram.bin_width)] += 1
    assert histogram.counts.tolist() == list(expected.values())
    assert histogram.counts.sum() == histogram.extremes.count == len(values)
    assert histogram.zeros == values.count(0.0)


@no_deadline
@given(BATCHES, BATCHES, BINS)
def test_merging_equals_feeding_everything(ours, theirs, bins):
    merged, other, one = fed(ours, bins), fed(theirs, bins), fed([*ours, *theirs], bins)
    merged.merge(other)
    assert_same(merged, one)
    assert_same(other, fed(theirs, bins))


@no_deadline
@given(BATCHES, BATCHES)
def test_merging_does_not_depend_on_the_order(ours, theirs):
    first, second = fed(ours, 64), fed(theirs, 64)
    first.merge(fed(theirs, 64))
    second.merge(fed(ours, 64))
    assert_same(first, second)


@no_deadline
@given(BATCHES, st.randoms())
def test_order_does_not_matter(batches, random):
    shuffled = [np.array(random.sample(list(batch), len(batch)), np.float32) for batch in batches]
    random.shuffle(shuffled)
    assert_same(fed(batches, 64), fed(shuffled, 64))


@no_deadline
@given(BATCHES, BINS)
def test_within_holds_all_values_but_zeros(batches, bins):
    histogram = fed(batches, bins)
    first, counts = histogram.within()
    values = np.concatenate([np.zeros(0), *batches])
    assert counts.sum() == np.count_nonzero(values)
    edges = (first + np.arange(counts.size + 1)) * histogram.bin_width
    assert edges[0] <= 0 <= edges[-1]
    expected, _ = np.histogram(values[values != 0], edges)  # its last bin is closed on both sides
    np.testing.assert_array_equal(counts, expected)


def test_zeros_stay_apart_from_small_values():
    histogram = fed([[0.0, -0.0, 1e-6, 4.0], [0.0, -1e-6]], 4)
    assert histogram.zeros == 3
    first, counts = histogram.within()
    assert (first, counts.tolist()) == (-1, [1, 1, 1])  # 4.0 is r itself and counts in [2, 4)


def test_nothing_has_one_empty_bin():
    first, counts = Histogram(4).within()
    assert (first, counts.tolist()) == (0, [0])


def test_memory_is_that_of_the_bins():
    histogram = Histogram(2048)
    for magnitude in (1e-30, 1.0, 1e30):
        histogram.update(np.full(10, magnitude))
    assert histogram.counts.nbytes == 2049 * 8


def test_merging_into_a_narrower_and_a_wider_histogram():
    merged = fed([[1e-20, -1.0]], 16)
    merged.merge(fed([[1000.0]], 16))
    merged.merge(fed([[1e-30, np.inf]], 16))
    assert_same(merged, fed([[1e-20, -1.0, 1000.0, 1e-30, np.inf]], 16))


def test_other_bins_are_refused():
    with pytest.raises(ValueError, match="histograms of 16 and 64 bins don't merge"):
        Histogram(16).merge(Histogram(64))
    with pytest.raises(UsageError, match="bins is 48; use a power of two"):
        Histogram(48)


def test_after_enough_values_a_share_stands_for_all(monkeypatch):
    monkeypatch.setattr(numerics_histogram, "ENOUGH", 20_000)
    rng = np.random.default_rng(0)
    batches = [np.maximum(rng.normal(size=(4, 5000)), 0).astype(np.float32) for _ in range(8)]
    batches[-1][0, 1] = 9.0  # not one of those that count, and yet the extremes are exact
    thinned, exact = Histogram(2048), Histogram(2048)
    for k, batch in enumerate(batches):
        thinned.update(batch)
        monkeypatch.setattr(numerics_histogram, "ENOUGH", 10**9)
        exact.update(batch)
        monkeypatch.setattr(numerics_histogram, "ENOUGH", 20_000)
        if k == 0:
            np.testing.assert_array_equal(thinned.counts, exact.counts)
    assert (thinned.extremes.low, thinned.extremes.high) == (exact.extremes.low, exact.extremes.high) == (0.0, 9.0)
    assert thinned.extremes.count == exact.counts.sum() == 160_000
    assert abs(thinned.counts.sum() - 160_000) <= 7 * numerics_histogram.THINNED
    assert thinned.zeros == pytest.approx(exact.zeros, rel=0.02)
    shares = np.cumsum(thinned.counts) / thinned.counts.sum(), np.cumsum(exact.counts) / exact.counts.sum()
    assert np.abs(shares[0] - shares[1]).max() < 0.01  # three standard errors of 40,000 values are 0.0075
