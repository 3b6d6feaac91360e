"""float16 and bfloat16 graphs computed in float32: against the float model of the same weights, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from conftest import Opener, apply, assert_same, body, make_model, node, random, run, text, value
from half_support import HALVES, NUMPY, nearest, rounded, to_half
from lowering_support import network
from onnx import TensorProto, defs, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_tables

from onnxq.graph import Graph, dtype_of, is_constant
from onnxq.passes.canonicalize.remove_identity import RemoveIdentity
from onnxq.passes.canonicalize.widen_half import TYPE_ATTRIBUTES, WidenHalf
from onnxq.passes.manager import Context
from onnxq.runtime.session import Session, SessionOptions
from onnxq.targets import TARGETS, Target

Written = Callable[[Graph], Path]
CPU = TARGETS["cpu"]
PLAIN = SessionOptions(threads=1, optimize=False)
FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16
BOOL, BF16 = TensorProto.BOOL, TensorProto.BFLOAT16
each_half = pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])


def widened(graph: Graph) -> tuple[bool, list[tuple[str, str]]]:
    return apply(WidenHalf(), graph, Context(CPU))


def ops(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes]


def halves(graph: Graph) -> set[str]:
    """Names of half tensors in a graph and its bodies."""
    tensors = [t for n, g in graph.walk() for t in (*n.inputs, *n.outputs, *g.inputs, *g.outputs)]
    return {t.name for t in tensors if str(dtype_of(t)) in ("float16", "bfloat16")}


def equal_to_float(path: Path, model: onnx.ModelProto, feed: Mapping[str, Any], dtype: int) -> None:
    """Outputs are those of the float model of the same weights, rounded to the half type."""
    given = {k: nearest(v, dtype) if v.dtype == np.float32 else v for k, v in feed.items()}
    wanted = run(rounded(model, dtype), given)
    types = {o.name: o.type.tensor_type.elem_type for o in onnx.load(path).graph.output}
    session = Session(path, PLAIN)
    cast = {p.name: given[p.name].astype(p.dtype) for p in session.inputs}
    for name, right in session.run(cast).items():
        left = nearest(wanted[name], dtype) if types[name] == dtype else wanted[name]
        np.testing.assert_array_equal(right.astype(left.dtype), left, err_msg=name)


# ------------------------------------------------------------------ what it computes


@each_half
def test_a_network_computes_what_float32_does_and_keeps_its_ports(opened: Opener, written: Written,
                                                                  dtype: int) -> None:
    model = network()
    graph = opened(to_half(model, dtype))
    before = graph.ports()
    assert widened(graph) == (True, [])
    assert graph.half == (NUMPY[dtype].name,)
    assert graph.ports() == before
    assert halves(graph) == {"x", "y"}
    assert [(n.op, n.inputs[0].name, n.outputs[0].name) for n in graph.nodes if n.op == "Cast"] == [
        ("Cast", "x", "x.float"), ("Cast", "y.float", "y")]
    path = written(graph)
    equal_to_float(path, model, {"x": random(2, 8, 12, 12)}, dtype)
    stored = onnx.load(path).graph
    assert [(v.name, v.type.tensor_type.elem_type) for v in (*stored.input, *stored.output)] == [
        ("x", dtype), ("y", dtype)]
    found = text(graph)
    assert widened(graph) == (False, [])
    assert text(graph) == found
    assert text(graph.copy()) == found
    assert graph.copy().half == graph.half
    equal_to_float(written(graph.copy()), model, {"x": random(2, 8, 12, 12)}, dtype)


@each_half
def test_an_output_that_is_read_inside_too_is_cast_last(opened: Opener, written: Written, dtype: int) -> None:
    model = make_model([node("MatMul", "x w", "y"), node("Relu", "y", "z")], {"x": [2, 4]},
                       {"y": [2, 3], "z": [2, 3]}, {"w": random(4, 3)})
    graph = opened(to_half(model, dtype))
    assert widened(graph) == (True, [])
    relu = next(n for n in graph.nodes if n.op == "Relu")
    assert relu.inputs[0].name == "y.float", "not rounded on its way"
    equal_to_float(written(graph), model, {"x": random(2, 4)}, dtype)


@each_half
def test_bodies_and_what_they_capture(opened: Opener, written: Written, dtype: int) -> None:
    """x, an input, and m, computed, are read inside, and so are weights of both graphs."""
    nested = body([node("Mul", "m k", "deep")], {"deep": None}, "nested", {"k": random(2, 3, seed=3)})
    then = body([node("MatMul", "x w", "a"), node("If", "c", "b", then_branch=nested, else_branch=body(
        [node("Identity", "a", "same")], {"same": None}, "same"))], {"b": None}, "then")
    other = body([node("Add", "m v", "d")], {"d": None}, "other", {"v": random(2, 3, seed=2)})
    model = make_model([node("MatMul", "x w", "m"), node("If", "c", "y", then_branch=then, else_branch=other)],
                       {"x": [2, 4], "c": (BOOL, [])}, {"y": [2, 3]}, {"w": random(4, 3)})
    graph = opened(to_half(model, dtype))
    assert widened(graph) == (True, [])
    assert halves(graph) == {"x", "y"}
    path = written(graph)
    for choice in (True, False):
        equal_to_float(path, model, {"x": random(2, 4), "c": np.array(choice)}, dtype)
    assert widened(graph)[0] is False


@each_half
def test_a_loop_carries_float32(opened: Opener, written: Written, dtype: int) -> None:
    """A state that is read, one that is not, and a scan output."""
    def ports(*names: str) -> list[onnx.ValueInfoProto]:
        return [value(name, [3]) for name in names]

    inner = helper.make_graph(
        [node("Mul", "s k", "t"), node("Identity", "go", "still"), node("Neg", "t", "v")], "loop",
        [value("i", [], TensorProto.INT64), value("go", [], BOOL), *ports("s", "unread")],
        [value("still", [], BOOL), *ports("t", "v", "t")], [numpy_helper.from_array(random(3), "k")])
    model = make_model([node("Loop", "n on x x", "y last all", body=inner)], {"x": [3]},
                       {"y": [3], "last": [3], "all": [None, 3]}, {"n": np.array(3), "on": np.array(True)})
    graph = opened(to_half(model, dtype))
    assert widened(graph) == (True, [])
    assert halves(graph) == {"x", "y", "last", "all"}
    equal_to_float(written(graph), model, {"x": random(3)}, dtype)


@each_half
def test_attributes_that_name_or_hold_a_half_type_follow(opened: Opener, written: Written, dtype: int) -> None:
    fill = numpy_helper.from_array(np.array([1.5], np.float32), "fill")
    model = make_model(
        [node("Shape", "x", "s"), node("ConstantOfShape", "s", "ones", value=fill), node("Cast", "i", "f", to=FLOAT),
         node("EyeLike", "x", "eye", dtype=FLOAT), node("CastLike", "i", "like", name="like"),
         node("Add", "x ones", "a"), node("Add", "a f", "b"), node("Add", "b eye", "c"), node("Add", "c like", "y"),
         node("Constant", "", "k", value=fill)],
        {"x": [2, 2], "i": (TensorProto.INT32, [2, 2])}, {"y": [2, 2], "k": [1]})
    model.graph.node[4].input.append("x")
    graph = opened(to_half(model, dtype))
    assert widened(graph) == (True, [])
    assert halves(graph) == {"x", "y", "k"}
    equal_to_float(written(graph), model, {"x": random(2, 2), "i": np.array([[1, -2], [3, 400]], np.int32)}, dtype)


@each_half
def test_casts_of_a_mixed_precision_export_vanish(opened: Opener, written: Written, dtype: int) -> None:
    """LayerNormalization in float32 between Casts, as exporters write it."""
    float_nodes = [node("MatMul", "x w", "m"), node("LayerNormalization", "m g b", "n"), node("MatMul", "n v", "y")]
    stored = {"w": random(8, 16), "g": random(16, seed=1), "b": random(16, seed=2), "v": random(16, 4)}
    model = make_model(float_nodes, {"x": [2, 8]}, {"y": [2, 4]}, stored)
    mixed = to_half(make_model([float_nodes[0], node("Identity", "m", "m32"),
                                node("LayerNormalization", "m32 g b", "n32"), node("Identity", "n32", "n"),
                                float_nodes[2]], {"x": [2, 8]}, {"y": [2, 4]}, stored), dtype)
    for index, to in ((1, FLOAT), (3, dtype)):
        mixed.graph.node[index].op_type = "Cast"
        mixed.graph.node[index].attribute.append(helper.make_attribute("to", to))
    for tensor in mixed.graph.initializer:
        if tensor.name in "gb":  # they stay float32
            tensor.CopyFrom(numpy_helper.from_array(nearest(stored[tensor.name], dtype), tensor.name))
    graph = opened(mixed)
    assert widened(graph) == (True, [])
    assert apply(RemoveIdentity(), graph, Context(CPU)) == (True, [])
    assert ops(graph) == ["Cast", "MatMul", "LayerNormalization", "MatMul", "Cast"]
    equal_to_float(written(graph), model, {"x": random(2, 8)}, dtype)


def test_half_scales_of_a_quantized_model(opened: Opener, written: Written) -> None:
    """DequantizeLinear makes what its scale is; output_dtype and precision name types besides."""
    scale = np.array(0.5, np.float16)
    model = make_model(
        [node("QuantizeLinear", "x s z", "q", precision=FLOAT16), node("DequantizeLinear", "q s z", "d"),
         node("DequantizeLinear", "w t", "e", output_dtype=FLOAT16), node("Add", "d e", "y")],
        {"x": (FLOAT16, [2, 3])}, {"y": (FLOAT16, [2, 3])},
        {"s": scale, "z": np.uint8(3), "w": np.array([[1, -2, 3]], np.int8), "t": np.float32(0.25)}, opset=23,
        ir_version=11)
    graph = opened(model)
    assert widened(graph) == (True, [])
    assert {n.name: dict(n.attrs) for n in graph.nodes if n.attrs and n.op != "Cast"} == {
        "QuantizeLinear_q": {"precision": FLOAT}, "DequantizeLinear_e": {"output_dtype": FLOAT}}
    got = run(written(graph), {"x": np.array([[1, -1.6, 100], [0, 0.3, -7]], np.float16)})["y"]
    assert got.tolist() == [[1.25, -2.0, 100.75], [0.25, 0.0, -0.75]]


def test_a_model_of_both_half_types(opened: Opener, written: Written) -> None:
    model = make_model([node("Cast", "x", "b", to=BF16), node("Mul", "b w", "m"), node("Cast", "m", "y", to=FLOAT16)],
                       {"x": (FLOAT16, [3])}, {"y": (FLOAT16, [3])},
                       {"w": np.array([1.5, 2, -4], ml_dtypes.bfloat16)})
    graph = opened(model)
    assert widened(graph) == (True, [])
    assert graph.half == ("bfloat16", "float16")
    assert ops(graph) == ["Cast", "Mul", "Cast"], "the model's own Casts serve"
    assert run(written(graph), {"x": np.array([1, 2.5, 3], np.float16)})["y"].tolist() == [1.5, 5, -12]


# ------------------------------------------------------------------ operators that are left alone


def runnable(path: Path, folder: Path) -> Path:
    """The file with its custom operators made Neg, so that a run checks every type around them."""
    model = onnx.load(path)
    for item in model.graph.node:
        if item.domain == "custom":
            item.op_type, item.domain = "Neg", ""
    onnx.save(model, folder / "runnable.onnx")
    return folder / "runnable.onnx"


def between(types: Mapping[str, int] | None = None) -> onnx.ModelProto:
    """MatMul, two custom operators, MatMul, in float16; inference can't see past the former."""
    model = to_half(make_model(
        [node("MatMul", "x w", "a"), node("Op", "a", "b", domain="custom"), node("Op", "b", "c", domain="custom"),
         node("MatMul", "c v", "d"), node("Relu", "d", "y"), node("Mul", "a b", "z")],
        {"x": [2, 4]}, {"y": [2, 3], "z": [2, 5]}, {"w": random(4, 5), "v": random(5, 3)}, domains={"custom": 1}),
        FLOAT16)
    for name, dtype in (types or {}).items():
        model.graph.value_info.append(helper.make_tensor_value_info(name, dtype, [2, 5]))
    return model


