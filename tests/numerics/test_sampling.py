"""Samples of what layers read: drawn evenly, the same each time, with exact extremes; views against onnx.reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

from onnxq.numerics.sampling import Sampled, View

no_deadline = settings(deadline=None, max_examples=60)
LINEAR = View()
KERNEL = View((3,), (1,), (1, 1), (1,))


def numbered(rows, channels=2):
    """Rows that hold their own number in each channel."""
    return np.repeat(np.arange(rows, dtype=np.float32)[:, None], channels, axis=1)


def drawn(x, batches, most, seed=0):
    sampled = Sampled([LINEAR], most)
    sampled._random = np.random.default_rng(seed)
    for part in np.array_split(x, batches):
        sampled.update(part)
    return sampled.result().rows[LINEAR]


# ------------------------------------------------------------------ the draw


@pytest.mark.parametrize("batches", [1, 7, 40], ids=lambda n: f"{n} batches")
def test_every_row_is_as_likely(batches):
    """Of 40 rows 10 are kept: each row's count over 400 draws has a mean of 100 and a deviation of 8.7."""
    x, counts = numbered(40), np.zeros(40)
    for seed in range(400):
        kept = drawn(x, batches, 10, seed)[:, 0].astype(int)
        assert len(set(kept)) == 10, "none is drawn twice"
        counts[kept] += 1
    deviation = np.sqrt(400 * 0.25 * 0.75)
    assert np.abs(counts - 100).max() < 4.5 * deviation
    # the sum of squares of what is left of 40 normal numbers, of which the last follows from the others
    assert np.square((counts - 100) / deviation).sum() < 40 + 5 * np.sqrt(80)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 8))
@no_deadline
def test_rows_are_rows_that_were_seen(rows, most, batches):
    x = np.random.default_rng(rows).normal(size=(rows, 3)).astype(np.float32)
    kept = drawn(x, batches, most)
    assert kept.shape == (min(rows, most), 3)
    assert {row.tobytes() for row in kept} <= {row.tobytes() for row in x}
    assert len({row.tobytes() for row in kept}) == len(kept)


def test_fewer_rows_than_wanted_are_all_kept_in_order():
    np.testing.assert_array_equal(drawn(numbered(30), 4, 100), numbered(30))
    np.testing.assert_array_equal(drawn(numbered(30), 4, 30), numbered(30))


def test_the_same_batches_give_the_same_rows():
    x = np.random.default_rng(1).normal(size=(5, 40, 7)).astype(np.float32)
    samples = []
    for _ in range(2):
        sampled = Sampled([LINEAR], 50)
        for batch in x:
            sampled.update(batch)
        samples.append(sampled.result())
    np.testing.assert_array_equal(samples[0].rows[LINEAR], samples[1].rows[LINEAR])
    assert len(samples[0].rows[LINEAR]) == 50


def test_views_of_one_tensor_are_drawn_each():
    sampled = Sampled([KERNEL, View((1,), (2,), (0, 0), (1,)), KERNEL], 4)
    sampled.update(np.arange(24, dtype=np.float32).reshape(2, 2, 6))
    rows = sampled.result().rows
    assert {view.kernel: r.shape for view, r in rows.items()} == {(3,): (4, 6), (1,): (4, 2)}


# ------------------------------------------------------------------ extremes


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
@no_deadline
def test_extremes_are_those_of_all_rows(seed, batches):
    x = np.random.default_rng(seed).normal(size=(12, 5, 3)).astype(np.float32)
    sampled = Sampled([LINEAR], 2)
    for part in np.array_split(x, batches):
        sampled.update(part)
    found = sampled.result()
    np.testing.assert_array_equal(found.low, x.reshape(-1, 3).min(axis=0), strict=True)
    np.testing.assert_array_equal(found.high, x.reshape(-1, 3).max(axis=0), strict=True)


def test_channels_of_a_conv_lie_along_axis_1():
    x = np.random.default_rng(0).normal(size=(3, 4, 9)).astype(np.float32)
    sampled = Sampled([KERNEL])
    sampled.update(x)
    found = sampled.result()
    np.testing.assert_array_equal(found.low, x.min(axis=(0, 2)))
    np.testing.assert_array_equal(found.high, x.max(axis=(0, 2)))


