"""Statistics that see every other row each, and positions of padding, which none sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import Opener, make_model, node, random
from observer_support import ALL, ONE_THREAD

from onnxq.calibration import observer
from onnxq.calibration.readers import open_data
from onnxq.graph import Graph
from onnxq.numerics.ranges import MinMax

I64 = 7  # onnx.TensorProto.INT64
S, K = 5, 3


class Seen:
    """All that it was given, one array a batch."""

    def __init__(self) -> None:
        self.batches: list[npt.NDArray[Any]] = []

    def update(self, x: npt.NDArray[Any]) -> None:
        self.batches.append(np.array(x))

    def all(self) -> npt.NDArray[Any]:
        return np.concatenate(self.batches)


class Split:
    def __init__(self) -> None:
        self.halves = Seen(), Seen()


def masked(opened: Opener) -> Graph:
    """m = -x [N, S, K]; k = the sum of m over S [N, K], of which all is real."""
    return opened(make_model([node("Neg", "x", "m"), node("Cast", "attention_mask", "c", to=1),
                              node("ReduceSum", "m axes", "k", keepdims=0), node("ReduceSum", "c", "y")],
                             {"x": ["N", S, K], "attention_mask": (I64, ["N", S])}, {"y": None},
                             {"axes": np.array([1])}))


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 20])
def test_halves_see_even_and_odd_rows_of_all_the_data(batch: int, opened: Opener) -> None:
    graph = opened(make_model([node("Neg", "x", "y")], {"x": ["N", K]}, {"y": ["N", K]}))
    x, found, whole = random(11, K), {"y": Split(), "x": Split()}, Seen()
    given = [{"x": part} for part in np.split(x, range(batch, 11, batch))]
    observer.fold(graph, found, open_data(given, graph.ports()), ALL, ONE_THREAD,
                  beside=[{"y": whole}])
    for name, sign in (("x", 1), ("y", -1)):
        even, odd = found[name].halves
        np.testing.assert_array_equal(even.all(), sign * x[0::2])
        np.testing.assert_array_equal(odd.all(), sign * x[1::2])
    np.testing.assert_array_equal(whole.all(), -x)


def test_padding_is_left_out_of_every_statistic(opened: Opener) -> None:
    graph, x = masked(opened), random(6, S, K)
    mask = (np.arange(S) < np.array([5, 2, 4, 1, 3, 5])[:, None]).astype(np.int64)
    x[mask == 0] = 1e6
    real = mask.astype(bool)
    feeds = [{"x": x[:3], "attention_mask": mask[:3]}, {"x": x[3:], "attention_mask": mask[3:]}]
    split, ranges, sums = Split(), MinMax(), Seen()
    observer.fold(graph, {"m": split}, open_data(feeds, graph.ports()), ALL, ONE_THREAD, None,
                  [{"m": ranges, "k": sums}])
    even, odd = split.halves
    np.testing.assert_array_equal(even.all(), -x[0::2][real[0::2]])
    np.testing.assert_array_equal(odd.all(), -x[1::2][real[1::2]])
    assert ranges.result()[0] > -10
    assert sums.all().shape == (6, K), "what is no row of positions is seen whole"


def test_comparisons_leave_it_out_too(opened: Opener) -> None:
    graph, x = masked(opened), random(4, S, K)
    mask = (np.arange(S) < np.array([5, 2, 4, 1])[:, None]).astype(np.int64)
    found = observer.compare([graph], {"m": ("m", 0, "m")},
                             open_data([{"x": x, "attention_mask": mask}], graph.ports()), ALL, ONE_THREAD)
    assert found["m"].count == int(mask.sum()) * K


def test_a_twin_is_seen_beside_the_graph(opened: Opener) -> None:
    """The same positions of the same rows: first what the other form makes, then what the graph does."""
    graph = masked(opened)
    twin = opened(make_model([node("Abs", "x", "m"), node("Cast", "attention_mask", "c", to=1),
                              node("ReduceSum", "c", "y")],
                             {"x": ["N", S, K], "attention_mask": (I64, ["N", S])}, {"y": None}))
    x = random(6, S, K)
    mask = (np.arange(S) < np.array([5, 2, 3, 1, 4, 5])[:, None]).astype(np.int64)
    found = {"m": Split()}
    given = [{"x": x[:4], "attention_mask": mask[:4]}, {"x": x[4:], "attention_mask": mask[4:]}]
    steps: list[int] = []
    observer.fold(graph, found, open_data(given, graph.ports()), ALL, ONE_THREAD, steps.append, [], twin)
    both = np.concatenate([np.abs(x), -x], axis=-1)
    for half, rows in zip(found["m"].halves, (slice(0, None, 2), slice(1, None, 2)), strict=True):
        np.testing.assert_array_equal(np.concatenate([b.reshape(-1, 2 * K) for b in half.batches]),
                                      both[rows][mask[rows] == 1])
    assert steps == [4, 6]
