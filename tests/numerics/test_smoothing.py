"""Factors of channels by hand, their error against a slow plain computation, what the search finds, and splits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.numerics import affine, smoothing
from onnxq.numerics.dtypes import INT8, UINT8
from onnxq.numerics.smoothing import Activation, Found, Reader, Search, factors, split

no_deadline = settings(deadline=None, max_examples=60)
SEEDS = st.integers(0, 2**32 - 1)
STATIC, SIGNED, PER_ROW = Activation(), Activation(INT8, True), Activation(per_row=True)
EXPONENTS = st.sampled_from(smoothing.ALPHAS)


def decoded(w):
    """As int8 codes with a scale per output channel say."""
    params = affine.weight_params(w, 1)
    return affine.dequantize(affine.quantize(w, params), params)


def extremes(rows, repeat=1):
    by_channel = rows.reshape(len(rows), -1, repeat)
    return by_channel.min(axis=(0, 2)), by_channel.max(axis=(0, 2))


def layer(seed, rows=64, channels=24, outputs=16, outliers=(), larger=50.0, repeat=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, channels * repeat)).astype(np.float32)
    for c in outliers:
        x[:, c * repeat:(c + 1) * repeat] *= larger
    return Reader(x, rng.normal(size=(channels * repeat, outputs)).astype(np.float32), decoded, repeat)


def searched(readers, activation=STATIC, tie=None, **fixed):
    low, high = extremes(readers[0].rows, readers[0].repeat)
    search = Search(readers, activation, low, high, tie)
    return search.run(**fixed), search


# ------------------------------------------------------------------ factors


def test_the_formula_by_hand():
    # alpha 1/2: sqrt(x / w) = 1/4, 1, 8 over their mean 2^(1/3)
    s = factors([1 / 4, 2, 16], [4, 2, 1 / 4], 0.5, 0.5)
    np.testing.assert_allclose(s, np.array([0.25, 1, 8]) / 2 ** (1 / 3), rtol=1e-6)
    # x^1 w^0, and x^0 w^-1: either takes all the difference of one side
    np.testing.assert_allclose(factors([1, 4], [7, 3], 1, 0), [0.5, 2], rtol=1e-6)
    np.testing.assert_allclose(factors([7, 3], [1, 4], 0, 1), [2, 0.5], rtol=1e-6)
    assert factors([1, 4], [7, 3], 0, 0).tolist() == [1, 1]
    assert factors([1, 4], [7, 3], 0.3, 0.7).dtype == np.float32


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e4)), min_size=1, max_size=20), EXPONENTS, EXPONENTS)
def test_factors_are_positive_with_a_geometric_mean_of_1(sizes, alpha, beta):
    x, w = np.array(sizes).T
    s = factors(x, w, alpha, beta).astype(np.float64)
    assert (s > 0).all()
    assert np.isfinite(s).all()
    assert np.exp(np.log(s).mean()) == pytest.approx(1, rel=1e-5)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), EXPONENTS, EXPONENTS)
def test_units_of_activations_and_weights_do_not_matter(unit, other, alpha, beta):
    x, w = np.array([0.5, 3, 20]), np.array([2, 0.1, 1])
    np.testing.assert_allclose(factors(unit * x, other * w, alpha, beta), factors(x, w, alpha, beta), rtol=1e-5)


def test_channels_of_zeros():
    assert factors([0, 0], [0, 0], 0.5, 0.5).tolist() == [1, 1]
    s = factors([1, 8, 0, 64], [1, 1, 1, 1], 1, 0)
    assert s[2] == pytest.approx(8 / np.exp(np.log([1, 8, 64, 8]).mean())), "like its neighbours' mean"
    assert s[0] < s[1] < s[3]


def test_a_channel_that_calibration_saw_no_value_of_is_not_blown_up():
    """A dead channel may fire on other data, and must not be the one outlier of its row then."""
    for alpha in smoothing.ALPHAS:
        s = factors([1, 2, 4, 0], [1, 1, 1, 1], alpha, 1 - alpha)
        assert s[:3].min() <= s[3] <= s[:3].max()


@given(SEEDS, EXPONENTS, EXPONENTS)
@no_deadline
def test_results_stay_the_same(seed, alpha, beta):
    """(x / s) (s w) = x w."""
    reader = layer(seed, outliers=(3,))
    s = factors(np.abs(reader.rows).max(axis=0), np.abs(reader.weight).max(axis=1), alpha, beta)
    after, before = (reader.rows / s) @ (s[:, None] * reader.weight), reader.results()
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


def test_extremes_of_weights_and_activations():
    one = Reader(np.zeros((1, 4), np.float32), np.float32([[1, -2], [3, 0], [0, 0], [0, -5]]), decoded, 2)
    other = Reader(np.zeros((1, 2), np.float32), np.float32([[-4], [1]]), decoded)
    assert smoothing.weight_extreme([one]).tolist() == [3, 5]
    assert smoothing.weight_extreme([one, other]).tolist() == [4, 5]
    assert smoothing.extreme([-3, 1], [2, 4]).tolist() == [3, 4]


# ------------------------------------------------------------------ activations as codes


def test_one_range_per_tensor():
    x = np.float32([[0, 1], [-1, 300]])
    params = affine.choose(-1, 254, UINT8)
    np.testing.assert_array_equal(STATIC.decoded(x, -1, 254),
                                  affine.dequantize(affine.quantize(x, params), params))
    assert STATIC.decoded(x, -1, 254)[1, 1] == 254, "beyond the range it saturates"


@pytest.mark.parametrize("spec", [PER_ROW, Activation(INT8, True, per_row=True)])
def test_a_range_per_row(spec):
    """Each row by itself, whatever the range given, always with 0 inside."""
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32) * np.float32([[1], [100], [1e-3], [5], [0]])
    x[3] = np.abs(x[3]) + 2
    got = spec.decoded(x, -1e9, 1e9)
    assert got.dtype == np.float32
    for row, found in zip(x, got, strict=True):
        params = affine.choose(min(row.min(), 0), max(row.max(), 0), spec.dtype, spec.symmetric)
        np.testing.assert_array_equal(found, affine.dequantize(affine.quantize(row, params), params))


# ------------------------------------------------------------------ errors


def slow_error(readers, activation, s, low, high):
    """The docstring, row by row."""
    by_reader = []
    for reader in readers:
        columns = [s[k // reader.repeat] for k in range(reader.rows.shape[1])]
        weight = reader.decoded(np.float32([w * f for w, f in zip(reader.weight, columns, strict=True)]))
        wanted = [row @ reader.weight for row in reader.rows]
        energies = [float(np.sum(np.float64(y) ** 2)) for y in wanted]
        shares = []
        for row, y, energy in zip(reader.rows, wanted, energies, strict=True):
            found = activation.decoded(np.float32(row / columns)[None], low, high)[0] @ weight
            shares.append(float(np.sum(np.float64(found - y) ** 2)) / max(energy, float(np.median(energies))))
        by_reader.append(np.mean(shares))
    return float(np.mean(by_reader))


@given(SEEDS, st.sampled_from([STATIC, PER_ROW, SIGNED]), st.sampled_from([1, 3]))
@no_deadline
def test_the_error_is_what_it_says(seed, activation, repeat):
    rng = np.random.default_rng(seed)
    readers = [layer(rng.integers(99), 9, 4, 5, (1,), repeat=repeat), layer(rng.integers(99), 7, 4, 3, repeat=repeat)]
    readers[0].rows[0] = 0  # a row of nothing, as large as the median one for this purpose
    s = np.exp(rng.normal(size=4)).astype(np.float32)
    low, high = -5.0, 60.0
    got = smoothing.error(readers, activation, s, low, high, [r.results() for r in readers])
    assert got == pytest.approx(slow_error(readers, activation, s, low, high), rel=1e-4)


def test_rows_count_by_what_they_are_themselves():
    """An outlying row whose error is relatively as large as others' does not hide them."""
    reader = Reader(np.float32([[1.3], [130], [1.3]]), np.ones((1, 1), np.float32), lambda w: w)
    coarse = Activation(INT8, True)
    one = smoothing.error([reader], coarse, np.ones(1, np.float32), -127, 127, [reader.results()])
    assert one == pytest.approx((2 * (0.3 / 1.3) ** 2 + (3 / 130) ** 2) / 3, rel=1e-5)
    both = smoothing.errors([reader], coarse, np.ones(1, np.float32), -127, 127, [reader.results()])
    assert both == pytest.approx((one, (2 * 0.3**2 + 3**2) / (2 * 1.3**2 + 130**2)), rel=1e-5)


