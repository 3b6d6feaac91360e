import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.errors import UsageError
from onnxq.numerics import histogram
from onnxq.numerics.dtypes import INT8, UINT8
from onnxq.numerics.ranges import MSE, Entropy, MinMax, Percentile, make

no_deadline = settings(deadline=None)
# Wide enough for many doublings, narrow enough that x / bin width never underflows.
FINITE = st.floats(-(2.0**40), 2.0**40, width=32).filter(lambda value: value == 0 or abs(value) > 2.0**-40)
BATCHES = st.lists(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5), elements=FINITE),
    max_size=6,
)
# Percents whose tails are binary fractions, so that count * tail is exact.
EXACT_PERCENT = st.sampled_from([100.0, 98.4375, 93.75, 75.0, 50.0])


METHODS = {
    "minmax": {}, "moving-average": {}, "percentile": {"percent": 100}, "entropy": {}, "mse": {},
}


def every():
    return [make(method, **options) for method, options in METHODS.items()]


def plain(running):
    return type(running).__name__


def folded(batches, **options):
    percentile = Percentile(**options)
    for batch in batches:
        percentile.update(batch)
    return percentile


def kth_values(values, percent):
    """The ceil(t)-th smallest and largest value, t = n * (100 - percent) / 200."""
    ordered = np.sort(values.astype(np.float64))
    rank = max(math.ceil(ordered.size * (100 - percent) / 200), 1)
    return ordered[rank - 1], ordered[-rank]


@pytest.mark.parametrize("running", [*every(), Percentile(percent=50, bins=4)], ids=plain)
def test_nothing_gives_zero(running):
    assert running.result() == (0.0, 0.0)
    running.update(np.zeros((0, 3), np.float32))
    running.update(np.zeros(0, np.int64))
    assert running.result() == (0.0, 0.0)
    assert running.count == 0


@no_deadline
@given(BATCHES)
def test_minmax_equals_numpy_over_everything(batches):
    running = MinMax()
    for batch in batches:
        running.update(batch)
    everything = np.concatenate([np.zeros(1, np.float32), *(batch.ravel() for batch in batches)])
    assert running.result() == (everything.min(), everything.max())
    assert running.count == everything.size - 1


@no_deadline
@given(BATCHES, st.randoms())
def test_minmax_does_not_depend_on_the_order(batches, random):
    first, second = MinMax(), MinMax()
    for batch in batches:
        first.update(batch)
    for batch in random.sample(batches, len(batches)):
        second.update(batch)
    assert first.result() == second.result()


@pytest.mark.parametrize("values", [[1.0, 3.0], [-3.0, -1.0], [-0.0], [0.0]])
@pytest.mark.parametrize(("method", "options"), METHODS.items())
def test_results_contain_a_positive_zero(method, options, values):
    running = make(method, **options)
    running.update(np.array(values, np.float32))
    low, high = running.result()
    assert low == min(0.0, *values)
    assert high == max(0.0, *values)
    if low == 0.0:
        assert math.copysign(1, low) == 1
    if high == 0.0:
        assert math.copysign(1, high) == 1


def test_infinities_are_counted_and_ignored():
    for running in every():
        running.update(np.array([[np.inf, -2.0], [3.0, -np.inf]], np.float32))
        running.update(np.array([np.inf], np.float16))
        assert running.result() == (-2.0, 3.0)
        assert running.count == 2
        assert running.infinite == 3


def test_only_infinities_give_zero():
    for running in every():
        running.update(np.array([np.inf, -np.inf], np.float32))
        assert running.result() == (0.0, 0.0)
        assert running.count == 0


@pytest.mark.parametrize("bad", [[np.nan, 9.0], [9.0, np.inf, np.nan, -np.inf]])
def test_nan_is_refused_and_changes_nothing(bad):
    for running, spared in zip(every(), every(), strict=True):
        running.update(np.array([-1.0, 2.0], np.float32))
        with pytest.raises(ValueError, match="holds NaN"):
            running.update(np.array(bad, np.float32))
        assert running.result() == (-1.0, 2.0)
        assert (running.count, running.infinite) == (2, 0)
        running.update(np.array([4.0], np.float32))
        for batch in ([-1.0, 2.0], [4.0]):
            spared.update(np.array(batch, np.float32))
        assert running.result() == spared.result()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "float16", "float32", "float64", "bool"])
def test_all_dtypes(dtype):
    values = (
        np.array([[0, 1], [1, 1]]).astype(dtype) if dtype == "bool" else np.array([[3, 100], [7, 50]]).astype(dtype)
    )
    for running in every():
        running.update(values)
        assert running.result() == (0.0, float(values.max()))
        assert running.count == 4


def test_float16_is_binned_as_float32():
    x = (np.random.default_rng(8).standard_normal(5000) * 10000).astype(np.float16)
    assert folded([x], percent=75.0).result() == folded([x.astype(np.float32)], percent=75.0).result()


