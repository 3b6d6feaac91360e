"""Who takes weights in blocks under a weight-only scheme, by which kernel, and what others are told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, body, make_model, node, random
from lowering_support import CPU, canonical, described, recipe
from onnx import TensorProto

from onnxq.graph import Graph
from onnxq.numerics.dtypes import by_name
from onnxq.plan import UNTOUCHED
from onnxq.planner import weight_only
from onnxq.planner.outline import Measured, Outline, outline
from onnxq.planner.rules import schemes
from onnxq.planner.scales import finish
from onnxq.recipe import Match, Recipe, Rule
from onnxq.schemes import Scheme, TensorSpec, scheme
from onnxq.targets import Target

PORTABLE = replace(CPU, portable=True)
SMALL = "its weights are too small to gain from fewer bits"
ELSEWHERE = "its weights are read as floats elsewhere, or along another axis: the file would hold them twice"
DECODED = "its weights are decoded as the model is loaded and multiplied in float"


def blocks_of(dtype: str, size: int) -> Scheme:
    """A weight-only scheme."""
    spec = TensorSpec(dtype, dtype[0] == "i", "block", block_size=size)
    return Scheme(f"{dtype}.{size}", weights=spec, operators=("MatMul", "Gemm", "Gather"))


def outlined(graph: Graph, chosen: Recipe | Scheme | str = "w4a16", target: Target = CPU, **measured: Any) -> Outline:
    if isinstance(chosen, str):
        chosen = recipe(chosen)
    if isinstance(chosen, Scheme):
        chosen = Recipe(chosen)
    return outline(canonical(graph), chosen, target, Measured(**measured))


def verdicts(graph: Graph, chosen: Recipe | Scheme | str = "w4a16", target: Target = CPU) -> dict[str, str]:
    return {n.node: described(n) for n in outlined(graph, chosen, target).nodes.values()}


def op(kind: str, inputs: str, result: str, **more: Any) -> onnx.NodeProto:
    return node(kind, inputs, result, name=result, **more)


def one(kind: str, inputs: str, shape: tuple[int, ...], stored: dict[str, Any], **more: Any) -> onnx.ModelProto:
    return make_model([op(kind, inputs, "y", **more)], {"x": list(shape)}, {"y": None}, stored)


# ------------------------------------------------------------------ who takes blocks


@pytest.mark.parametrize(("kind", "inputs", "stored"), [
    ("MatMul", "x w", {"w": random(32, 32)}),
    ("Gemm", "x w b", {"w": random(32, 32), "b": random(32)}),
    ("Gemm", "x w", {"w": random(32, 32)})])
def test_linear_layers_run_by_the_kernel_that_decodes(kind: str, inputs: str, stored: dict[str, Any],
                                                      opened: Opener) -> None:
    found = outlined(opened(one(kind, inputs, (4, 32), stored))).nodes["y"]
    assert (found.lowering, found.scheme, found.weight, found.activation) == ("MatMulNBits", "w4a16", "w", UNTOUCHED)
    assert (found.int_inputs, found.int_output) == ((), False)
    assert found.reason == "uint4 weights in blocks of 32, decoded as they are multiplied"


def test_a_transposed_gemm_is_normal_by_then(opened: Opener) -> None:
    model = one("Gemm", "x w b", (4, 48), {"w": random(32, 48), "b": random(32)}, transB=1)
    assert verdicts(opened(model)) == {"y": "MatMulNBits"}


@pytest.mark.parametrize(("model", "reason"), [
    (one("MatMul", "x w", (4, 32), {"w": random(32, 31)}), SMALL),
    (one("MatMul", "w x", (64, 4), {"w": random(64, 64)}), "its constant is on the left side"),
    (one("MatMul", "x w", (2, 4, 32), {"w": random(2, 32, 32)}),
     "its weight has rank 3, and the int8 kernels take rank 2"),
    (one("MatMul", "x w", (32,), {"w": random(32, 32)}), "its activation has rank 1"),
    (one("Gemm", "x w b", (4, 32), {"w": random(32, 32), "b": random(4, 32)}),
     "its form (transA, or a bias that is not one number per column) has no int8 kernel"),
    (one("Relu", "x", (4, 32), {}), "scheme w4a16 quantizes MatMul, Gemm, Gather, Conv alone"),
], ids=["small", "left", "batched", "vector", "bias", "operator"])
def test_what_stays_float(model: onnx.ModelProto, reason: str, opened: Opener) -> None:
    found = verdicts(opened(model))["y"]
    # a weight that has no blocks may still be stored as int8 for a float kernel
    assert found in (f"float: {reason}", f"stored: weights stored as int8 to save space, computed in float: {reason}")


def test_float64_and_outputs_stay(opened: Opener) -> None:
    model = make_model([op("MatMul", "x w", "y"), op("Identity", "w", "v")], {"x": [4, 32]}, {"y": None, "v": None},
                       {"w": random(32, 32)})
    assert verdicts(opened(model))["y"].startswith("float")
    double = make_model([op("MatMul", "x w", "y")], {"x": (TensorProto.DOUBLE, [4, 32])},
                        {"y": (TensorProto.DOUBLE, None)}, {"w": random(32, 32).astype(np.float64)})
    assert verdicts(opened(double))["y"].startswith("float: ")


def test_tables(opened: Opener) -> None:
    def looked_up(rows: int, axis: int = 0) -> str:
        model = make_model([op("Gather", "t i", "y", axis=axis)], {"i": (TensorProto.INT64, ["n"])}, {"y": None},
                           {"t": random(rows, 64)})
        return verdicts(opened(model))["y"]

    assert looked_up(256) == "GatherBlockQuantized"
    assert looked_up(255) == f"float: {SMALL}"
    assert looked_up(256, axis=1) == "float: only rows of a matrix are looked up in blocks"


def test_a_bias_add_goes_with_its_layer(opened: Opener) -> None:
    model = make_model([op("MatMul", "x w", "m"), op("Add", "m b", "a"), op("Relu", "a", "y")], {"x": [4, 32]},
                       {"y": None}, {"w": random(32, 32), "b": random(32)})
    found = outlined(opened(model)).nodes
    assert {n.node: described(n) for n in found.values() if n.node != "y"} == {"m": "MatMulNBits", "a": "part of m"}
    assert (found["m"].bias_add, found["m"].result) == ("a", "a")
    assert found["y"].scheme == "float"


# ------------------------------------------------------------------ weights of several readers


def test_a_weight_that_several_layers_read(opened: Opener) -> None:
    model = make_model([op("MatMul", "x w", "a"), op("MatMul", "a w", "y")], {"x": [4, 32]}, {"y": None},
                       {"w": random(32, 32)})
    found = outlined(opened(model))
    assert {n.node: described(n) for n in found.nodes.values()} == {"a": "MatMulNBits", "y": "MatMulNBits"}
    assert found.formats.keys() == {"w"}


@pytest.mark.parametrize("kind", ["Add", "MatMul"])
def test_a_weight_that_something_else_reads_stays_float(kind: str, opened: Opener) -> None:
    """So does that of a table which a layer multiplies by: blocks would run along two axes."""
    if kind == "MatMul":
        model = make_model([op("Gather", "w i", "g"), op("MatMul", "g w", "y")], {"i": (TensorProto.INT64, [3])},
                           {"y": None}, {"w": random(160, 160)})
    else:
        model = make_model([op("MatMul", "x w", "y"), op("Add", "x w", "z")], {"x": [64, 64]},
                           {"y": None, "z": None}, {"w": random(64, 64)})
    found = outlined(opened(model))
    assert found.formats == {}
    assert {described(n) for n in found.nodes.values() if n.op != "Add"} == {f"float: {ELSEWHERE}"}


def test_one_reader_that_is_kept_float_keeps_the_weight(opened: Opener) -> None:
    model = make_model([op("MatMul", "x w", "a"), op("MatMul", "a w", "y")], {"x": [4, 32]}, {"y": None},
                       {"w": random(32, 32)})
    found = outlined(opened(model), recipe("w4a16", keep=["y"])).nodes
    assert found["y"].reason == "kept float as asked (y)"
    assert described(found["a"]) == f"float: {ELSEWHERE}"


def test_names_that_the_parts_would_take(opened: Opener) -> None:
    model = make_model([op("MatMul", "x w", "w.blocks"), op("Relu", "w.blocks", "y")], {"x": [4, 32]}, {"y": None},
                       {"w": random(32, 32)})
    found = outlined(opened(model))
    assert found.formats == {}
    assert found.nodes["w.blocks"].reason.endswith(
        "the model has a tensor of the name that a part of 'w' would take")


# ------------------------------------------------------------------ kernels or not


@pytest.mark.parametrize(("dtype", "size", "kernel"), [
    ("uint2", 16, False), ("uint2", 32, True), ("int2", 128, True), ("int2", 256, False), ("uint4", 16, True),
    ("int8", 256, True)])
def test_two_bits_have_no_integer_kernel_for_every_size(dtype: str, size: int, kernel: bool, opened: Opener) -> None:
    found = verdicts(opened(one("MatMul", "x w", (4, 64), {"w": random(64, 64)})), blocks_of(dtype, size))["y"]
    assert found == ("MatMulNBits" if kernel else
                     f"stored: {dtype} weights in blocks of {size}: {DECODED}: {weight_only.NO_INT8_KERNEL}")


def test_rows_of_two_bits_are_decoded_at_load(opened: Opener) -> None:
    model = make_model([op("Gather", "t i", "y")], {"i": (TensorProto.INT64, ["n"])}, {"y": None},
                       {"t": random(256, 64)})
    assert verdicts(opened(model), "w2a16")["y"] == (
        "stored: uint2 weights in blocks of 32: its weights are decoded as the model is loaded and looked up in float: "
        "rows of 2 bits have no kernel")


def test_what_was_measured_slower_is_decoded_at_load(opened: Opener) -> None:
    found = outlined(opened(one("MatMul", "x w", (4, 64), {"w": random(64, 64)})), refused={"y": "slower here"})
    assert described(found.nodes["y"]) == f"stored: uint4 weights in blocks of 32: {DECODED}: slower here"
    assert (found.nodes["y"].weight, found.nodes["y"].activation, list(found.formats)) == ("w", UNTOUCHED, ["w"])


def test_a_target_without_such_kernels(opened: Opener) -> None:
    bare = replace(CPU, name="bare", lowerings={k: v for k, v in CPU.lowerings.items() if k[1] != "blocks"})
    found = verdicts(opened(one("MatMul", "x w", (4, 64), {"w": random(64, 64)})), "w8a16", bare)["y"]
    assert found.endswith(f"{DECODED}: bare has no kernel for such weights of a MatMul")


def test_layers_in_bodies_take_blocks_without_their_bias_add(opened: Opener) -> None:
    """What stands in a body is left where it is; the kernel itself runs there as anywhere."""
    then = body([op("MatMul", "x w", "m"), op("Add", "m b", "a")], {"a": None}, "then")
    other = body([op("Relu", "x", "e")], {"e": None}, "other")
    model = make_model([op("If", "c", "y", then_branch=then, else_branch=other)],
                       {"c": (TensorProto.BOOL, []), "x": [4, 32]}, {"y": None}, {"w": random(32, 32), "b": random(32)})
    found = verdicts(opened(model))
    assert found["m"] == "MatMulNBits"
    assert found["a"] in ("part of m", "float: in a body of If y, where calibration does not look")
    assert found["e"].startswith("float: ")


# ------------------------------------------------------------------ rules


def test_rules_mix_schemes(opened: Opener) -> None:
    model = make_model([op("MatMul", f"{'xabc'[k]} w{k}", "abcy"[k]) for k in range(4)], {"x": [4, 64]}, {"y": None},
                       {f"w{k}": random(64, 64, seed=k) for k in range(4)})
    rules = [Rule(Match(name="w1"), "w8a16"), Rule(Match(name="c"), "w2a16"), Rule(Match(name="y"), "float", "head")]
    graph = opened(model)
    chosen = recipe("w4a16", rules=rules)
    found = outlined(graph, chosen)
    assert {n.node: (n.scheme, n.reason) for n in found.nodes.values()} == {
        "a": ("w4a16", "uint4 weights in blocks of 32, decoded as they are multiplied"),
        "b": ("w8a16", "int8 weights in blocks of 128, decoded as they are multiplied"),
        "c": ("w2a16", "uint2 weights in blocks of 32, decoded as they are multiplied"),
        "y": ("float", "head")}
    plan = finish(found, graph, {}, chosen, CPU)
    assert {k: (b.dtype.name, b.block_size, b.axis, b.search) for k, b in plan.blocks.items()} == {
        "w0": ("uint4", 32, 0, "absmax"), "w1": ("int8", 128, 0, "absmax"), "w2": ("uint2", 32, 0, "absmax")}
    assert {k: s.name for k, s in schemes(graph, chosen).items()} == {
        "a": "w4a16", "b": "w8a16", "c": "w2a16", "y": "float"}


def test_bits_count_the_scales(opened: Opener) -> None:
    for name, wanted in (("w4a16", 4 + (32 + 4) / 32), ("w8a16", 8 + 32 / 128), ("w2a16", 2 + (32 + 2) / 32)):
        spec = scheme(name).weights
        assert spec is not None
        assert weight_only.bits(spec) == wanted
        assert by_name(spec.dtype).signed == spec.symmetric


# ------------------------------------------------------------------ the portable form


def test_the_portable_form_of_a_layer_is_fused(opened: Opener) -> None:
    graph = opened(make_model([op("MatMul", "x w", "m"), op("Add", "m b", "y")], {"x": [4, 64]}, {"y": None},
                              {"w": random(64, 64), "b": random(64)}, opset=21, ir_version=10))
    assert verdicts(graph, "w4a16", PORTABLE) == {"m": "MatMulNBits", "y": "part of m"}
    assert verdicts(graph, "w8a16", PORTABLE) == {"m": "MatMulNBits", "y": "part of m"}
    assert verdicts(graph, "w2a16", PORTABLE)["m"].endswith("DequantizeLinear takes blocks of uint2 from opset 25 on")


def test_what_the_runtime_would_not_fuse_is_decoded_at_load(opened: Opener) -> None:
    then, other = (body([op("MatMul", "x v", name)], {name: None}, name) for name in "pq")
    graph = opened(make_model(
        [op("Gather", "t i", "g"), op("MatMul", "x w", "a"), op("MatMul", "a w", "b"),
         op("If", "c", "y", then_branch=then, else_branch=other)],
        {"c": (TensorProto.BOOL, []), "i": (TensorProto.INT64, [3]), "x": [4, 64]}, {"g": None, "b": None, "y": None},
        {"t": random(256, 64), "w": random(64, 64), "v": random(64, 64, seed=1)}, opset=21, ir_version=10))
    found = verdicts(graph, "w4a16", PORTABLE)
    assert found["g"].endswith("the runtime has no kernel that decodes the rows of a look-up behind DequantizeLinear")
    assert found["a"].endswith("the runtime fuses no DequantizeLinear of weights that several nodes read")
    assert found["a"] == found["b"]
    assert found["p"].endswith("the runtime fuses nothing in a body with weights outside of it")
    assert all(found[k].startswith("stored: uint4 weights in blocks of 32: ") for k in "gabp")
    assert set(verdicts(graph).values()) >= {"MatMulNBits", "GatherBlockQuantized"}, "kernels that are written do"


def test_the_opset_that_the_portable_form_needs(opened: Opener) -> None:
    model = make_model([op("MatMul", "x w0", "a"), op("MatMul", "a w1", "y")], {"x": [4, 64]}, {"y": None},
                       {f"w{k}": random(64, 64, seed=k) for k in range(2)})
    graph = canonical(opened(model))

    def needed(name: str, *rules: Rule) -> int:
        return weight_only.opset(graph, schemes(graph, recipe(name, rules=rules)))

    assert [needed(name) for name in ("w8a16", "w4a16", "w2a16", "float")] == [21, 21, 25, 0]
    assert needed("w4a16", Rule(Match(name="y"), "w2a16")) == 25
    assert graph.opset == 17
    found = verdicts(graph, "w4a16", PORTABLE)
    assert found["a"].endswith("DequantizeLinear takes blocks of uint4 from opset 21 on")


# ------------------------------------------------------------------ what came quantized


def test_what_came_in_blocks_is_kept(opened: Opener) -> None:
    """Fused operators, and DequantizeLinear that the runtime fuses: none is quantized again, nor taken for float."""
    scales, codes = np.full((64, 2), 0.1, np.float32), np.zeros((64, 2, 16), np.uint8)
    model = make_model(
        [op("GatherBlockQuantized", "t i ts", "g", domain="com.microsoft", block_size=32, bits=4, gather_axis=0,
            quantize_axis=1),
         op("MatMulNBits", "g b s", "m", domain="com.microsoft", K=64, N=64, bits=4, block_size=32),
         op("DequantizeLinear", "q qs", "d", axis=0, block_size=32), op("MatMul", "m d", "y")],
        {"i": (TensorProto.INT64, [3])}, {"y": None},
        {"t": np.zeros((256, 32), np.uint8), "ts": np.ones((256, 2), np.float32), "b": codes, "s": scales,
         "q": np.ones((64, 64), np.int8), "qs": np.full((2, 64), 0.1, np.float32)}, opset=21, ir_version=10,
        domains={"com.microsoft": 1})
    graph = opened(model)
    for name in ("w4a16", "w8a8", "w8a8-dynamic"):
        assert {k: v.partition(":")[0] for k, v in verdicts(graph, name).items()} == dict.fromkeys("gmdy", "given")
    assert verdicts(graph)["y"] == "given: quantized already: its weights are stored as codes"
