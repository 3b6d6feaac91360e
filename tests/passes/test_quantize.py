"""From the Plan's scales to Q/DQ pairs: where they stand, what they hold, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, apply, make_model, node, random, text
from lowering_support import (
    BOTH_FORMATS,
    CPU,
    NETWORK_FEEDS,
    Array,
    Made,
    canonical,
    make,
    network,
    recipe,
    weight_scales,
)
from onnx import numpy_helper

from onnxq.graph import Graph
from onnxq.passes.lower import lower
from onnxq.passes.manager import Context, PassManager
from onnxq.passes.quantize import quantize
from onnxq.passes.quantize.activations import QuantizeActivations
from onnxq.planner.outline import outline
from onnxq.planner.scales import finish

ROWS = {"x": [4, 32]}
W = {"w": random(32, 32), "v": random(32, 32, seed=1), "b": random(32, seed=2)}
FEED = {"x": random(4, 32, seed=3)}


def pairs(path: Path) -> list[tuple[onnx.NodeProto, Array, Array]]:
    """(node, scale, zero point) of each Q and DQ in a file."""
    model = onnx.load(path)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return [(n, stored[n.input[1]], stored.get(n.input[2]) if len(n.input) > 2 else None)
            for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]


def nodes(path: Path) -> dict[str, onnx.NodeProto]:
    return {n.name: n for n in onnx.load(path).graph.node}


# ------------------------------------------------------------------ scales and types


def test_every_pair_is_in_the_form_that_the_runtime_fuses(tmp_path: Path) -> None:
    made = make(network(), tmp_path, NETWORK_FEEDS, "qdq")
    stored = made.initializers()
    seen = set()
    for item, scale, zero in pairs(made.twin):
        codes = stored.get(item.input[0])
        kind = "activation" if codes is None else str(codes.dtype)
        seen.add(kind)
        assert scale.dtype == np.float32
        if kind == "activation":
            assert (scale.shape, zero.shape, zero.dtype) == ((), (), np.uint8)
        elif kind == "int8":
            axis = next(a.i for a in item.attribute if a.name == "axis")
            channels = codes.shape[axis]
            assert axis == (0 if codes.ndim == 4 else 1)
            assert (scale.shape, zero.shape, zero.dtype) == ((channels,), (channels,), np.int8)
            assert not zero.any()
            assert np.abs(codes.astype(int)).max() <= 127
        else:
            assert (kind, codes.shape) == ("int32", scale.shape)
            assert zero is None  # none is 0
    assert seen == {"activation", "int8", "int32"}


def test_a_bias_has_the_scale_of_the_products(tmp_path: Path) -> None:
    made = make(network(), tmp_path, NETWORK_FEEDS, "qdq")
    stored, biases = made.initializers(made.twin), onnx.load(made.source)
    floats = {t.name: numpy_helper.to_array(t) for t in biases.graph.initializer}
    for name, bias in (("Conv_c0", "b0"), ("Conv_c5", "b5"), ("Gemm_h", "b6"), ("MatMul_m", "b7")):
        plan = made.plan.nodes[name]
        x = next(n for n in biases.graph.node if n.name == name).input[0]
        scale = made.plan.activations[x].scale * stored[f"{plan.weight}.scale"]
        np.testing.assert_array_equal(stored[f"{name}.bias.scale"], scale)
        np.testing.assert_array_equal(stored[f"{name}.bias.q"], np.rint(floats[bias].astype(np.float64) / scale))


def test_data_movement_keeps_scale_and_zero_point(tmp_path: Path) -> None:
    made = make(network(), tmp_path, NETWORK_FEEDS, "qdq")
    for name, source in (("p", "r1"), ("t", "p"), ("s", "g"), ("u", "g"), ("rs", "g"), ("f", "g")):
        assert made.plan.activations[name] is made.plan.activations[source]


@pytest.mark.parametrize("channel", [0, 31])
def test_an_all_zero_channel_stays_zero(channel: int, tmp_path: Path) -> None:
    weight = W["w"].copy()
    weight[:, channel] = 0
    made = make(make_model([node("MatMul", "x w", "y")], ROWS, {"y": [4, 32]}, {"w": weight}), tmp_path, [FEED])
    stored = made.initializers()
    assert stored["w.scale"][channel] == 1.0
    assert not stored["w.q"][:, channel].any()
    assert not made.run(made.compiled)["y"][:, channel].any()


# ------------------------------------------------------------------ bias and int32


@BOTH_FORMATS
def test_a_large_bias_beside_tiny_activations_fits_int32(fmt: str, tmp_path: Path) -> None:
    x = {"x": random(1, 4, 5, 5) * np.float32(1e-9)}
    bias = np.array([1.0, -2.0, 0.0, 1e-9], np.float32)
    model = make_model([node("Conv", "x w b", "y", name="op")], {"x": [1, 4, 5, 5]}, {"y": [1, 4, 3, 3]},
                       {"w": random(4, 4, 3, 3, seed=1), "b": bias})
    made = make(model, tmp_path, [x], fmt)
    codes = made.initializers()["op.bias.q"]
    assert codes.dtype == np.int32
    assert np.abs(codes.astype(np.int64)).max() <= 2**30
    assert made.ran("op") == ["QLinearConv"]
    # all of the result is the bias: the products are a billion times smaller
    found = made.run(made.compiled)["y"]
    step = float(made.plan.activations["y"].scale)
    np.testing.assert_allclose(found, np.broadcast_to(bias.reshape(1, 4, 1, 1), found.shape), rtol=0, atol=step)
    assert codes_that_move(made) == {0, 1}  # only the channels whose bias asks for it get a coarser weight


def codes_that_move(made: Made) -> set[int]:
    """Channels whose scale is not that of their largest weight."""
    weight = random(4, 4, 3, 3, seed=1)
    plain = weight_scales(np.moveaxis(weight, 1, -1).reshape(4, -1))
    return set(np.flatnonzero(~np.isclose(made.initializers()["w.scale"], plain, rtol=1e-6)))


def test_a_matmul_bias_beyond_int32_stays_float_and_says_so(tmp_path: Path) -> None:
    model = make_model([node("MatMul", "x w", "m", name="fc"), node("Add", "m b", "y")], ROWS, {"y": [4, 32]},
                       {"w": W["w"], "b": np.full(32, 3e9, np.float32)})
    made = make(model, tmp_path, [FEED], "qdq")
    assert [(s.node, s.reason) for s in made.skips] == [
        ("fc", "its bias does not fit into int32 at this scale and stays float")]
    assert "b" in made.initializers()


# ------------------------------------------------------------------ sharing


@BOTH_FORMATS
@pytest.mark.parametrize("name", ["w8a8", "w8a8-dynamic-tensor"])
def test_a_shared_weight_is_stored_once(name: str, fmt: str, tmp_path: Path) -> None:
    model = make_model([node("MatMul", "x w", "m"), node("Gemm", "m w b", "y")], ROWS, {"y": [4, 32]}, W)
    made = make(model, tmp_path, [FEED], fmt, name=name)
    for path in (made.twin, made.compiled):
        large = {n: v for n, v in made.initializers(path).items() if v.size == 32 * 32}
        assert {n: v.dtype for n, v in large.items()} == {"w.q": np.dtype(np.int8)}
    ran = made.ran("MatMul_m", "Gemm_y")
    assert all("MatMul" in op or "Gemm" in op for op in ran)


def test_a_weight_that_a_float_node_reads_too_is_kept_for_it(tmp_path: Path) -> None:
    ids = np.array([[0, 3], [5, 5], [31, 2], [7, 8]])
    model = make_model([node("Gather", "w ids", "rows"), node("MatMul", "x w", "m"), node("ReduceSum", "rows _", "r"),
                        node("Add", "m r", "y")], ROWS, {"y": None}, {**W, "ids": ids})
    made = make(model, tmp_path, [FEED])
    stored = made.initializers()
    assert stored["w.q"].dtype == np.int8
    wanted = made.run(made.source)["y"]
    np.testing.assert_allclose(made.run(made.compiled)["y"], wanted, rtol=0, atol=0.02 * np.abs(wanted).max())


def test_a_tensor_of_several_readers_is_quantized_once_and_float_readers_keep_it(tmp_path: Path) -> None:
    model = make_model([node("MatMul", "x w", "m"), node("MatMul", "x v", "n"), node("Exp", "x", "e"),
                        node("Mul", "m n", "p"), node("Add", "p e", "y")], ROWS, {"y": [4, 32]}, W)
    made = make(model, tmp_path, [FEED])
    found = nodes(made.compiled)
    assert made.stored().count("QuantizeLinear") == 1
    assert list(found["Exp_e"].input) == ["x"]
    assert [found[n].input[0] for n in ("MatMul_m", "MatMul_n")] == ["x.q", "x.q"]


def test_a_result_read_in_integers_and_in_float(tmp_path: Path) -> None:
    """A Conv's result exists as codes only; its float reader gets them decoded."""
    filters = {"w": random(8, 8, 1, 1), "v": random(8, 8, 1, 1, seed=1)}
    model = make_model([node("Conv", "x w", "c"), node("Conv", "c v", "d"), node("Sigmoid", "c", "s"),
                        node("Mul", "d s", "y")], {"x": [1, 8, 4, 4]}, {"y": [1, 8, 4, 4]}, filters)
    made = make(model, tmp_path, [{"x": random(1, 8, 4, 4)}])
    found = nodes(made.compiled)
    assert list(found["Conv_c"].output) == ["c.q"]
    assert found["Conv_d"].input[0] == "c.q"
    assert found["Sigmoid_s"].input[0] == "c"
    assert list(found["c/dequantize"].output) == ["c"]


