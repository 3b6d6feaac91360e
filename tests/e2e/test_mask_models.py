"""Masks of whole models: the same results, decided once, and taken back where it is slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import assert_same, run
from lowering_support import MODELS
from masking_support import canonical, feed, model, planned, rewritten

import onnxq
from onnxq import settling, verification
from onnxq.errors import UsageError
from onnxq.plan import FLOORED, ROW_FLOORED, Plan
from onnxq.planner.rewriting import Kept
from onnxq.report.report import Latency

TOLERANCE = 1e-5  # of the largest output: 1e-6 per Softmax, and float32 sums in another order


def rows(name: str, data: str, count: int = 8) -> dict[str, Any]:
    with np.load(MODELS / name / f"{data}.npz") as z:
        return {k: z[k][:count] for k in z.files if k != "labels"}


@pytest.mark.parametrize("name", ["text_encoder", "decoder"])
@pytest.mark.parametrize("floors", ["", FLOORED, ROW_FLOORED])
def test_outputs_stay(name: str, floors: str, tmp_path: Path) -> None:
    source = onnx.load(MODELS / name / "model.onnx")
    graph = canonical(source, tmp_path)
    plan, _ = planned(graph, [rows(name, "calib", 32)], floors)
    assert plan.changes or not floors
    path, skips, again = rewritten(graph, plan, tmp_path)
    assert (skips, again) == ([], False)
    fed = rows(name, "eval")
    assert_same(run(path, fed), run(source, fed), TOLERANCE)


def test_the_encoder_adds_its_masks(tmp_path: Path) -> None:
    calib, source = str(MODELS / "text_encoder" / "calib.npz"), MODELS / "text_encoder" / "model.onnx"
    report = onnxq.compile(source, tmp_path / "a.onnx", calib=calib, measure=False)
    assert report.ok
    ran = {n.name: n.ran_as for n in report.nodes if n.op == "Where"}
    assert ran == {"node_masked_fill": "Add", "node_masked_fill_1": "Add"}
    assert sum(n.op_type == "Where" for n in onnx.load(tmp_path / "a.onnx").graph.node) == 1
    assert any("masks of attention scores: 2 are added" in note for note in report.verdict.notices)
    onnxq.compile(tmp_path / "a.onnx", tmp_path / "b.onnx", calib=calib, measure=False, save_plan=tmp_path / "plan")
    again = Plan.load(tmp_path / "plan")
    assert (again.added, again.maskings) == ({}, {})


@pytest.fixture
def attention(tmp_path: Path) -> tuple[Path, str]:
    """A model in which nothing but a mask is to be changed, and its data."""
    onnx.save(model("where", -1e9), tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", **feed(4.0))
    return tmp_path / "model.onnx", str(tmp_path / "calib.npz")


@pytest.mark.parametrize("speed", [0.5, 2.0])
def test_a_rewrite_that_is_slower_goes_back(speed: float, attention: tuple[Path, str], tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(reference: Path, made: Path, *args: Any, **more: Any) -> Latency:
        selects = any(n.op_type == "Softmax" and "x" in n.input for n in onnx.load(made).graph.node) and not any(
            n.op_type == "ReduceMax" for n in onnx.load(made).graph.node)
        return Latency(1.0, 1.0, *(3 * (1.0 if selects else speed,)), {}, 0, "calib.npz")

    monkeypatch.setattr(verification, "latency", timed)
    monkeypatch.setattr(settling, "keep_faster", lambda *_: Kept(rewritten=True))  # by itself it looked fast
    source, calib = attention
    report = onnxq.compile(source, tmp_path / "out.onnx", calib=calib)
    assert report.ok
    operators = [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node]
    assert ("Max" in operators) is (speed > 1.0)
    told = any("the model is left as it came: rewritten it ran at 0.50x" in note for note in report.verdict.notices)
    assert told is (speed < 1.0)
    assert any("nothing in this model can be quantized" in note for note in report.verdict.notices)


def test_a_plan_of_masks_is_replayed(attention: tuple[Path, str], tmp_path: Path) -> None:
    source, calib = attention
    for scheme in ("w8a8", "w8a8-dynamic"):
        onnxq.compile(source, tmp_path / "a.onnx", scheme=scheme, calib=calib, measure=False, force=True,
                      save_plan=tmp_path / "plan")
        onnxq.compile(source, tmp_path / "b.onnx", plan=tmp_path / "plan", measure=False, force=True)
        assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
        plan = Plan.load(tmp_path / "plan")
        assert plan.added
        assert plan.maskings
    plan.maskings["elsewhere"] = plan.maskings.popitem()[1]
    with pytest.raises(UsageError, match="the two differ in node 'elsewhere'"):
        onnxq.compile(source, tmp_path / "c.onnx", plan=plan, measure=False)
