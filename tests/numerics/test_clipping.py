import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.numerics import affine, clipping
from onnxq.numerics.dtypes import INT4, INT8, INT16, UINT4, UINT8, UINT16
from onnxq.numerics.histogram import Histogram
from onnxq.numerics.ranges import MSE, Entropy

no_deadline = settings(deadline=None, max_examples=60)
# Values that fill a histogram of 64 bins: a heap, and some far from it on either side.
VALUES = st.builds(
    lambda heap, far: np.array([*heap, *far], np.float32),
    st.lists(st.integers(-80, 80).map(lambda k: k / 8), min_size=1, max_size=60),
    st.lists(st.floats(-30, 30, width=16), max_size=3),
)
TYPES = st.sampled_from([(UINT4, False), (INT4, False), (INT4, True), (UINT4, True)])


def fed(values, bins=2048):
    histogram = Histogram(bins)
    histogram.update(np.asarray(values, np.float32))
    return histogram


def true_error(x, low, high, dtype=UINT8, symmetric=False):
    """The mean squared error of x (float32) when it really is quantized."""
    params = affine.choose(low, high, dtype, symmetric)
    return float(np.mean((affine.dequantize(affine.quantize(x, params), params) - x.astype(np.float64)) ** 2))


# ------------------------------------------------------------------ slow references, in plain loops


