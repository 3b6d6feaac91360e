"""What Ascend's tools take, made of pairs of Q and DQ."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_model, node, random, run
from onnx import TensorProto

from onnxq.graph import save
from onnxq.passes.ascend import AscendOperators, OneScale, as_standard, deploy, for_amct
from onnxq.passes.manager import Context, PassManager

X_SCALE = np.float32(0.031)


def codes(*shape, seed=0):
    return np.random.default_rng(seed).integers(-127, 128, shape).astype(np.int8)


def layer(op, *, per_channel=True, bias=True, zero=0, **attrs):
    """x -> Q -> DQ -> op(DQ(w), DQ(bias)) -> y, all of it int8 around 0; a MatMul's bias is added."""
    conv = op == "Conv"
    shape, channels = ((5, 3, 3, 3), 5) if conv else ((8, 6), 6)
    axis = 0 if conv else 1
    scale = (np.linspace(.002, .01, channels) if per_channel else np.asarray(.004)).astype(np.float32)
    stored = {"xs": X_SCALE, "xz": np.int8(zero), "w": codes(*shape), "ws": scale,
              "wz": np.zeros(scale.shape, np.int8)}
    nodes = [node("QuantizeLinear", "x xs xz", "q"), node("DequantizeLinear", "q xs xz", "d"),
             node("DequantizeLinear", "w ws wz", "wd", **({"axis": axis} if per_channel else {}))]
    if bias:
        stored |= {"b": np.arange(channels, dtype=np.int32) * 100 - 150, "bs": (X_SCALE * scale).astype(np.float32)}
        nodes.append(node("DequantizeLinear", "b bs", "bd", **({"axis": 0} if per_channel else {})))
    if op == "MatMul" and bias:
        nodes += [node("MatMul", "d wd", "m"), node("Add", "bd m", "y")]
    else:
        nodes.append(node(op, f"d wd{' bd' if bias else ''}", "y", **attrs))
    ports = ({"x": [2, 3, 6, 6]}, {"y": [2, 5, *((4, 4) if not attrs.get("pads") else (6, 6))]}) if conv else (
        {"x": [4, 8]}, {"y": [4, 6]})
    return make_model(nodes, *ports, stored)


def fed(op):
    return {"x": random(2, 3, 6, 6) * 2 if op == "Conv" else random(4, 8) * 2}


CASES = [("Conv", {}), ("Conv", {"bias": False}), ("Conv", {"per_channel": False}), ("Conv", {"pads": [1, 1, 1, 1]}),
         ("Gemm", {}), ("Gemm", {"bias": False}), ("MatMul", {}), ("MatMul", {"bias": False}),
         ("MatMul", {"per_channel": False})]


def rewritten(opened, model, passes):
    graph, context = opened(model), Context()
    PassManager(passes).run(graph, context)
    return graph, context


@pytest.mark.parametrize(("op", "options"), CASES)
def test_a_deploy_graph_computes_what_its_pairs_do(opened, tmp_path, op, options):
    """By its operators' contracts, which the check writes out anew from the deploy graph alone."""
    model = layer(op, **options)
    graph, context = rewritten(opened, model, deploy())
    assert context.skips == []
    kinds = [n.op for n in graph.nodes]
    added = ["Add"] if op == "MatMul" and options.get("bias", True) else []
    assert kinds == ["AscendQuant", op, *added, "AscendDequant"]
    PassManager(as_standard()).run(graph, Context())
    save(graph, tmp_path / "standard.onnx")
    wanted = run(model, fed(op))["y"]
    # sums of int32 are exact; x * (1 / scale) may round to the neighbour of x / scale where it lies between two codes
    np.testing.assert_allclose(run(tmp_path / "standard.onnx", fed(op))["y"], wanted, rtol=0, atol=2e-6 * np.abs(
        wanted).max())


def test_a_conv_whose_result_has_no_known_shape_is_checked_as_well(opened, tmp_path):
    """An output may be declared without one; the rank is that of the weights."""
    model = layer("Conv")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    wanted = run(model, fed("Conv"))["y"]
    save(rewritten(opened, model, [*deploy(), *as_standard()])[0], tmp_path / "standard.onnx")
    assert np.allclose(run(tmp_path / "standard.onnx", fed("Conv"))["y"], wanted, rtol=1e-5, atol=1e-5)


