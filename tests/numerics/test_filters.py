"""Weights as matrices: what a Conv computes is its rows times the matrix, and all comes back."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import random
from onnx.reference.ops.op_conv import _conv_implementation

from onnxq.numerics.filters import by_place, from_matrix, restored, to_matrix
from onnxq.numerics.sampling import View


def test_rows_times_the_matrix_are_a_convolution() -> None:
    x, weight = random(2, 3, 5, 6), random(4, 3, 2, 3, seed=1)
    view = View((2, 3), (1, 1), (0, 0, 0, 0), (1, 1))
    made = view.rows(x, np.arange(view.count(x))) @ to_matrix(weight, filters=True)
    wanted = _conv_implementation(x, weight, None, None, [1, 1], 1, [2, 3], [0, 0, 0, 0], [1, 1])
    np.testing.assert_allclose(made, wanted.transpose(0, 2, 3, 1).reshape(-1, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shape", "kernel", "filters"), [((6, 4), (), False), ((4, 6), (), True),
                                                          ((4, 3, 2, 5), (2, 5), True)])
def test_all_comes_back(shape: tuple[int, ...], kernel: tuple[int, ...], filters: bool) -> None:
    weight = random(*shape)
    matrix = to_matrix(weight, filters)
    np.testing.assert_array_equal(from_matrix(matrix, kernel, filters), weight)
    order = by_place(len(matrix), kernel)
    np.testing.assert_array_equal(restored(matrix[order], order), matrix)


def test_channels_of_one_place_follow_one_another() -> None:
    channel, place = np.divmod(np.arange(12), 4)
    order = by_place(12, (2, 2))
    assert place[order].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert channel[order].tolist() == [0, 1, 2] * 4
