"""The verdict on each node: which run in integers, which stay float, and the reason that each is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, body, make_model, node, random
from lowering_support import NETWORK_FEEDS, make, network, outlined, verdicts
from onnx import TensorProto

from onnxq.plan import FLOAT
from onnxq.recipe import Match, Rule

X4 = {"x": [1, 8, 8, 8]}
ROWS = {"x": [4, 32]}
FILTERS = {f"w{k}": random(8, 8, 3, 3, seed=k) for k in range(5)}
LINEAR = {f"w{k}": random(32, 32, seed=k) for k in range(4)} | {f"b{k}": random(32, seed=9 + k) for k in range(4)}
JOINED_ONLY = "only float operators read its result: int8 would be converted back at once"
NOT_INT8 = "what it reads is float: int8 here would only add conversions"
NO_CLAMP = "a Relu or Clip is free inside an int8 kernel in front of it, and there is none"


def conv(source: str, weight: str, result: str, **more: Any) -> onnx.NodeProto:
    return node("Conv", f"{source} {weight}", result, name=result, pads=[1, 1, 1, 1], **more)


def op(kind: str, inputs: str, result: str, **more: Any) -> onnx.NodeProto:
    """A node named after its (first) result."""
    return node(kind, inputs, result, name=result.split()[0], **more)


def convs(nodes: list[onnx.NodeProto], outputs: dict[str, Any] | None = None, extra: dict[str, Any] | None = None,
          opset: int = 17) -> onnx.ModelProto:
    return make_model(nodes, X4, outputs or {"y": [None] * 4}, {**FILTERS, **(extra or {})}, opset=opset)


def linears(nodes: list[onnx.NodeProto], outputs: dict[str, Any] | None = None, extra: dict[str, Any] | None = None,
            opset: int = 17) -> onnx.ModelProto:
    return make_model(nodes, ROWS, outputs or {"y": None}, {**LINEAR, **(extra or {})}, opset=opset)


# ------------------------------------------------------------------ regions


def test_a_residual_block_absorbs_add_and_relu(opened: Opener) -> None:
    model = convs([conv("x", "w0", "c0"), op("Relu", "c0", "r0"), conv("r0", "w1", "c1"), op("Add", "c1 r0", "a"),
                   op("Relu", "a", "r1"), conv("r1", "w2", "y")])
    assert verdicts(opened(model)) == {
        "c0": "QLinearConv", "r0": "part of c0", "c1": "QLinearConv", "a": "QLinearAdd", "r1": "part of a",
        "y": "QLinearConv"}


def test_pre_activation_keeps_the_sum_and_its_relu_apart(opened: Opener) -> None:
    """The sum has two readers: the next block's Relu can't be the saturation of its codes, so it clips them."""
    model = convs([conv("x", "w0", "s"), op("Relu", "s", "r"), conv("r", "w1", "c"), op("Add", "c s", "a"),
                   op("Relu", "a", "r2"), conv("r2", "w2", "d"), op("Add", "d a", "e"), conv("e", "w3", "y")])
    assert verdicts(opened(model)) == {
        "s": "QLinearConv", "r": "Clip", "c": "QLinearConv", "a": "QLinearAdd", "r2": "Clip", "d": "QLinearConv",
        "e": "QLinearAdd", "y": "QLinearConv"}


def test_a_tail_stays_float(opened: Opener) -> None:
    model = convs([conv("x", "w0", "c"), op("Add", "c c", "a"), op("GlobalAveragePool", "a", "g"),
                   op("Softmax", "g", "y")])
    assert verdicts(opened(model)) == {
        "c": "QLinearConv", "a": f"float: {JOINED_ONLY}", "g": f"float: {JOINED_ONLY}",
        "y": "float: Softmax stays float: 8 bits are too coarse for its exponentials"}


def test_what_joins_on_one_side_only_stays_float(opened: Opener) -> None:
    model = convs([conv("x", "w0", "c"), op("Exp", "x", "e"), op("Add", "c e", "a"),
                   op("Concat", "c c e", "cat", axis=2), op("MaxPool", "e", "p", kernel_shape=[2, 2]),
                   conv("a", "w1", "d"), conv("cat", "w2", "f"), conv("p", "w3", "g")], dict.fromkeys("dfg"))
    found = verdicts(opened(model))
    assert {found[n] for n in ("a", "cat", "p")} == {f"float: {NOT_INT8}"}
    assert found["e"] == "float: onnxq has no int8 form of Exp on cpu"


def test_a_result_of_int8_and_float_readers_counts_as_codes_for_a_conv(opened: Opener) -> None:
    model = convs([conv("x", "w0", "c"), op("Exp", "c", "e"), op("MaxPool", "c", "p", kernel_shape=[2, 2]),
                   conv("p", "w1", "y")], {"y": None, "e": None})
    assert verdicts(opened(model)) == {"c": "QLinearConv", "e": "float: onnxq has no int8 form of Exp on cpu",
                                       "p": "MaxPool", "y": "QLinearConv"}


@pytest.mark.parametrize(("nodes", "extra", "reason"), [
    ([op("MaxPool", "c", "j i", kernel_shape=[2, 2])], {},
     "its indices are read, which the int8 kernel does not give"),
    ([op("AveragePool", "c", "j", kernel_shape=[2, 2], dilations=[2, 2])], {}, "the int8 kernel knows no dilations"),
    ([op("AveragePool", "c", "j", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1,
         count_include_pad=1)], {}, "the int8 kernel counts other elements where a window hangs over the padding"),
], ids=["indices", "dilations", "ceil"])
def test_forms_that_no_kernel_takes(nodes: list[onnx.NodeProto], extra: dict[str, Any], reason: str,
                                    opened: Opener) -> None:
    outputs: dict[str, Any] = {"y": None}
    if "i" in nodes[0].output:
        outputs["i"] = (TensorProto.INT64, None)
    model = convs([conv("x", "w0", "c"), *nodes, conv("j", "w1", "y")], outputs, extra, opset=19)
    assert verdicts(opened(model))[nodes[0].output[0]] == f"float: {reason}"


@pytest.mark.parametrize(("low", "high", "verdict"), [
    (0, 6, "part of c"), (-1, 1, "part of c"), (None, 6, "part of c"), (0, None, "part of c"),
    (1, 5, "Clip"), (-5, -1, "Clip"), ("computed", 6, "float: its bounds are computed at run time")])
def test_a_clip_is_absorbed_where_it_lets_0_pass_and_clips_codes_elsewhere(low: Any, high: Any, verdict: str,
                                                                           opened: Opener) -> None:
    bounds = {k: np.float32(v) for k, v in (("low", low), ("high", high)) if v not in (None, "computed")}
    inputs = f"c {'_' if low is None else 'low'} {'_' if high is None else 'high'}"
    nodes = [conv("x", "w0", "c"), op("Clip", inputs, "k"), conv("k", "w1", "y")]
    if low == "computed":
        nodes.insert(0, op("ReduceMin", "x", "low", keepdims=0))
    assert verdicts(opened(convs(nodes, extra=bounds)))["k"] == verdict


def test_a_clamp_of_two_readers_is_absorbed_and_one_beside_another_reader_is_not(opened: Opener) -> None:
    model = convs([conv("x", "w0", "c"), op("Relu", "c", "r"), conv("r", "w1", "d"), op("Relu", "d", "r1"),
                   op("Add", "r r1", "a"), op("Add", "a d", "e"), conv("e", "w2", "y")])
    found = verdicts(opened(model))
    assert found["r"] == "part of c"  # both its readers get the clamped codes
    assert found["r1"] == "Clip"  # d itself is read besides


def test_a_graph_output_in_front_of_a_relu_is_not_clamped(opened: Opener) -> None:
    model = convs([conv("x", "w0", "c"), op("Relu", "c", "r"), conv("r", "w1", "y")], {"y": None, "c": None})
    assert verdicts(opened(model)) == {"c": "QLinearConv", "r": "Clip", "y": "QLinearConv"}


# ------------------------------------------------------------------ linear layers


def test_linear_layers_by_who_reads_them(opened: Opener) -> None:
    model = linears([
        op("MatMul", "x w0", "m"), op("Relu", "m", "r"), op("MatMul", "r w1", "n"),  # integer result, Relu absorbed
        op("Add", "n b0", "nb"), op("Gemm", "nb w2 b1", "g"), op("Relu", "g", "gr"),  # MatMul with bias: float result
        op("Gemm", "gr w3 b2", "h"), op("Exp", "h", "y")])
    found = outlined(opened(model)).nodes
    assert {n.node: n.lowering for n in found.values()} == {
        "m": "QLinearMatMul", "r": "QLinearMatMul", "n": "MatMulIntegerToFloat", "nb": "MatMulIntegerToFloat",
        "g": "QGemm", "gr": "QGemm", "h": "QGemm", "y": "float"}
    assert {n.node for n in found.values() if n.int_output} == {"m", "g"}
    assert found["n"].bias_add == "nb"
    assert found["h"].reason.endswith("so that they and what it reads are int8; its result is float")


def test_a_relu_in_front_of_float_readers_is_left_to_them(opened: Opener) -> None:
    model = linears([op("MatMul", "x w0", "m"), op("Relu", "m", "r"), op("Exp", "r", "y")])
    assert verdicts(opened(model)) == {"m": "MatMulIntegerToFloat", "r": f"float: {NO_CLAMP}",
                                       "y": "float: onnxq has no int8 form of Exp on cpu"}


def test_a_residual_add_of_linear_layers_follows_their_results(opened: Opener) -> None:
    gemms = linears([op("Gemm", "x w0 b0", "g"), op("Gemm", "g w1 b1", "h"), op("Add", "g h", "a"),
                     op("Gemm", "a w2 b2", "y")])
    assert verdicts(opened(gemms)) == {"g": "QGemm", "h": "QGemm", "a": "QLinearAdd", "y": "QGemm"}
    # a MatMul with bias hands on float: two Q more would be dearer than a float Add
    matmuls = linears([op("MatMul", "x w0", "m"), op("Add", "m b0", "g"), op("MatMul", "g w1", "n"),
                       op("Add", "n b1", "h"), op("Add", "g h", "a"), op("Add", "a g", "a2"),
                       op("MatMul", "a2 w2", "y")])
    found = verdicts(opened(matmuls))
    assert found["a"] == found["a2"] == "float: what it reads is float: int8 here would only add conversions"
    assert found["y"] == "MatMulIntegerToFloat"


@pytest.mark.parametrize(("k", "n", "reason"), [
    (16, 16, None), (15, 64, "it reads 15 columns (K), below 16: converting costs more than int8 gains"),
    (64, 10, "it makes 10 columns (N), below 16: converting costs more than int8 gains")])
@pytest.mark.parametrize("name", ["w8a8", "w8a8-dynamic-tensor"])
def test_small_linear_layers_stay_float(k: int, n: int, reason: str | None, name: str, opened: Opener) -> None:
    model = make_model([op("MatMul", "x w", "m"), op("Gemm", "x t", "y", transB=1)], {"x": [4, k]},
                       {"m": None, "y": None}, {"w": random(k, n), "t": random(n, k)})
    found = verdicts(opened(model), name)
    for layer in "my":
        assert found[layer] == f"float: {reason}" if reason else not found[layer].startswith("float")


FORMS: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], str]] = {
    "constant on the left": ([op("MatMul", "w0 x", "y")], {"x": [32, 4]},
                             "its constant is on the left side, and M = 32 is below 128: converting costs more than "
                             "int8 gains"),
    "two activations": ([op("MatMul", "x z", "y")], {"x": [4, 32], "z": [32, 32]},
                        "it multiplies two computed tensors: there is no stored weight to make int8"),
    "computed weights of a Gemm": ([op("Gemm", "x z", "y")], {"x": [4, 32], "z": [32, 32]},
                                   "its weights are computed at run time"),
    "computed weights of a Conv": ([op("Conv", "x z", "y")], {"x": [1, 8, 4, 4], "z": [8, 8, 1, 1]},
                                   "its weights are computed at run time"),
    "computed bias": ([op("Gemm", "x w0 z", "y")], {"x": [4, 32], "z": [32]}, "its bias is computed at run time"),
    "transA": ([op("Gemm", "x w0 b0", "y", transA=1)], {"x": [32, 4]},
               "its form (transA, or a bias that is not one number per column) has no int8 kernel"),
    "bias per row": ([op("Gemm", "x w0 rows", "y")], {"x": [4, 32]},
                     "its form (transA, or a bias that is not one number per column) has no int8 kernel"),
    "rank 1": ([op("MatMul", "x w0", "y")], {"x": [32]}, "its activation has rank 1"),
    "weight of rank 3": ([op("MatMul", "x w_3d", "y")], {"x": [2, 4, 32]},
                         "its weight has rank 3, and the int8 kernels take rank 2"),
    "3-D Conv": ([op("Conv", "x k3", "y")], {"x": [1, 4, 4, 4, 4]},
                 "a 3-D Conv whose filters read 4 channels, below 24, is faster in float"),
}


@pytest.mark.parametrize("case", FORMS)
def test_forms_without_constant_weights_or_kernel(case: str, opened: Opener) -> None:
    nodes, inputs, reason = FORMS[case]
    extra = {"rows": random(4, 32), "w_3d": random(2, 32, 32), "k3": random(4, 4, 1, 1, 1)}
    model = make_model(nodes, inputs, {"y": None}, LINEAR | extra)
    stored = "stored: weights stored as int8 to save space, computed in float"  # where they are large enough
    assert verdicts(opened(model))["y"] in (f"float: {reason}", f"{stored}: {reason}")


def test_double_weights_are_left_alone(opened: Opener) -> None:
    model = make_model([op("MatMul", "x w", "y")], {"x": (TensorProto.DOUBLE, [4, 32])},
                       {"y": (TensorProto.DOUBLE, [4, 32])}, {"w": np.ones((32, 32))})
    assert verdicts(opened(model)) == {"y": "float: it makes float64, and only float32 is quantized"}


# ------------------------------------------------------------------ kept float


def test_a_relu_that_is_asked_for_is_not_absorbed(opened: Opener) -> None:
    model = convs([conv("x", "w0", "c"), op("Relu", "c", "r"), conv("r", "w1", "y")])
    assert verdicts(opened(model), keep=["r"]) == {"c": "QLinearConv", "r": "float: kept float as asked (r)",
                                                   "y": "QLinearConv"}


def test_a_bias_add_that_is_asked_for_is_not_absorbed(opened: Opener) -> None:
    model = linears([op("MatMul", "x w0", "m"), op("Add", "m b0", "a"), op("Relu", "a", "y")])
    found = verdicts(opened(model), keep=["b0"])
    assert (found["m"], found["a"]) == ("MatMulIntegerToFloat", "float: kept float as asked (b0)")


def test_rules_go_in_order_and_keep_float_comes_first(opened: Opener) -> None:
    model = linears([op("MatMul", "x w0", "first"), op("MatMul", "first w1", "head"), op("MatMul", "head w2", "y")])
    rules = [Rule(Match(name="head"), "w8a8"), Rule(Match(op="MatMul", name="{head,y}"), "float", "near the output")]
    found = verdicts(opened(model), rules=rules, keep=["first"])
    assert found == {"first": "float: kept float as asked (first)", "head": "MatMulIntegerToFloat",
                     "y": "float: near the output"}


# ------------------------------------------------------------------ all the rest has a reason


def test_bodies_and_control_flow_are_float_with_the_reason(opened: Opener) -> None:
    then = body([node("MatMul", "m w1", "t", name="inner"), node("Relu", "t", "tr", name="inner_relu")], {"tr": None})
    other = body([node("Neg", "m", "e", name="other")], {"e": None})
    model = make_model([op("MatMul", "x w0", "m"), op("If", "c", "y", then_branch=then, else_branch=other)],
                       {**ROWS, "c": (TensorProto.BOOL, [])}, {"y": None}, LINEAR)
    inside = "in a body of If y, where calibration does not look"
    assert verdicts(opened(model)) == {
        "m": "MatMulIntegerToFloat", "y": "float: it only chooses what runs; see the nodes inside",
        "inner": f"stored: weights stored as int8 to save space, computed in float: {inside}",
        "inner_relu": f"float: {inside}", "other": f"float: {inside}"}
    assert verdicts(opened(model), keep=["inner"])["inner"] == f"float: {inside}"


def test_a_relu_inside_of_a_body_is_never_absorbed(opened: Opener) -> None:
    then = body([node("Relu", "c", "t", name="inner")], {"t": None})
    other = body([node("Neg", "x", "e", name="other")], {"e": None})
    model = make_model([conv("x", "w0", "c"), op("If", "p", "y", then_branch=then, else_branch=other)],
                       {**X4, "p": (TensorProto.BOOL, [])}, {"y": None}, FILTERS)
    found = outlined(opened(model))
    assert found.nodes["c"].result == "c"
    assert found.ranges_of == ["x", "c"]


def test_norms_softmax_lookups_and_integers_say_what_they_are(opened: Opener) -> None:
    model = make_model([op("Gather", "table ids", "e"), op("LayerNormalization", "e g", "n"), op("Softmax", "n", "s"),
                        op("ArgMax", "s", "y"), op("Foo", "n", "f", domain="acme")],
                       {"ids": (TensorProto.INT64, [4])}, {"y": (TensorProto.INT64, None), "f": None},
                       {"table": random(9, 32), "g": random(32)}, domains={"acme": 1})
    assert verdicts(opened(model)) == {
        "e": "float: a look-up in a table that is too small to gain from int8",
        "n": "float: normalisations stay float: 8 bits are too coarse for their mean and variance",
        "s": "float: Softmax stays float: 8 bits are too coarse for its exponentials",
        "y": "float: it makes int64, and only float32 is quantized",
        "f": "float: operator acme.Foo is not known here"}


@pytest.mark.parametrize("name", ["w8a8", "w8a8-dynamic-tensor", "float"])
def test_every_node_has_one_verdict_and_a_reason(name: str, opened: Opener) -> None:
    graph = opened(network())
    found = outlined(graph, name)
    assert set(found.nodes) == {n.name for n in graph.nodes}
    assert all(n.reason for n in found.nodes.values())
    if name == "float":
        assert {n.reason for n in found.nodes.values()} == {"the scheme is float"}
        assert found.ranges_of == []


def test_a_dynamic_scheme_takes_linear_layers_only(opened: Opener) -> None:
    found = outlined(opened(network()), "w8a8-dynamic-tensor")
    assert {n.node: n.lowering for n in found.nodes.values() if n.scheme != FLOAT} == {
        "Gemm_h": "DynamicQuantizeMatMul", "MatMul_m": "DynamicQuantizeMatMul", "Add_y": "DynamicQuantizeMatMul"}
    assert found.nodes["Conv_c0"].reason == "scheme w8a8-dynamic-tensor quantizes MatMul, Gemm, LSTM alone"
    assert found.ranges_of == []


@pytest.mark.parametrize("shape", [[1, 1, 32], [1, 4, 32]])
def test_an_add_that_raises_the_rank_or_adds_rows_is_no_bias(shape: list[int], tmp_path: Path) -> None:
    model = make_model([op("MatMul", "x w0", "m"), op("Add", "m k", "y")], ROWS, {"y": None},
                       {**LINEAR, "k": random(*shape)})
    made = make(model, tmp_path, [{"x": random(4, 32)}])
    assert made.plan.nodes["m"].bias_add is None
    wanted = made.run(made.source)["y"]
    found = made.run(made.compiled)["y"]
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.03 * np.abs(wanted).max())


def test_ranges_are_asked_for_once_and_for_codes_only(opened: Opener) -> None:
    found = outlined(opened(network()))
    assert found.ranges_of == ["x", "r0", "k1", "c2", "r1", "c3", "c4", "cat", "ap", "c5", "g", "hr"]
    assert found.same_as == {"p": "r1", "t": "p", "s": "g", "u": "s", "rs": "u", "f": "rs"}


def test_a_name_that_codes_would_take_leaves_a_node_float(tmp_path: Path) -> None:
    """Legal, and what a model has that was compiled once."""
    model = make_model([op("MatMul", "x w0", "m"), op("MatMul", "m w1", "n"), op("Exp", "x", "x.q"),
                        op("Add", "n x.q", "y")], ROWS, {"y": None}, LINEAR)
    made = make(model, tmp_path, [{"x": random(4, 32)}])
    taken = "the model has a tensor 'x.q' already, a name that its codes would take"
    assert made.plan.nodes["m"].reason.endswith(f": {taken}")
    assert made.plan.nodes["n"].lowering == "MatMulIntegerToFloat"


def test_calibrated_network_plans_the_same_twice(tmp_path: Path) -> None:
    plans = [make(network(), tmp_path, NETWORK_FEEDS).plan for _ in range(2)]
    assert plans[0].digest() == plans[1].digest()
