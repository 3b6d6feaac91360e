"""Layers of w8a8 for which one scale for all rows costs too much: a scale for each row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random

import onnxq
from onnxq.recipe import Escape, Outliers, Recipe
from onnxq.report.report import NodeRow, Report
from onnxq.schemes import scheme

K, N = 48, 32
RECIPE = Recipe(scheme("w8a8"), outliers=Outliers("none"))


def compiled(tmp_path: Path, x: np.ndarray, recipe: Recipe) -> tuple[Report, NodeRow]:
    """A Gemm-like layer, compiled by the tables, and its row."""
    model = make_model([node("MatMul", "x w", "m", name="mix"), node("Add", "m b", "y")], {"x": ["rows", 4, K]},
                       {"y": ["rows", 4, N]}, {"w": random(K, N), "b": random(N)})
    onnx.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", x=x)
    report = onnxq.compile(tmp_path / "model.onnx", tmp_path / "out.onnx", calib=tmp_path / "calib.npz", recipe=recipe,
                           measure=False, force=True)
    assert report.verdict.failures == []
    return report, next(row for row in report.nodes if row.name == "mix")


def rows(spread: float) -> np.ndarray:
    """Rows whose sizes go up to `spread` times the least."""
    sizes = np.geomspace(1, spread, 64 * 4).reshape(64, 4, 1)
    return np.random.default_rng(0).permutation((random(64, 4, K) * sizes).reshape(-1, 4, K)).astype(np.float32)


def test_rows_of_very_different_sizes_get_scales_of_their_own(tmp_path: Path) -> None:
    report, row = compiled(tmp_path, rows(1e5), RECIPE)
    assert "a scale for each row is found at run time" in row.reason
    static, _ = compiled(tmp_path, rows(1e5), replace(RECIPE, escape=Escape(None)))
    (found,), (before,) = (list(r.accuracy.outputs.values()) for r in (report, static) if r.accuracy is not None)
    assert found.cosine > before.cosine


@pytest.mark.parametrize(("spread", "escape"), [(2, Escape()), (1e5, Escape(None)), (1e5, Escape(-10.0)),
                                                (1e5, Escape(20.0, gain=100.0))])
def test_one_scale_stays_where_it_does(spread: float, escape: Escape, tmp_path: Path) -> None:
    _, row = compiled(tmp_path, rows(spread), replace(RECIPE, escape=escape))
    assert "row" not in row.reason
    assert row.scheme == "w8a8"


def test_a_conv_has_no_such_kernel(tmp_path: Path) -> None:
    model = make_model([node("Conv", "x w", "y", name="conv")], {"x": ["rows", 8, 6, 6]}, {"y": None},
                       {"w": random(8, 8, 3, 3)})
    onnx.save(model, tmp_path / "model.onnx")
    x = random(32, 8, 6, 6) * np.geomspace(1, 1e5, 32).reshape(-1, 1, 1, 1)
    np.savez(tmp_path / "calib.npz", x=x.astype(np.float32))
    report = onnxq.compile(tmp_path / "model.onnx", tmp_path / "out.onnx", calib=tmp_path / "calib.npz", recipe=RECIPE,
                           measure=False)
    assert next(row for row in report.nodes if row.name == "conv").ran_as == "com.microsoft.QLinearConv"
