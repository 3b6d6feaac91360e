"""sweep(): each row is what compiling with that format gives, and the weights' error is the one of those codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random

import onnxq
from onnxq import sweep as module
from onnxq.errors import DataError, ModelError, RecipeError, UsageError
from onnxq.numerics import affine, blocks
from onnxq.numerics.dtypes import by_name
from onnxq.recipe import Recipe
from onnxq.schemes import in_blocks, scheme
from onnxq.sweep import read, sweep

WEIGHTS = {"a": random(64, 96), "d": random(96, 64)}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asserts a time."""
    monkeypatch.setattr(module, "BLOCK_SECONDS", 0.01)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(make_model([node("MatMul", "x a", "b", name="first"), node("Tanh", "b", "c"),
                          node("MatMul", "c d", "y", name="second")], {"x": ["n", 64]}, {"y": None}, WEIGHTS),
              tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=random(24, 64, seed=2))
    return tmp_path / "m.onnx"


def weight_error(dtype: str, size: int) -> float:
    error = power = 0.0
    for w in WEIGHTS.values():
        params = blocks.choose(w, by_name(dtype), size, by_name(dtype).signed)
        error += float(np.square(affine.dequantize(affine.quantize(w, params), params).astype(np.float64) - w).sum())
        power += float(np.square(w.astype(np.float64)).sum())
    return float(np.sqrt(error / power))


