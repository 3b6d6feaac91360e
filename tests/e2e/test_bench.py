"""bench(): one model or two, on data or on random inputs of chosen sizes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random

from onnxq.bench import bench
from onnxq.errors import DataError, ModelError, UsageError

bench_module = importlib.import_module("onnxq.bench")  # onnxq.bench is the function
KEYS = {"model", "other", "shapes", "threads", "data", "a_ms", "notices", "peak_memory_bytes", "environment"}


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "BLOCK_SECONDS", 0.01)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """One matrix product, and eight."""
    paths = []
    for count in (1, 8):
        nodes = [node("MatMul", "x w" if k == 0 else f"m{k - 1} w", f"m{k}") for k in range(count)]
        nodes.append(node("Relu", f"m{count - 1}", "y"))
        path = tmp_path / f"{count}.onnx"
        onnx.save(make_model(nodes, {"x": ["N", "S", 256]}, {"y": None}, {"w": random(256, 256)}), path)
        paths.append(path)
    return paths[0], paths[1]


def test_one_model(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "peak_memory", lambda *a: 123)
    found = bench(models[0], shapes={"N": 2, "S": 5}, threads=1)
    assert set(found) == KEYS
    assert (found["model"], found["other"]) == (str(models[0]), None)
    assert found["shapes"] == {"x": [2, 5, 256]}
    assert (found["threads"], found["data"]) == (1, "random inputs")
    assert found["a_ms"] > 0
    assert found["peak_memory_bytes"] == {"a": 123}
    assert found["environment"]["onnxruntime"]


def test_two_models(models: tuple[Path, Path]) -> None:
    found = bench(models[1], models[0], shapes={"N": 4, "S": 64}, threads=1)
    assert set(found) == KEYS | {"b_ms", "ratio", "low", "high"}
    assert found["low"] <= found["ratio"] <= found["high"]
    assert found["ratio"] > 1.5  # eight products against one: model / other
    memory = found["peak_memory_bytes"]
    assert set(memory) == {"a", "b"}
    assert all(10 << 20 < m < 4 << 30 for m in memory.values())  # of processes of their own


def test_data_give_the_shapes(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "peak_memory", lambda *a: 0)
    np.savez(tmp_path / "d.npz", x=random(6, 3, 256))
    found = bench(models[0], data=str(tmp_path / "d.npz"), batch=4)
    assert found["shapes"] == {"x": [4, 3, 256]}
    assert found["data"] == "d.npz"


@pytest.mark.parametrize(("options", "part"), [
    ({"shapes": {"T": 3}}, "has no dynamic axis 'T'; it has N, S"),
    ({"shapes": {"N": 0}}, "axis 'N' can't have 0 elements"),
    ({"shapes": {"N": 3}, "data": "random"}, "leave it out with --data"),
    ({"threads": -2}, "threads is -2")])
def test_a_call_that_is_wrong(options: dict[str, Any], part: str, models: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match=part):
        bench(models[0], **options)


def test_files_that_are_not_there_or_do_not_fit(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        bench(tmp_path / "no.onnx")
    with pytest.raises(ModelError, match=r"no\.onnx"):
        bench(models[0], tmp_path / "no.onnx")
    with pytest.raises(DataError, match="missing"):
        bench(models[0], data=str(tmp_path / "no.npz"))
    onnx.save(make_model([node("Relu", "z", "y")], {"z": [2]}, {"y": [2]}), tmp_path / "z.onnx")
    with pytest.raises(DataError, match="no input 'x'"):
        bench(models[0], tmp_path / "z.onnx")
