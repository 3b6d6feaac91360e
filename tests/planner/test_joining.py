"""What joins int8 regions and what does not, each with its reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, make_model, node, random
from lowering_support import make, outlined, verdicts

X = {"x": [1, 8, 8, 8]}
FILTERS: dict[str, Any] = {f"w{k}": random(8, 8, 3, 3, seed=k) * np.float32(0.2) for k in range(3)}
LINEAR = {"m0": random(32, 32), "m1": random(32, 32, seed=1), "m2": random(32, 32, seed=2)}
JOINED_ONLY = "float: only float operators read its result: int8 would be converted back at once"
NOT_INT8 = "float: what it reads is float: int8 here would only add conversions"
TWICE = np.array([1, 1, 2, 2], np.float32)
BORDER = np.array([0, 0, 1, 1, 0, 0, 1, 1])


def op(kind: str, inputs: str, result: str, **more: Any) -> onnx.NodeProto:
    return node(kind, inputs, result, name=result.split()[0], **more)


def conv(source: str, weight: str, result: str) -> onnx.NodeProto:
    return op("Conv", f"{source} {weight}", result, pads=[1, 1, 1, 1])


def between(nodes: list[onnx.NodeProto], extra: dict[str, Any] | None = None, opset: int = 17,
            inputs: dict[str, Any] | None = None, outputs: dict[str, Any] | None = None) -> onnx.ModelProto:
    """x -> Conv -> a and x -> Conv -> b; nodes; j -> Conv -> y."""
    return make_model([conv("x", "w0", "a"), conv("x", "w1", "b"), *nodes, conv("j", "w2", "y")],
                      {**X, **(inputs or {})}, {"y": [None] * 4, **(outputs or {})}, {**FILTERS, **(extra or {})},
                      opset=opset)


def mean(source: str, result: str, axes: list[int], keepdims: int = 1) -> onnx.NodeProto:
    return op("ReduceMean", source, result, axes=axes, keepdims=keepdims)


# name: nodes from a and b to j, constants, the kernel of each node
JOINS: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], dict[str, str]]] = {
    "a gate": ([op("Sigmoid", "b", "s"), op("Mul", "a s", "j")], {}, {"s": "QLinearSigmoid", "j": "QLinearMul"}),
    "squeeze and excite": (
        [op("GlobalAveragePool", "a", "g"), conv("g", "w1", "c"), op("HardSigmoid", "c", "h"), op("Mul", "a h", "j")],
        {}, {"g": "QLinearGlobalAveragePool", "c": "QLinearConv", "h": "QLinearAdd", "j": "QLinearMul"}),
    "HardSwish": ([op("HardSwish", "a", "j")], {}, {"j/gate": "QLinearAdd", "j": "QLinearMul"}),
    "LeakyRelu": ([op("LeakyRelu", "a", "j")], {}, {"j": "QLinearLeakyRelu"}),
    "PRelu of one slope": ([op("PRelu", "a p", "j")], {"p": np.full((8, 1, 1), 0.1, np.float32)},
                           {"j": "QLinearLeakyRelu"}),
    "a number": ([op("Add", "a b", "i"), op("Mul", "i k", "j")], {"k": np.float32(0.1)},
                 {"i": "QLinearAdd", "j": "QLinearMul"}),
    "a plane": ([op("Add", "k a", "j")], {"k": random(1, 1, 8, 8)}, {"j": "QLinearAdd"}),
    "a mask": ([op("Mul", "k a", "j")], {"k": np.eye(8, dtype=np.float32)}, {"j": "QLinearMul"}),
    "a stored row": ([op("Concat", "a k", "j", axis=2)], {"k": random(1, 8, 1, 8)}, {"j": "QLinearConcat"}),
    "mean": ([mean("a", "m", [2, 3]), op("Mul", "a m", "j")], {},
             {"m": "QLinearGlobalAveragePool", "j": "QLinearMul"}),
    "mean without dimensions": (
        [mean("a", "m", [-1, -2], 0), op("Unsqueeze", "m ax", "u"), op("Mul", "a u", "j")], {"ax": np.array([2, 3])},
        {"m": "QLinearGlobalAveragePool", "u": "Unsqueeze", "j": "QLinearMul"}),
    "Relu beside a reader": ([op("Relu", "a", "r"), op("Add", "a r", "j")], {}, {"r": "Clip", "j": "QLinearAdd"}),
    "Resize": ([op("Resize", "a _ two", "j", mode="nearest")], {"two": TWICE}, {"j": "Resize"}),
    "Pad": ([op("Pad", "a border", "j")], {"border": BORDER}, {"j": "Pad"}),
    "Pad with 0": ([op("Pad", "a border zero", "j")], {"border": BORDER, "zero": np.float32(0)}, {"j": "Pad"}),
    "Pad by reflection": ([op("Pad", "a border", "j", mode="reflect")], {"border": BORDER}, {"j": "Pad"}),
    "Slice": ([op("Slice", "a zero four ax", "j")], {"zero": np.array([0]), "four": np.array([4]), "ax": np.array([3])},
              {"j": "Slice"}),
    "Split": ([op("Split", "a parts", "s t", axis=1), op("Concat", "t s", "j", axis=1)], {"parts": np.array([2, 6])},
              {"s": "Split", "j": "QLinearConcat"}),
    "Gather of channels": ([op("Gather", "a order", "j", axis=1)], {"order": np.arange(8)[::-1].copy()},
                           {"j": "Gather"}),
    "Expand": ([op("GlobalAveragePool", "a", "g"), op("Expand", "g full", "j")], {"full": np.array([1, 8, 8, 8])},
               {"g": "QLinearGlobalAveragePool", "j": "Expand"}),
    "DepthToSpace": ([op("Concat", "a b a b", "c", axis=1), op("DepthToSpace", "c", "j", blocksize=2)], {},
                     {"c": "QLinearConcat", "j": "DepthToSpace"}),
}


@pytest.mark.parametrize("case", JOINS)
def test_what_joins(case: str, opened: Opener) -> None:
    nodes, extra, wanted = JOINS[case]
    found = verdicts(opened(between(nodes, extra)))
    assert {n: k for n, k in found.items() if n not in ("a", "b", "y")} == wanted


# name: nodes, constants, the node, its reason
STAYS: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], str, str]] = {
    "float beside int8": ([op("Exp", "a", "e"), op("Mul", "a e", "j")], {}, "j", NOT_INT8),
    "factors of a wide range": ([op("Mul", "a k", "j")], {"k": random(1, 1, 8, 8)}, "j",
                                "float: its factors differ too much for one scale"),
    "infinite": ([op("Add", "a k", "j")], {"k": np.array([[[[0, np.inf]]]], np.float32).repeat(4, 3)}, "j",
                 "float: its constant is empty or holds NaN or infinite values"),
    "slope per channel": ([op("PRelu", "a p", "j")], {"p": random(8, 1, 1)}, "j",
                          "float: a slope per channel has no int8 kernel"),
    "falling HardSigmoid": ([op("HardSigmoid", "a", "j", alpha=-0.2)], {}, "j", "float: its slope is not positive"),
    "mean over rows": ([mean("a", "j", [2])], {}, "j",
                       "float: the int8 kernel averages over all of height and width, and over nothing else"),
    "linear Resize": ([op("Resize", "a _ two", "j", mode="linear")], {"two": TWICE}, "j",
                      "float: interpolating codes is slower than interpolating floats, and rounds down"),
    "cubic Resize": ([op("Resize", "a _ two", "j", mode="cubic")], {"two": TWICE}, "j",
                     "float: no int8 kernel for a cubic Resize"),
    "cropping Resize": ([op("Resize", "a roi two", "j", coordinate_transformation_mode="tf_crop_and_resize")],
                        {"two": TWICE, "roi": np.array([0, 0, 0, 0, 1, 1, 2, 2], np.float32)}, "j",
                        "float: a Resize that crops fills in a value that may be no code"),
    "Pad with 1": ([op("Pad", "a border one", "j")], {"border": BORDER, "one": np.float32(1)}, "j",
                   "float: it pads with another value than 0, the only one that is always a code"),
    "SpaceToDepth": ([op("SpaceToDepth", "a", "d", blocksize=2), op("Slice", "d zero eight one", "j")],
                     {"zero": np.array([0]), "eight": np.array([8]), "one": np.array([1])}, "d",
                     "float: its kernel takes codes from a later onnxruntime than 1.25 on"),
    "before a float reader": ([op("Resize", "a _ two", "r"), op("Exp", "r", "j")], {"two": TWICE}, "r", JOINED_ONLY),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_stays_float_says_why(case: str, opened: Opener) -> None:
    nodes, extra, name, reason = STAYS[case]
    found = verdicts(opened(between(nodes, extra)))
    assert found[name] == reason
    assert (found["a"], found["y"]) == ("QLinearConv", "QLinearConv")


def test_a_look_up_is_no_movement_of_codes(opened: Opener) -> None:
    model = between([op("Gather", "table ids", "e"), op("Mul", "a e", "j")], {"table": random(20, 8, 1, 1)},
                    inputs={"ids": (onnx.TensorProto.INT64, [1])})
    found = verdicts(opened(model))
    assert (found["e"], found["j"]) == ("float: a look-up in a table that is too small to gain from int8", "QLinearMul")


def test_what_is_computed_between_codes_may_be_joined_with_codes(opened: Opener) -> None:
    """A float Resize or ConvTranspose, a Relu behind it too, gets a Q of its own: the Concat behind stays int8."""
    nodes = [op("Resize", "a _ two", "up", mode="linear"), op("ConvTranspose", "b wt", "ct", strides=[2, 2]),
             op("Relu", "ct", "r"), op("Concat", "up r", "c", axis=1), op("Gather", "c even", "j", axis=1)]
    found = outlined(opened(between(nodes, {"two": TWICE, "wt": random(8, 8, 2, 2), "even": np.arange(0, 16, 2)})))
    kinds = {n.node: n.lowering for n in found.nodes.values()}
    assert [kinds[n] for n in ("up", "ct", "r", "c")] == ["float", "float", "float", "QLinearConcat"]
    assert {"up", "r", "c"} <= set(found.ranges_of)
    assert "ct" not in found.ranges_of


def test_a_gate_of_one_number_per_channel_may_be_float(opened: Opener) -> None:
    """Its Q costs nothing; a product with a float image would need one of the whole image."""
    model = between([op("Mul", "gate a", "j")], inputs={"gate": [1, 8, 1, 1]})
    assert verdicts(opened(model))["j"] == "QLinearMul"
    image = between([op("Mul", "gate a", "j")], inputs={"gate": [1, 8, 8, 8]})
    assert verdicts(opened(image))["j"] == NOT_INT8
    nothing_wide = between([op("Mul", "gate gate2", "g"), op("Add", "a g", "j")],
                           inputs={"gate": [1, 8, 1, 1], "gate2": [1, 8, 1, 1]})
    found = verdicts(opened(nothing_wide))
    assert (found["g"], found["j"]) == (NOT_INT8, "QLinearAdd")


def test_a_gate_from_linear_layers(opened: Opener) -> None:
    """The Sigmoid stays float behind the linear layer, the product of the image joins."""
    stored = {"m": random(8, 32) * np.float32(0.3), "n": random(32, 16) * np.float32(0.3), "w16": random(16, 8, 3, 3),
              "w17": random(8, 16, 3, 3), "shape": np.array([1, 16, 1, 1])}
    model = make_model([
        op("Conv", "x w16", "a", pads=[1, 1, 1, 1]), op("GlobalAveragePool", "a", "g"), op("Flatten", "g", "f"),
        op("MatMul", "f n2", "h"), op("MatMul", "h n", "e"), op("Sigmoid", "e", "s"), op("Reshape", "s shape", "r"),
        op("Mul", "a r", "j"), op("Conv", "j w17", "y", pads=[1, 1, 1, 1])], X, {"y": None},
        {**stored, "n2": random(16, 32)})
    found = verdicts(opened(model))
    assert found["s"] == "float: it is behind a linear layer, whose kernel hands on float at no cost"
    assert (found["e"], found["j"], found["y"]) == ("MatMulIntegerToFloat", "QLinearMul", "QLinearConv")


def test_gated_linear_layers_stay_float_between_the_products(opened: Opener) -> None:
    """SwiGLU: its elementwise part costs as much in int8, and the outliers of its product cost accuracy."""
    model = make_model([op("MatMul", "x m0", "g"), op("MatMul", "x m1", "u"), op("Sigmoid", "g", "s"),
                        op("Mul", "g s", "silu"), op("Mul", "silu u", "p"), op("MatMul", "p m2", "y")],
                       {"x": [4, 32]}, {"y": None}, LINEAR)
    found = verdicts(opened(model))
    assert found["s"] == "float: it is behind a linear layer, whose kernel hands on float at no cost"
    assert {found[n] for n in ("g", "u", "y")} == {"MatMulIntegerToFloat"}
    assert found["silu"] == found["p"] == NOT_INT8


def test_a_relu_behind_a_linear_layer_stays_float(opened: Opener) -> None:
    """Its kernel hands on float, so a Q in front of the Relu would halve the codes."""
    model = make_model([op("MatMul", "x m0", "m"), op("Add", "m b", "h"), op("Relu", "h", "r"),
                        op("MatMul", "r m1", "n"), op("Neg", "h", "z"), op("Add", "n z", "y")], {"x": [4, 32]},
                       {"y": None}, {**LINEAR, "b": random(32)})
    assert verdicts(opened(model))["r"] == (
        "float: a Relu or Clip is free inside an int8 kernel in front of it, and there is none")


def test_a_split_has_all_that_is_read_of_it_as_results(opened: Opener) -> None:
    nodes = [op("Split", "a parts", "s t u", axis=1), op("Exp", "t", "e"), op("Concat", "s s", "j", axis=1)]
    model = between(nodes, {"parts": np.array([4, 2, 2])}, outputs={"e": None})
    found = outlined(opened(model))
    assert (found.nodes["s"].result, found.nodes["s"].more_results) == ("s", ("t",))
    assert found.same_as == {"s": "a", "t": "a"}


def test_ranges_that_need_no_data(opened: Opener) -> None:
    nodes = [op("Sigmoid", "b", "s"), op("Mul", "a s", "p"), op("Add", "p k", "j")]
    found = outlined(opened(between(nodes, {"k": np.array([[[[-3.0] * 7 + [5.0]]]], np.float32)})))
    assert found.known == {"s": (0.0, 1.0), "k": (-3.0, 5.0)}
    assert found.ranges_of == ["x", "a", "b", "p", "j", "y"]


def test_an_axis_that_is_computed_or_missing_is_no_mean_over_height_and_width(opened: Opener) -> None:
    nodes = [op("ReduceMean", "a axes", "j")]
    computed = between(nodes, opset=18, inputs={"axes": (onnx.TensorProto.INT64, [2])})
    every = between([op("ReduceMean", "a", "j")], opset=18)
    reason = "float: the int8 kernel averages over all of height and width, and over nothing else"
    assert verdicts(opened(computed))["j"] == verdicts(opened(every))["j"] == reason
    given = between([op("ReduceMean", "a axes", "m"), op("Mul", "a m", "j")], {"axes": np.array([3, 2])}, opset=18)
    assert verdicts(opened(given))["m"] == "QLinearGlobalAveragePool"


def test_a_constant_that_a_kernel_reads_otherwise_is_stored_apart(tmp_path: Any) -> None:
    """One tensor as a weight [K, N] and as what is added to a product."""
    model = make_model([op("Conv", "x w0", "a", pads=[1, 1, 1, 1]), op("Add", "a k", "j"),
                        op("Conv", "j w1", "c", pads=[1, 1, 1, 1]), op("MatMul", "c k", "y")],
                       {"x": [1, 8, 16, 16]}, {"y": None}, {**FILTERS, "k": random(16, 16)})
    made = make(model, tmp_path, [{"x": random(1, 8, 16, 16)}])
    assert {n.lowering for n in made.plan.nodes.values()} == {"QLinearConv", "QLinearAdd", "MatMulIntegerToFloat"}
    stored = made.initializers()
    assert (stored["k.u8"].dtype, stored["k.q"].dtype) == (np.uint8, np.int8)
    wanted, found = made.run(made.source)["y"], made.run(made.compiled)["y"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.03 * np.abs(wanted).max())
