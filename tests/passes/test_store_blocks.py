"""Weights in blocks that are decoded as the model is loaded: what they decode to, where, and the bytes they take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from blocks_support import decoded, form, linear, planned, written
from conftest import Opener, apply, body, make_model, node, random, run
from lowering_support import CPU, ONE_THREAD
from onnx import TensorProto

from onnxq.graph import read_nodes, save
from onnxq.passes.manager import Context
from onnxq.passes.pack.codes import PackCodes, opset_for_codes
from onnxq.passes.quantize.blocks import StoreBlocks
from onnxq.plan import UNTOUCHED, NodePlan, Plan
from onnxq.runtime.observe import optimized
from onnxq.targets import TARGETS

FORMS = [(bits, symmetric) for bits in (2, 4, 8) for symmetric in (True, False)]
each_form = pytest.mark.parametrize(("bits", "symmetric"), FORMS, ids=[f"{'u' * (not s)}int{b}" for b, s in FORMS])


def constants(path: Path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


@each_form
@pytest.mark.parametrize("inputs", [64, 72], ids=["whole", "short"])
@pytest.mark.parametrize("op", ["MatMul", "Add", "Gemm"])
def test_a_layer_reads_what_its_codes_stand_for(op: str, inputs: int, bits: int, symmetric: bool,
                                                tmp_path: Path) -> None:
    model, w = linear(inputs, 24, op)
    how = form(bits, 32, symmetric)
    made = written(model, tmp_path, {"w": how}, None)
    bias = random(24, seed=3) if op != "MatMul" else np.float32(0)
    np.testing.assert_array_equal(made.run({"x": np.eye(inputs, dtype=np.float32)})["y"], decoded(w, how) + bias)
    folds = {"Cast", "Mul", "Reshape", *(() if symmetric else ("Sub",)), *(("Slice",) if inputs % 32 else ())}
    assert set(made.ops()) == folds | {"Add": {"MatMul", "Add"}}.get(op, {op})


@each_form
@pytest.mark.parametrize("columns", [64, 72], ids=["whole", "short"])
def test_rows_of_a_table_are_what_their_codes_stand_for(columns: int, bits: int, symmetric: bool,
                                                        tmp_path: Path) -> None:
    """Blocks run along the columns."""
    table = random(50, columns)
    model = make_model([node("Gather", "t i", "y")], {"i": (TensorProto.INT64, ["n", "s"])}, {"y": None}, {"t": table})
    how = form(bits, 32, symmetric, axis=1)
    found = written(model, tmp_path, {"t": how}, None).run({"i": np.array([[3, 49], [0, 3]])})["y"]
    np.testing.assert_array_equal(found, decoded(table, how)[[[3, 49], [0, 3]]])


@each_form
@pytest.mark.parametrize("inputs", [64, 72], ids=["whole", "short"])
def test_the_runtime_decodes_once_as_it_loads(inputs: int, bits: int, symmetric: bool, tmp_path: Path) -> None:
    made = written(linear(inputs, 24)[0], tmp_path, {"w": form(bits, 32, symmetric)}, None)
    assert [e.op for e in optimized(made.path, ONE_THREAD, read_nodes)] == ["MatMul"]


def test_a_second_run_edits_nothing(opened: Opener, tmp_path: Path) -> None:
    graph = opened(linear(72, 24)[0])
    context = Context(CPU, planned(graph, {"w": form(4, 32, False)}, lowered=False))
    assert apply(StoreBlocks(), graph, context)[0]
    save(graph, tmp_path / "once.onnx")
    assert not apply(StoreBlocks(), graph, context)[0]
    save(graph, tmp_path / "twice.onnx")
    assert (tmp_path / "once.onnx").read_bytes() == (tmp_path / "twice.onnx").read_bytes()


def test_what_the_plan_does_not_name_stays_float(opened: Opener) -> None:
    graph = opened(linear(64, 24)[0])
    assert apply(StoreBlocks(), graph, Context(CPU)) == (False, [])
    other = Plan("w8a8", "cpu", {"MatMul_y": NodePlan("MatMul_y", "MatMul", "float", "float", "")})
    assert apply(StoreBlocks(), graph, Context(CPU, other)) == (False, [])
    gone = Plan("w4a16", "cpu", {"MatMul_y": NodePlan("MatMul_y", "MatMul", "stored", "stored", "", weight="another",
                                                      activation=UNTOUCHED)})
    assert apply(StoreBlocks(), graph, Context(CPU, gone)) == (False, []), "another pass took the weight away"
    assert [n.op for n in graph.nodes] == ["MatMul"]


def test_a_weight_that_two_layers_read_is_decoded_once(tmp_path: Path) -> None:
    w = random(64, 24)
    model = make_model([node("MatMul", "x w", "a"), node("MatMul", "z w", "b")], {"x": ["n", 64], "z": ["n", 64]},
                       {"a": None, "b": None}, {"w": w})
    made = written(model, tmp_path, {"w": form(4, 32, False)}, None)
    assert sorted(made.ops()) == ["Cast", "Cast", "MatMul", "MatMul", "Mul", "Reshape", "Sub"]
    eye = np.eye(64, dtype=np.float32)
    found = made.run({"x": eye, "z": 2 * eye})
    np.testing.assert_array_equal(found["a"], decoded(w, form(4, 32, False)))
    np.testing.assert_array_equal(found["b"], 2 * found["a"])


@pytest.mark.parametrize("held", ["body", "graph"])
def test_weights_of_bodies_are_decoded_outside(held: str, tmp_path: Path) -> None:
    """They fold there once, for all bodies that see them."""
    w = random(64, 24)
    inner = {"w": w} if held == "body" else {}
    then, other = body([node("MatMul", "x w", "a")], {"a": None}, "then", inner), body(
        [node("Slice", "x zero width one", "b")], {"b": None}, "other")
    outer = {"zero": np.array([0]), "width": np.array([24]), "one": np.array([1])} | ({} if inner else {"w": w})
    model = make_model([node("If", "c", "y", then_branch=then, else_branch=other)],
                       {"c": (TensorProto.BOOL, []), "x": ["n", 64]}, {"y": None}, outer)
    how = form(8, 32, True)
    made = written(model, tmp_path, {"w": how}, None)
    assert set(made.ops()) == {"Cast", "Mul", "Reshape", "If"}
    x = np.eye(64, dtype=np.float32)
    np.testing.assert_array_equal(made.run({"c": np.array(True), "x": x})["y"], decoded(w, how))
    np.testing.assert_array_equal(made.run({"c": np.array(False), "x": x})["y"], x[:, :24])
    left = [e.op for e in optimized(made.path, ONE_THREAD, read_nodes)]
    assert left == ["If"]


# ------------------------------------------------------------------ codes that share bytes


@pytest.mark.parametrize(("bits", "opset"), [(4, 21), (2, 25)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_share_bytes_from_the_opset_on_that_casts_them(bits: int, opset: int, symmetric: bool,
                                                             tmp_path: Path) -> None:
    model, w = linear(72, 24, opset=opset)
    how = form(bits, 32, symmetric)
    made = written(model, tmp_path, {"w": how}, None)
    kind = getattr(TensorProto, f"{'' if symmetric else 'U'}INT{bits}")
    codes = [t for t in made.stored().values() if t.data_type == kind]
    assert sum(len(t.raw_data) for t in codes) == 3 * (32 + (0 if symmetric else 1)) * 24 * bits // 8
    np.testing.assert_array_equal(made.run({"x": np.eye(72, dtype=np.float32)})["y"], decoded(w, how))
    assert [e.op for e in optimized(made.path, ONE_THREAD, read_nodes)] == ["MatMul"]
    assert not apply(PackCodes(), made.graph, made.context)[0], "a second run edits nothing"


@pytest.mark.parametrize(("bits", "opset", "wanted"), [(4, 20, 21), (2, 21, 25), (2, 24, 25)])
def test_below_that_opset_each_code_takes_a_byte(bits: int, opset: int, wanted: int, tmp_path: Path) -> None:
    made = written(linear(64, 24, opset=opset)[0], tmp_path, {"w": form(bits, 32, True)}, None)
    assert [s.reason for s in made.context.skips] == [f"Cast takes int{bits} from opset {wanted} on"]
    assert constants(made.path)["w.q"].dtype == np.int8


def test_the_opset_to_raise_to_is_that_of_the_narrowest_decoded_codes(opened: Opener) -> None:
    model = make_model([node("MatMul", "x v", "m"), node("MatMul", "m w", "y")], {"x": ["n", 32]}, {"y": None},
                       {"v": random(32, 32), "w": random(32, 32, seed=1)})
    graph = opened(model)
    for bits, wanted in (((8, 8), 0), ((4, 8), 21), ((4, 2), 25)):
        forms = dict(zip("vw", (form(b, 32, True) for b in bits), strict=True))
        assert opset_for_codes(planned(graph, forms, lowered=False), TARGETS["cpu"]) == wanted
        assert opset_for_codes(planned(graph, forms), TARGETS["cpu"]) == 0, "kernels read bytes"


def test_other_casts_are_left_alone(tmp_path: Path) -> None:
    """Even of a constant whose name looks like that of codes."""
    model = make_model([node("Cast", "t.q", "f", to=1), node("Add", "x f", "s"), node("MatMul", "s w", "y")],
                       {"x": ["n", 64]}, {"y": None}, {"t.q": np.ones((1, 64), np.int8), "w": random(64, 24)},
                       opset=21, ir_version=10)
    made = written(model, tmp_path, {"w": form(4, 32, True)}, None)
    assert all(t.data_type != TensorProto.INT4 or t.name == "w.q.packed" for t in made.stored().values())
    x = random(3, 64, seed=2)
    wanted = (x + 1) @ decoded(random(64, 24), form(4, 32, True))
    np.testing.assert_allclose(run(made.path, {"x": x})["y"], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
