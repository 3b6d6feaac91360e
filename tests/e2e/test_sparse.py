"""Models compiled with zeros: they are in what is written, in every scheme, and a saved plan brings them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lowering_support import MODELS

import onnxq
from onnxq.errors import UsageError
from onnxq.graph import is_constant, load
from onnxq.report.report import Report

DIGITS = MODELS / "digits_cnn"
SPARED = 2  # of its weights: depthwise filters, and those of the head


def compiled(output: Path, **options: Any) -> Report:
    given = {"calib": str(DIGITS / "calib.npz"), "eval": str(DIGITS / "eval.npz"), "metric": "top1", "measure": False,
             "threads": 1, "sparsity": "50%", "force": True}
    return onnxq.compile(DIGITS / "model.onnx", output, **{**given, **options})


def shares(model: Path) -> dict[str, float]:
    """Stored weight -> its share of zeros."""
    graph = load(model)
    found = {t.name: np.asarray(graph.read(t)) for n in graph.nodes for t in n.inputs if is_constant(t)}
    return {name: float((w == 0).mean()) for name, w in found.items() if w.ndim > 1 and w.size > 64}


@pytest.mark.parametrize("scheme", ["float", "w8a8", "w8a8-dynamic"])
def test_zeros_are_in_the_file_in_every_scheme(tmp_path: Path, scheme: str) -> None:
    report = compiled(tmp_path / "out.onnx", scheme=scheme)
    assert report.ok
    assert report.pruned
    assert all(abs(row.zeros - 0.5) < 0.01 and row.error is not None for row in report.pruned)
    found = shares(tmp_path / "out.onnx")
    assert sum(share >= 0.49 for share in found.values()) == len(report.pruned)
    assert sum(share < 0.2 for share in found.values()) == SPARED
    assert any("save bytes once they are packed" in said for said in report.verdict.notices)
    assert not list(tmp_path.glob("*.partial"))


def test_making_up_for_zeros_keeps_accuracy_where_dropping_weights_does_not(tmp_path: Path) -> None:
    drops = {}
    for method in ("sparsegpt", "magnitude"):
        accuracy = compiled(tmp_path / "out.onnx", scheme="w8a8", prune=method, sparsity="70%").accuracy
        assert accuracy is not None
        drops[method] = accuracy.outputs[next(iter(accuracy.outputs))].sqnr_db
    assert drops["sparsegpt"] > drops["magnitude"] + 3


def test_a_saved_plan_brings_the_same_bytes_without_data(tmp_path: Path) -> None:
    compiled(tmp_path / "a.onnx", scheme="w8a8", save_plan=tmp_path / "plan")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("scheme: w8a8\nsparsity: {share: 50%}\nbudget: {metric: top1}\n")
    report = onnxq.compile(DIGITS / "model.onnx", tmp_path / "b.onnx", recipe=recipe, plan=tmp_path / "plan",
                           eval=str(DIGITS / "eval.npz"), measure=False, threads=1)
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "a.onnx").read_bytes()
    assert {row.method for row in report.pruned} == {"saved plan"}


def test_methods_that_need_data_say_so(tmp_path: Path) -> None:
    for options in ({}, {"prune": "wanda"}):
        with pytest.raises(UsageError, match="give --calib DATA, or take the smallest weights with --prune magnitude"):
            compiled(tmp_path / "out.onnx", scheme="float", calib=None, **options)
    report = compiled(tmp_path / "out.onnx", scheme="float", calib=None, prune="magnitude")
    assert {row.method for row in report.pruned} == {"magnitude"}
    assert json.loads(report.to_json())["pruned"][0]["error"] is None
