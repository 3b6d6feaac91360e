"""Elements of windows that hang over the padding, against counting."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onnxq.numerics.pooling import window_counts

_SMALL = st.integers(1, 3)


@given(sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)), window=st.tuples(_SMALL, _SMALL),
       strides=st.tuples(_SMALL, _SMALL), pads=st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_counts_are_those_of_ones_among_zeros(sizes: tuple[int, int], window: tuple[int, int],
                                              strides: tuple[int, int], pads: list[int]) -> None:
    inside = np.pad(np.ones(sizes, int), ((pads[0], pads[2]), (pads[1], pads[3])))
    found = window_counts(sizes, window, strides, pads)
    if any(have < want for have, want in zip(inside.shape, window, strict=True)):
        assert found.size == 0
        return
    views = np.lib.stride_tricks.sliding_window_view(inside, window)[::strides[0], ::strides[1]]
    np.testing.assert_array_equal(found, views.sum(axis=(2, 3)))
    assert found.dtype == np.int64


def test_any_number_of_axes() -> None:
    assert window_counts([4], [3], [1], [1, 1]).tolist() == [2, 3, 3, 2]
    assert window_counts([3, 1, 2], [3, 1, 2], [1, 1, 2], [1, 0, 0, 1, 0, 0]).tolist() == [[[4]], [[6]], [[4]]]
