"""Models as right as a given one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random, run
from onnx import numpy_helper

from onnxq.graph import write_nudged
from onnxq.graph.nudged import NUDGE
from onnxq.graph.parse import KEPT_BELOW


def constants(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """x [N, 4] @ w + b, masked and resized; only w is read by an operator that sums."""
    nodes = [node("MatMul", "x w", "m"), node("Add", "m b", "a"), node("Resize", "a _ sizes", "y")]
    stored = {"w": random(4, 6), "b": random(6), "sizes": np.array([1.0, 2.0], np.float32)}
    path = tmp_path / "model.onnx"
    onnx.save(make_model(nodes, {"x": ["N", 4]}, {"y": None}, stored), path)
    return path


def test_what_sums_read_is_nudged_and_nothing_else(model: Path, tmp_path: Path) -> None:
    assert write_nudged(model, tmp_path / "other.onnx", 0)
    before, after = constants(model), constants(tmp_path / "other.onnx")
    change = after["w"].astype(np.float64) / before["w"] - 1
    np.testing.assert_allclose(np.abs(change), NUDGE, rtol=0.04)  # rounding to float32 is 1/32 of a nudge at the most
    assert {*np.sign(change).flat} == {-1.0, 1.0}
    for name in ("b", "sizes"):
        np.testing.assert_array_equal(after[name], before[name])


def test_seeds_differ_and_repeat(model: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{k}.onnx" for k in range(3)]
    for path, seed in zip(files, (0, 1, 0), strict=True):
        write_nudged(model, path, seed)
    assert files[0].read_bytes() == files[2].read_bytes() != files[1].read_bytes()


def test_large_weights_stay_where_they_are(tmp_path: Path) -> None:
    """They are read from the first model's file; the other one is small."""
    size = 640
    weight = random(size, size)
    assert weight.nbytes > KEPT_BELOW
    nodes = [node("MatMul", "x w", "m"), node("MatMul", "m v", "y")]
    onnx.save(make_model(nodes, {"x": ["N", size]}, {"y": None}, {"w": weight, "v": random(size, 2)}),
              tmp_path / "model.onnx")
    assert write_nudged(tmp_path / "model.onnx", tmp_path / "other.onnx", 0)
    assert (tmp_path / "other.onnx").stat().st_size < 20_000
    feed = {"x": random(3, size)}
    right, other = run(tmp_path / "model.onnx", feed)["y"], run(tmp_path / "other.onnx", feed)["y"]
    assert 0 < np.abs(right - other).max() < 1e-4 * np.abs(right).max()


@pytest.mark.parametrize("values", [np.array([[1.0, -3.4e38]], np.float32), np.zeros((1, 0), np.float32),
                                    np.array([[1, 2]], np.int32)], ids=["infinite", "empty", "integers"])
def test_constants_that_can_not_be_nudged(values: np.ndarray, tmp_path: Path) -> None:
    kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    onnx.save(make_model([node("MatMul", "x w", "y")], {"x": (kind, ["N", 1])}, {"y": (kind, None)}, {"w": values}),
              tmp_path / "model.onnx")
    assert not write_nudged(tmp_path / "model.onnx", tmp_path / "other.onnx", 0)
    assert not (tmp_path / "other.onnx").exists()


def test_float_activations_beside_weights_in_blocks(tmp_path: Path) -> None:
    stored = {"b": np.arange(64, dtype=np.uint8).reshape(4, 1, 16), "s": np.full(4, 0.01, np.float32)}
    blocks = node("MatMulNBits", "x b s", "y", domain="com.microsoft", K=32, N=4, bits=4, block_size=32,
                  accuracy_level=4)
    model = make_model([blocks], {"x": [1, 32]}, {"y": [1, 4]}, stored, domains={"com.microsoft": 1})
    onnx.save(model, tmp_path / "model.onnx")
    assert write_nudged(tmp_path / "model.onnx", tmp_path / "other.onnx", None)
    attributes = {a.name: a.i for a in onnx.load(tmp_path / "other.onnx").graph.node[0].attribute}
    assert attributes == {"K": 32, "N": 4, "bits": 4, "block_size": 32, "accuracy_level": 1}
    codes = np.arange(64, dtype=np.uint8).reshape(4, 16)
    weights = (np.stack([codes & 15, codes >> 4], -1).reshape(4, 32).astype(np.float32) - 8) * np.float32(0.01)
    x = random(1, 32)
    np.testing.assert_allclose(run(tmp_path / "other.onnx", {"x": x})["y"], x @ weights.T, rtol=0, atol=1e-5)


def test_a_model_without_blocks_has_no_such_variant(model: Path, tmp_path: Path) -> None:
    assert not write_nudged(model, tmp_path / "other.onnx", None)