def test_dynamic_codes_of_a_tensor_are_computed_once(tmp_path: Path) -> None:
    model = make_model([node("MatMul", "x w", "m"), node("MatMul", "x v", "n"), node("Mul", "m n", "y")], ROWS,
                       {"y": [4, 32]}, W)
    made = make(model, tmp_path, [FEED], "qdq", name="w8a8-dynamic-tensor")
    assert made.stored(made.twin).count("DynamicQuantizeLinear") == 1
    assert made.stored(made.twin).count("MatMulInteger") == 2


# ------------------------------------------------------------------ goldens and what is left alone


def residual() -> onnx.ModelProto:
    """Conv, Relu, Conv, Add, Relu, and a float tail."""
    filters: dict[str, Any] = {"w0": random(4, 4, 3, 3), "b0": random(4), "w1": random(4, 4, 1, 1)}
    return make_model(
        [node("Conv", "x w0 b0", "c0", pads=[1, 1, 1, 1]), node("Relu", "c0", "r0"), node("Conv", "r0 w1", "c1"),
         node("Add", "c1 r0", "a"), node("Relu", "a", "r1"), node("Conv", "r1 w1", "c2"), node("Exp", "c2", "y")],
        {"x": ["N", 4, 6, 6]}, {"y": ["N", 4, 6, 6]}, filters)