def test_a_settled_reader_keeps_its_codes():
    reader = layer(0)
    settled = reader.settled()
    np.testing.assert_array_equal(settled.decoded(reader.weight), decoded(reader.weight))
    np.testing.assert_array_equal(settled.results(), reader.results())
    ones = np.ones(24, np.float32)
    low, high = (float(v) for v in (reader.rows.min(), reader.rows.max()))
    errors = {smoothing.error([r], STATIC, ones, low, high, [r.results()]) for r in (reader, settled)}
    assert len(errors) == 1


# ------------------------------------------------------------------ the search


@pytest.mark.parametrize("activation", [STATIC, SIGNED, PER_ROW], ids=["static", "symmetric", "per row"])
@pytest.mark.parametrize("repeat", [1, 9])
def test_outlier_channels_are_evened_out(activation, repeat):
    found, search = searched([layer(1, outliers=(2, 7), repeat=repeat)], activation)
    assert found.alpha >= 0.3
    assert found.gain_db > 6
    assert found.error == search.tried[found.alpha, found.beta] == min(search.tried.values())
    assert found.plain == search.tried[0, 0]


def test_readers_share_the_factors():
    first, other = layer(2, outliers=(5,)), layer(3)
    both = [first, Reader(first.rows, other.weight, decoded)]
    found, search = searched(both)
    assert found.gain_db > 6
    np.testing.assert_array_equal(search.weights, np.maximum(*(np.abs(r.weight).max(axis=1) for r in both)))


