"""A network on color images with small pools, compiled from end to end: what runs, and how far it is from float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random
from lowering_support import HERE, bare

import onnxq
from onnxq.report.report import Report

CALIB = {"x": random(16, 3, 16, 16, seed=5)}


def model() -> onnx.ModelProto:
    """x [N, 3, 16, 16] -> stem -> pool of 2x2 -> Conv -> two padded pools -> Conv and Add of them -> y [N, 16]."""
    nodes = [
        node("Conv", "x w0 b0", "c0", name="stem", pads=[1, 1, 1, 1]), node("Relu", "c0", "r0"),
        node("AveragePool", "r0", "p0", name="apart", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", "p0 w1 b0", "c1", pads=[1, 1, 1, 1]), node("Relu", "c1", "r1"),
        node("AveragePool", "r1", "p1", name="padded", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("AveragePool", "r1", "p2", name="counted", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
        node("Conv", "p1 w2 b0", "c2"), node("Add", "c2 p2", "a"), node("Conv", "a w2", "c3"),
        node("AveragePool", "c3", "g", name="whole", kernel_shape=[8, 8]), node("Flatten", "g", "f"),
        node("Gemm", "f w3", "y"),
    ]
    shapes = {"w0": (16, 3, 3, 3), "w1": (16, 16, 3, 3), "w2": (16, 16, 1, 1), "w3": (16, 16)}
    stored = {k: random(*s, seed=i) / np.sqrt(np.prod(s[1:])).astype(np.float32)
              for i, (k, s) in enumerate(shapes.items())}
    return make_model(nodes, {"x": ["N", 3, 16, 16]}, {"y": ["N", 16]}, {**stored, "b0": random(16, seed=9) * 0.1})


@pytest.fixture(params=["qoperator", "qdq"])
def compiled(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Report]:
    source, output = tmp_path / "model.onnx", tmp_path / "small.onnx"
    onnx.save(model(), source)
    np.savez(tmp_path / "calib.npz", **CALIB)
    report = onnxq.compile(source, output, calib=str(tmp_path / "calib.npz"), format=request.param, measure=False)
    return request.param, output, report


def test_small_pools_run_as_planned(compiled: tuple[str, Path, Report]) -> None:
    fmt, output, report = compiled
    assert report.verdict.failures == []
    rows = {row.name: row for row in report.nodes}
    pools = [rows[name] for name in ("apart", "padded", "counted")]
    assert {(row.lowering, row.reason) for row in pools} == {
        ("QLinearConv", "between int8 operators; over so few elements a Conv of ones is the faster kernel")}
    assert (rows["whole"].lowering, rows["whole"].reason) == ("QLinearAveragePool", "between int8 operators")
    ran = [bare(row.ran_as) for row in (*pools, rows["whole"], rows["stem"])]
    assert ran == [*(["QLinearConv"] * 3 if fmt == "qoperator" else ["QLinearAveragePool"] * 3), "QLinearAveragePool",
                   "QLinearConv"]
    ops = [n.op_type for n in onnx.load(output).graph.node]
    assert ops.count("Where") == (2 if fmt == "qoperator" else 0)
    assert ("Pad" in ops) == (fmt == "qoperator" and bool(HERE.padded_channels))


def test_they_agree_with_their_qdq_form_and_with_float(compiled: tuple[str, Path, Report]) -> None:
    _, _, report = compiled
    assert report.semantic is not None
    for db in (report.semantic.twin_sqnr_db, report.semantic.runtime_sqnr_db):
        assert db is None or db > 40
    assert report.accuracy is not None
    assert (report.accuracy.outputs["y"].sqnr_db or 0) > 25
