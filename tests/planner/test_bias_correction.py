"""Bias correction takes the mean error out of a layer's output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import make_model, node, random, run

from onnxq import compile
from onnxq.recipe import Calibration, Outliers, Recipe
from onnxq.schemes import scheme


def _model(path: Path) -> Path:
    """Two Convs whose inputs cover a range that rounding to 8 bits shifts: most values sit between two codes."""
    rng = np.random.default_rng(3)
    weights = {"w": rng.normal(size=(24, 16, 1, 1)).astype(np.float32), "b": np.zeros(24, np.float32)}
    model = make_model([node("Conv", "x w b", "y", kernel_shape=[1, 1])],
                       {"x": ["n", 16, 4, 4]}, {"y": ["n", 24, 4, 4]}, weights)
    path.write_bytes(model.SerializeToString())
    return path


def _data(rows: int, seed: int) -> dict[str, np.ndarray]:
    # one far value makes a code 1/25.5 wide; all others stand .4 above a code, so rounding takes .4 of each
    codes = np.random.default_rng(seed).integers(0, 60, (rows, 16, 4, 4))
    x = ((codes + 0.4) / 25.5).astype(np.float32)
    x[:, :, 0, 0] = 10.0
    return {"x": x}


def test_the_mean_of_the_output_comes_back(tmp_path: Path) -> None:
    model = _model(tmp_path / "m.onnx")
    np.savez(tmp_path / "calib.npz", **_data(32, seed=4))
    errors = {}
    for on in (False, True):
        out = tmp_path / f"{on}.onnx"
        # other ranges and codes leave less of that error: they would be chosen by it
        recipe = Recipe(scheme("w8a8"), bias_correction=on, calibration=Calibration(ranges="minmax"),
                        outliers=Outliers("none"), rounding="nearest")
        report = compile(model, out, recipe=recipe, calib=tmp_path / "calib.npz", measure=False)
        assert report.ok, report.verdict.failures
        feed = _data(64, seed=5)
        exact, found = (run(p, feed, optimize=True)["y"] for p in (model, out))
        errors[on] = np.abs((exact - found).mean(axis=(0, 2, 3))).max()
    assert errors[True] < errors[False] / 3


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_rounding_of_stored_weights_is_taken_back_too(op: str, tmp_path: Path) -> None:
    """Weights .4 above a code, and inputs that are never below zero: each output is short by the same amount."""
    codes = np.random.default_rng(1).integers(-60, 60, (16, 16, 3, 3))
    weight = ((codes + 0.4) / 127).astype(np.float32)
    weight[:, :, 0, 0] = 1.0
    source = tmp_path / "m.onnx"
    source.write_bytes(make_model([node(op, "x w b", "y")], {"x": ["n", 16, 8, 8]}, {"y": None},
                                  {"w": weight, "b": np.zeros(16, np.float32)}).SerializeToString())
    feeds = [np.abs(random(32, 16, 8, 8, seed=seed)) for seed in (4, 5)]
    np.savez(tmp_path / "calib.npz", x=feeds[0])
    errors = {}
    for on in (False, True):
        recipe = Recipe(scheme("w8a8-dynamic-tensor"), bias_correction=on)
        report = compile(source, tmp_path / f"{on}.onnx", recipe=recipe, calib=tmp_path / "calib.npz", measure=False)
        assert [n.lowering for n in report.nodes] == ["stored"]
        exact, found = (run(p, {"x": feeds[1]}, optimize=True)["y"] for p in (source, tmp_path / f"{on}.onnx"))
        errors[on] = np.abs((exact - found).mean(axis=(0, 2, 3))).max()
    assert errors[True] < errors[False] / 10