def test_rows_are_what_compiling_gives(model: Path, tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    data = str(tmp_path / "data.npz")
    found = sweep(model, vary={"group_size": [16, 64], "bits": [4, 8]}, eval=data, heard=heard.append, threads=1)
    assert heard == found["rows"]
    assert [(row["group_size"], row["bits"]) for row in heard] == [(16, 4), (16, 8), (64, 4), (64, 8)]
    assert found["float"] == {"bytes": model.stat().st_size, "metric": None}
    for row in heard:
        own = in_blocks(scheme("w4a16" if row["bits"] == 4 else "w8a16"), row["group_size"], False)
        report = onnxq.compile(model, tmp_path / "o.onnx", recipe=Recipe(own), eval=data, measure=False, force=True,
                               threads=1)
        assert report.accuracy is not None
        # beside the codes the file holds the recipe, whose name and summary are another's
        assert row["bytes"] == pytest.approx((tmp_path / "o.onnx").stat().st_size, abs=100)
        assert row["sqnr_db"] == pytest.approx(report.accuracy.outputs["y"].sqnr_db, rel=1e-6)
        assert row["weight_error"] == pytest.approx(weight_error(f"uint{row['bits']}", row["group_size"]), rel=1e-5)
        assert row["metric"] is None
        assert [one["compiled_ms"] > 0 for one in row["latency"]] == [True]
    assert found["feeds"] == [{"x": [8, 64]}]
    assert found["notices"] == []


def test_calibration_data_round_and_judge(model: Path, tmp_path: Path) -> None:
    data = str(tmp_path / "data.npz")
    [row] = sweep(model, vary={"group_size": [64]}, calib=data, samples=16)["rows"]
    report = onnxq.compile(model, tmp_path / "o.onnx", scheme="w4a16", group_size=64, calib=data, samples=16,
                           measure=False)
    assert report.accuracy is not None
    assert row["sqnr_db"] == pytest.approx(report.accuracy.outputs["y"].sqnr_db, rel=1e-6)
    assert row["weight_error"] >= 0.999 * weight_error("uint4", 64)  # data never bring codes nearer than the nearest


def test_without_data_all_group_sizes_are_timed(model: Path) -> None:
    found = sweep(model, shapes={"n": [1, 3]})
    assert [row["group_size"] for row in found["rows"]] == [16, 32, 64, 128, 256]
    assert found["feeds"] == [{"x": [1, 64]}, {"x": [3, 64]}]
    assert {len(row["latency"]) for row in found["rows"]} == {2}
    assert {row["sqnr_db"] for row in found["rows"]} == {None}
    assert ["--eval DATA" in said for said in found["notices"]] == [True]
    assert [row["weight_error"] for row in found["rows"]] == sorted(row["weight_error"] for row in found["rows"])


def test_searches_and_signs_vary(model: Path) -> None:
    found = sweep(model, vary={"search": ["absmax", "mse"], "symmetric": [True, False]})
    errors = {(row["search"], row["symmetric"]): row["weight_error"] for row in found["rows"]}
    assert errors["absmax", False] == pytest.approx(weight_error("uint4", 32), rel=1e-5)
    assert errors["absmax", True] == pytest.approx(weight_error("int4", 32), rel=1e-5)
    assert all(errors["mse", sign] < errors["absmax", sign] for sign in (True, False))


def test_a_metric_is_that_of_the_data(model: Path, tmp_path: Path) -> None:
    x = random(24, 64, seed=2).astype(np.float64)
    labels = np.argmax(np.tanh(x @ WEIGHTS["a"]) @ WEIGHTS["d"], axis=1)
    np.savez(tmp_path / "labelled.npz", x=x.astype(np.float32), labels=labels)
    found = sweep(model, vary={"bits": [2, 8]}, eval=str(tmp_path / "labelled.npz"), metric="top1")
    assert found["float"]["metric"] == 1.0
    two, eight = (row["metric"] for row in found["rows"])
    assert two < eight <= 1.0


def test_sizes_that_do_not_go_together_are_left_out(tmp_path: Path) -> None:
    onnx.save(make_model([node("MatMul", "x a", "b", name="first"), node("Mul", "b z", "y")],
                         {"x": ["n", 64], "z": ["m", 96]}, {"y": None}, {"a": WEIGHTS["a"]}), tmp_path / "m.onnx")
    found = sweep(tmp_path / "m.onnx", vary={"bits": [4]}, shapes={"n": [2, 3], "m": [2, 3]})
    assert [feed["x"][0] for feed in found["feeds"]] == [2, 3]
    assert any("2 of 4 combinations of sizes are left out" in said for said in found["notices"])
    with pytest.raises(ModelError, match="sizes"):
        sweep(tmp_path / "m.onnx", vary={"bits": [4]}, shapes={"n": [2], "m": [3]})


def test_targets_of_fixed_sizes_get_those_that_are_given(model: Path) -> None:
    found = sweep(model, vary={"group_size": [32]}, shapes={"n": 4}, target="ascend", threads=1)
    assert [feed["x"] for feed in found["feeds"]] == [[4, 64]]
    assert "this machine is not ascend: times and kernels are those of the CPU provider here" in found["notices"]
    with pytest.raises(UsageError, match="--shape n=N"):
        sweep(model, vary={"group_size": [32]}, shapes={"n": [4, 8]}, target="ascend", threads=1)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"vary": {"colour": ["red"]}}, UsageError, "--vary colour is not known; vary group_size, bits, symmetric, search"),
    ({"vary": {"group_size": [48]}}, UsageError, "--vary group_size=48 has no kernel here; use some of group_size="),
    ({"vary": {"bits": []}}, UsageError, "--vary bits="), ({"vary": {"bits": [True]}}, UsageError, "bits=True"),
    ({"vary": {"symmetric": [1]}}, UsageError, "symmetric=true,false"),
    ({"scheme": "w8a8"}, UsageError, "scheme w8a8 does not have"), ({"metric": "top1"}, UsageError, "--eval DATA"),
    ({"scheme": "w4a15"}, UsageError, "there is no scheme"),
    ({"shapes": {"m": [2]}}, UsageError, "no dynamic axis 'm'"),
    ({"eval": "missing.npz"}, DataError, "missing.npz")])
def test_what_cannot_be_is_refused_before_the_work(model: Path, options: dict[str, Any], error: type[Exception],
                                                   message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*args: Any, **given: Any) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(module, "compile", nothing)
    with pytest.raises(error, match=message):
        sweep(model, **options)
    assert issubclass(RecipeError, UsageError)


def test_texts_of_a_command_line() -> None:
    assert read({"bits": ["2", "8"], "symmetric": ["true", "False"], "search": ["mse"]}) == {
        "bits": [2, 8], "symmetric": [True, False], "search": ["mse"]}


def test_progress_has_a_stage_for_each_combination(model: Path) -> None:
    class Heard:
        def __init__(self) -> None:
            self.stages: list[str] = []
            self.steps: list[tuple[Callable[..., None], int]] = []

        def stage(self, name: str) -> None:
            self.stages.append(name)

        def total(self, steps: int | None) -> None:
            assert steps is None or steps >= 0

        def step(self, done: int) -> None:
            assert done >= 0

    heard = Heard()
    sweep(model, vary={"group_size": [32, 64], "symmetric": [True]}, progress=heard)
    assert heard.stages == ["load", "group size 32, symmetric (1 of 2)", "group size 64, symmetric (2 of 2)"]