def test_operators_have_the_attributes_and_types_of_the_parser(opened):
    graph, _ = rewritten(opened, layer("Conv"), deploy())
    quant, conv, dequant = graph.nodes
    assert quant.attrs == {"scale": pytest.approx(1 / X_SCALE), "offset": 0.0, "round_mode": "Round", "sqrt_mode": 0,
                           "dst_type": "INT8"}
    assert [graph.read(t).dtype for t in conv.inputs[1:]] == [np.int8, np.int32]
    scales = graph.read(dequant.inputs[1])
    assert scales.dtype == np.uint64
    assert scales.shape == (5,)
    wanted = (X_SCALE * np.linspace(.002, .01, 5).astype(np.float32)).astype(np.float32)
    np.testing.assert_array_equal(scales.astype(np.uint32).view(np.float32), wanted)
    assert not (scales >> np.uint64(32)).any()


def test_what_several_layers_read_is_quantized_once(opened):
    model = layer("MatMul", bias=False)
    model.graph.node.append(node("MatMul", "d wd", "z"))
    model.graph.output.append(make_model([], {}, {"z": [4, 6]}).graph.output[0])
    graph, _ = rewritten(opened, model, deploy())
    assert sorted(n.op for n in graph.nodes) == ["AscendDequant"] * 2 + ["AscendQuant"] + ["MatMul"] * 2


@pytest.mark.parametrize(("options", "why"), [
    ({"zero": 3}, "not int8 around 0"), ({"transB": 1}, "transposed"), ({"alpha": 2.0}, "scales its product")])
def test_what_the_device_would_compute_otherwise_is_left_with_its_reason(opened, options, why):
    given = {k: v for k, v in options.items() if k != "zero"}
    model = layer("Gemm", zero=options.get("zero", 0), bias=False, **given)
    if "transB" in given:
        for tensor in model.graph.initializer:
            if tensor.name == "w":
                tensor.CopyFrom(make_model([], {}, {}, {"w": codes(6, 8)}).graph.initializer[0])
        next(n for n in model.graph.node if n.output[0] == "wd").attribute[0].i = 0
    graph, context = rewritten(opened, model, deploy())
    assert why in context.skips[0].reason
    assert "AscendQuant" not in [n.op for n in graph.nodes]


def test_a_float_bias_is_no_int32_one(opened):
    model = layer("Gemm", bias=False)
    model.graph.node[-1].input.append("f")
    model.graph.initializer.append(make_model([], {}, {}, {"f": random(6)}).graph.initializer[0])
    _, context = rewritten(opened, model, deploy())
    assert [s.reason for s in context.skips] == ["its bias is not int32 of the products' scale"]


def test_deploying_twice_edits_nothing(opened):
    graph, _ = rewritten(opened, layer("MatMul"), deploy())
    assert AscendOperators().run(graph, Context()) is False


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_amct_gets_one_scale_for_matrices(opened, tmp_path, op):
    model = layer(op)
    graph, _ = rewritten(opened, model, for_amct())
    save(graph, tmp_path / "amct.onnx")
    pairs = [n for n in graph.nodes if n.op == "DequantizeLinear"]
    assert all(np.asarray(graph.read(n.inputs[1])).shape == () for n in pairs)
    assert TensorProto.INT32 not in [t.data_type for t in model.graph.initializer] or not any(
        n.inputs[0].dtype == np.int32 for n in pairs)
    wanted, found = run(model, fed(op))["y"], run(tmp_path / "amct.onnx", fed(op))["y"]
    step = 127 * .01 / 127 / 2  # half of the one scale, for each of 8 products with |x| of at most 127 X_SCALE
    assert np.abs(found - wanted).max() <= 8 * step * 127 * X_SCALE
    assert OneScale().run(graph, Context()) is False


def test_amct_keeps_the_scales_of_a_conv(opened):
    graph, _ = rewritten(opened, layer("Conv"), for_amct())
    [weight] = [n for n in graph.nodes if n.op == "DequantizeLinear" and n.outputs[0].name == "wd"]
    assert np.asarray(graph.read(weight.inputs[1])).shape == (5,)