@pytest.mark.parametrize("types", [None, {"b": FLOAT16, "c": FLOAT16}], ids=["by neighbours", "declared"])
def test_a_custom_operator_keeps_half_inputs_and_outputs(opened: Opener, written: Written, tmp_path: Path,
                                                         types: Mapping[str, int] | None) -> None:
    graph = opened(between(types))
    assert widened(graph) == (True, [])
    made = {n.name: ([t.name for t in n.inputs], [t.name for t in n.outputs]) for n in graph.nodes}
    assert made["Op_b"] == (["a.half"], ["b"])
    assert made["Op_c"] == (["b"], ["c"])
    assert made["MatMul_d"][0] == ["c.float", "v"]
    assert made["Mul_z"][0] == ["a", "b.float"]
    assert halves(graph) - {"b", "c"} == {"x", "y", "z", "a.half"}
    found = text(graph)
    path = runnable(written(graph), tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    feed = {"x": random(2, 4).astype(np.float16)}
    wanted = run(runnable(written(opened(between(types))), tmp_path), feed)
    assert_same(run(path, feed), wanted, 2e-3)  # float16 has 11 bits
    assert widened(graph) == (False, [])
    assert text(graph) == found


def test_a_custom_operator_at_the_borders_needs_no_cast(opened: Opener) -> None:
    model = make_model([node("Op", "x w", "a", domain="custom"), node("Op", "a", "y", domain="custom")],
                       {"x": (FLOAT16, [2])}, {"y": (FLOAT16, [2])}, {"w": np.ones(2, np.float16)},
                       domains={"custom": 1})
    graph = opened(model)
    before = text(graph)
    assert widened(graph) == (False, [])
    assert text(graph) == before


def test_a_weight_that_both_kinds_read(opened: Opener, written: Written, tmp_path: Path) -> None:
    model = make_model([node("Op", "w", "a", domain="custom"), node("Add", "x w", "b"), node("Add", "a b", "y")],
                       {"x": (FLOAT16, [3])}, {"y": (FLOAT16, [3])}, {"w": np.array([1, 2, 3], np.float16)},
                       domains={"custom": 1})
    graph = opened(model)
    assert widened(graph) == (True, [])
    assert run(runnable(written(graph), tmp_path), {"x": np.array([10, 20, 30], np.float16)})["y"].tolist() == [
        10, 20, 30]


def test_a_custom_operator_ends_a_body(opened: Opener, written: Written) -> None:
    """What the body hands out is float32 like that of its sibling."""
    then = body([node("Relu", "x", "r"), node("Op", "r", "a", domain="custom")], {"a": None}, "then")
    other = body([node("Add", "x x", "b")], {"b": None}, "other")
    model = to_half(make_model([node("If", "c", "y", then_branch=then, else_branch=other)],
                               {"x": [2], "c": (BOOL, [])}, {"y": [2]}, domains={"custom": 1}), FLOAT16)
    graph = opened(model)
    assert widened(graph) == (True, [])
    stored = onnx.load(written(graph))
    for branch in (a.g for n in stored.graph.node for a in n.attribute if a.name == "then_branch"):
        for item in branch.node:
            if item.domain == "custom":
                item.op_type, item.domain = "Neg", ""
    got = run(stored, {"x": np.array([1, -2], np.float16), "c": np.array(True)})["y"]
    assert got.tolist() == [-1, 0]


def test_an_unknown_type_beside_a_custom_operator_is_said(opened: Opener) -> None:
    model = make_model([node("Cast", "x", "a", to=FLOAT), node("Op", "a", "b", domain="custom"),
                        node("Shape", "b", "y")], {"x": (FLOAT16, [2])}, {"y": (TensorProto.INT64, [1])},
                       domains={"custom": 1})
    graph = opened(model)
    assert widened(graph) == (False, [("Op_b", "nothing tells the type of b, which is taken to be no half")])


def test_bits_are_not_widened(opened: Opener) -> None:
    if not defs.has("BitCast", defs.onnx_opset_version(), ""):
        pytest.skip("this onnx has no BitCast")
    model = make_model([node("Relu", "x", "r"), node("BitCast", "r", "y", to=TensorProto.UINT16)],
                       {"x": (FLOAT16, [2])}, {"y": (TensorProto.UINT16, [2])}, opset=defs.onnx_opset_version(),
                       ir_version=11)
    graph = opened(model)
    assert widened(graph) == (True, [])
    bits = next(n for n in graph.nodes if n.op == "BitCast")
    assert bits.inputs[0].name == "r.half"


@pytest.mark.parametrize(("op", "wide"), [("Gelu", True), ("BiasSplitGelu", False)])
def test_operators_of_onnxruntime(opened: Opener, op: str, wide: bool) -> None:
    """Widened where the provider computes them in float32, kept half where it does not."""
    model = make_model([node("Relu", "x", "r"), node(op, "r", "g", domain="com.microsoft"), node("Relu", "g", "y")],
                       {"x": (FLOAT16, [2])}, {"y": (FLOAT16, [2])}, domains={"com.microsoft": 1})
    graph = opened(model)
    assert widened(graph) == (True, [])
    assert (halves(graph) == {"x", "y"}) is wide
    assert ops(graph).count("Cast") == (2 if wide else 4)


# ------------------------------------------------------------------ when it does nothing


def test_float_models_and_targets_with_half_kernels_are_left_alone(opened: Opener) -> None:
    graph = opened(network())
    assert widened(graph) == (False, [])
    assert graph.half == ()
    half = opened(to_half(network(), FLOAT16))
    for target in (Target("gpu", "CUDAExecutionProvider", "qdq", half=True), None):
        assert apply(WidenHalf(), half, Context(target)) == (False, [])
        assert half.half == ()


def test_other_types_stay(opened: Opener) -> None:
    model = make_model([node("Cast", "x", "d", to=TensorProto.DOUBLE), node("Cast", "d", "y", to=FLOAT16),
                        node("Cast", "i", "j", to=TensorProto.INT32)],
                       {"x": (FLOAT16, [2]), "i": (TensorProto.INT64, [2])},
                       {"y": (FLOAT16, [2]), "j": (TensorProto.INT32, [2])})
    graph = opened(model)
    assert widened(graph) == (False, []), "its own Casts stand at the borders"
    assert not any(is_constant(t) for n in graph.nodes for t in n.inputs)


# ------------------------------------------------------------------ the tables behind it


def test_every_attribute_that_names_a_type_is_known() -> None:
    """Integer attributes of ONNX's operators whose text speaks of a data type."""
    found = {name for schema in defs.get_all_schemas_with_history() if schema.domain == ""
             for name, attribute in schema.attributes.items()
             if attribute.type == defs.OpSchema.AttrType.INT
             and name.rpartition("_")[2] in ("dtype", "datatype", "to", "type", "precision")}
    assert found == TYPE_ATTRIBUTES


def test_what_takes_a_half_type_takes_float32() -> None:
    for schema in defs.get_all_schemas():
        for parameter in schema.type_constraints if schema.domain == "" else ():
            allowed = set(parameter.allowed_type_strs)
            assert "tensor(float)" in allowed or not allowed & {"tensor(float16)", "tensor(bfloat16)"}, schema.name


def test_operators_of_onnxruntime_have_float32_kernels_where_they_take_half() -> None:
    """By onnxruntime's own tables of operators and kernels."""
    half = {"tensor(float16)", "tensor(bfloat16)"}
    schemas = {s.name: s for s in ort_tables.get_all_operator_schema() if s.domain == "com.microsoft"}
    assert schemas.keys() >= CPU.contrib
    for name in sorted(CPU.contrib):
        kernels = [k for k in ort_tables.get_all_opkernel_def()
                   if (k.domain, k.op_name, k.provider) == ("com.microsoft", name, CPU.provider)]
        for parameter in schemas[name].type_constraints:
            if half & set(parameter.allowed_type_strs):
                assert any("tensor(float)" in k.type_constraints.get(parameter.type_param_str, ["tensor(float)"])
                           for k in kernels), (name, parameter.type_param_str)
        assert not TYPE_ATTRIBUTES & set(schemas[name].attributes), name
        assert not any("GRAPH" in str(a.type) for a in schemas[name].attributes.values()), name
