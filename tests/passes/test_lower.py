"""Lowering: what a plain default session then runs, in both formats; what must stay float does; near misses say why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random
from lowering_support import (
    BOTH_FORMATS,
    CPU,
    FORMATS,
    NETWORK_FEEDS,
    ONE_THREAD,
    Made,
    codes_of,
    described,
    make,
    network,
)

from onnxq.graph import load, read_nodes
from onnxq.passes.lower import lower
from onnxq.passes.lower.fence_float import FenceFloat
from onnxq.passes.manager import Context, PassManager
from onnxq.passes.quantize import quantize
from onnxq.runtime.observe import executed
from onnxq.verification import is_integer

X = {"x": [1, 8, 8, 8]}
WEIGHTS = {f"w{k}": random(8, 8, 3, 3, seed=k) * np.float32(0.2) for k in range(3)}
FEED = {"x": random(1, 8, 8, 8, seed=9)}


def conv(source: str, weight: str, result: str, **more: Any) -> onnx.NodeProto:
    return node("Conv", f"{source} {weight}", result, pads=[1, 1, 1, 1], **more)


def between(nodes: list[onnx.NodeProto], result: str = "j", extra: dict[str, Any] | None = None,
            outputs: dict[str, Any] | None = None, opset: int = 17) -> onnx.ModelProto:
    """x -> Conv -> a and x -> Conv -> b; nodes; `result` -> Conv -> y."""
    return make_model([conv("x", "w0", "a"), conv("x", "w1", "b"), *nodes, conv(result, "w2", "y")], X,
                      {"y": [None] * 4, **(outputs or {})}, {**WEIGHTS, **(extra or {})}, opset=opset)


def close(made: Made, least_db: float = 25.0) -> None:
    """The deployed model agrees with float, and with its unoptimized self to float rounding."""
    wanted = made.run(made.source)
    deployed = made.run(made.compiled)
    plain = made.run(made.compiled, optimize=False)
    twin = made.run(made.twin, optimize=False)
    for name, right in wanted.items():
        noise = np.square(deployed[name] - right, dtype=np.float64).sum()
        assert noise <= np.square(right, dtype=np.float64).sum() * 10 ** (-least_db / 10)
        reach = np.abs(right).max()
        for other in (plain, twin):
            np.testing.assert_allclose(deployed[name], other[name], rtol=0, atol=1e-4 * reach, err_msg=name)


# ------------------------------------------------------------------ whole networks


@BOTH_FORMATS
@pytest.mark.parametrize("opset", [13, 17, 21, 23, 26])
def test_every_kernel_of_a_region_runs_in_integers(opset: int, fmt: str, tmp_path: Path) -> None:
    made = make(network(opset), tmp_path, NETWORK_FEEDS, fmt)
    assert made.skips == []
    assert [described(p) for p in made.plan.nodes.values()] == [
        "QLinearConv", "part of Conv_c0", "QLinearConv", "part of Conv_c1", "QLinearConv", "QLinearAdd",
        "part of Add_a", "MaxPool", "Transpose", "QLinearConv", "QLinearConv", "QLinearConcat", "QLinearConv",
        "QLinearConv", "QLinearGlobalAveragePool", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "QGemm",
        "part of Gemm_h", "MatMulIntegerToFloat", "part of MatMul_m"]
    ran = made.rows()  # finds no fault
    assert {r.ran_as.rpartition(".")[2] for r in ran.values() if r.op == "Conv"} == {"QLinearConv"}
    # one Q in front, no DQ: codes from end to end
    assert made.ops().count("QuantizeLinear") == 1
    assert "DequantizeLinear" not in made.ops()
    close(made)


def test_lowered_form_holds_integer_operators_only(tmp_path: Path) -> None:
    made = make(network(), tmp_path, NETWORK_FEEDS)
    assert made.stored() == [
        "QuantizeLinear", "QLinearConv", "QLinearConv", "QLinearConv", "QLinearAdd", "MaxPool", "Transpose",
        "QLinearConv", "QLinearConv", "QLinearConcat", "QLinearConv", "QLinearConv", "QLinearGlobalAveragePool",
        "Squeeze", "Unsqueeze", "Reshape", "Flatten", "QGemm", "MatMulIntegerToFloat"]
    stored = made.initializers()
    assert {n for n, v in stored.items() if v.dtype == np.float32 and v.size > 32} == set()  # no float weight is left


def test_qdq_form_is_portable(tmp_path: Path) -> None:
    made = make(network(), tmp_path, NETWORK_FEEDS, "qdq")
    model = onnx.load(made.compiled)
    onnx.checker.check_model(model, full_check=True)
    assert {o.domain for o in model.opset_import} <= {"", "ai.onnx"}
    assert {n.op_type for n in model.graph.node} == {
        "Add", "AveragePool", "Concat", "Conv", "DequantizeLinear", "Flatten", "Gemm", "GlobalAveragePool", "MatMul",
        "MaxPool", "QuantizeLinear", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_second_run_edits_nothing(fmt: str, tmp_path: Path) -> None:
    model = between([node("Sigmoid", "a", "s"), node("Add", "s b", "j")])
    made = make(model, tmp_path, [FEED], fmt)
    context = Context(CPU, made.plan)
    for step in [*quantize(), *lower(fmt)]:
        assert PassManager([step]).run(made.graph, context) is False, step.name


def test_metadata_of_a_node_stays_with_its_kernel(tmp_path: Path) -> None:
    model = network()
    for item in model.graph.node:
        item.metadata_props.add(key="namespace", value=f"scope/{item.name}")
    made = make(model, tmp_path, NETWORK_FEEDS)
    found = {n.name: {p.key: p.value for p in n.metadata_props} for n in onnx.load(made.compiled).graph.node}
    assert found["Conv_c0"] == {"namespace": "scope/Conv_c0"}
    assert found["Gemm_h"] == {"namespace": "scope/Gemm_h"}
    assert found["MatMul_m"] == {"namespace": "scope/MatMul_m"}


# ------------------------------------------------------------------ edges of regions


@BOTH_FORMATS
def test_a_graph_output_inside_of_a_region_keeps_its_name_and_values(fmt: str, tmp_path: Path) -> None:
    model = between([node("Add", "a b", "i"), node("Relu", "i", "j")], outputs={"a": [None] * 4, "j": [None] * 4})
    made = make(model, tmp_path, [FEED], fmt)
    assert made.ran("Conv_a", "Add_i", "Relu_j", "Conv_y") == ["QLinearConv", "QLinearAdd", "QLinearAdd", "QLinearConv"]
    found = made.run(made.compiled)
    assert list(found) == ["y", "a", "j"]
    for name in "aj":
        # what a caller gets are decoded codes, and those are at most the rounding of what came before away from float
        codes = codes_of(made, name, found[name])
        params = made.plan.activations[name]
        np.testing.assert_allclose(found[name], (codes - int(params.zero_point)) * params.scale, rtol=1e-6)
    close(made)


@BOTH_FORMATS
def test_an_integer_matmul_that_is_an_output_and_read_besides(fmt: str, tmp_path: Path) -> None:
    model = make_model([node("MatMul", "x w0", "m"), node("MatMul", "m w1", "y")], {"x": [4, 32]},
                       {"y": [4, 32], "m": [4, 32]}, {"w0": random(32, 32), "w1": random(32, 32, seed=1)})
    made = make(model, tmp_path, [{"x": random(4, 32)}], fmt)
    assert made.ran("MatMul_m", "MatMul_y") == ["MatMulIntegerToFloat"] * 2
    close(made)


@BOTH_FORMATS
@pytest.mark.parametrize("added", ["another MatMul", "a scalar", "a bias beyond int32"])
def test_what_is_added_to_a_matmul_does_not_make_it_float(added: str, fmt: str, tmp_path: Path) -> None:
    stored = {"w0": random(32, 32), "w1": random(32, 32, seed=1), "k": np.float32(0.5),
              "b": np.full(32, 3e9, np.float32)}
    other = {"another MatMul": "n", "a scalar": "k", "a bias beyond int32": "b"}[added]
    model = make_model([node("MatMul", "x w0", "m"), node("MatMul", "x w1", "n"), node("Add", f"m {other}", "y"),
                        node("Neg", "n", "z")], {"x": [4, 32]}, {"y": [4, 32], "z": [4, 32]}, stored)
    made = make(model, tmp_path, [{"x": random(4, 32)}], fmt)
    assert made.ran("MatMul_m", "MatMul_n") == ["MatMulIntegerToFloat"] * 2
    close(made)


@BOTH_FORMATS
@pytest.mark.parametrize("bounds", [(0.0, 0.5), (-1.0, 1.0), (-0.7, 0.3), (0.0, 6.0)], ids=str)
def test_an_absorbed_clip_clamps(bounds: tuple[float, float], fmt: str, tmp_path: Path) -> None:
    stored = {"low": np.float32(bounds[0]), "high": np.float32(bounds[1])}
    model = between([node("Clip", "a low high", "j")], extra=stored, outputs={"j": [None] * 4})
    made = make(model, tmp_path, [FEED], fmt)
    assert described(made.plan.nodes["Clip_j"]) == "part of Conv_a"
    assert made.ran("Conv_a") == ["QLinearConv"]
    assert "Clip" not in made.ops()
    found = made.run(made.compiled)["j"]
    slack = float(made.plan.activations["j"].scale) / 2  # 0 is a code exactly, so a bound may lie between two codes
    assert bounds[0] - slack <= found.min()
    assert found.max() <= bounds[1] + slack
    close(made)


@BOTH_FORMATS
def test_a_clip_without_0_inside_is_not_absorbed(fmt: str, tmp_path: Path) -> None:
    model = between([node("Clip", "a low high", "j")], extra={"low": np.float32(0.2), "high": np.float32(1)})
    made = make(model, tmp_path, [FEED], fmt)
    assert made.ran("Conv_a", "Clip_j") == ["QLinearConv", "Clip"]
    close(made)


# ------------------------------------------------------------------ float stays float


FENCED: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], str]] = {
    "Sigmoid": ([node("Sigmoid", "a", "j", name="keep")], {}, "Sigmoid"),
    "Softmax": ([node("Softmax", "a", "j", name="keep")], {}, "Softmax"),
    "Mul": ([node("Mul", "a b", "j", name="keep")], {}, "Mul"),
    "LeakyRelu": ([node("LeakyRelu", "a", "j", name="keep")], {}, "LeakyRelu"),
    "Where": ([node("Where", "c a b", "j", name="keep")], {"c": np.eye(8, dtype=bool)}, "Where"),
    "Where with a constant": ([node("Where", "c a k", "j", name="keep")],
                              {"c": np.eye(8, dtype=bool), "k": np.float32(-1)}, "Where"),
    "Add": ([node("Add", "a b", "j", name="keep")], {}, "Add"),
    "Add, Relu": ([node("Add", "a b", "i", name="keep"), node("Relu", "i", "j")], {}, "Add"),
    "Concat": ([node("Concat", "a b", "j", name="keep", axis=2)], {}, "Concat"),
    "GlobalAveragePool": ([node("GlobalAveragePool", "a", "j", name="keep")], {}, "GlobalAveragePool"),
    "AveragePool": ([node("AveragePool", "a", "j", name="keep", kernel_shape=[2, 2])], {}, "AveragePool"),
    "Conv": ([conv("a", "wk", "j", name="keep")], {"wk": random(8, 8, 3, 3)}, "Conv"),
    "Conv, Relu": ([conv("a", "wk", "i", name="keep"), node("Relu", "i", "j")], {"wk": random(8, 8, 3, 3)}, "Conv"),
    "ConvTranspose": ([node("ConvTranspose", "a wt", "j", name="keep")], {"wt": random(8, 8, 2, 2)}, "ConvTranspose"),
    "behind a Transpose": ([node("Transpose", "a", "t", perm=[0, 1, 3, 2]), node("Sigmoid", "t", "j", name="keep")],
                           {}, "Sigmoid"),
    "before a Transpose": ([node("Sigmoid", "a", "t", name="keep"), node("Transpose", "t", "j", perm=[0, 1, 3, 2])],
                           {}, "Sigmoid"),
    "between data movement": ([node("MaxPool", "a", "t", kernel_shape=[1, 1]), node("Unsqueeze", "t one", "u"),
                               node("Sigmoid", "u", "v", name="keep"), node("Squeeze", "v one", "j")],
                              {"one": np.array([1])}, "Sigmoid"),
    "MatMul of two activations": ([node("MatMul", "a b", "j", name="keep")], {}, "MatMul"),
    "MatMul and Add": ([node("MatMul", "a wm", "m", name="keep"), node("Add", "m bm", "j", name="keep2")],
                       {"wm": random(8, 8), "bm": random(8)}, "MatMul"),
}


@BOTH_FORMATS
@pytest.mark.parametrize("case", FENCED)
def test_what_the_plan_keeps_float_runs_in_float(case: str, fmt: str, tmp_path: Path) -> None:
    nodes, extra, op = FENCED[case]
    made = make(between(nodes, extra=extra), tmp_path, [FEED], fmt, keep=["keep*"])
    assert made.plan.nodes["keep"].scheme == "float"
    assert made.ran("Conv_a", "Conv_y") == ["QLinearConv"] * 2  # and finds no fault
    assert {name for name in made.ops() if is_integer(name)} <= {"NhwcMaxPool", "QLinearConv"}
    # float kernels of several nodes: Conv and activation, MatMul and bias
    assert {op, f"Fused{op}", *(["Gemm"] if op == "MatMul" else [])} & set(made.ops())
    close(made)


@BOTH_FORMATS
def test_a_matmul_of_two_decoded_activations_needs_no_q_to_be_fenced(fmt: str, tmp_path: Path) -> None:
    model = make_model([conv("x", "w0", "q"), conv("x", "w1", "k"), node("MatMul", "q k", "s", name="scores"),
                        node("Softmax", "s", "y")], X, {"y": [None] * 4}, WEIGHTS)
    made = make(model, tmp_path, [FEED], fmt)
    assert described(made.plan.nodes["scores"]) == (
        "float: it multiplies two computed tensors: there is no stored weight to make int8")
    assert made.ran("Conv_q", "Conv_k", "scores") == ["QLinearConv", "QLinearConv", "MatMul"]


@BOTH_FORMATS
@pytest.mark.parametrize("case", ["MatMul", "ConvTranspose"])
def test_what_is_stored_between_codes_runs_in_float(case: str, fmt: str, tmp_path: Path) -> None:
    nodes, extra = {
        "MatMul": ([node("MatMul", "ws a", "j", name="inner")], {"ws": random(64, 8)}),
        "ConvTranspose": ([node("ConvTranspose", "a ws", "j", name="inner")], {"ws": random(8, 8, 4, 4)})}[case]
    made = make(between(nodes, extra=extra), tmp_path, [FEED], fmt)
    assert made.plan.nodes["inner"].scheme == "stored" or case == "MatMul"
    assert made.ran("Conv_a", "inner", "Conv_y") == ["QLinearConv", case, "QLinearConv"]
    close(made)


def test_the_fence_is_what_keeps_it_float(tmp_path: Path) -> None:
    """Without the pass the runtime does quantize these: the tests above can fail."""
    made = make(between([node("Sigmoid", "a", "j", name="keep")]), tmp_path, [FEED], "qdq", keep=["keep"])
    assert "keep/fence" in [n.name for n in onnx.load(made.compiled).graph.node]
    assert "com.microsoft.QLinearSigmoid" in [e.op for e in executed(made.twin, [FEED], ONE_THREAD, read_nodes)]


def test_no_fence_where_a_float_node_meets_float(tmp_path: Path) -> None:
    made = make(between([node("Sigmoid", "a", "s", name="keep"), node("Neg", "s", "j")]), tmp_path, [FEED])
    assert described(made.plan.nodes["keep"]) == (
        "float: only float operators read its result: int8 would be converted back at once")
    assert made.stored().count("Sum") == 0
    assert FenceFloat().run(load(made.compiled), Context(CPU, made.plan)) is False


LINEAR_RESIZE = node("Resize", "a _ two", "j", name="keep", mode="linear")
TWO = {"two": np.array([1, 1, 2, 2], np.float32)}


@BOTH_FORMATS
@pytest.mark.parametrize(("ranges", "fenced"), [((-2.0, 2.0), True), ((-1.5, 2.0), False)])
def test_a_float_resize_is_fenced_between_equal_scales(ranges: tuple[float, float], fenced: bool, fmt: str,
                                                       tmp_path: Path) -> None:
    """The runtime rewrites it to interpolate codes, which rounds down, where Q and DQ have the same parameters."""
    made = make(between([LINEAR_RESIZE], extra=TWO), tmp_path, [FEED], fmt, ranges={
        "x": (-3.0, 3.0), "a": (-2.0, 2.0), "j": ranges, "y": (-3.0, 3.0)})
    assert ("keep/fence" in [n.name for n in onnx.load(made.compiled).graph.node]) is fenced
    assert made.ran("Conv_a", "keep", "Conv_y") == ["QLinearConv", "Resize", "QLinearConv"]
    assert made.ops().count("DequantizeLinear") == 2  # one in front of the Resize
    deployed, plain = made.run(made.compiled)["y"], made.run(made.compiled, optimize=False)["y"]
    np.testing.assert_allclose(deployed, plain, rtol=0, atol=1e-4)


@BOTH_FORMATS
@pytest.mark.parametrize("kind", ["Pad", "Resize"])
def test_pad_and_resize_of_axes_run_between_convs(kind: str, fmt: str, tmp_path: Path) -> None:
    """In the runtime's channels-last layout they fail in any form but that of all axes."""
    item = node("Pad", "a pads _ axes", "j") if kind == "Pad" else node("Resize", "a _ scales", "j", axes=[2, 3])
    extra = {"pads": np.array([1, 0, 0, 1]), "axes": np.array([2, 3])} if kind == "Pad" else {
        "scales": np.array([2, 2], np.float32)}
    made = make(between([item], extra=extra, opset=18), tmp_path, [FEED], fmt)
    close(made)
