import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.numerics.extremes import MinMax, MovingAverage, PerChannel

no_deadline = settings(deadline=None)
FINITE = st.floats(-(2.0**40), 2.0**40, width=32)
CHANNELS = 3
# Batches [CHANNELS, ?, ?] of unequal shapes, some without values.
CHANNELLED = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 4)).flatmap(
        lambda shape: hnp.arrays(np.float32, (CHANNELS, *shape), elements=FINITE)
    ),
    min_size=1,
    max_size=5,
)


def fed(running, batches):
    for batch in batches:
        running.update(np.asarray(batch, np.float32))
    return running


def test_absmax_of_a_tensor():
    assert MinMax().absmax == 0.0
    assert fed(MinMax(), [[1.0, -3.0], [2.0]]).absmax == 3.0
    assert fed(MinMax(), [[-np.inf, 2.0]]).absmax == 2.0


def test_moving_average_by_hand():
    running = fed(MovingAverage(0.25), [[-1.0, 4.0, 0.5], [-3.0, 8.0], [1.0, 1.0]])
    # Minima -1, -3, 1 and maxima 4, 8, 1: -1 -> -1.5 -> -.875 and 4 -> 5 -> 4.
    assert (running.low, running.high) == (-0.875, 4.0)
    assert running.result() == (-0.875, 4.0)
    assert running.count == 7


def test_moving_average_begins_with_the_first_values_and_widens_only_its_result():
    running = fed(MovingAverage(0.5), [[], [np.inf], [2.0, 3.0]])
    assert running.result() == (0.0, 3.0)
    assert running.low == 2.0
    fed(running, [[-4.0, 5.0], [np.inf, -np.inf], []])
    assert (running.low, running.high) == (-1.0, 4.0)
    assert (running.count, running.infinite) == (4, 3)


@no_deadline
@given(CHANNELLED, st.floats(0.001, 1.0))
def test_moving_average_against_a_weighted_sum(batches, constant):
    running = fed(MovingAverage(constant), batches)
    lows = [float(batch.min()) for batch in batches if batch.size]
    highs = [float(batch.max()) for batch in batches if batch.size]
    if not lows:
        assert running.result() == (0.0, 0.0)
        return
    weights = [(1 - constant) ** (len(lows) - 1 - i) * (constant if i else 1.0) for i in range(len(lows))]
    scale = max(map(abs, lows + highs))
    assert running.low == pytest.approx(math.fsum(w * v for w, v in zip(weights, lows, strict=True)), abs=1e-12 * scale)
    assert running.high == pytest.approx(
        math.fsum(w * v for w, v in zip(weights, highs, strict=True)), abs=1e-12 * scale
    )
    assert min(lows) <= running.low <= max(lows)
    assert min(highs) <= running.high <= max(highs)


def test_moving_average_is_that_of_the_field_by_default():
    batches = np.random.default_rng(0).standard_normal((50, 20)).astype(np.float32)
    running = fed(MovingAverage(), batches)
    low = float(batches[0].min())
    for batch in batches[1:]:
        low = 0.99 * low + 0.01 * float(batch.min())
    assert running.low == pytest.approx(low, rel=1e-12)


@no_deadline
@given(CHANNELLED, st.integers(0, 2), st.booleans())
def test_per_channel_equals_minmax_of_each_channel(batches, position, negative):
    running = PerChannel(position - 3 if negative else position)
    each = [MinMax() for _ in range(CHANNELS)]
    for batch in batches:
        running.update(np.moveaxis(batch, 0, position))
        for channel, values in zip(each, batch, strict=True):
            channel.update(values)
    low, high = running.result()
    assert low.dtype == high.dtype == np.float64
    assert list(zip(low.tolist(), high.tolist(), strict=True)) == [channel.result() for channel in each]
    assert running.absmax.tolist() == [channel.absmax for channel in each]
    assert running.low.tolist() == [channel.low for channel in each]
    assert running.count == sum(channel.count for channel in each)


@no_deadline
@given(CHANNELLED, CHANNELLED)
def test_per_channel_merges(ours, theirs):
    merged = fed(PerChannel(0), ours)
    merged.merge(fed(PerChannel(0), theirs))
    one = fed(PerChannel(0), [*ours, *theirs])
    np.testing.assert_array_equal(merged.low, one.low)
    np.testing.assert_array_equal(merged.high, one.high)
    assert (merged.count, merged.infinite) == (one.count, one.infinite)


def test_per_channel_merges_with_an_empty_one():
    empty, running = PerChannel(0), fed(PerChannel(0), [[1.0, -2.0]])
    running.merge(PerChannel(0))
    empty.merge(running)
    for merged in (running, empty):
        assert merged.absmax.tolist() == [1.0, 2.0]
        assert merged.count == 2


def test_per_channel_ignores_infinities():
    running = PerChannel(-1)
    running.update(np.array([[np.inf, 2.0, -np.inf], [-1.0, 3.0, np.inf]], np.float32))
    low, high = running.result()
    assert (low.tolist(), high.tolist()) == ([-1.0, 0.0, 0.0], [0.0, 3.0, 0.0])
    assert running.absmax.tolist() == [1.0, 3.0, 0.0]
    assert (running.count, running.infinite) == (3, 3)


def test_per_channel_keeps_no_view_of_a_batch():
    x = np.array([1.0, -2.0])
    running = PerChannel(0)
    running.update(x)
    x[:] = 9.0
    assert running.absmax.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "float16", "float64", "bool"])
def test_per_channel_takes_all_dtypes(dtype):
    running = PerChannel(1)
    running.update(np.array([[0, 1], [1, 1]]).astype(dtype))
    low, high = running.result()
    assert (low.tolist(), high.tolist()) == ([0.0, 0.0], [1.0, 1.0])
    assert running.low.tolist() == [0.0, 1.0]


def test_per_channel_refuses_nan_and_other_shapes_and_changes_nothing():
    running = fed(PerChannel(1), [[[1.0, -2.0]]])
    with pytest.raises(ValueError, match="holds NaN"):
        running.update(np.array([[np.nan, 9.0]]))
    with pytest.raises(ValueError, match="a batch has 3 channels along axis 1, those before it 2"):
        running.update(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="a batch of rank 1 has no axis 1"):
        running.update(np.zeros(2))
    with pytest.raises(ValueError, match="3 channels"):
        running.merge(fed(PerChannel(1), [np.ones((2, 3))]))
    assert running.absmax.tolist() == [1.0, 2.0]
    assert (running.count, running.infinite) == (2, 0)


def test_per_channel_before_any_batch():
    low, high = PerChannel(0).result()
    assert low.shape == high.shape == (0,)
