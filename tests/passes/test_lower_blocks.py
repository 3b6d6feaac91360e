"""Kernels that read weights in blocks: what they are given means what the codes mean, and they compute on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from blocks_support import KERNELS, SIZES, Array, decoded, form, linear, planned, written
from conftest import Opener, apply, body, make_model, node, random, run, value
from lowering_support import CPU, ONE_THREAD
from onnx import TensorProto

from onnxq.graph import load, read_nodes, save
from onnxq.passes.lower.blocks import LowerBlocks
from onnxq.passes.lower.blocks_to_dequantize import BlocksToDequantize
from onnxq.passes.manager import Context, PassManager
from onnxq.passes.quantize.blocks import StoreBlocks
from onnxq.plan import Blocks
from onnxq.runtime.observe import optimized

BITS = (2, 4, 8)
each_bits = pytest.mark.parametrize("bits", BITS)
each_sort = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])


def within_float(found: Array, x: Array, w: Array, bias: Array | float = 0.0) -> bool:
    """Whether a product of floats is within 2e-6 of its largest value."""
    wanted = x.astype(np.float64) @ w.astype(np.float64) + bias
    return bool(np.abs(found - wanted).max() <= 2e-6 * np.abs(wanted).max())


def integer_bound(x: Array, w: Array, size: int) -> Array:
    """How far products may be off that round x [M, K] to int8 in blocks of `size`, each by its largest magnitude.

    A step is max|x| / 127 of the block and an element is off by half of one at most, so a product by
    sum |w| * step / 2; besides, as floats are.
    """
    missing = -x.shape[1] % size
    blocks = np.pad(np.abs(x), ((0, 0), (0, missing))).reshape(len(x), -1, size)
    weights = np.pad(np.abs(w), ((0, missing), (0, 0))).reshape(blocks.shape[1], size, -1).sum(axis=1)
    return (blocks.max(axis=2) / 254) @ weights + 2e-6 * np.abs(x @ w).max()


# ------------------------------------------------------------------ MatMulNBits


@each_bits
@each_sort
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rest", [0, 8], ids=["whole", "short"])
def test_every_format(rest: int, size: int, symmetric: bool, bits: int, tmp_path: Path) -> None:
    inputs = 2 * size + rest
    model, w = linear(inputs, 40)
    how = form(bits, size, symmetric)
    made, exact = written(model, tmp_path, {"w": how}), decoded(w, how)
    assert made.ops() == ["MatMulNBits"]
    np.testing.assert_array_equal(made.run({"x": np.eye(inputs, dtype=np.float32)}, level=0)["y"], exact)
    for rows in (1, 5, 40):  # a vector, and what kernels take for few and for many
        x = random(rows, inputs, seed=rows)
        assert within_float(made.run({"x": x}, level=0)["y"], x, exact)
        off = np.abs(made.run({"x": x})["y"] - x.astype(np.float64) @ exact)
        assert (off <= integer_bound(x, exact, size)).all()


def test_attributes_and_types_are_those_of_the_operator(tmp_path: Path) -> None:
    made = written(linear(72, 24)[0], tmp_path, {"w": form(4, 32, False)})
    [found] = onnx.load(made.path).graph.node
    assert found.domain == "com.microsoft"
    assert {a.name: a.i for a in found.attribute} == {"K": 72, "N": 24, "bits": 4, "block_size": 32,
                                                      "accuracy_level": 4}
    stored = made.stored()
    assert [(stored[name].data_type, list(stored[name].dims)) for name in found.input[1:]] == [
        (TensorProto.UINT8, [24, 3, 16]), (TensorProto.FLOAT, [24, 3]), (TensorProto.UINT8, [24, 2])]
    assert set(stored) == set(found.input[1:]), "nothing of the decoded form is left"


def test_zero_points_that_kernels_take_for_granted_are_written_out(tmp_path: Path) -> None:
    """Weights between -8 and 7 times a number give zero point 8 everywhere; the operator's inputs stay those of
    asymmetric codes."""
    model, w = linear(32, 40)
    w[...] = np.linspace(-8, 7, 32)[:, None]
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(w, "w"))
    made = written(model, tmp_path, {"w": form(4, 32, False)})
    [zeros] = [t for name, t in made.stored().items() if name.endswith("zeros")]
    assert set(zeros.raw_data) == {8}
    np.testing.assert_array_equal(made.run({"x": np.eye(32, dtype=np.float32)}, level=0)["y"],
                                  decoded(w, form(4, 32, False)))


@each_sort
@pytest.mark.parametrize("op", ["Add", "Gemm"])
def test_the_kernel_adds_the_bias(op: str, symmetric: bool, tmp_path: Path) -> None:
    model, w = linear(72, 40, op)
    how = form(4, 32, symmetric)
    made, x = written(model, tmp_path, {"w": how}), random(5, 72, seed=1)
    assert made.ops() == ["MatMulNBits"]
    assert within_float(made.run({"x": x}, level=0)["y"], x, decoded(w, how), random(40, seed=3))
    names = onnx.load(made.path).graph.node[0].input
    assert (len(names), names[3] == "", names[4]) == (6, symmetric, "")


def test_an_add_of_something_else_stays(tmp_path: Path) -> None:
    w = random(64, 64)
    model = make_model([node("MatMul", "x w", "m"), node("Add", "m x", "y")], {"x": ["n", 64]}, {"y": ["n", 64]},
                       {"w": w})
    made, x = written(model, tmp_path, {"w": form(4, 32, False)}), random(5, 64, seed=1)
    assert made.ops() == ["MatMulNBits", "Add"]
    assert within_float(made.run({"x": x}, level=0)["y"], x, decoded(w, form(4, 32, False)), x)


def test_a_bias_of_more_dimensions(tmp_path: Path) -> None:
    w, b = random(64, 40), random(1, 1, 40, seed=3)
    model = make_model([node("MatMul", "x w", "m"), node("Add", "b m", "y")], {"x": ["n", "s", 64]}, {"y": None},
                       {"w": w, "b": b})
    made, x = written(model, tmp_path, {"w": form(4, 32, False)}), random(2, 3, 64, seed=1)
    assert made.ops() == ["MatMulNBits"]
    assert within_float(made.run({"x": x}, level=0)["y"], x, decoded(w, form(4, 32, False)), b)


@each_bits
def test_layers_that_share_a_weight_share_its_bytes(bits: int, tmp_path: Path) -> None:
    w = random(64, 40)
    model = make_model([node("MatMul", "x w", "a"), node("Tanh", "a", "t"), node("MatMul", "z w", "b")],
                       {"x": ["n", 64], "z": ["n", 64]}, {"t": None, "b": None}, {"w": w})
    how = form(bits, 32, False)
    made = written(model, tmp_path, {"w": how})
    assert sorted(made.ops()) == ["MatMulNBits", "MatMulNBits", "Tanh"]
    assert len(made.stored()) == 3
    x = random(5, 64, seed=1)
    assert within_float(made.run({"x": x, "z": x}, level=0)["b"], x, decoded(w, how))


@pytest.mark.parametrize("held", ["body", "graph"])
def test_layers_inside_bodies(held: str, tmp_path: Path) -> None:
    w = random(64, 40)
    inner = {"w": w} if held == "body" else {}
    then = body([node("MatMul", "x w", "m"), node("Add", "m b", "a")], {"a": None}, "then", inner)
    other = body([node("Slice", "x zero width one", "e")], {"e": None}, "other")
    outer = {"zero": np.array([0]), "width": np.array([40]), "one": np.array([1]), "b": random(40, seed=3)}
    model = make_model([node("If", "c", "y", then_branch=then, else_branch=other)],
                       {"c": (TensorProto.BOOL, []), "x": ["n", 64]}, {"y": None}, outer | ({} if inner else {"w": w}))
    made = written(model, tmp_path, {"w": form(4, 32, False)})
    [branch] = onnx.load(made.path).graph.node
    [then_graph] = [a.g for a in branch.attribute if a.name == "then_branch"]
    assert [n.op_type for n in then_graph.node] == ["MatMulNBits"]
    x = random(5, 64, seed=1)
    found = made.run({"c": np.array(True), "x": x})["y"]
    exact = decoded(w, form(4, 32, False))
    off = np.abs(found - (x.astype(np.float64) @ exact + random(40, seed=3)))
    assert (off <= integer_bound(x, exact, 32)).all()


def test_what_follows_a_layer_in_a_body_stays_behind_it(tmp_path: Path) -> None:
    """Three turns of a Loop, s = tanh(s w)."""
    w, how = random(64, 64) / 8, form(8, 32, True)
    turn = body([node("MatMul", "s w", "m", name="inner"), node("Tanh", "m", "next"), node("Identity", "go", "on")], {},
                "turn", inputs=[value("i", [], TensorProto.INT64), value("go", [], TensorProto.BOOL),
                                value("s", [None, 64])])
    turn.output.extend([value("on", [], TensorProto.BOOL), value("next", [None, 64])])
    model = make_model([node("Loop", "count start x", "y", body=turn)], {"x": ["n", 64]}, {"y": None},
                       {"count": np.array(3), "start": np.array(True), "w": w})
    made = written(model, tmp_path, {"w": how})
    [loop] = [n for n in onnx.load(made.path).graph.node if n.op_type == "Loop"]
    assert [n.op_type for n in loop.attribute[0].g.node if n.op_type != "Identity"] == ["MatMulNBits", "Tanh"]
    x = random(4, 64, seed=1)
    wanted, exact = x.astype(np.float64), decoded(w, how).astype(np.float64)
    off = np.zeros_like(wanted)  # tanh adds nothing to it
    for _ in range(3):
        off = integer_bound(np.abs(wanted) + off, exact, 32) + off @ np.abs(exact)
        wanted = np.tanh(wanted @ exact)
    assert (np.abs(made.run({"x": x})["y"] - wanted) <= off).all()


@pytest.mark.parametrize("fmt", ["qoperator", "qdq"])
def test_a_second_run_edits_nothing(fmt: str, opened: Opener, tmp_path: Path) -> None:
    graph = opened(linear(72, 24, opset=21)[0])
    context = Context(CPU, planned(graph, {"w": form(4, 32, False)}))
    step = LowerBlocks() if fmt == "qoperator" else BlocksToDequantize()
    PassManager([StoreBlocks()]).run(graph, context)
    assert apply(step, graph, context)[0]
    save(graph, tmp_path / "once.onnx")
    assert not apply(step, graph, context)[0]
    save(graph, tmp_path / "twice.onnx")
    assert (tmp_path / "once.onnx").read_bytes() == (tmp_path / "twice.onnx").read_bytes()


@pytest.mark.parametrize("fmt", ["qoperator", "qdq"])
def test_what_is_planned_decoded_stays_decoded(fmt: str, opened: Opener) -> None:
    graph = opened(linear(64, 24, opset=21)[0])
    context = Context(CPU, planned(graph, {"w": form(4, 32, False)}, lowered=False))
    PassManager([StoreBlocks()]).run(graph, context)
    assert apply(LowerBlocks() if fmt == "qoperator" else BlocksToDequantize(), graph, context) == (False, [])


def test_one_reader_of_a_weight_may_be_decoded_beside_a_kernel(tmp_path: Path) -> None:
    """Timing decides on each node; the file then holds both forms."""
    w = random(64, 40)
    model = make_model([node("MatMul", "x w", "a"), node("MatMul", "z w", "b")], {"x": ["n", 64], "z": ["n", 64]},
                       {"a": None, "b": None}, {"w": w})
    how = form(4, 32, False)
    onnx.save(model, tmp_path / "m.onnx")
    graph = load(tmp_path / "m.onnx")
    plan = planned(graph, {"w": how})
    plan.nodes["MatMul_b"] = planned(graph, {"w": how}, lowered=False).nodes["MatMul_b"]
    PassManager([StoreBlocks(), LowerBlocks()]).run(graph, Context(CPU, plan))
    save(graph, tmp_path / "q.onnx")
    assert sorted(op for _, op, *_ in read_nodes(tmp_path / "q.onnx")) == [
        "Cast", "Cast", "MatMul", "MatMulNBits", "Mul", "Reshape", "Sub"]
    eye = np.eye(64, dtype=np.float32)
    np.testing.assert_array_equal(run(tmp_path / "q.onnx", {"x": eye, "z": eye})["b"], decoded(w, how))


# ------------------------------------------------------------------ GatherBlockQuantized


@pytest.mark.parametrize("bits", [4, 8])
@each_sort
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rest", [0, 8], ids=["whole", "short"])
@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32], ids=["int64", "int32"])
def test_look_ups(kind: int, rest: int, size: int, symmetric: bool, bits: int, tmp_path: Path) -> None:
    table = random(30, 2 * size + rest)
    model = make_model([node("Gather", "t i", "y")], {"i": (kind, ["n", "s"])}, {"y": None}, {"t": table})
    how = form(bits, size, symmetric, axis=1)
    made = written(model, tmp_path, {"t": how})
    assert made.ops() == [KERNELS["Gather"]]
    rows = np.array([[3, 29], [0, 3]], np.int64 if kind == TensorProto.INT64 else np.int32)
    np.testing.assert_array_equal(made.run({"i": rows})["y"], decoded(table, how)[rows])
    size_of = sum(len(t.raw_data) for t in made.stored().values())
    assert size_of < table.nbytes * (bits + (32 + 8) / size + 1) / 32 + 300


# ------------------------------------------------------------------ DequantizeLinear in the QDQ form


def opset_for(how: Blocks) -> int:
    return 25 if how.dtype.bits == 2 else 21


@each_bits
@each_sort
@pytest.mark.parametrize(("size", "rest"), [(16, 0), (32, 8), (128, 0), (256, 8)])
@pytest.mark.parametrize("op", ["MatMul", "Add", "Gemm"])
def test_the_portable_form_means_the_same_and_is_fused(op: str, size: int, rest: int, symmetric: bool, bits: int,
                                                       tmp_path: Path) -> None:
    how, inputs = form(bits, size, symmetric), 2 * size + rest
    model, w = linear(inputs, 40, op, opset_for(how))
    made, exact = written(model, tmp_path, {"w": how}, "qdq"), decoded(w, how)
    assert made.ops() == ["DequantizeLinear", *{"Add": ["MatMul", "Add"]}.get(op, [op])]
    onnx.checker.check_model(str(made.path), full_check=True)
    bias = random(40, seed=3) if op != "MatMul" else np.float32(0)
    np.testing.assert_array_equal(made.run({"x": np.eye(inputs, dtype=np.float32)})["y"], exact + bias)
    assert [e.op for e in optimized(made.path, ONE_THREAD, read_nodes)] == ["com.microsoft.MatMulNBits"]
    x = random(5, inputs, seed=1)
    off = np.abs(made.run({"x": x}, optimize=True)["y"] - (x.astype(np.float64) @ exact + bias))
    assert (off <= integer_bound(x, exact, size) + 2e-6 * np.abs(bias).max()).all()


def test_codes_of_the_portable_form_share_bytes(tmp_path: Path) -> None:
    stored = written(linear(72, 40, opset=21)[0], tmp_path, {"w": form(4, 32, False)}, "qdq").stored()
    assert {name: (t.data_type, list(t.dims), len(t.raw_data)) for name, t in stored.items()} == {
        "w.blocks": (TensorProto.UINT4, [72, 40], 72 * 40 // 2),
        "w.block_scales": (TensorProto.FLOAT, [3, 40], 3 * 40 * 4),
        "w.block_zeros": (TensorProto.UINT4, [3, 40], 3 * 40 // 2)}


def test_a_bias_that_the_runtime_would_not_fuse_is_added_apart(tmp_path: Path) -> None:
    """Of [1, N] it would make a Gemm, for which it has no kernel that decodes."""
    w, b = random(64, 40), random(1, 40, seed=3)
    model = make_model([node("MatMul", "x w", "m"), node("Add", "m b", "y")], {"x": ["n", 64]}, {"y": None},
                       {"w": w, "b": b}, opset=21, ir_version=10)
    made = written(model, tmp_path, {"w": form(4, 32, False)}, "qdq")
    assert made.ops() == ["DequantizeLinear", "MatMul", "Sum"]
    assert [e.op for e in optimized(made.path, ONE_THREAD, read_nodes)] == ["com.microsoft.MatMulNBits", "Sum"]


@pytest.mark.parametrize(("bits", "opset", "wanted"), [(4, 20, 21), (8, 17, 21), (2, 24, 25)])
def test_below_its_opset_the_decoded_form_stays(bits: int, opset: int, wanted: int, tmp_path: Path) -> None:
    how = form(bits, 32, True)
    model, w = linear(64, 40, opset=opset)
    made = written(model, tmp_path, {"w": how}, "qdq")
    assert made.ops() == ["Cast", "Mul", "Reshape", "MatMul"]
    assert [(s.pass_name, s.reason) for s in made.context.skips] == [
        ("blocks-to-dequantize", f"DequantizeLinear takes blocks of int{bits} from opset {wanted} on")]
    np.testing.assert_array_equal(made.run({"x": np.eye(64, dtype=np.float32)})["y"], decoded(w, how))


def test_look_ups_and_bodies_stay_decoded_in_the_portable_form(tmp_path: Path) -> None:
    then, other = (body([node("MatMul", "g w", name)], {name: None}, name) for name in "ab")
    model = make_model([node("Gather", "t i", "g"), node("If", "c", "y", then_branch=then, else_branch=other)],
                       {"c": (TensorProto.BOOL, []), "i": (TensorProto.INT64, ["n"])}, {"y": None},
                       {"t": random(30, 64), "w": random(64, 40)}, opset=21, ir_version=10)
    made = written(model, tmp_path, {"w": form(8, 32, True), "t": form(8, 32, True, 1)}, "qdq")
    assert sorted(made.ops()) == ["Cast", "Cast", "Gather", "If", "Mul", "Mul", "Reshape", "Reshape"]
    x = decoded(random(30, 64), form(8, 32, True, 1))[[3, 4]].astype(np.float64)
    exact = x @ decoded(random(64, 40), form(8, 32, True))
    found = made.run({"c": np.array(True), "i": np.array([3, 4])}, optimize=True)["y"]
    assert np.abs(found - exact).max() <= 2e-6 * np.abs(exact).max()
