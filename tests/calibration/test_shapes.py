"""Real rows in other sizes."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.calibration.shapes import resized
from onnxq.errors import UsageError
from onnxq.ports import Port

PORTS = [Port("ids", np.dtype(np.int64), ("batch", "seq")), Port("image", np.dtype(np.float32), ("batch", 3))]
FEED = {"ids": np.arange(6).reshape(2, 3), "image": np.float32([[1, 2, 3], [4, 5, 6]])}


def test_no_sizes_leave_the_feed_as_it_is() -> None:
    [found] = resized(FEED, PORTS, {})
    assert all(np.array_equal(found[name], FEED[name]) for name in FEED)


def test_larger_sizes_repeat_from_the_start_and_smaller_ones_cut() -> None:
    [found] = resized(FEED, PORTS, {"batch": [3], "seq": [2]})
    assert found["ids"].tolist() == [[0, 1], [3, 4], [0, 1]]
    assert found["image"].tolist() == [[1, 2, 3], [4, 5, 6], [1, 2, 3]]


def test_several_sizes_are_combined() -> None:
    assert [f["ids"].shape for f in resized(FEED, PORTS, {"batch": [1, 2], "seq": [5]})] == [(1, 5), (2, 5)]


@pytest.mark.parametrize(("shapes", "words"), [
    ({"length": [2]}, "no dynamic axis 'length'; it has batch, seq"), ({"seq": [0]}, "give at least 1")])
def test_an_axis_that_there_is_not_and_empty_ones_are_refused(shapes: dict[str, list[int]], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        resized(FEED, PORTS, shapes)