def test_even_channels_are_left_alone():
    """All pairs give factors of 1 here, and the plain one comes first."""
    rng = np.random.default_rng(0)
    x, w = (rng.uniform(-1, 1, shape).astype(np.float32) for shape in ((64, 8), (8, 5)))
    x[0], x[1], w[:, 0] = 1, -1, 1
    found, _ = searched([Reader(x, w, decoded)])
    assert (found.alpha, found.beta, found.gain_db) == (0, 0, 0)


def test_fixed_exponents():
    reader = layer(1, outliers=(2, 7))
    for fixed, wanted in (({"alpha": 0.5}, (0.5, 0.5)), ({"alpha": 0.8, "beta": 0.1}, (0.8, 0.1)),
                          ({"alpha": 0.0, "beta": 0.4}, (0.0, 0.4))):
        found, search = searched([reader], **fixed)
        assert (found.alpha, found.beta) == wanted
        assert list(search.tried) == [wanted], "nothing else is tried"
        assert found.plain == searched([reader])[0].plain
    flat = layer(4)
    assert searched([flat], alpha=1.0)[0].alpha == 1.0, "as asked, for better or worse"


@pytest.mark.parametrize(("activation", "alike", "cost"), [
    (PER_ROW, True, lambda own, mean: float(np.sqrt(own * mean))), (PER_ROW, False, lambda own, mean: mean),
    (STATIC, True, lambda own, mean: own), (STATIC, False, lambda own, mean: mean)])