def slow_bins(values, bins):
    """Bin width, {bin: count} without exact zeros, and the bins from the lowest to the highest, both included."""
    largest = max(abs(float(v)) for v in values)
    radius = 2.0**-100
    while radius < largest:
        radius *= 2
    width = 2 * radius / bins
    counts = {}
    for value in values:
        if value != 0:
            k = min(math.floor(value / width), bins // 2 - 1)
            counts[k] = counts.get(k, 0) + 1
    low, high = min(0.0, *map(float, values)), max(0.0, *map(float, values))
    return width, counts, math.floor(low / width), min(math.floor(high / width), bins // 2 - 1)


def nearest_code(t, scale, lowest, highest):
    return min(max(math.floor(t / scale + 0.5), lowest), highest)


def slow_quantizer(low, high, dtype, symmetric):
    """(scale, lowest code, highest code), codes less the zero point."""
    params = affine.choose(low, high, dtype, symmetric)
    return float(params.scale), dtype.qmin - int(params.zero_point), dtype.qmax - int(params.zero_point)


def usual_count(counts, i, span):
    """The count of bin i, or, when it is more than 2 u + 8, the median u of the 16 bins on each side of it and itself.

    Beyond the ends of `span` the bins are mirrored, the outermost one included.
    """
    around = []
    for j in range(i - 16, i + 17):
        while j not in span:
            j = 2 * span[0] - 1 - j if j < span[0] else 2 * span[-1] + 1 - j
        around.append(counts.get(j, 0))
    usual = sorted(around)[16]
    return usual if counts.get(i, 0) > 2 * usual + 8 else counts.get(i, 0)


def slow_divergence(counts, inside, code_of, span):
    """KL(P||Q) less its bias, when the bins `inside` of `span` are kept and `code_of` gives the code of each."""
    total = sum(counts.values())
    kept = {i: usual_count(counts, i, span) for i in inside}
    p = dict(kept)
    for k, count in counts.items():
        if k < inside[0]:
            p[inside[0]] += count
        elif k > inside[-1]:
            p[inside[-1]] += count
    divergence = 0.0
    for code in {code_of(i) for i in inside}:
        members = [i for i in inside if code_of(i) == code and p[i] > 0]
        held = sum(kept[i] for i in members)
        for i in members:
            q = held / len(members) if held else 0.5
            divergence += p[i] / total * math.log(p[i] / q)
        divergence -= max(len(members) - 1, 0) / 2 / total
    return divergence


def slow_entropy(values, bins, dtype, symmetric):
    """[(threshold in bins, low, high, divergence)] of all candidates."""
    width, counts, first, last = slow_bins(values, bins)
    low, high = min(0.0, *map(float, values)), max(0.0, *map(float, values))
    farthest, nearest = max(-first, last + 1), (dtype.qmax - dtype.qmin) / 2
    found = []
    if farthest <= nearest or not counts:
        return found
    for threshold in {round(float(t)) for t in np.geomspace(farthest, nearest, 256)}:
        candidate = max(low, -threshold * width), min(high, threshold * width)
        scale, lowest, highest = slow_quantizer(*candidate, dtype, symmetric)
        inside = range(max(first, -threshold), min(last + 1, threshold))
        codes = {i: nearest_code(i + 0.5, scale / width, lowest, highest) for i in inside}
        loss = slow_divergence(counts, inside, codes.__getitem__, range(first, last + 1))
        found.append((threshold, *candidate, loss))
    return found


def slow_squared_error(values, bins, low, high, dtype, symmetric, points=200):
    """The expected squared error in squared bin widths, each bin's values at `points` even places."""
    width, counts, _, _ = slow_bins(values, bins)
    scale, lowest, highest = slow_quantizer(low, high, dtype, symmetric)
    error = 0.0
    for k, count in counts.items():
        for j in range(points):
            t = (k + (j + 0.5) / points) * width
            error += count / points * ((t - nearest_code(t, scale, lowest, highest) * scale) / width) ** 2
    return error


# ------------------------------------------------------------------ against them


def check_entropy(values, bins, dtype, symmetric=False):
    """Compare all divergences and the result with the slow reference; gives the number of candidates."""
    candidates = slow_entropy(values, bins, dtype, symmetric)
    histogram = fed(values, bins)
    found = clipping.entropy(histogram, dtype, symmetric)
    if not candidates:
        assert found == (min(0.0, values.min()), max(0.0, values.max()))
        return 0
    thresholds, lows, highs, expected = (np.array(column) for column in zip(*candidates, strict=True))
    np.testing.assert_allclose(clipping.divergence(histogram, thresholds, dtype, symmetric), expected, atol=1e-9)
    best = expected[(lows == found[0]) & (highs == found[1])]
    assert best.size
    assert best.min() <= expected.min() + 1e-9
    return thresholds.size


@no_deadline
@given(VALUES, TYPES)
def test_entropy_against_a_slow_reference(values, kind):
    check_entropy(values, 64, *kind)


@pytest.mark.parametrize("dtype", [UINT4, INT4])
@pytest.mark.parametrize("size", [20, 300, 20_000])
def test_entropy_tries_many_thresholds(size, dtype):
    values = np.random.default_rng(size).laplace(size=size).astype(np.float32)
    assert check_entropy(values, 512, dtype) > 50
    assert check_entropy(np.abs(values), 512, dtype, symmetric=True) > 50
    # Every third value repeats, the most at the ends, -1.5 and 2.
    values[::3] = np.round(values[::3], 1)
    assert check_entropy(np.clip(values, -1.5, 2), 512, dtype) > 50


@no_deadline
@given(VALUES, TYPES, st.floats(0.02, 1.0), st.floats(0.02, 1.0))
def test_squared_error_against_a_slow_reference(values, kind, shrink_low, shrink_high):
    low, high = min(0.0, values.min()) * shrink_low, max(0.0, values.max()) * shrink_high
    [found] = clipping.squared_error(fed(values, 64), np.array([low]), np.array([high]), *kind)
    expected = slow_squared_error(values, 64, low, high, *kind)
    assert found == pytest.approx(expected, rel=2e-3, abs=1e-4 * values.size)


@pytest.mark.parametrize("dtype", [UINT4, UINT8])
def test_squared_error_is_that_of_the_quantizer(dtype):
    # Bins of 2**-8 (8 / 2048); scales from 8 / 255 down to 3 / 255, and 8 / 15 down to 3 / 15.
    x = np.random.default_rng(1).standard_normal(300_000).astype(np.float32)
    histogram = fed(x)
    for bound in (4.0, 3.0, 1.5):
        [found] = clipping.squared_error(histogram, np.array([-bound]), np.array([bound]), dtype)
        mean = found * histogram.bin_width**2 / x.size
        assert mean == pytest.approx(true_error(x, -bound, bound, dtype), rel=0.01)


@no_deadline
@given(VALUES, TYPES)
def test_mse_is_never_worse_than_minmax_or_a_common_threshold(values, kind):
    histogram = fed(values, 64)
    low, high = (np.array([bound]) for bound in clipping.mse(histogram, *kind))
    found = clipping.squared_error(histogram, low, high, *kind)
    lowest, highest = histogram.extremes.result()
    thresholds = max(-lowest, highest) * 2.0 ** (-np.arange(65) / 8)
    others = clipping.squared_error(
        histogram, np.maximum(lowest, -thresholds), np.minimum(highest, thresholds), *kind
    )
    assert found <= others.min() * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [UINT4, UINT8])
@pytest.mark.parametrize("distribution", ["normal", "relu", "laplace", "skewed", "outliers", "uneven", "lopsided"])
def test_mse_is_near_the_best_of_a_dense_grid(distribution, dtype):
    rng = np.random.default_rng(2)
    n = 30_000
    x = {
        "normal": rng.standard_normal(n),
        "relu": np.maximum(rng.standard_normal(n), 0),
        "laplace": rng.laplace(size=n),
        "skewed": rng.exponential(size=n) ** 1.5 - 1,
        "outliers": np.concatenate([rng.standard_normal(n), [-12.0, 40.0]]),
        "uneven": np.concatenate([rng.standard_normal(n), [-30.0] * 2, [30.0] * 10]),
        "lopsided": np.concatenate([rng.standard_normal(n * 10), [-40.0] * 3000, [40.0]]),
    }[distribution]
    histogram = fed(x)
    lowest, highest = histogram.extremes.result()
    lows, highs = (grid.ravel() for grid in np.meshgrid(
        lowest * np.linspace(0.02, 1, 60), highest * np.linspace(0.02, 1, 60)))
    best = clipping.squared_error(histogram, lows, highs, dtype).min()
    low, high = clipping.mse(histogram, dtype)
    [found] = clipping.squared_error(histogram, np.array([low]), np.array([high]), dtype)
    assert found <= 1.02 * best


# ------------------------------------------------------------------ what theory says


@pytest.mark.parametrize(("dtype", "step"), [(UINT4, 0.3352), (UINT8, 0.0308)])
def test_mse_finds_the_optimal_step_of_a_normal_distribution(dtype, step):
    # Steps of the best uniform quantizers of 16 and 256 levels: J. Max, Quantizing for minimum distortion, 1960.
    running = MSE(dtype)
    rng = np.random.default_rng(3)
    for _ in range(5):
        running.update(rng.standard_normal(200_000).astype(np.float32))
    low, high = running.result()
    assert (high - low) / (dtype.qmax - dtype.qmin) == pytest.approx(step, rel=0.06)
    assert -low == pytest.approx(high, rel=0.12)


@pytest.mark.parametrize("kind", [Entropy, MSE])
@pytest.mark.parametrize(("dtype", "symmetric"), [(UINT8, False), (INT8, True)])
def test_rare_far_outliers_are_clipped_and_the_error_falls(kind, dtype, symmetric):
    # Outliers at 30 in 2 of 10**6: clipping at t costs 2e-6 * (30 - t)**2 <= .0018, min-max (60 / 255)**2 / 12 = .0046.
    x = np.random.default_rng(4).standard_normal(1_000_000).astype(np.float32)
    x[:2] = 30.0, -30.0
    running = kind(dtype, symmetric)
    running.update(x)
    low, high = running.result()
    assert -25 < low < -2.5
    assert 2.5 < high < 25
    assert true_error(x, low, high, dtype, symmetric) < 0.6 * true_error(x, -30.0, 30.0, dtype, symmetric)


def test_mse_keeps_outliers_that_cost_more_than_they_save():
    # 1 in 1000: clipping at t costs .001 * (30 - t)**2, more than .0046 for t < 27.8.
    x = np.random.default_rng(5).standard_normal(30_000).astype(np.float32)
    x[:30] = 30.0
    running = MSE()
    running.update(x)
    low, high = running.result()
    assert high > 27.8
    assert true_error(x, low, high) <= true_error(x, float(x.min()), 30.0)


@pytest.mark.parametrize("outliers", [(-50.0,), (50.0,)])
def test_mse_clips_one_side_only(outliers):
    x = np.random.default_rng(6).uniform(-1, 1, 2_000_000).astype(np.float32)
    x[: len(outliers)] = outliers
    running = MSE()
    running.update(x)
    low, high = running.result()
    clipped, kept = (-low, high) if outliers[0] < 0 else (high, -low)
    assert clipped < 40
    assert kept > 0.9


@pytest.mark.parametrize("kind", [Entropy, MSE])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 3.0), (-5.0, 0.0), (-0.3, 5.0), (4.0, 5.0)])
def test_uniform_data_keep_their_range(kind, low, high):
    x = np.random.default_rng(7).uniform(low, high, 100_000).astype(np.float32)
    running = kind()
    running.update(x)
    lowest, highest = min(0.0, float(x.min())), max(0.0, float(x.max()))
    # A zero point is whole, which moves the codes by up to half a scale: a bound may gain by moving along.
    within = running.histogram.bin_width if kind is Entropy else (highest - lowest) / 255
    assert running.result() == pytest.approx((lowest, highest), abs=within)


