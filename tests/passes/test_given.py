"""Models that came quantized: kept, lowered where that is exact, and never quantized twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random
from lowering_support import BOTH_FORMATS, Array, described, make

from onnxq.verification import is_integer


def given(op: str, attrs: dict[str, Any] | None = None, **change: Any) -> onnx.ModelProto:
    """A QDQ model as another tool writes it: x -> Q -> DQ -> op(.., DQ(w), DQ(b)) -> Q -> DQ -> y."""
    filters = {"Conv": (8, 8, 1, 1), "Gemm": (8, 8), "MatMul": (8, 8)}[op]
    scales = np.linspace(0.01, 0.03, 8, dtype=np.float32)
    axis = change.get("w_axis", 0 if op == "Conv" else 1)
    x_scale = np.float32(0.05)
    # codes below 64: exact without VNNI instructions, too
    stored: dict[str, Any] = {
        "xs": x_scale, "xz": change.get("x_zero", np.uint8(128)), "ys": np.float32(0.02), "yz": np.uint8(100),
        "ws": scales, "wz": np.zeros(8, np.int8), "w": np.random.default_rng(0).integers(-64, 64, filters, np.int8),
        "b": np.arange(8, dtype=np.int32) * 50, "bs": x_scale * scales * np.float32(change.get("b_factor", 1))}
    bias = op != "MatMul"
    nodes = [node("QuantizeLinear", "x xs xz", "xq"), node("DequantizeLinear", "xq xs xz", "xd"),
             node("DequantizeLinear", "w ws wz", "wd", axis=axis)]
    if bias:
        nodes.append(node("DequantizeLinear", "b bs", "bd", axis=0))
    nodes += [node(op, "xd wd bd" if bias else "xd wd", "r", name="op", **(attrs or {})),
              node("QuantizeLinear", "r ys yz", "yq"), node("DequantizeLinear", "yq ys yz", "y")]
    shape = [1, 8, 3, 3] if op == "Conv" else [4, 8]
    return make_model(nodes, {"x": shape}, {"y": [None] * len(shape)}, stored)


def pair(nodes: list[onnx.NodeProto], last: str, stored: dict[str, Any] | None = None, *, scale: float = 0.02,
         behind: bool = True) -> onnx.ModelProto:
    """x [1, 8, 6, 6] -> Q -> DQ -> xd; nodes; `last` (-> Q -> DQ with its own scale) -> y."""
    ends = [node("QuantizeLinear", f"{last} ys xz", "yq"), node("DequantizeLinear", "yq ys xz", "y")]
    return make_model([node("QuantizeLinear", "x xs xz", "xq"), node("DequantizeLinear", "xq xs xz", "xd"), *nodes,
                       *(ends if behind else [])], {"x": [1, 8, 6, 6]}, {"y" if behind else last: [None] * 4},
                      {"xs": np.float32(0.05), "xz": np.uint8(128), "ys": np.float32(scale), **(stored or {})})


def given_feed(model: onnx.ModelProto) -> dict[str, Array]:
    return {"x": random(*[d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim], seed=1)}


@pytest.mark.parametrize(("op", "kernel"), [("Conv", "QLinearConv"), ("Gemm", "QGemm"), ("MatMul", "QLinearMatMul")])
def test_pairs_that_the_model_came_with_are_lowered(op: str, kernel: str, tmp_path: Path) -> None:
    model = given(op)
    made = make(model, tmp_path, [given_feed(model)])
    assert described(made.plan.nodes["op"]).startswith("given: quantized already")
    assert made.stored() == ["QuantizeLinear", kernel, "DequantizeLinear"]
    np.testing.assert_allclose(made.run(made.compiled)["y"], made.run(made.source, optimize=False)["y"], atol=0.0201)


NEAR_MISSES: dict[str, tuple[onnx.ModelProto, str]] = {
    "bias of another scale, Conv": (given("Conv", b_factor=3), "its bias is not int32 of the products' scale"),
    "bias of another scale, Gemm": (given("Gemm", b_factor=3), "its bias is not int32 of the products' scale"),
    "scales along the rows": (given("MatMul", w_axis=0),
                              "its input or weight is not behind a DequantizeLinear the kernel can take"),
    "beta": (given("Gemm", {"beta": 2.0}), "it scales its product or its bias"),
    "alpha": (given("Gemm", {"alpha": 0.5}), "it scales its product or its bias"),
}


@BOTH_FORMATS
@pytest.mark.parametrize("case", NEAR_MISSES)
def test_a_form_that_no_kernel_takes_stays_as_it_came(case: str, fmt: str, tmp_path: Path) -> None:
    model, reason = NEAR_MISSES[case]
    made = make(model, tmp_path, [given_feed(model)], fmt)
    assert made.stored() == made.stored(made.source)
    assert [(s.node, s.reason) for s in made.skips] == ([("op", reason)] if fmt == "qoperator" else [])
    wanted = made.run(made.source, optimize=False)["y"]
    np.testing.assert_allclose(made.run(made.compiled, optimize=False)["y"], wanted, atol=1e-6)


@BOTH_FORMATS
def test_data_movement_to_another_scale_is_no_movement_of_codes(fmt: str, tmp_path: Path) -> None:
    model = pair([node("MaxPool", "xd", "p", name="op", kernel_shape=[2, 2])], "p", scale=0.1)
    made = make(model, tmp_path, [given_feed(model)], fmt)
    assert made.stored() == made.stored(made.source)
    np.testing.assert_array_equal(made.run(made.compiled)["y"], made.run(made.source, optimize=False)["y"])
    if fmt == "qoperator":
        assert [(s.node, s.reason) for s in made.skips] == [("op", "the model stores its result at another scale")]


@BOTH_FORMATS
def test_data_movement_at_one_scale_moves_codes(fmt: str, tmp_path: Path) -> None:
    model = pair([node("MaxPool", "xd", "p", name="op", kernel_shape=[2, 2])], "p", scale=0.05)
    made = make(model, tmp_path, [given_feed(model)], fmt)
    assert "DequantizeLinear" not in made.ops()[:-1]
    np.testing.assert_array_equal(made.run(made.compiled)["y"], made.run(made.source, optimize=False)["y"])


@BOTH_FORMATS
@pytest.mark.parametrize(("op", "kernel"), [("Sigmoid", "QLinearSigmoid"), ("Softmax", "QLinearSoftmax"),
                                            ("LeakyRelu", "QLinearLeakyRelu")])
def test_what_the_runtime_fuses_by_itself_is_left_to_it(op: str, kernel: str, fmt: str, tmp_path: Path) -> None:
    model = pair([node(op, "xd", "s", name="op")], "s")
    made = make(model, tmp_path, [given_feed(model)], fmt)
    assert described(made.plan.nodes["op"]).startswith("given: ")
    assert made.ran("op") == [kernel]


@BOTH_FORMATS
def test_a_float_conv_in_front_of_no_q_stays_float(fmt: str, tmp_path: Path) -> None:
    """Its codes have a scale of their own, by which a bias of calibrated scale would be wrong."""
    model = pair([node("Conv", "xd w b", "y", name="op")], "y",
                 {"w": random(8, 8, 1, 1), "b": random(8) * 100}, behind=False)
    made = make(model, tmp_path, [given_feed(model)], fmt)
    assert described(made.plan.nodes["op"]) == (
        "float: beside it are codes that the model came with, which are not quantized twice")
    wanted = made.run(made.source, optimize=False)["y"]
    np.testing.assert_allclose(made.run(made.compiled)["y"], wanted, rtol=1e-5, atol=1e-3)


@BOTH_FORMATS
def test_codes_that_are_not_uint8_are_kept_and_the_reason_says_so(fmt: str, tmp_path: Path) -> None:
    model = given("Conv", x_zero=np.int8(0))
    made = make(model, tmp_path, [given_feed(model)], fmt)
    assert made.stored() == made.stored(made.source)
    assert "not uint8" in made.plan.nodes["op"].reason


@BOTH_FORMATS
def test_weights_that_came_quantized_under_a_float_activation(fmt: str, tmp_path: Path) -> None:
    stored = {"w": np.ones((32, 32), np.int8), "ws": np.full(32, 0.1, np.float32), "wz": np.zeros(32, np.int8)}
    model = make_model([node("DequantizeLinear", "w ws wz", "wd", axis=1), node("MatMul", "x wd", "y", name="op")],
                       {"x": [4, 32]}, {"y": [4, 32]}, stored)
    made = make(model, tmp_path, [{"x": random(4, 32)}], fmt)
    assert described(made.plan.nodes["op"]) == "given: quantized already: its weights are stored as codes"
    assert made.ran("op") == ["MatMulNBits"], "the runtime quantizes what it reads, and that is no fault"
    np.testing.assert_array_equal(made.run(made.compiled)["y"], made.run(made.source)["y"])


@BOTH_FORMATS
@pytest.mark.parametrize("name", ["w8a8", "w8a8-dynamic-tensor"])
def test_what_was_kept_float_once_is_kept_in_a_second_compilation(name: str, fmt: str, tmp_path: Path) -> None:
    """Both MatMuls read x: the second finds the name x.q taken by the codes of the first compilation."""
    model = make_model([node("MatMul", "x w0", "m", name="one"), node("MatMul", "x w1", "n", name="two"),
                        node("Add", "m n", "y")], {"x": [4, 32]}, {"y": [4, 32]},
                       {"w0": random(32, 32), "w1": random(32, 32, seed=1)})
    feeds = [{"x": random(4, 32)}]
    once = make(model, tmp_path, feeds, fmt, name=name, keep=["two"])
    again = make(once.compiled, tmp_path, feeds, fmt, name=name)
    if name == "w8a8" or fmt == "qdq":
        assert again.plan.nodes["two"].reason.endswith(
            "the model has a tensor 'x.q' already, a name that its codes would take")
    wanted = once.run(once.compiled)["y"]
    allowed = 1e-5 if again.plan.nodes["two"].scheme == "float" else 0.02
    np.testing.assert_allclose(again.run(again.compiled)["y"], wanted, rtol=0, atol=allowed * np.abs(wanted).max())


@BOTH_FORMATS
def test_the_bias_of_a_matmul_that_came_quantized(fmt: str, tmp_path: Path) -> None:
    """MatMul and Add become one Gemm in the runtime; the Add is no float node that ran in integers against the plan."""
    model = make_model([node("MatMul", "x w", "m", name="fc"), node("Add", "m b", "y", name="bias")], {"x": [4, 32]},
                       {"y": [4, 32]}, {"w": random(32, 32), "b": random(32, seed=1)})
    feeds = [{"x": random(4, 32)}]
    once = make(model, tmp_path, feeds, "qdq")
    again = make(once.compiled, tmp_path, feeds, fmt)
    assert described(again.plan.nodes["bias"]) == "given: quantized already: it adds a bias stored as int32"
    again.rows()  # finds no fault
    assert {"QGemm" if fmt == "qdq" else "MatMulIntegerToFloat"} == {op for op in again.ops() if is_integer(op)}
    wanted = once.run(once.compiled)["y"]
    np.testing.assert_allclose(again.run(again.compiled)["y"], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