def test_what_a_pair_costs(activation, alike, cost):
    """With a range per row, ordinary rows and those of outliers both have a say."""
    reader = layer(1, outliers=(2, 7))
    search = Search([reader], activation, *extremes(reader.rows, reader.repeat), alike=alike)
    search.run()
    for (alpha, beta), found in search.tried.items():
        s = search.factors(alpha, beta, search.low, search.high)
        low, high = float((search.low / s).min()), float((search.high / s).max())
        both = smoothing.errors(search.readers, activation, s, low, high, search.results)
        assert found == pytest.approx(cost(*both), rel=1e-6)


def test_no_pair_is_tried_twice_and_all_are_exponents():
    _, search = searched([layer(1, outliers=(2,))])
    assert all(0 <= a <= 1 and 0 <= b <= 1 for a, b in search.tried)
    assert len(search.tried) <= 1 + 10 + len(smoothing.BETAS) + 3


def test_channels_of_one_source_share_a_factor():
    """Two heads of three channels read the same three columns: the largest of both counts."""
    tie = np.array([0, 1, 2, 0, 1, 2])
    reader = layer(5, channels=6, outliers=(1,))
    found, search = searched([reader], tie=tie)
    low, high = extremes(reader.rows)
    s = search.factors(0.5, 0.5, low, high)
    np.testing.assert_array_equal(s[:3], s[3:])
    x, w = smoothing.extreme(low, high), search.weights
    np.testing.assert_allclose(s, factors(np.tile(x.reshape(2, 3).max(axis=0), 2),
                                          np.tile(w.reshape(2, 3).max(axis=0), 2), 0.5, 0.5))
    assert found.gain_db > 3
    assert smoothing.shared(np.array([1.0, 5, 2, 3]), np.array([0, 2, 0, 2])).tolist() == [2, 5, 2, 5]


def test_gain_in_decibels():
    assert Found(0.5, 0.5, 0.01, 0.1).gain_db == pytest.approx(10)
    assert Found(0, 0, 0.0, 0.0).gain_db == 0


# ------------------------------------------------------------------ splits


def test_split_by_hand():
    # 8 becomes 4 4, then 3 copies of 8/3, then the 3 is the largest
    assert split([0, -8, 0], [1, 2, 3], 0).tolist() == [0, 1, 2]
    assert split([0, -8, 0], [1, 2, 3], 1).tolist() == [0, 1, 1, 2]
    assert split([0, -8, 0], [1, 2, 3], 2).tolist() == [0, 1, 1, 1, 2]
    assert split([0, -8, 0], [1, 2, 3], 3).tolist() == [0, 1, 1, 1, 2, 2]
    assert split([0, 0], [0, 0], 2).tolist() == [0, 0, 0, 1]
    assert split([0], [1], 2).dtype == np.int64


@given(st.lists(st.floats(0, 100), min_size=1, max_size=4), st.integers(0, 4))
def test_no_other_split_has_a_smaller_largest_copy(sizes, extra):
    source = split([-s for s in sizes], [s / 2 for s in sizes], extra)
    copies = np.bincount(source, minlength=len(sizes))
    assert copies.sum() == len(sizes) + extra
    assert copies.min() >= 1
    assert (np.diff(source) >= 0).all()
    ways = (w for w in itertools.product(range(1, extra + 2), repeat=len(sizes)) if sum(w) == len(sizes) + extra)
    best = min(max(s / n for s, n in zip(sizes, way, strict=True)) for way in ways)
    assert max(s / n for s, n in zip(sizes, copies, strict=True)) == best


@given(SEEDS, st.integers(1, 30))
@no_deadline
def test_copies_with_their_share_give_the_same_results(seed, extra):
    reader = layer(seed, outliers=(3,))
    source = split(*extremes(reader.rows), extra)
    share = 1 / np.bincount(source)[source].astype(np.float32)
    before = reader.results()
    np.testing.assert_allclose((reader.rows[:, source] * share) @ reader.weight[source], before,
                               atol=1e-5 * np.abs(before).max())
