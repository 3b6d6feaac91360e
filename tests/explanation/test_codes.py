"""Encodings: of parameters, of a Plan, and as read back from any model's operators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from blocks_support import form, linear, planned, written
from conftest import make_model, node, random
from lowering_support import NETWORK_FEEDS, make, network
from onnx import TensorProto

from onnxq.explanation import codes
from onnxq.graph import Graph, load
from onnxq.numerics import affine, blocks
from onnxq.numerics.dtypes import INT4, INT8, UINT4, UINT8
from onnxq.report.report import Encoding

Opener = Callable[[onnx.ModelProto], Graph]


# ------------------------------------------------------------------ of parameters


def test_one_scale() -> None:
    params = affine.choose(-1.0, 3.0, UINT8)
    found = codes.of_params(params)
    zero_point = int(params.zero_point)
    assert (found.dtype, found.granularity, found.zero_point) == ("uint8", "tensor", zero_point)
    assert np.float32(found.scale) == params.scale
    decoded = affine.dequantize(np.array([0, 255], np.uint8), params)
    np.testing.assert_allclose([found.low, found.high], decoded, rtol=1e-6)
    assert set(found.to_dict()) == {"dtype", "granularity", "scale", "zero_point", "low", "high"}


def test_scales_of_channels() -> None:
    w = random(3, 4, 5) * np.array([1, 10, 100], np.float32)[:, None, None]
    params = affine.weight_params(w, 0)
    found = codes.of_params(params, w.size)
    assert (found.granularity, found.axis, found.scales, found.zero_point) == ("channel", 0, 3, 0)
    ordered = np.sort(params.scale)
    assert [np.float32(s) for s in (found.least_scale, found.scale, found.greatest_scale)] == list(ordered)
    assert found.low == pytest.approx(-128 * float(ordered[2]), rel=1e-6)
    assert found.high == pytest.approx(np.abs(w).max(), rel=1e-6)
    assert (found.float_bytes, found.code_bytes) == (240, 60 + 12)


def test_a_channel_of_zeros_tells_nothing() -> None:
    w = random(3, 8) * np.float32(0.01)
    w[1] = 0
    found = codes.of_params(affine.weight_params(w, 0), w.size)
    assert found.scales == 3
    assert found.high == pytest.approx(np.abs(w).max(), rel=1e-6)
    assert found.greatest_scale == pytest.approx(np.abs(w).max() / 127, rel=1e-6)


def test_blocks_and_half_bytes() -> None:
    scale = np.full((2, 3), 0.5, np.float32)
    params = affine.QuantParams(scale, np.array([[0, 1, 0], [0, 0, 0]], np.int8), INT4, 0, 16)
    found = codes.of_params(params, 32 * 3)
    assert (found.granularity, found.axis, found.block_size, found.scales) == ("block", 0, 16, 6)
    assert found.zero_point is None, "they differ"
    assert (found.low, found.high) == (-4.5, 3.5)
    assert found.code_bytes == 48 + 24


def test_a_type_without_a_code_range() -> None:
    found = codes.encoding(np.float32(0.25), 0, "float8e4m3fn")
    assert (found.scale, found.low, found.high) == (0.25, None, None)


# ------------------------------------------------------------------ of a file


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {fmt: make(network(), tmp_path_factory.mktemp("codes"), NETWORK_FEEDS, fmt) for fmt in ("qdq", "qoperator")}


@pytest.mark.parametrize("fmt", ["qdq", "qoperator"])
def test_what_a_plan_stores_is_read_back_from_the_file(fmt: str, files: dict[str, Any]) -> None:
    made = files[fmt]
    there = codes.stored(load(made.compiled))
    planned = codes.planned(made.plan, load(made.canonical))
    assert planned.keys() == {*made.plan.activations, *made.plan.weights}
    for name, wanted in planned.items():
        assert there[f"{name}.q"] == wanted, name


@pytest.mark.parametrize("fmt", ["qdq", "qoperator"])
def test_rows_of_a_file_say_what_is_codes(fmt: str, files: dict[str, Any]) -> None:
    graph = load(files[fmt].compiled)
    found = codes.stored(graph)
    rows = {n.name: codes.row_of(n, g, found) for n, g in graph.walk()}
    conv = rows["Conv_c2"]
    if fmt == "qdq":  # a bias is decoded from int32
        assert (conv.codes_in, conv.weights, conv.codes_out) == (["k1", "Conv_c2.bias.dq"], ["w2.dq"], "c2.raw")
    else:
        assert (conv.codes_in, conv.weights, conv.codes_out) == (["k1.q"], ["w2.q"], "c2.q")
    assert conv.op == {"qdq": "Conv", "qoperator": "QLinearConv"}[fmt]
    pool = rows["MaxPool_p"]
    assert (len(pool.codes_in), pool.weights) == (1, [])
    last = rows["MatMul_m"]
    assert last.codes_out is None, "its result is float"
    assert len(last.codes_in) == len(last.weights) == 1
    for row in rows.values():
        assert row.op != "QuantizeLinear" or (row.codes_in, bool(row.codes_out)) == ([], True)
        assert row.op != "DequantizeLinear" or row.codes_out is None


def test_scales_found_at_run_time(opened: Opener) -> None:
    model = make_model(
        [node("DynamicQuantizeLinear", "x", "xq xs xz"), node("MatMulInteger", "xq w xz", "s"),
         node("DynamicQuantizeMatMul", "x w ws", "y", domain="com.microsoft"), node("Relu", "x", "r")],
        {"x": ["n", 8]}, {"s": (TensorProto.INT32, None), "y": None, "r": None},
        {"w": np.ones((8, 4), np.int8), "ws": np.array([1, 2, 3, 4], np.float32) / 8},
        domains={"com.microsoft": 1})
    graph = opened(model)
    found = codes.stored(graph)
    assert found["xq"] == found["x"] == Encoding("uint8", "tensor")
    assert (found["w"].axis, found["w"].scales, found["w"].greatest_scale) == (1, 4, 0.5)
    rows = {n.op: codes.row_of(n, graph, found) for n in graph.nodes}
    assert rows["MatMulInteger"].codes_in == ["xq"]
    assert rows["DynamicQuantizeMatMul"].codes_in == ["x"]
    assert rows["Relu"].codes_in == [], "it reads the floats that others quantize"


def test_weights_stored_for_float_operators(opened: Opener) -> None:
    model = make_model(
        [node("Cast", "w", "f", to=1), node("Mul", "f s", "d"), node("MatMul", "x d", "y"),
         node("Gather", "t i", "g"), node("Cast", "g", "gf", to=1), node("Gather", "ts i", "gs"),
         node("Mul", "gf gs", "z"), node("Mul", "y y", "sq")],
        {"x": ["n", 8], "i": (TensorProto.INT64, ["n"])}, {"sq": None, "z": None},
        {"w": np.ones((8, 4), np.int8), "s": np.array([[1, 2, 3, 4]], np.float32) / 8,
         "t": np.ones((5, 3), np.int8), "ts": np.full((5, 1), 0.25, np.float32)})
    graph = opened(model)
    found = codes.stored(graph)
    assert found.keys() == {"w", "d", "t", "z"}
    assert (found["d"].axis, found["d"].scales, found["d"].float_bytes, found["d"].code_bytes) == (1, 4, 128, 48)
    assert (found["t"].axis, found["t"].scales) == (0, 5)
    row = next(codes.row_of(n, graph, found) for n in graph.nodes if n.op == "MatMul")
    assert (row.scheme, row.weights, row.codes_in) == ("stored", ["d"], [])


def test_block_quantized_weights(opened: Opener) -> None:
    nodes = [node("MatMulNBits", "x b s", "y", domain="com.microsoft", K=32, N=4, bits=4, block_size=16)]
    model = make_model(nodes, {"x": ["n", 32]}, {"y": None},
                       {"b": np.zeros((4, 2, 8), np.uint8), "s": np.linspace(0.5, 4, 8, dtype=np.float32)},
                       domains={"com.microsoft": 1})
    found = codes.stored(opened(model))["b"]
    assert (found.dtype, found.granularity, found.block_size, found.scales) == ("uint4", "block", 16, 8)
    assert (found.zero_point, found.low, found.high) == (8, -32.0, 28.0)


def test_connect_names_what_a_kernel_reads_and_makes(tmp_path: Path) -> None:
    made = make(network(), tmp_path, NETWORK_FEEDS)
    rows = made.rows()
    codes.connect(list(rows.values()), made.plan.nodes, load(made.canonical))
    assert rows["Conv_c0"].codes_in == ["x"]
    assert rows["Conv_c0"].outputs == ["c0"]
    assert rows["Conv_c0"].codes_out == "r0", "behind the Relu that the kernel computes"
    assert rows["Relu_r0"].part_of == "Conv_c0"
    assert (rows["Add_a"].inputs, rows["Add_a"].codes_in) == (["c2", "r0"], ["c2", "r0"])
    assert rows["MatMul_m"].weights == ["w7"]
    assert rows["MatMul_m"].codes_out is None
    assert INT8.name == codes.planned(made.plan, load(made.canonical))["w7"].dtype


# ------------------------------------------------------------------ weights in blocks


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("fmt", ["qoperator", "qdq", None], ids=["kernel", "portable", "decoded"])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_are_read_back_from_every_form(bits: int, fmt: str | None, symmetric: bool, tmp_path: Path) -> None:
    """72 inputs fill two blocks and a quarter."""
    model, _ = linear(72, 40, opset=21)
    how = form(bits, 32, symmetric)
    made = written(model, tmp_path, {"w": how}, fmt)
    params = blocks.choose(random(72, 40) / 4, how.dtype, 32, symmetric)
    graph = load(made.path)
    found = codes.stored(graph)
    row = next(codes.row_of(n, graph, found) for n in graph.nodes if n.op in ("MatMul", "MatMulNBits"))
    [name] = row.weights
    told, wanted = found[name], codes.of_params(params, 72 * 40)
    assert row.scheme == ("stored" if fmt is None else "")
    assert (row.codes_in, row.codes_out) == ([], None)
    kernel = fmt == "qoperator"  # its codes count from 0, and lie by outputs
    assert told.dtype == (f"uint{bits}" if kernel else how.dtype.name)
    assert (told.granularity, told.block_size, told.scales) == ("block", 32, 3 * 40)
    assert told.axis == (1 if kernel else 0)
    assert (told.scale, told.least_scale, told.greatest_scale) == (
        wanted.scale, wanted.least_scale, wanted.greatest_scale)
    assert (told.low, told.high) == (wanted.low, wanted.high)
    if symmetric:
        assert told.zero_point == (2 ** (bits - 1) if kernel else 0)
    whole = 72 if fmt == "qdq" else 96  # the last block is filled up
    assert (told.float_bytes, told.code_bytes) == (4 * 72 * 40, whole * 40 * bits // 8 + 4 * 3 * 40)


@pytest.mark.parametrize("fmt", ["qoperator", None], ids=["kernel", "decoded"])
def test_blocks_of_a_table_are_read_back(fmt: str | None, tmp_path: Path) -> None:
    model = make_model([node("Gather", "t i", "y")], {"i": (TensorProto.INT64, ["n"])}, {"y": None},
                       {"t": random(50, 64)}, opset=21, ir_version=10)
    made = written(model, tmp_path, {"t": form(4, 32, False, 1)}, fmt)
    params = blocks.choose(random(50, 64).T, UINT4, 32, False)
    graph = load(made.path)
    found = codes.stored(graph)
    [name] = next(codes.row_of(n, graph, found) for n in graph.nodes if n.op.startswith("Gather")).weights
    told, wanted = found[name], codes.of_params(params, 50 * 64)
    assert (told.dtype, told.axis, told.block_size, told.scales) == ("uint4", 1, 32, 100)
    assert (told.low, told.high, told.scale) == (wanted.low, wanted.high, wanted.scale)
    assert (told.float_bytes, told.code_bytes) == (wanted.float_bytes, wanted.code_bytes)


def test_blocks_that_a_plan_has_not_found_yet(opened: Opener) -> None:
    """Their number is known, their values are not."""
    model, _ = linear(72, 40)
    graph = opened(model)
    for symmetric in (True, False):
        [found] = codes.planned(planned(graph, {"w": form(4, 32, symmetric)}), graph).values()
        assert found == Encoding("int4" if symmetric else "uint4", "block", zero_point=0 if symmetric else None, axis=0,
                                 block_size=32, scales=120, float_bytes=4 * 72 * 40,
                                 code_bytes=(72 * 40 * 4 + 120 * (32 if symmetric else 36)) // 8)
