"""The sample of an export: its files, and what is allowed of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random, run
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from onnxq.errors import ModelError
from onnxq.exporting import sample
from onnxq.exporting.manifest import DTYPES
from onnxq.ports import Port
from onnxq.recipe import Preprocessing
from onnxq.runtime.session import SessionOptions

ONE_THREAD = SessionOptions(threads=1)


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_arrays_come_back_from_their_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject,
                                           dtype: str) -> None:
    values = data.draw(arrays(dtype, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)))
    folder = tmp_path_factory.mktemp("stored")
    (stored,) = sample.store(folder, {"x": values}, "input")
    assert (stored.name, stored.dtype, stored.shape) == ("x", dtype, values.shape)
    assert (folder / stored.file).read_bytes() == values.astype(values.dtype.newbyteorder("<")).tobytes()
    found = sample.fetch(folder, stored)
    assert found.dtype == values.dtype
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, values)


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    (stored,) = sample.store(tmp_path, {"x": random(4)}, "input")
    (tmp_path / stored.file).write_bytes(b"123")
    with pytest.raises(ModelError, match=r"does not hold float32 \[4\]; export the model again"):
        sample.fetch(tmp_path, stored)


F = np.float32
INF, NAN = F("inf"), F("nan")


@pytest.mark.parametrize(("found", "expected", "wanted"), [
    ([F(1), F(2)], [F(1), F(2.5)], 0.5), ([NAN, INF, -INF], [NAN, INF, -INF], 0.0), ([NAN], [F(0)], math.inf),
    ([INF], [F(0)], math.inf), ([INF], [-INF], math.inf), ([], [], 0.0)])
def test_difference(found: list[Any], expected: list[Any], wanted: float) -> None:
    assert sample.difference(np.array(found, F), np.array(expected, F)) == wanted


def test_difference_of_integers_is_exact() -> None:
    a, b = np.array([2 ** 63, 5], np.uint64), np.array([2 ** 63 + 1, 5], np.uint64)
    assert sample.difference(a, b) == 1
    assert sample.difference(np.array([-128], np.int8), np.array([127], np.int8)) == 255
    assert sample.difference(np.array([True]), np.array([False])) == 1


def test_other_types_and_shapes_are_infinitely_far() -> None:
    assert sample.difference(np.zeros(2, F), np.zeros(2)) == math.inf
    assert sample.difference(np.zeros(2, F), np.zeros((2, 1), F)) == math.inf


def allowed(tmp_path: Path, model: onnx.ModelProto, feed: dict[str, Any]) -> dict[str, float]:
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    found = sample.tolerances(path, feed, run(path, feed, optimize=True), ONE_THREAD)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"], "variants are removed"
    return found


def test_float_sums_are_allowed_their_roundings(tmp_path: Path) -> None:
    """1e-5 of the largest number, and twice what nudges of 2^-18 bring: less than 2^-18 of the sum of magnitudes."""
    weight, x = random(64, 8), random(2, 64, seed=1)
    found = allowed(tmp_path, make_model([node("MatMul", "x w", "y")], {"x": [2, 64]}, {"y": [2, 8]}, {"w": weight}),
                    {"x": x})
    largest = float(np.abs(x @ weight).max())
    most = 2 * 2.0 ** -18 * float((np.abs(x) @ np.abs(weight)).max()) + 1e-5 * largest
    assert 1e-5 * largest < found["y"] < 1.02 * most


def test_a_code_near_the_middle_may_take_the_other_one(tmp_path: Path) -> None:
    """x * w lies at 2.5 steps: nudged one way it rounds to 2 of them, the other way to 3."""
    nodes = [node("MatMul", "x w", "m"), node("QuantizeLinear", "m s z", "q"), node("DequantizeLinear", "q s z", "y")]
    stored = {"w": np.full((1, 64), 2.5, F), "s": F(1), "z": np.uint8(0)}
    model = make_model(nodes, {"x": [1, 1]}, {"y": [1, 64], "q": (onnx.TensorProto.UINT8, [1, 64])}, stored)
    found = allowed(tmp_path, model, {"x": np.ones((1, 1), F)})
    assert found["q"] == 1  # an integer is allowed what it differed by
    assert 1.99 < found["y"] <= 2.01  # twice a step, and the scale is nudged, too


def test_what_is_exact_has_to_be_equal(tmp_path: Path) -> None:
    model = make_model([node("Add", "x x", "y")], {"x": (onnx.TensorProto.INT32, [2])},
                       {"y": (onnx.TensorProto.INT32, [2])})
    assert allowed(tmp_path, model, {"x": np.array([1, 2], np.int32)}) == {"y": 0}


def test_half_is_allowed_units_in_its_last_place(tmp_path: Path) -> None:
    half = onnx.TensorProto.FLOAT16
    model = make_model([node("Relu", "x", "y")], {"x": (half, [2])}, {"y": (half, [2])})
    found = allowed(tmp_path, model, {"x": np.array([1, 2], np.float16)})
    assert found["y"] == pytest.approx(4 * 2 * 2.0 ** -10, rel=0.01)


@pytest.mark.parametrize("number", [1.0, 0.12345, 99999.0, 3e-7])
def test_tolerances_are_rounded_up(number: float) -> None:
    found = sample._rounded(number)
    assert number <= found <= 1.01 * number
    assert len(f"{found:.10g}".replace(".", "").strip("0").partition("e")[0]) <= 3


def test_the_sample_is_the_first_row(tmp_path: Path) -> None:
    rows = random(3, 4)
    np.savez(tmp_path / "rows.npz", x=rows)
    ports = [Port("x", np.dtype(F), ("N", 4))]
    feed, told = sample.take(str(tmp_path / "rows.npz"), ports, Preprocessing())
    np.testing.assert_array_equal(feed["x"], rows[:1])
    assert told == "first row of rows.npz"
    feed, told = sample.take(None, ports, Preprocessing())
    assert feed["x"].shape == (1, 4)
    assert told == "made at random"
