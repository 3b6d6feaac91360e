"""Linear layers with a scale per row, against numpy and against float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import make_model, node, random, run
from lowering_support import weight_scales

from onnxq import compile


def _model(path: Path, opset: int, op: str = "MatMul") -> Path:
    weights = {"w": random(32, 48), "b": random(48)}
    nodes = ([node("Gemm", "x w b", "y")] if op == "Gemm" else
             [node("MatMul", "x w", "t"), node("Add", "t b", "y")] if op == "MatMul" else [node("MatMul", "x w", "y")])
    rows = ["n", 32] if op == "Gemm" else ["n", "s", 32]
    model = make_model(nodes, {"x": rows}, {"y": [*rows[:-1], 48]}, weights, opset=opset)
    path.write_bytes(model.SerializeToString())
    return path


def _rows(op: str) -> np.ndarray:
    x = random(3, 5, 32, seed=1)
    x *= np.logspace(-3, 2, 15).reshape(3, 5, 1).astype(np.float32)  # one scale for all would drown the small rows
    x[0, 1] += 40.0  # a row far from 0
    x[0, 2] = 7.0  # a constant row
    x[0, 3] = 0.0
    return x.reshape(-1, 32) if op == "Gemm" else x


def _expected(x: np.ndarray, w: np.ndarray, b: np.ndarray | float) -> np.ndarray:
    """The formula, in float64, on int8 weights with a scale per column."""
    scale = weight_scales(w.T.astype(np.float32)).astype(np.float64)
    codes_w = np.clip(np.rint(w / scale), -127, 127)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    step = np.maximum((high - low) / 255, 1e-30)
    codes = np.clip(np.rint((x - low) / step), 0, 255)
    return step * (codes @ codes_w) * scale + low * (codes_w * scale).sum(axis=0) + b


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("form", ["qoperator", "qdq"])
@pytest.mark.parametrize("op", ["MatMul", "Gemm", "bare"])
def test_rows_have_scales_of_their_own(tmp_path: Path, op: str, form: str, opset: int) -> None:
    model, out = _model(tmp_path / "m.onnx", opset, op), tmp_path / "q.onnx"
    report = compile(model, out, scheme="w8a8-dynamic", format=form, measure=False)
    assert report.ok, report.verdict.failures
    quantized = [n for n in report.nodes if n.scheme == "w8a8-dynamic"]
    assert {n.op for n in quantized} == ({"MatMul", "Add"} if op == "MatMul" else {"MatMul" if op == "bare" else op})
    kernel = "MatMulIntegerToFloat" if form == "qoperator" else "MatMulInteger"
    assert all(n.ran_as.removeprefix("com.microsoft.").startswith(kernel) for n in quantized)
    x = _rows(op)
    found = run(out, {"x": x}, optimize=True)["y"]
    wanted = _expected(x.astype(np.float64), random(32, 48).astype(np.float64),
                       0.0 if op == "bare" else random(48).astype(np.float64))
    # float32 arithmetic, and a rounding tie here and there: one code times the largest weight of a row
    step = (x.max(-1, keepdims=True) - x.min(-1, keepdims=True)) / 255
    bound = step * np.abs(random(32, 48)).max() + 1e-4 * np.abs(x).max(-1, keepdims=True) + 1e-5
    assert (np.abs(found - wanted) <= bound).all()


def test_small_rows_keep_their_accuracy_where_one_scale_loses_them(tmp_path: Path) -> None:
    model, x = _model(tmp_path / "m.onnx", 17), _rows("MatMul")
    exact = run(model, {"x": x})["y"] - random(48)
    errors = {}
    for scheme in ("w8a8-dynamic", "w8a8-dynamic-tensor"):
        compile(model, tmp_path / f"{scheme}.onnx", scheme=scheme, measure=False)
        found = run(tmp_path / f"{scheme}.onnx", {"x": x})["y"] - random(48)
        errors[scheme] = np.abs(found - exact)[1, 0].max() / np.abs(exact[1, 0]).max()
    assert errors["w8a8-dynamic"] < 0.02
    assert errors["w8a8-dynamic-tensor"] > 0.1
