"""An exported folder in words."""

from __future__ import annotations

from typing import Any

from onnxq.report import exported


def row(file: str, output: str, error: float | None, tolerance: float) -> dict[str, Any]:
    return {"file": file, "output": output, "error": error, "tolerance": tolerance,
            "ok": error is not None and error <= tolerance}


def test_outputs_by_model_the_worst_first() -> None:
    found = {"bundle": "b", "format": "bundle", "sample": "made at random", "models": [
        row("model.onnx", "fine", 0.1, 1.0), row("model.onnx", "off", 2.0, 1.0), row("model.onnx", "shape", None, 1.0),
        row("model.ort", "exact", 0.0, 0.0)]}
    assert exported.text(found).splitlines() == [
        "b: bundle with the sample made at random",
        "model        output   error                   allowed",
        "model.onnx   shape    another type or shape   1         wrong",
        "model.onnx   off      2                       1         wrong",
        "model.onnx   fine     0.1                     1         ok",
        "model.ort    exact    0                       0         ok"]


def test_of_many_outputs_those_that_are_farthest() -> None:
    models = [row("model.onnx", f"y{k}", k / 100, 1.0) for k in range(20)]
    lines = exported.text({"bundle": "b", "format": "ort", "sample": "s", "models": models}).splitlines()
    assert [line.split()[1] for line in lines[2:-1]] == [f"y{k}" for k in range(19, 11, -1)]
    assert lines[-1] == "12 outputs more, nearer to what is expected"


def test_sizes_and_what_was_measured() -> None:
    found = {"model": "m.onnx", "output": "o", "format": "ort", "sample": "s", "models": [],
             "size": {"model": 2000, "model.ort": 3000}}
    assert exported.text(found).splitlines() == ["m.onnx: ort with the sample s",
                                                 "the model 2.0 kB -> model.ort 3.0 kB"]
    measured = {"accuracy": {"metric": "top1", "compiled": 0.998, "rows": 500, "data": "eval.npz"},
                "latency": {"compiled_ms": 1.5, "speedup": 2.0}}
    lines = exported.text({"bundle": "b", "format": "web", "sample": "s", "models": [], "measured": measured})
    assert lines.splitlines()[1:] == ["top1 was 99.80 % on 500 rows of eval.npz",
                                      "latency was 1.50 ms, 2.00x as fast as float"]
