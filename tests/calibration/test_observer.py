"""Observing: named tensors in one streamed run, folded and dropped."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from conftest import Opener, make_model, node, random
from observer_support import ALL, ONE_THREAD, observe

from onnxq.calibration import observer
from onnxq.calibration.readers import open_data
from onnxq.errors import DataError, UsageError
from onnxq.graph import Graph
from onnxq.numerics.moments import Moments
from onnxq.recipe import Calibration

Feed = dict[str, npt.NDArray[Any]]
W = random(8, 8)


def model() -> onnx.ModelProto:
    """y = log(relu(x @ W)) + 1: negative infinities wherever the Relu gives 0."""
    return make_model([node("MatMul", "x w", "m"), node("Relu", "m", "r"), node("Log", "r", "l"),
                       node("Add", "l one", "y")], {"x": ["N", 8]}, {"y": ["N", 8]}, {"w": W, "one": np.float32(1)})


def rows(count: int, seed: int = 0) -> list[Feed]:
    return [{"x": random(1, 8, seed=seed + k)} for k in range(count)]


def observed(graph: Graph, wanted: list[str], data: Any, how: Calibration = ALL,
             progress: Callable[[int], None] | None = None) -> dict[str, tuple[float, float]]:
    return observe(graph, wanted, open_data(data, graph.ports()), how, progress)


# ------------------------------------------------------------------ values


def test_ranges_of_computed_tensors_and_of_inputs(opened: Opener) -> None:
    feeds = rows(5)
    found = observed(opened(model()), ["x", "m", "r"], feeds)
    x = np.concatenate([f["x"] for f in feeds])
    m = x @ W
    assert list(found) == ["x", "m", "r"]
    assert found["x"] == (float(x.min()), float(x.max()))
    np.testing.assert_allclose(found["m"], (m.min(), m.max()), rtol=1e-5)
    np.testing.assert_allclose(found["r"], (0, m.max()), rtol=1e-5)


def test_a_graph_output_can_be_observed(opened: Opener) -> None:
    exp = make_model([node("Exp", "x", "y")], {"x": [2]}, {"y": [2]})
    found = observed(opened(exp), ["y"], [{"x": np.float32([0, 2])}])
    np.testing.assert_allclose(found["y"], (0, np.exp(2)), rtol=1e-5)


def test_only_inputs_need_no_run(opened: Opener) -> None:
    assert observed(opened(model()), ["x"], [{"x": np.full((2, 8), 3, np.float32)}]) == {"x": (0.0, 3.0)}


def test_0_is_always_inside(opened: Opener) -> None:
    found = observed(opened(model()), ["x"], [{"x": np.full((2, 8), -3, np.float32)}])
    assert found == {"x": (-3.0, 0.0)}


def test_infinities_do_not_count(opened: Opener) -> None:
    feeds = rows(20)
    low, high = observed(opened(model()), ["l"], feeds)["l"]
    r = np.maximum(np.concatenate([f["x"] for f in feeds]) @ W, 0)
    assert (r == 0).any(), "log gives -inf somewhere"
    np.testing.assert_allclose((low, high), (np.log(r[r > 0]).min(), np.log(r.max())), rtol=1e-4)


def test_nothing_but_infinities_is_a_range_of_0(opened: Opener) -> None:
    assert observed(opened(model()), ["l"], [{"x": np.zeros((2, 8), np.float32)}]) == {"l": (0.0, 0.0)}


def test_percentile_cuts_both_tails(opened: Opener) -> None:
    x = random(4000, 8)
    x[7, 3], x[9, 1] = 1e4, -1e4
    how = Calibration(samples=None, ranges="percentile", percentile=99.0, batch=500)
    low, high = observed(opened(model()), ["x"], [{"x": x[k:k + 500]} for k in range(0, 4000, 500)], how)["x"]
    width = 2 * 2.0 ** 14 / 2048  # a bin of the histogram that holds 1e4
    assert abs(low - np.percentile(x, 0.5)) <= width
    assert abs(high - np.percentile(x, 99.5)) <= width
    assert observed(opened(model()), ["x"], [{"x": x}])["x"] == (-1e4, 1e4)


# ------------------------------------------------------------------ the stream


def test_samples_batches_and_progress(tmp_path: Path, opened: Opener) -> None:
    np.savez(tmp_path / "d.npz", x=random(40, 8))
    seen: list[int] = []
    how = Calibration(samples=20, batch=8)
    found = observed(opened(model()), ["x"], str(tmp_path / "d.npz"), how, seen.append)
    assert seen == [8, 16, 20]
    first = random(40, 8)[:20]
    assert found["x"] == (float(first.min()), float(first.max()))


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_the_batch_size_changes_nothing(batch: int, tmp_path: Path, opened: Opener) -> None:
    np.savez(tmp_path / "d.npz", x=random(40, 8))
    for ranges in ("minmax", "percentile"):
        graph = opened(model())
        whole = observed(graph, ["x", "r"], str(tmp_path / "d.npz"), Calibration(None, 40, ranges))
        found = observed(graph, ["x", "r"], str(tmp_path / "d.npz"), Calibration(None, batch, ranges))
        np.testing.assert_allclose([found["x"], found["r"]], [whole["x"], whole["r"]], rtol=1e-5)


def test_rows_of_unequal_length(opened: Opener) -> None:
    varying = make_model([node("Exp", "x", "e"), node("ReduceSum", "e", "y")], {"x": ["N", "S"]}, {"y": None})
    feeds = [{"x": np.full((2, length), length, np.float32)} for length in (3, 9, 5)]
    assert observed(opened(varying), ["x"], feeds)["x"] == (0.0, 9.0)
    np.testing.assert_allclose(observed(opened(varying), ["e"], feeds)["e"], (0, np.exp(9)), rtol=1e-5)


def test_the_graph_is_left_as_it_was(opened: Opener) -> None:
    graph = opened(model())
    observed(graph, ["m", "r"], rows(2))
    assert [t.name for t in graph.outputs] == ["y"]


def holds_one_batch(run: Callable[[Callable[[], Iterator[Feed]]], object]) -> None:
    """Whether ten times the batches, of x [1, 2**19] each, have the same peak in what `run` does with them."""
    def peak(batches: int) -> int:
        def feeds() -> Iterator[Feed]:
            for k in range(batches):
                yield {"x": np.full((1, 1 << 19), k / batches, np.float32)}

        tracemalloc.start()
        try:
            run(feeds)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    short, long = peak(4), peak(40)
    assert short > 4 << 20, "a batch is seen at all"
    assert long < short + (2 << 20)


@pytest.mark.parametrize("ranges", ["minmax", "percentile"])
def test_memory_is_that_of_one_batch(ranges: str, opened: Opener) -> None:
    """Ten times the batches, the same peak: nothing is kept (a batch of x and m is 4 MB)."""
    graph = opened(make_model([node("Exp", "x", "m"), node("ReduceMax", "m", "y")], {"x": ["N", 1 << 19]}, {"y": None}))

    holds_one_batch(lambda feeds: observed(graph, ["x", "m"], feeds, Calibration(samples=None, ranges=ranges)))


# ------------------------------------------------------------------ what can't be used


@pytest.mark.parametrize("batch", [1, 4, 40])
@pytest.mark.parametrize("wanted", [["x", "m"], ["m"], ["r", "x"]])
def test_nan_in_the_data_names_the_input_and_the_row(wanted: list[str], batch: int, tmp_path: Path,
                                                     opened: Opener) -> None:
    x = random(10, 8)
    x[5, 2] = np.nan
    np.savez(tmp_path / "d.npz", x=x)
    with pytest.raises(DataError, match="input 'x' holds NaN in row 5 of the calibration data; repair or leave out"):
        observed(opened(model()), wanted, str(tmp_path / "d.npz"), Calibration(None, batch))


def test_nan_that_the_model_makes_names_the_first_tensor_that_holds_it(opened: Opener) -> None:
    nan = make_model([node("Sqrt", "x", "s"), node("Exp", "s", "e"), node("ReduceSum", "e", "y")], {"x": ["N", 4]},
                     {"y": None})
    feeds = [{"x": np.ones((1, 4), np.float32)}, {"x": np.full((1, 4), -1, np.float32)}]
    for ranges in ("minmax", "percentile"):
        with pytest.raises(DataError, match=r"tensor 's' holds NaN for row 1 of .* the float model itself makes it"):
            observed(opened(nan), ["x", "s", "e"], feeds, Calibration(samples=None, ranges=ranges))


def test_nan_in_a_tensor_without_rows_names_those_of_the_batch(opened: Opener) -> None:
    nan = make_model([node("ReduceSum", "x", "t", keepdims=0), node("Sqrt", "t", "s")], {"x": ["N", 4]}, {"s": []})
    x = np.ones((3, 4), np.float32)
    with pytest.raises(DataError, match="tensor 's' holds NaN for rows 3 to 5 of"):
        observed(opened(nan), ["s"], [{"x": x}, {"x": -x}])


def test_no_rows_are_no_ranges(opened: Opener) -> None:
    with pytest.raises(DataError, match="at least one"):
        observed(opened(model()), ["x"], lambda: iter(()))


@pytest.mark.parametrize("how", [Calibration(ranges="median"), Calibration(percentile=0.5),
                                 Calibration(percentile=101)])
def test_settings_that_no_observer_has(how: Calibration) -> None:
    with pytest.raises(UsageError, match="use"):
        observer.check(how)


def test_settings_that_there_are() -> None:
    for ranges in ("minmax", "percentile"):
        observer.check(Calibration(ranges=ranges))


# ------------------------------------------------------------------ against a reference


def test_tensors_are_compared_within_a_graph_and_across(opened: Opener) -> None:
    """The error of a rounded weight, seen at the product and behind the Relu of another graph."""
    rounded = np.round(W * 4) / 4
    both = make_model([node("MatMul", "x w", "m"), node("MatMul", "x v", "k"), node("Relu", "m", "y")],
                      {"x": ["N", 8]}, {"y": ["N", 8]}, {"w": W, "v": rounded})
    other = make_model([node("MatMul", "x v", "m"), node("Relu", "m", "y")], {"x": ["N", 8]}, {"y": ["N", 8]},
                       {"v": rounded})
    feeds, graphs, moments, steps = rows(5), [opened(both), opened(other)], Moments(), list[int]()
    found = observer.compare(graphs, {"inside": ("m", 0, "k"), "across": ("y", 1, "y"), "input": ("x", 0, "x")},
                             open_data(feeds, graphs[0].ports()), ALL, ONE_THREAD, steps.append, {"x": [moments]})
    x = np.concatenate([f["x"] for f in feeds])
    a, b = x @ W, x @ rounded
    assert found["inside"].sqnr_db == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), abs=1e-3)
    a, b = np.maximum(a, 0), np.maximum(b, 0)
    assert found["across"].sqnr_db == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), abs=1e-3)
    assert (found["input"].sqnr_db, found["input"].count) == (None, x.size)
    assert moments.std == pytest.approx(x.std(), rel=1e-6)
    assert steps == [1, 2, 3, 4, 5]
    assert [t.name for t in graphs[0].outputs] == ["y"]


def test_comparing_refuses_nan_where_statistics_are_asked_and_data_without_rows(opened: Opener) -> None:
    graph = opened(model())
    nan = open_data([{"x": np.full((1, 8), np.nan, np.float32)}], graph.ports())
    with pytest.raises(DataError, match="input 'x' holds NaN in row 0"):
        observer.compare([graph], {}, nan, ALL, ONE_THREAD, beside={"x": [Moments()]})
    with pytest.raises(DataError, match="at least one"):
        observer.compare([graph], {"m": ("m", 0, "r")}, open_data(lambda: iter(()), graph.ports()), ALL, ONE_THREAD)


def test_statistics_of_a_tensor_whose_range_is_asked_for_too(opened: Opener) -> None:
    graph, moments = opened(model()), Moments()
    found = observe(graph, ["m"], open_data(rows(5), graph.ports()), beside={"m": moments})
    assert found["m"] == moments.extremes.result()
    assert moments.count == 40


def test_comparing_takes_the_memory_of_one_batch(opened: Opener) -> None:
    graph = opened(make_model([node("Exp", "x", "m"), node("Abs", "x", "k"), node("ReduceMax", "m", "y")],
                              {"x": ["N", 1 << 19]}, {"y": None}))

    holds_one_batch(lambda feeds: observer.compare(
        [graph, graph], {"a": ("m", 0, "k"), "b": ("m", 1, "m")}, open_data(feeds, graph.ports()), ALL, ONE_THREAD,
        beside={"x": [Moments()]}))