@pytest.mark.parametrize("kind", [Entropy, MSE])
@no_deadline
@given(values=VALUES, zeros=st.integers(1, 500), types=TYPES)
def test_zeros_change_nothing(kind, values, zeros, types):
    without, more = kind(*types, bins=64), kind(*types, bins=64)
    without.update(values)
    more.update(np.append(values, np.zeros(zeros, np.float32)))
    assert more.result() == without.result()
    assert more.count == without.count + zeros


@pytest.mark.parametrize("kind", [Entropy, MSE])
def test_a_clamped_activation_keeps_its_bound(kind):
    x = np.clip(np.random.default_rng(8).standard_normal(100_000) * 4, 0, 6).astype(np.float32)  # a Relu6
    running = kind()
    running.update(x)
    assert running.result() == (0.0, 6.0)


@pytest.mark.parametrize("place", [-1.7, 0.01, 1.2345, 3.0])
def test_repeated_values_do_not_shrink_the_range_of_the_entropy(place):
    x = np.random.default_rng(11).laplace(size=200_000).astype(np.float32)
    without, repeated = Entropy(), Entropy()
    without.update(x)
    repeated.update(np.append(x, np.full(50_000, place, np.float32)))
    assert repeated.result()[1] > 0.85 * without.result()[1]
    assert without.result()[1] < x.max()


def test_repeated_values_are_not_clipped():
    x = np.random.default_rng(12).standard_normal(200_000).astype(np.float32)
    x[:5000] = 20.0
    running = Entropy()
    running.update(x)
    assert running.result()[1] == 20.0


def test_entropy_of_types_with_more_levels_than_bins_is_minmax():
    x = np.random.default_rng(9).standard_t(3, 50_000).astype(np.float32)
    for dtype, symmetric in ((INT16, True), (UINT16, False)):
        assert clipping.entropy(fed(x), dtype, symmetric) == (x.min(), x.max())


def test_mse_for_16_bits_clips_next_to_nothing():
    x = np.random.default_rng(10).standard_normal(50_000).astype(np.float32)
    low, high = clipping.mse(fed(x), UINT16)
    assert low < 0.9 * x.min()
    assert high > 0.9 * x.max()


@pytest.mark.parametrize("search", [clipping.entropy, clipping.mse])
@pytest.mark.parametrize("values", [[], [0.0, 0.0], [np.inf, -np.inf]])
def test_nothing_but_zeros_has_no_width(search, values):
    assert search(fed(values), UINT8) == (0.0, 0.0)
    assert search(fed(values), INT8, True) == (0.0, 0.0)
