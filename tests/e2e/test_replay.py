"""A saved Plan makes the same file again, without data; on another model it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random
from lowering_support import MODELS

import onnxq
from onnxq import Plan
from onnxq.errors import UsageError
from onnxq.report.report import Latency


def data(name: str) -> tuple[Path, str]:
    return MODELS / name / "model.onnx", str(MODELS / name / "calib.npz")


@pytest.mark.parametrize("name", ["digits_cnn", "text_encoder", "recurrent"])
@pytest.mark.parametrize("fmt", ["qdq", "qoperator"])
def test_the_same_plan_on_the_same_model_gives_the_same_bytes(name: str, fmt: str, tmp_path: Path) -> None:
    model, calib = data(name)
    onnxq.compile(model, tmp_path / "a.onnx", calib=calib, format=fmt, measure=False, save_plan=tmp_path / "plan")
    report = onnxq.compile(model, tmp_path / "b.onnx", format=fmt, measure=False, plan=tmp_path / "plan")
    assert report.ok
    assert report.scheme == "w8a8"
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    props = {p.key: p.value for p in onnx.load(tmp_path / "b.onnx").metadata_props}
    assert props["onnxq.plan"] == Plan.load(tmp_path / "plan").digest()


def test_what_was_measured_is_not_decided_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first compilation finds int8 slow and goes back; its Plan says so on machines where int8 would pay."""
    from onnxq import verification

    speed = 0.5

    def timed(reference: Path, made: Path, feeds: Any, *args: Any, **more: Any) -> Latency:
        int8 = any(n.op_type == "QLinearConv" for n in onnx.load(made).graph.node)
        return Latency(1.0, 1.0, *(3 * (speed if int8 else 1.0,)), {}, 0, "random inputs")

    monkeypatch.setattr(verification, "latency", timed)
    model, calib = data("digits_cnn")
    first = onnxq.compile(model, tmp_path / "a.onnx", calib=calib, save_plan=tmp_path / "plan")
    assert {n.scheme for n in first.nodes} == {"float", "stored", "folded"}
    speed = 2.0
    onnxq.compile(model, tmp_path / "b.onnx", plan=tmp_path / "plan")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    onnxq.compile(model, tmp_path / "int8.onnx", calib=calib, save_plan=tmp_path / "plan")
    speed = 0.5
    again = onnxq.compile(model, tmp_path / "c.onnx", plan=tmp_path / "plan")
    assert "QLinearConv" in {n.lowering for n in again.nodes}


def test_a_plan_for_another_model_or_scheme_is_refused(tmp_path: Path) -> None:
    model, calib = data("text_encoder")
    for outliers, differ in (("smooth", "'.*' does not read '.*' in this one"), ("none", "the two differ in node")):
        onnxq.compile(model, tmp_path / "a.onnx", calib=calib, measure=False, save_plan=tmp_path / "plan", force=True,
                      outliers=outliers)
        with pytest.raises(UsageError, match=f"made for another model: {differ}"):
            onnxq.compile(data("digits_cnn")[0], tmp_path / "b.onnx", plan=tmp_path / "plan")
    with pytest.raises(UsageError, match="the plan is for scheme w8a8 on cpu, not for w8a8-dynamic"):
        onnxq.compile(model, tmp_path / "b.onnx", scheme="w8a8-dynamic", plan=tmp_path / "plan")
    with pytest.raises(UsageError, match="holds no plan"):
        onnxq.compile(model, tmp_path / "b.onnx", plan=tmp_path / "nowhere")
    assert not (tmp_path / "b.onnx").exists()


def test_a_plan_whose_weights_have_another_shape_is_refused(tmp_path: Path) -> None:
    for name, width in (("a", 32), ("b", 48)):
        model = make_model([node("MatMul", "x w", "y")], {"x": ["n", 32]}, {"y": ["n", width]},
                           {"w": random(32, width)})
        (tmp_path / f"{name}.onnx").write_bytes(model.SerializeToString())
    np.savez(tmp_path / "calib.npz", x=random(64, 32))
    onnxq.compile(tmp_path / "a.onnx", tmp_path / "o.onnx", calib=tmp_path / "calib.npz", measure=False,
                  outliers="none", save_plan=tmp_path / "plan")
    with pytest.raises(UsageError, match="made for another model: the weights 'w'"):
        onnxq.compile(tmp_path / "b.onnx", tmp_path / "q.onnx", plan=tmp_path / "plan", measure=False)


@pytest.mark.parametrize(("scheme", "before", "after"), [("w8a16", "1.20", "1.23"), ("w2a16", "1.22", "1.24"),
                                                         ("w4a16", "1.26", "1.27")])
def test_a_plan_with_kernels_that_a_runtime_lacks_is_refused(scheme: str, before: str, after: str,
                                                             tmp_path: Path) -> None:
    """Look-ups have a kernel from 1.23 on, 2 bits from 1.24 on; rows of 3 blocks have wrong zero points before 1.27."""
    model = MODELS / "text_encoder" / "model.onnx"
    given = {"measure": False, "threads": 1}
    onnxq.compile(model, tmp_path / "a.onnx", scheme=scheme, save_plan=tmp_path / "plan", **given)
    with pytest.raises(UsageError, match=f"with onnxruntime {before}; name a later --runtime, or make a plan"):
        onnxq.compile(model, tmp_path / "b.onnx", plan=tmp_path / "plan", runtime=before, **given)
    onnxq.compile(model, tmp_path / "b.onnx", plan=tmp_path / "plan", runtime=after, **given)
