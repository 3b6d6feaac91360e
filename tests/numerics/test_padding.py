"""Padding: what a fed mask hides is left out, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.numerics.padding import real_positions, without_padding

MASK = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
REAL = MASK.astype(bool)


@pytest.mark.parametrize("name", ["attention_mask", "text.Attention_Mask", "decoder_attention_mask"])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float32, bool])
def test_zeros_of_a_mask_are_padding(name, dtype):
    real = real_positions({"ids": np.zeros((3, 3), np.int64), name: MASK.astype(dtype)})
    assert real.dtype == bool
    np.testing.assert_array_equal(real, REAL)


def test_a_row_without_real_positions_counts_as_real():
    """A model gives something there, too, and a row has to have values."""
    real = real_positions({"attention_mask": np.array([[0, 0, 0], [0, 1, 1]])})
    np.testing.assert_array_equal(real, [[True, True, True], [False, True, True]])


@pytest.mark.parametrize("feed", [
    {},
    {"ids": MASK},
    {"attention_mask_type": MASK},
    {"attention_mask": np.ones((2, 3), np.int64)},
    {"attention_mask": np.array([[1, 0], [1, 2]])},  # numbers of segments
    {"attention_mask": np.array([[0.0, -1e9], [0.0, 0.0]], np.float32)},  # what is added to scores
    {"attention_mask": MASK[:, None, None]},
    {"attention_mask": np.zeros((2, 3), np.int64)},
], ids=["no inputs", "no mask", "another input", "no padding", "other numbers", "added", "rank 4", "nothing real"])
def test_what_hides_nothing(feed):
    assert real_positions(feed) is None


def test_values_of_real_positions_are_kept_in_their_order():
    values = np.arange(18.0).reshape(3, 3, 2)
    kept = without_padding(values, REAL)
    np.testing.assert_array_equal(kept, [[0, 1], [2, 3], [6, 7], [12, 13], [14, 15], [16, 17]])


@pytest.mark.parametrize("shape", [(3,), (3, 3), (3, 4, 2), (2, 3, 2), (3, 2, 3, 3), ()])
def test_other_shapes_stay(shape):
    values = np.zeros(shape)
    assert without_padding(values, REAL) is values


def test_without_padding_nothing_is_left_out():
    values = np.zeros((3, 3, 2))
    assert without_padding(values, None) is values
