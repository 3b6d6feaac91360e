import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.numerics.comparison import CHUNK, Comparison

no_deadline = settings(deadline=None)
MODERATE = st.floats(-1e4, 1e4, width=32)


def compared(*pairs):
    comparison = Comparison()
    for reference, result in pairs:
        comparison.update(np.asarray(reference), np.asarray(result))
    return comparison


def test_comparison_by_hand():
    comparison = compared(([3.0, 4.0], [3.0, 3.5]))
    assert comparison.sqnr_db == pytest.approx(20.0)  # 25 / 0.25 = 100
    assert comparison.cosine == pytest.approx((9 + 14) / (5 * math.sqrt(9 + 12.25)))
    assert comparison.max_abs == 0.5
    assert comparison.count == 2


@no_deadline
@given(st.data())
def test_comparison_in_batches_equals_numpy_over_everything(data):
    pairs = []
    for shape in data.draw(st.lists(hnp.array_shapes(min_side=0, max_side=4), min_size=1, max_size=4)):
        arrays = hnp.arrays(np.float32, shape, elements=MODERATE)
        pairs.append((data.draw(arrays), data.draw(arrays)))
    a, b = (np.concatenate([pair[i].ravel() for pair in pairs]).astype(np.float64) for i in (0, 1))
    comparison = compared(*pairs)
    assert comparison.count == a.size
    assert comparison.max_abs == np.abs(a - b).max(initial=0)
    if (a == b).all():
        assert comparison.sqnr_db is None
        assert comparison.cosine == pytest.approx(1.0)
    else:
        signal, noise, energy = np.sum(a**2), np.sum((a - b) ** 2), np.sum(b**2)
        assert comparison.sqnr_db == pytest.approx(10 * np.log10(signal / noise) if signal else -math.inf)
        expected = np.sum(a * b) / np.sqrt(signal * energy) if signal and energy else 0.0
        assert comparison.cosine == pytest.approx(expected, abs=1e-12)


def test_comparison_accumulates_in_float64():
    a = np.full(3_000_000, 1e4, np.float32)  # more than one chunk
    comparison = compared((a, a + np.float32(1)))
    assert comparison.sqnr_db == pytest.approx(80.0, abs=1e-9)
    assert comparison.cosine == pytest.approx(1.0, abs=1e-12)


def test_comparison_holds_no_large_arrays():
    a = np.ones(4_000_000, np.float32)
    tracemalloc.start()
    try:
        compared((a, a))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * 8 * CHUNK


@pytest.mark.parametrize(
    "pair",
    [
        ([1.0, 2.0], [1.0, np.nan]),
        ([1.0, np.nan], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, np.inf]),
        ([1.0, np.inf], [1.0, -np.inf]),
        ([1.0, 2.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0], [[1.0, 2.0]]),
    ],
)
def test_broken_results_stay_broken(pair):
    comparison = compared(([1.0], [1.0]), pair, ([1.0], [1.0]))
    assert comparison.sqnr_db == -math.inf
    assert comparison.cosine == 0.0
    assert comparison.max_abs == math.inf


def test_equal_infinities_are_equal():
    comparison = compared(([1.0, -np.inf, np.inf], [1.0, -np.inf, np.inf]))
    assert comparison.sqnr_db is None
    assert (comparison.cosine, comparison.max_abs, comparison.count) == (1.0, 0.0, 3)


def test_comparison_of_zeros_and_of_nothing():
    assert (Comparison().sqnr_db, Comparison().cosine, Comparison().max_abs) == (None, 1.0, 0.0)
    assert (compared(([0.0], [0.0])).sqnr_db, compared(([0.0], [0.0])).cosine) == (None, 1.0)
    assert (compared(([0.0], [1.0])).sqnr_db, compared(([0.0], [1.0])).cosine) == (-math.inf, 0.0)


def test_comparison_of_integers():
    assert compared((np.array([250, 3], np.uint8), np.array([255, 3], np.uint8))).max_abs == 5.0