def test_strided_and_fortran_batches():
    x = np.random.default_rng(0).standard_normal((40, 50)).astype(np.float32)
    views = (x[::3, ::-2], np.ascontiguousarray(x[::3, ::-2]), np.asfortranarray(x[::3, ::-2]))
    results = {folded([view], percent=90.0).result() for view in views}
    assert len(results) == 1


@no_deadline
@given(BATCHES, EXACT_PERCENT, st.sampled_from([4, 16, 2048]))
def test_percentile_is_within_a_bin_of_the_value_of_its_rank(batches, percent, bins):
    running = folded(batches, percent=percent, bins=bins)
    everything = np.concatenate([np.zeros(0, np.float32), *(batch.ravel() for batch in batches)])
    assert running.count == everything.size
    if everything.size == 0:
        assert running.result() == (0.0, 0.0)
        return
    low, high = running.result()
    expected_low, expected_high = kth_values(everything, percent)
    assert abs(low - min(expected_low, 0.0)) <= running.histogram.bin_width
    assert abs(high - max(expected_high, 0.0)) <= running.histogram.bin_width
    assert min(float(everything.min()), 0.0) <= low <= 0.0 <= high <= max(float(everything.max()), 0.0)
    largest = float(np.abs(everything).max())
    if largest:  # r is the smallest power of two that holds the values
        assert largest <= running.histogram.bin_width * bins / 2 < 2 * largest


@no_deadline
@given(BATCHES, st.randoms(), st.sampled_from([99.9, 75.0]))
def test_percentile_does_not_depend_on_order_or_batch_sizes(batches, random, percent):
    shuffled = random.sample(batches, len(batches))
    at_once = np.concatenate([np.zeros(0, np.float32), *(batch.ravel() for batch in batches)])
    results = {folded(some, percent=percent, bins=64).result() for some in (batches, shuffled, [at_once])}
    assert len(results) == 1


def test_values_just_below_a_boundary_stay_below_it():
    tiny, large = np.full(10, -1e-10, np.float32), np.array([-1.0, 1.0], np.float32)
    results = {folded(batches, percent=50.0).result() for batches in ([tiny, large], [large, tiny])}
    # t = 3 from below: the value -1, then 2 of the 10 in the bin that ends at 0, 2 / 2048 wide.
    assert len(results) == 1
    assert results.pop() == pytest.approx((-0.8 * 2 / 2048, 0.0))


@pytest.mark.parametrize("percent", [99.99, 99.0, 90.0, 50.0])
@pytest.mark.parametrize("distribution", ["normal", "relu", "laplace", "shifted"])
def test_percentile_against_numpy(percent, distribution):
    rng = np.random.default_rng(4)
    x = {
        "normal": rng.standard_normal(200_000),
        "relu": np.maximum(rng.standard_normal(200_000), 0),
        "laplace": rng.laplace(size=200_000),
        "shifted": rng.standard_normal(200_000) - 0.5,
    }[distribution].astype(np.float32)
    running = folded(np.array_split(x, 7), percent=percent)
    tail = (100 - percent) / 2
    low, high = running.result()
    assert low == pytest.approx(min(np.percentile(x, tail), 0), abs=running.histogram.bin_width)
    assert high == pytest.approx(max(np.percentile(x, 100 - tail), 0), abs=running.histogram.bin_width)


def test_both_tails_lose_the_same_mass():
    x = np.random.default_rng(5).standard_normal(100_000).astype(np.float32)
    x[x > 0] *= 10
    low, high = folded([x], percent=99.0).result()
    assert (x < low).mean() == pytest.approx(0.005, abs=5e-4)
    assert (x > high).mean() == pytest.approx(0.005, abs=5e-4)
    assert ((x >= low) & (x <= high)).mean() == pytest.approx(0.99, abs=1e-3)


def test_interpolation_within_a_bin():
    # Four bins of width 2 over [-4, 4): eight values in [0, 2), one in [2, 4) and one in [-4, -2).
    x = np.array([0.5] * 8 + [4.0 - 1e-6, -4.0], np.float32)
    running = folded([x], percent=60.0, bins=4)
    assert running.histogram.bin_width == 2.0
    # t = 2 from each side: one value outside, then the first of eight within [0, 2).
    low, high = running.result()
    assert low == 0.0  # 0 + 1/8 * 2, widened to 0
    assert high == pytest.approx(2.0 - 2.0 / 8)


def test_a_batch_larger_than_a_chunk_loses_no_value():
    x = np.random.default_rng(6).standard_normal(2 * histogram.CHUNK + 17).astype(np.float32)
    running = folded([x], percent=80.0)
    low, high = running.result()
    assert running.count == x.size
    assert low == pytest.approx(np.percentile(x, 10), abs=running.histogram.bin_width)
    assert high == pytest.approx(np.percentile(x, 90), abs=running.histogram.bin_width)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 3.4e38])
