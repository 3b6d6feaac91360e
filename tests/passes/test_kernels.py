"""Each kernel that onnxq writes against numpy, code by code, in both formats, optimized and not.

A result code may be off by one: the kernels multiply by one float32 factor where the reference divides in float64, and
a number half way between two codes goes either way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_model, node, random
from lowering_support import (
    BOTH_FORMATS,
    Array,
    Made,
    centred,
    codes_of,
    convolve,
    make,
    requantized,
    weight_codes,
)

OPTIMIZED = pytest.mark.parametrize("optimize", [True, False], ids=["optimized", "plain"])

# name: input shape, weight shape, bias, attributes
CONVS = {
    "plain": ([2, 4, 9, 7], [8, 4, 3, 3], True, {"pads": [1, 1, 1, 1]}),
    "pointwise, no bias": ([1, 16, 5, 5], [12, 16, 1, 1], False, {}),
    "strided, uneven pads": ([1, 3, 10, 11], [6, 3, 3, 5], True, {"pads": [0, 1, 2, 3], "strides": [2, 3]}),
    "dilated": ([1, 4, 12, 12], [8, 4, 3, 3], True, {"pads": [2, 2, 2, 2], "dilations": [2, 2]}),
    "depthwise": ([2, 16, 8, 8], [16, 1, 3, 3], True, {"pads": [1, 1, 1, 1], "group": 16}),
    "depthwise, two filters each": ([1, 8, 8, 8], [16, 1, 3, 3], True, {"pads": [1, 1, 1, 1], "group": 8}),
    "grouped": ([1, 12, 6, 6], [6, 4, 3, 3], True, {"pads": [1, 1, 1, 1], "group": 3}),
    "1-D": ([2, 6, 20], [8, 6, 5], True, {"pads": [2, 2], "strides": [2]}),
    "3-D": ([1, 24, 4, 5, 5], [8, 24, 3, 3, 3], True, {"pads": [1, 1, 1, 1, 1, 1], "strides": [2, 1, 1]}),
    "3-D pointwise": ([2, 24, 3, 4, 4], [6, 24, 1, 1, 1], False, {}),
    "1-D depthwise": ([1, 8, 20], [8, 1, 5], False, {"pads": [2, 2], "group": 8}),
}


def feed(*shape: int, shift: float = 1.5) -> dict[str, Array]:
    """An asymmetric input: its zero point is neither 0 nor in the middle."""
    x = random(*shape, seed=3) + np.float32(shift)
    assert x.min() < 0
    return {"x": x}


def same_codes(made: Made, name: str, found: Array, wanted: Array) -> None:
    codes = codes_of(made, name, found)
    assert codes.shape == wanted.shape
    assert np.abs(codes - wanted).max() <= 1
    assert np.mean(codes != wanted) < 0.01, "more than a tie here and there"


# ------------------------------------------------------------------ Conv


@OPTIMIZED
@BOTH_FORMATS
@pytest.mark.parametrize("case", CONVS)
def test_qlinear_conv_computes_what_its_codes_say(case: str, fmt: str, optimize: bool, tmp_path: Path) -> None:
    shape, filters, bias, attrs = CONVS[case]
    weight = random(*filters, seed=1) * np.linspace(0.01, 2, filters[0], dtype=np.float32).reshape(
        -1, *[1] * (len(filters) - 1))  # channels of very different scale
    stored = {"w": weight, **({"b": random(filters[0], seed=2)} if bias else {})}
    model = make_model([node("Conv", "x w b" if bias else "x w", "y", name="conv", **attrs)],
                       {"x": shape}, {"y": [None] * len(shape)}, stored)
    given = feed(*shape)
    made = make(model, tmp_path, [given], fmt)
    assert made.ran("conv") == ["QLinearConv"]

    w, w_scale = weight_codes(made, "w")
    assert w_scale.shape == (filters[0],)
    rank = len(shape) - 2
    sums = convolve(centred(made, "x", given["x"]), w, attrs.get("strides", [1] * rank),
                    attrs.get("pads", [0] * 2 * rank), attrs.get("dilations", [1] * rank), attrs.get("group", 1))
    per_channel = (1, -1, *[1] * rank)
    if bias:
        codes = made.initializers()["conv.bias.q"]
        assert codes.dtype == np.int32
        sums = sums + codes.reshape(per_channel)
    x_scale = np.float64(made.plan.activations["x"].scale)
    real = sums * x_scale * w_scale.reshape(per_channel)
    same_codes(made, "y", made.run(made.compiled, optimize=optimize)["y"], requantized(made, "y", real))
    # and the real numbers are the float model's, up to the rounding of x (|w| * s_x / 2), of w (|x| * s_w / 2) and b
    x_codes = centred(made, "x", given["x"]).astype(np.float64)
    conv = [attrs.get("strides", [1] * rank), attrs.get("pads", [0] * 2 * rank), attrs.get("dilations", [1] * rank),
            attrs.get("group", 1)]
    off = convolve(np.full(shape, x_scale / 2), np.abs(weight).astype(np.float64), *conv)
    off = off + convolve(np.abs(x_codes) * x_scale, np.ones_like(weight, np.float64), *conv) \
        * w_scale.reshape(per_channel) / 2
    off = off + x_scale * w_scale.reshape(per_channel) / 2
    float_y = made.run(made.source)["y"]
    assert (np.abs(real - float_y) <= off * (1 + 1e-5) + 1e-4).all()


@BOTH_FORMATS
def test_padding_is_the_zero_point_and_not_code_0(fmt: str, tmp_path: Path) -> None:
    # all of x is 5 and the filter sums its window: where it hangs over the edge, only the part inside counts
    model = make_model([node("Conv", "x w", "y", pads=[1, 1, 1, 1])], {"x": [1, 1, 4, 4]}, {"y": [1, 1, 4, 4]},
                       {"w": np.ones((1, 1, 3, 3), np.float32)})
    given = {"x": np.full((1, 1, 4, 4), 5, np.float32)}
    made = make(model, tmp_path, [given], fmt, ranges={"x": (-5.0, 5.0), "y": (-45.0, 45.0)})
    inside = np.array([[4, 6, 6, 4], [6, 9, 9, 6], [6, 9, 9, 6], [4, 6, 6, 4]])
    np.testing.assert_allclose(made.run(made.compiled)["y"][0, 0], inside * 5, atol=0.5)


# ------------------------------------------------------------------ linear


def linear_sums(made: Made, x: Array) -> tuple[Array, Array]:
    """(int64 sums, scale per column) of the product of x with the weight w."""
    w, w_scale = weight_codes(made, "w")
    return centred(made, "x", x) @ w, np.float64(made.plan.activations["x"].scale) * w_scale


@OPTIMIZED
@BOTH_FORMATS
@pytest.mark.parametrize("bias", [None, [24], [1, 24]], ids=["no bias", "bias", "bias of rank 2"])
@pytest.mark.parametrize("shape", [[5, 32], [2, 3, 32]], ids=["2-D", "3-D"])
def test_matmul_integer_to_float(shape: list[int], bias: list[int] | None, fmt: str, optimize: bool,
                                 tmp_path: Path) -> None:
    nodes, stored = [node("MatMul", "x w", "p", name="fc")], {"w": random(32, 24, seed=1)}
    if bias:
        nodes.append(node("Add", "b p", "y"))
        stored["b"] = random(*bias, seed=2)
    result = "y" if bias else "p"
    given = feed(*shape)
    made = make(make_model(nodes, {"x": shape}, {result: [None] * len(shape)}, stored), tmp_path, [given], fmt)
    # MatMul and bias become a Gemm in the runtime: an integer one, since the bias is int32
    gemm = fmt == "qdq" and (len(shape) == 2 or bias == [24]) and bias
    assert made.ran("fc") == ["QGemm" if gemm else "MatMulIntegerToFloat"]
    sums, scale = linear_sums(made, given["x"])
    wanted = sums * scale
    if bias:
        wanted = wanted + np.rint(stored["b"].astype(np.float64).reshape(-1) / scale) * scale
    found = made.run(made.compiled, optimize=optimize)[result]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@OPTIMIZED
@BOTH_FORMATS
@pytest.mark.parametrize("shape", [[5, 32], [2, 3, 32]], ids=["2-D", "3-D"])
def test_qlinear_matmul(shape: list[int], fmt: str, optimize: bool, tmp_path: Path) -> None:
    # the second MatMul alone reads the first's result, so that is stored as codes
    model = make_model([node("MatMul", "x w", "h", name="fc"), node("MatMul", "h v", "y", name="out")],
                       {"x": shape}, {"y": [None] * len(shape), }, {"w": random(32, 24, seed=1), "v": np.eye(
                           24, dtype=np.float32)})
    given = feed(*shape)
    made = make(model, tmp_path, [given], fmt)
    assert made.ran("fc", "out") == ["QLinearMatMul", "MatMulIntegerToFloat"]
    sums, scale = linear_sums(made, given["x"])
    wanted = requantized(made, "h", sums * scale)
    # v is the identity, whose codes are 127 * identity at scale 1 / 127: y is h decoded
    same_codes(made, "h", made.run(made.compiled, optimize=optimize)["y"], wanted)


@OPTIMIZED
@BOTH_FORMATS
@pytest.mark.parametrize("relu", [False, True])
def test_qgemm_with_codes_as_result(relu: bool, fmt: str, optimize: bool, tmp_path: Path) -> None:
    nodes = [node("Gemm", "x w b", "g", name="fc"), node("Relu", "g", "h", name="relu")][:2 if relu else 1]
    hidden = "h" if relu else "g"
    model = make_model([*nodes, node("MatMul", f"{hidden} v", "y", name="out")], {"x": [5, 32]}, {"y": [None, None]},
                       {"w": random(32, 24, seed=1), "b": random(24, seed=2), "v": np.eye(24, dtype=np.float32)})
    given = feed(5, 32)
    made = make(model, tmp_path, [given], fmt)
    assert made.ran("fc") == ["QGemm"]
    assert "Relu" not in made.ops()
    sums, scale = linear_sums(made, given["x"])
    real = (sums + made.initializers()["fc.bias.q"]) * scale
    wanted = requantized(made, hidden, np.maximum(real, 0) if relu else real)
    same_codes(made, hidden, made.run(made.compiled, optimize=optimize)["y"], wanted)


@OPTIMIZED
@BOTH_FORMATS
@pytest.mark.parametrize("attrs", [{}, {"transB": 1}, {"alpha": 0.5, "beta": 2.0}], ids=str)
def test_qgemm_with_float_result(attrs: dict[str, float], fmt: str, optimize: bool, tmp_path: Path) -> None:
    stored = {"w": random(24, 32, seed=1) if "transB" in attrs else random(32, 24, seed=1), "b": random(24, seed=2)}
    model = make_model([node("Gemm", "x w b", "y", name="fc", **attrs)], {"x": [5, 32]}, {"y": [5, 24]}, stored)
    given = feed(5, 32)
    made = make(model, tmp_path, [given], fmt)
    assert made.ran("fc") == ["QGemm"]
    params = made.plan.weights[made.plan.nodes["fc"].weight or ""]
    real = (stored["w"].T if "transB" in attrs else stored["w"]).astype(np.float64) * attrs.get("alpha", 1)
    w = np.rint(real / params.scale)
    scale = np.float64(made.plan.activations["x"].scale) * params.scale.astype(np.float64)
    bias = np.rint(stored["b"].astype(np.float64) * attrs.get("beta", 1) / scale)
    wanted = (centred(made, "x", given["x"]) @ w + bias) * scale
    found = made.run(made.compiled, optimize=optimize)["y"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@OPTIMIZED
@BOTH_FORMATS
@pytest.mark.parametrize("form", ["MatMul", "MatMul and Add", "Gemm"])
def test_dynamic_quantize_matmul(form: str, fmt: str, optimize: bool, tmp_path: Path) -> None:
    nodes = {"MatMul": [node("MatMul", "x w", "y", name="fc")],
             "MatMul and Add": [node("MatMul", "x w", "p", name="fc"), node("Add", "p b", "y")],
             "Gemm": [node("Gemm", "x w b", "y", name="fc")]}[form]
    stored = {"w": random(32, 24, seed=1), "b": random(24, seed=2)}
    given = feed(5, 32)
    made = make(make_model(nodes, {"x": [5, 32]}, {"y": [5, 24]}, stored), tmp_path, [given], fmt,
                name="w8a8-dynamic-tensor")
    assert made.ops() == ["DynamicQuantizeMatMul"]
    x = given["x"].astype(np.float64)
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    x_scale = (high - low) / 255
    zero_point = np.rint(np.clip(-low / x_scale, 0, 255))
    w, w_scale = weight_codes(made, "w")
    wanted = (np.clip(np.rint(x / x_scale) + zero_point, 0, 255) - zero_point) @ w * x_scale * w_scale
    if form != "MatMul":
        wanted = wanted + stored["b"]
    found = made.run(made.compiled, optimize=optimize)["y"]
    # a value half way between codes may fall on the other side in float32: one step of x times the largest weight
    step = x_scale * np.abs(stored["w"]).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1.01 * step)
    assert np.mean(np.abs(found - wanted) > 1e-4) < 0.2


# ------------------------------------------------------------------ what joins


def region(tmp_path: Path, fmt: str, nodes: list[Any], shape: list[int]) -> Made:
    """x -> Conv by 1 -> a, Conv by -0.3141 -> b (where it is read); nodes make j; Conv by 1 -> y. All are outputs."""
    kinds = {n.op_type for n in nodes}
    tensors = ["a", "b", "j", "y"] if kinds & {"Add", "Concat"} else ["a", "j", "y"]
    eye = np.eye(8, dtype=np.float32).reshape(8, 8, *[1] * (len(shape) - 2))
    convs = [node("Conv", "x one", "a"), node("Conv", "x third", "b")][:len(tensors) - 2]
    model = make_model([*convs, *nodes, node("Conv", "j out", "y")], {"x": shape},
                       {t: [None] * len(shape) for t in tensors},
                       {"one": eye, "third": np.float32(-0.3141) * eye,
                        "out": np.concatenate([eye, eye], 1) if "Concat" in kinds else eye})
    return make(model, tmp_path, [{"x": random(*shape, seed=4)}], fmt)


JOINS = {
    "QLinearAdd": ([node("Add", "a b", "j", name="join")], lambda a, b: a + b),
    "QLinearAdd, Relu": ([node("Add", "a b", "i", name="join"), node("Relu", "i", "j")],
                         lambda a, b: np.maximum(a + b, 0)),
    "QLinearConcat": ([node("Concat", "a b", "j", name="join", axis=1)], lambda a, b: np.concatenate([a, b], 1)),
    "QLinearConcat, negative axis": ([node("Concat", "b a", "j", name="join", axis=-3)],
                                     lambda a, b: np.concatenate([b, a], 1)),
    "QLinearGlobalAveragePool": ([node("GlobalAveragePool", "a", "j", name="join")],
                                 lambda a, b: a.mean(axis=(2, 3), keepdims=True)),
    "QLinearAveragePool": ([node("AveragePool", "a", "j", name="join", kernel_shape=[6, 2], strides=[1, 2])],
                           lambda a, b: a.reshape(*a.shape[:2], 6, 3, 2).mean(axis=(2, 4))[:, :, None]),
    "QLinearAveragePool, padded": (
        [node("AveragePool", "a", "j", name="join", kernel_shape=[5, 3], pads=[1, 1, 1, 1], count_include_pad=1)],
        lambda a, b: convolve(a, np.full((8, 1, 5, 3), 1 / 15), [1, 1], [1] * 4, [1, 1], 8)),
    "MaxPool": ([node("MaxPool", "a", "j", name="join", kernel_shape=[2, 2], strides=[2, 2])],
                lambda a, b: a.reshape(*a.shape[:2], 3, 2, 3, 2).max(axis=(3, 5))),
}


@OPTIMIZED
@BOTH_FORMATS
@pytest.mark.parametrize("case", JOINS)
def test_what_joins_computes_on_codes(case: str, fmt: str, optimize: bool, tmp_path: Path) -> None:
    nodes, function = JOINS[case]
    made = region(tmp_path, fmt, nodes, [2, 8, 6, 6])
    kernel = case.split(",")[0]
    assert made.ran("join") in ([kernel], ["Nhwc" + kernel])
    assert "Relu" not in made.ops()
    found = made.run(made.compiled, optimize=optimize)
    a, b = (found[n].astype(np.float64) if n in found else None for n in "ab")
    same_codes(made, "j", found["j"], requantized(made, "j", function(a, b)))