def test_rows_and_extremes_are_float32_of_any_numbers():
    for dtype in (np.float16, np.float64, np.int32):
        sampled = Sampled([LINEAR])
        sampled.update(np.array([[1, 2], [3, -4]], dtype))
        found = sampled.result()
        assert {a.dtype for a in (found.low, found.high, found.rows[LINEAR])} == {np.dtype(np.float32)}
        assert (found.low.tolist(), found.high.tolist()) == ([1, -4], [3, 2])


# ------------------------------------------------------------------ what can't be taken


def test_nan_is_refused():
    sampled = Sampled([LINEAR])
    with pytest.raises(ValueError, match="NaN"):
        sampled.update(np.array([[1.0, np.nan], [np.inf, 2.0]]))
    assert sampled.result() is None


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_a_batch_with_infinities_is_left_out(bad):
    sampled = Sampled([LINEAR])
    sampled.update(numbered(3))
    sampled.update(np.array([[9.0, 9.0], [bad, 9.0]]))
    sampled.update(numbered(2) - 5)
    found = sampled.result()
    assert (found.low.tolist(), found.high.tolist()) == ([-5, -5], [2, 2])
    np.testing.assert_array_equal(found.rows[LINEAR], np.concatenate([numbered(3), numbered(2) - 5]))


def test_nothing_seen():
    sampled = Sampled([LINEAR])
    assert sampled.result() is None
    sampled.update(np.zeros((0, 4)))
    sampled.update(np.full((2, 4), np.inf))
    assert sampled.result() is None


# ------------------------------------------------------------------ views


@pytest.mark.parametrize(("spatial", "view"), [
    ((7,), View((3,), (2,), (1, 0), (2,))),
    ((5, 6), View((3, 2), (1, 2), (1, 0, 1, 1), (1, 2))),
    ((4, 4), View((1, 1), (1, 1), (0, 0, 0, 0), (1, 1))),
    ((3, 4, 5), View((2, 1, 3), (1, 1, 1), (0, 0, 1, 0, 0, 1), (1, 1, 1))),
])
def test_rows_times_the_weight_are_the_conv(spatial, view):
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 10, (2, 3, *spatial)).astype(np.float32)
    w = rng.integers(-9, 10, (4, 3, *view.kernel)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=view.kernel, strides=view.strides, pads=view.pads,
                            dilations=view.dilations)
    y = np.moveaxis(ReferenceEvaluator(node).run(None, {"x": x, "w": w})[0], 1, -1).reshape(-1, 4)
    assert view.count(x) == len(y)
    rows = view.rows(x, np.arange(len(y)))
    np.testing.assert_array_equal(rows @ w.reshape(4, -1).T, y)
    assert view.repeat == np.prod(view.kernel)
    # channel c stands for the columns c * repeat on
    alone = np.zeros_like(x)
    alone[:, 1] = x[:, 1]
    seen = np.flatnonzero(view.rows(alone, np.arange(len(y))).any(axis=0))
    assert set(seen) <= set(range(view.repeat, 2 * view.repeat))
    sampled = Sampled([view], 5)
    sampled.update(x)
    assert {r.tobytes() for r in sampled.result().rows[view]} <= {r.tobytes() for r in rows}


def test_rows_of_a_linear_layer_are_those_of_the_last_axis():
    x = np.arange(24).reshape(2, 3, 4)
    assert (LINEAR.count(x), LINEAR.repeat) == (6, 1)
    np.testing.assert_array_equal(LINEAR.rows(x, np.array([5, 0])), [[20, 21, 22, 23], [0, 1, 2, 3]])
    assert LINEAR.count(np.zeros((0, 4))) == 0


def test_a_kernel_that_does_not_fit_has_no_rows():
    assert KERNEL.count(np.zeros((2, 3, 1))) == 2
    assert View((3,), (1,), (0, 0), (1,)).count(np.zeros((2, 3, 1))) == 0
    assert KERNEL.count(np.zeros((0, 3, 5))) == 0
