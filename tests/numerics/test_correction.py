"""Mean errors against hand-worked cases."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.numerics.correction import MeanError


def test_equal_batches_give_their_mean() -> None:
    found = MeanError()
    for _ in range(3):
        found.update(np.array([1.0, -2.0]))
    np.testing.assert_array_equal(found.result(), np.array([1.0, -2.0], np.float32))


def test_a_mean_within_its_own_noise_is_taken_for_zero() -> None:
    found = MeanError()
    for value in (1.0, -1.0, 1.1, -1.1):
        found.update(np.array([value]))
    assert found.result() == 0.0


def test_shrinkage_by_hand() -> None:
    found = MeanError()
    found.update(np.array([3.0]))
    found.update(np.array([5.0]))
    # mean 4, variance of the mean (16 + ... ): ((9 + 25) / 2 - 16) / 1 = 1; factor 1 - 1/16
    assert found.result() == pytest.approx(4 * (1 - 1 / 16))


def test_one_batch_is_taken_as_it_is_and_nan_is_refused() -> None:
    found = MeanError()
    found.update(np.array([0.5]))
    assert found.result() == 0.5
    with pytest.raises(ValueError, match="not finite"):
        found.update(np.array([np.nan]))
