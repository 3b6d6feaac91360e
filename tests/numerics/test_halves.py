"""float32 to float16: nearest to even, and nothing finite becomes infinite."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.numerics import halves

ANY = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
                 elements=st.floats(width=32, allow_nan=True, allow_infinity=True))


@given(ANY, st.sampled_from([halves.LARGEST, halves.LARGEST / 2]))
def test_each_number_is_the_nearest_within_the_limit(values: np.ndarray, limit: float) -> None:
    found = halves.nearest(values, limit)
    assert (found.dtype, found.shape) == (np.float16, values.shape)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(found[~finite], values[~finite].astype(np.float16))
    wanted = np.clip(values[finite], -limit, limit).astype(np.float16)
    np.testing.assert_array_equal(found[finite].view(np.uint16), wanted.view(np.uint16))


@pytest.mark.parametrize("value", [65519.9, 65520, 1e9, float(np.finfo(np.float32).max)])
def test_ends(value: float) -> None:
    """65520 lies in the middle between the largest number and the first that there isn't."""
    assert halves.nearest(np.float32([value, -value])).tolist() == [65504, -65504]
    assert halves.nearest(np.float32(value), 32752.0).tolist() == 32752


def test_large_arrays_are_converted_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "_BLOCK", 10)
    values = np.random.default_rng(0).standard_normal((7, 2, 3)).astype(np.float32) * np.float32(40000)
    wanted = np.clip(values, -65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(halves.nearest(values), wanted)
    np.testing.assert_array_equal(halves.nearest(values.T), wanted.T)


def test_shares() -> None:
    """6.2e-5 is above the smallest normal number 2**-14, about 6.1e-5; 0 counts for nothing."""
    assert halves.shares(np.float32([[0, 1], [6.2e-5, 6.0e-5], [-1e-12, 0]])) == (4, 2)
