"""Quantizers that a run switches on: off they change nothing, on they give what codes leave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from conftest import make_model, node, random

from onnxq.graph import load, save, switched
from onnxq.numerics import affine
from onnxq.numerics.dtypes import UINT8
from onnxq.runtime.session import Session, SessionOptions


def model() -> onnx.ModelProto:
    """Two readers of t, one of them through another tensor, and an output of its own."""
    return make_model([node("MatMul", "x w", "t", name="fc"), node("Relu", "t", "r", name="relu"),
                       node("Add", "t r", "y", name="sum")], {"x": ["rows", 8]}, {"y": None, "t": None},
                      {"w": random(8, 8)})


def test_only_the_named_readers_see_codes(tmp_path: Path) -> None:
    onnx.save(model(), tmp_path / "model.onnx")
    graph = load(tmp_path / "model.onnx")
    names = [n.name for n in graph.nodes]
    probe, switches = switched(graph, {"t": ["relu"], "x": ["fc"]}, np.uint8)
    assert [n.name for n in graph.nodes] == names, "the graph itself stays"
    save(probe, tmp_path / "probe.onnx")
    session, x, w = Session(tmp_path / "probe.onnx", SessionOptions(threads=1)), random(16, 8, seed=1), random(8, 8)
    off = {name: value for one in switches.values() for name, value in one.off(np.uint8).items()}
    t = x @ w
    found = session.run({"x": x, **off})
    np.testing.assert_allclose(found["y"], t + np.maximum(t, 0), rtol=1e-5, atol=1e-5)

    params = affine.choose(-3.0, 2.0, UINT8)
    coarse = affine.dequantize(affine.quantize(t, params), params)
    found = session.run({"x": x, **off, **switches["t"].at(params.scale, params.zero_point)})
    np.testing.assert_allclose(found["t"], t, rtol=1e-5, atol=1e-5)
    # a value beside the middle between two codes may take either, by how the product was summed up
    assert np.mean(np.abs(found["y"] - (t + np.maximum(coarse, 0))) > 1e-4) < 0.02
    assert np.abs(found["y"] - (t + np.maximum(t, 0))).max() > 0.005

    params = affine.choose(-1.0, 1.0, UINT8)
    rough = affine.dequantize(affine.quantize(x, params), params)
    found = session.run({"x": x, **off, **switches["x"].at(params.scale, params.zero_point)})
    np.testing.assert_allclose(found["t"], rough @ w, rtol=1e-5, atol=1e-5)
