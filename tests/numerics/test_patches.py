"""Patches against the Conv of onnx.reference; small integers make every sum exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

from onnxq.numerics.patches import output_sizes, patches

no_deadline = settings(deadline=None)


@st.composite
def convs(draw):
    """(x, w, attributes) of a Conv whose kernel fits."""
    rank = draw(st.integers(1, 3))

    def each(least, most):
        return draw(st.lists(st.integers(least, most), min_size=rank, max_size=rank))

    kernel, strides, dilations, pads = each(1, 3), each(1, 3), each(1, 2), [*each(0, 2), *each(0, 2)]
    spatial = [max(size, d * (k - 1) + 1) for size, k, d in zip(each(1, 6), kernel, dilations, strict=True)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, channels, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    x = rng.integers(-9, 10, (batch, channels, *spatial)).astype(np.float32)
    w = rng.integers(-9, 10, (outputs, channels, *kernel)).astype(np.float32)
    return x, w, {"kernel": kernel, "strides": strides, "pads": pads, "dilations": dilations}


def reference(x, w, attributes):
    """[B, *output, M]: the output of the Conv, channels last."""
    names = {"kernel": "kernel_shape"}
    node = helper.make_node("Conv", ["x", "w"], ["y"], **{names.get(k, k): v for k, v in attributes.items()})
    return np.moveaxis(ReferenceEvaluator(node).run(None, {"x": x, "w": w})[0], 1, -1)


@given(convs())
@no_deadline
def test_rows_times_the_weight_are_the_conv(conv):
    x, w, attributes = conv
    y = reference(x, w, attributes)
    assert output_sizes(x.shape[2:], **attributes) == y.shape[1:-1]
    rows = patches(x, **attributes)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows @ w.reshape(len(w), -1).T, y.reshape(-1, len(w)))


@given(convs(), st.data())
@no_deadline
def test_wanted_rows_are_those_of_the_whole_matrix(conv, data):
    x, _, attributes = conv
    rows = patches(x, **attributes)
    wanted = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9))
    np.testing.assert_array_equal(patches(x, **attributes, wanted=wanted), rows[wanted])


def test_by_hand():
    x = np.arange(6).reshape(1, 2, 3)
    # kernel 2 over 0 | 0 1 2 and 0 | 3 4 5, one zero in front; channels first, then taps
    expected = [[0, 0, 0, 3], [0, 1, 3, 4], [1, 2, 4, 5]]
    assert patches(x, [2], [1], [1, 0], [1]).tolist() == expected
    assert patches(x, [2], [1], [1, 0], [1], wanted=[2, 0]).tolist() == [expected[2], expected[0]]
    assert patches(x, [2], [2], [1, 0], [1]).tolist() == [expected[0], expected[2]]
    assert patches(x, [2], [1], [0, 0], [2]).tolist() == [[0, 2, 3, 5]]


def test_infinities_reach_only_the_rows_that_see_them():
    rows = patches(np.array([[[np.inf, 1.0, 2.0]]]), [2], [1], [1, 1], [1])
    assert rows.tolist() == [[0, np.inf], [np.inf, 1], [1, 2], [2, 0]]


@pytest.mark.parametrize("x", [np.zeros((2, 3, 1)), np.zeros((0, 3, 4))], ids=["kernel too large", "no samples"])
def test_no_rows(x):
    assert patches(x, [2], [1], [0, 0], [1]).shape == (0, 6)
    assert patches(x, [2], [1], [0, 0], [1], wanted=[]).shape == (0, 6)


@pytest.mark.parametrize(("change", "says"), [
    ({"wanted": [3]}, "from 0 to 2"),
    ({"wanted": [-1]}, "from 0 to 2"),
    ({"pads": [0]}, "two pads"),
    ({"kernel": [2, 2]}, "don't fit 1"),
    ({"strides": [0]}, "below 1"),
    ({"pads": [-1, 0]}, "negative"),
    ({"x": np.zeros((2, 3))}, "spatial"),
])
def test_what_does_not_fit_is_refused(change, says):
    fits = {"x": np.zeros((1, 1, 4)), "kernel": [2], "strides": [1], "pads": [0, 0], "dilations": [1]}
    with pytest.raises(ValueError, match=says):
        patches(**{**fits, **change})
