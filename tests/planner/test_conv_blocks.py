"""Filters of a Conv in blocks: decoded as the model is loaded, rounded by the patches that they read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Opener, make_model, node, random, run
from lowering_support import CPU, MODELS, canonical, described, recipe

import onnxq
from onnxq import Plan
from onnxq.planner.outline import Outline, outline

CNN = MODELS / "digits_cnn"


def conv(filters: int = 24, channels: int = 6, groups: int = 1) -> onnx.ModelProto:
    weights = {"w": random(filters, channels // groups, 3, 3), "b": random(filters)}
    return make_model([node("Conv", "x w b", "y", name="conv", group=groups, pads=[1, 1, 1, 1])],
                      {"x": ["n", channels, 8, 8]}, {"y": ["n", filters, 8, 8]}, weights)


def outlined(opened: Opener, model: onnx.ModelProto, name: str = "w4a16") -> Outline:
    return outline(canonical(opened(model)), recipe(name), CPU)


@pytest.mark.parametrize(("name", "form"), [("w4a16", "uint4 weights in blocks of 32"), ("w4a8", "uint4"),
                                            ("w8a16", "int8 weights in blocks of 128")])
def test_filters_are_decoded_at_load(opened: Opener, name: str, form: str) -> None:
    found = outlined(opened, conv(), name)
    assert described(found.nodes["conv"]).startswith(f"stored: {form}")
    assert found.nodes["conv"].reason.endswith(
        "its weights are decoded as the model is loaded and multiplied in float: cpu has no kernel for such weights of "
        "a Conv")
    assert list(found.formats) == ["w"]


def test_short_and_small_filters_have_no_blocks(opened: Opener) -> None:
    """A depthwise filter of 9 weights, and fewer than 1024 in all."""
    depthwise = outlined(opened, conv(128, 128, 128))
    assert depthwise.formats == {}
    assert described(depthwise.nodes["conv"]).startswith("stored: weights stored as int8")
    assert outlined(opened, conv(16)).formats == {}


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w2a16"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_file_decodes_to_the_codes(tmp_path: Path, scheme: str, groups: int) -> None:
    """54 or 27 weights to a filter: the last block is short."""
    onnx.save(conv(channels=6, filters=48, groups=groups), tmp_path / "m.onnx")
    report = onnxq.compile(tmp_path / "m.onnx", tmp_path / "q.onnx", scheme=scheme, measure=False,
                           save_plan=tmp_path / "plan")
    assert report.ok, report.verdict.failures
    plan = Plan.load(tmp_path / "plan")
    params, codes = plan.weights["w"], plan.rounded["w"]
    assert params.axis == 1
    spread = [np.repeat(p.astype(np.float32), params.block_size or 0, axis=1)[:, : codes.shape[1]]
              for p in (params.scale, params.zero_point)]
    w = ((codes.astype(np.float32) - spread[1]) * spread[0]).reshape(48, 6 // groups, 3, 3)
    exact = conv(channels=6, filters=48, groups=groups)
    del exact.graph.initializer[:]
    exact.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in (("w", w), ("b", random(48))))
    x = random(2, 6, 8, 8, seed=4)
    for optimize in (False, True):
        np.testing.assert_allclose(run(tmp_path / "q.onnx", {"x": x}, optimize)["y"], run(exact, {"x": x})["y"],
                                   rtol=0, atol=1e-5)
    assert report.tensors["w"].block_size == params.block_size


def test_data_bring_it_nearer_to_float(tmp_path: Path) -> None:
    found = {}
    for name, data in (("plain", {}), ("seen", {"calib": str(CNN / "calib.npz")})):
        report = onnxq.compile(CNN / "model.onnx", tmp_path / f"{name}.onnx", scheme="w4a16", measure=False,
                               eval=str(CNN / "eval.npz"), **data)
        assert report.ok, report.verdict.failures
        assert report.accuracy is not None
        [found[name]] = [one.sqnr_db for one in report.accuracy.outputs.values()]
        assert report.size is not None
        assert report.size.ratio < 0.3
    assert found["seen"] > found["plain"] + 3


def test_a_compiled_model_compiles_to_itself(tmp_path: Path) -> None:
    onnxq.compile(CNN / "model.onnx", tmp_path / "a.onnx", scheme="w4a16", measure=False)
    onnxq.compile(tmp_path / "a.onnx", tmp_path / "b.onnx", scheme="w4a16", measure=False)
    stored = [{t.name: t.SerializeToString() for t in onnx.load(tmp_path / f"{name}.onnx").graph.initializer}
              for name in "ab"]
    assert stored[0] == stored[1]