def test_extreme_magnitudes(scale):
    x = (np.linspace(-1, 1, 1001) * scale).astype(np.float32)
    running = folded([x, np.zeros(3, np.float32)], percent=90.0)
    low, high = running.result()
    assert low == pytest.approx(-0.9 * scale, abs=running.histogram.bin_width)
    assert high == pytest.approx(0.9 * scale, abs=running.histogram.bin_width)
    assert float(x.min()) <= low
    assert high <= float(x.max())
    assert running.count == x.size + 3


def test_growth_from_tiny_to_huge_values():
    running = folded(
        [np.full(5, 1e-30, np.float32), np.full(4, -3e38, np.float32), np.zeros(1, np.float32)], percent=100
    )
    assert running.result() == (float(np.float32(-3e38)), float(np.float32(1e-30)))
    assert running.count == 10


@pytest.mark.parametrize("running", every(), ids=plain)
def test_memory_does_not_grow_with_the_batches(running):
    x = np.random.default_rng(7).standard_normal(100_000).astype(np.float32)
    running.update(x)
    tracemalloc.start()
    try:
        for factor in range(1, 20):
            running.update(x * np.float32(factor))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 64 * 1024
    assert peak < 8 * x.nbytes


def test_update_leaves_the_batch_alone():
    x = np.array([1.0, np.inf, -3.0], np.float32)
    for running in every():
        running.update(x)
    np.testing.assert_array_equal(x, np.array([1.0, np.inf, -3.0], np.float32))


@no_deadline
@given(BATCHES, st.sampled_from(list(METHODS)))
def test_every_result_contains_zero_and_lies_within_the_true_range(batches, method):
    running = make(method)
    for batch in batches:
        running.update(batch)
    everything = np.concatenate([np.zeros(1, np.float32), *(batch.ravel() for batch in batches)])
    low, high = running.result()
    assert everything.min() <= low <= 0.0 <= high <= everything.max()


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-30, 1.0, 3.4e38, 1e300])
@pytest.mark.parametrize("method", METHODS)
def test_equal_values_of_any_magnitude_keep_their_range(method, scale):
    for value in (scale, -scale):
        running = make(method)
        running.update(np.full(1000, value, np.float64 if scale > 1e39 else np.float32))
        low, high = running.result()
        stored = value if scale > 1e39 else float(np.float32(value))
        assert (low, high) == pytest.approx((min(stored, 0.0), max(stored, 0.0)), rel=1e-3, abs=0)


@no_deadline
@given(BATCHES, BATCHES, st.sampled_from([method for method in METHODS if method != "moving-average"]))
def test_merging_equals_feeding_everything_to_one(ours, theirs, method):
    merged, other, one = make(method), make(method), make(method)
    for running, batches in ((merged, ours), (other, theirs), (one, [*ours, *theirs])):
        for batch in batches:
            running.update(batch)
    untouched = other.result()
    merged.merge(other)
    assert merged.result() == one.result()
    assert (merged.count, merged.infinite) == (one.count, one.infinite)
    assert other.result() == untouched


def test_make():
    assert isinstance(make("minmax"), MinMax)
    assert make("moving-average", constant=0.5).constant == 0.5
    for method, kind in (("entropy", Entropy), ("mse", MSE)):
        made = make(method, dtype=INT8, symmetric=True, bins=512)
        assert isinstance(made, kind)
        assert (made.dtype, made.symmetric, made.histogram.bins) == (INT8, True, 512)
        assert (kind().dtype, kind().symmetric, kind().histogram.bins) == (UINT8, False, 2048)
    made = make("percentile", percent=99.0, bins=512)
    assert isinstance(made, Percentile)
    assert (made.percent, made.histogram.bins) == (99.0, 512)
    assert (Percentile().percent, Percentile().histogram.bins) == (99.999, 2048)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("median", {}, "unknown range method 'median'; use one of minmax, moving-average, percentile, entropy, mse"),
        ("minmax", {"percent": 99.0}, "'minmax' does not know the option 'percent'; it takes no options"),
        ("percentile", {"bin": 9}, "'percentile' does not know the option 'bin'; it takes percent, bins"),
        ("mse", {"percent": 99.0}, "'mse' does not know the option 'percent'; it takes dtype, symmetric, bins"),
        ("moving-average", {"constant": 0.0}, "constant is 0.0; use"),
        ("moving-average", {"constant": 1.5}, "constant is 1.5; use"),
        ("entropy", {"bins": 1000}, "bins is 1000; use a power of two"),
        ("percentile", {"percent": 0.0}, "percent is 0.0; use"),
        ("percentile", {"percent": 101}, "percent is 101; use"),
        ("percentile", {"percent": math.nan}, "percent is nan; use"),
        ("percentile", {"bins": 1000}, "bins is 1000; use a power of two"),
        ("percentile", {"bins": 2}, "bins is 2; use a power of two"),
    ],
)
def test_make_errors(method, options, message):
    with pytest.raises(UsageError, match=message):
        make(method, **options)