def planned(model: onnx.ModelProto, opened: Opener, name: str = "w8a8") -> tuple[Graph, Context]:
    """A canonical graph and a Plan for it whose ranges are all [-1, 2], [0, 2] behind a Relu."""
    graph = canonical(opened(model))
    found = outline(graph, recipe(name), CPU)
    ranges = {tensor: (0.0 if tensor.startswith("r") else -1.0, 2.0) for tensor in found.ranges_of}
    return graph, Context(CPU, finish(found, graph, ranges, recipe(name), CPU))


def test_golden_residual_block(opened: Opener, golden: Callable[[str, str], None]) -> None:
    graph, context = planned(residual(), opened)
    PassManager(quantize()).run(graph, context)
    golden("quantize-residual", text(graph))
    PassManager(lower("qoperator")).run(graph, context)
    golden("lower-residual", text(graph))
    assert context.skips == []


def test_golden_dynamic_linear(opened: Opener, golden: Callable[[str, str], None]) -> None:
    model = make_model([node("MatMul", "x w", "m"), node("Add", "m b", "h"), node("Gemm", "h v b", "y")], ROWS,
                       {"y": [4, 32]}, W)
    graph, context = planned(model, opened, "w8a8-dynamic-tensor")
    PassManager(quantize()).run(graph, context)
    golden("quantize-dynamic", text(graph))
    PassManager(lower("qoperator")).run(graph, context)
    golden("lower-dynamic", text(graph))


def test_an_empty_plan_changes_nothing(opened: Opener) -> None:
    graph = opened(residual())
    before = text(graph)
    for step in [*quantize(), *lower("qdq"), *lower("qoperator")]:
        assert apply(step, graph, Context(CPU)) == (False, [])
    assert text(graph) == before


def test_codes_stand_in_front_of_int8_nodes_only(opened: Opener) -> None:
    graph, context = planned(residual(), opened)
    edited, skips = apply(QuantizeActivations(), graph, context)
    assert (edited, skips) == (True, [])
    quantized = {n.inputs[0].name for n in graph.nodes if n.op == "QuantizeLinear"}
    assert quantized == {"x", "r0.raw", "c1.raw", "r1.raw", "c2.raw"}
    assert "Relu" not in {n.op for n in graph.nodes}  # both are absorbed: Q saturates at 0
    assert apply(QuantizeActivations(), graph, context) == (False, [])
