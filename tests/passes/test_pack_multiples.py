"""int8 weights with two levels of scales: 4 bits in the file, the same codes and kernels once it is loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random, run
from lowering_support import CPU, ONE_THREAD, canonical

import onnxq
from onnxq import Plan
from onnxq.graph import load, read_nodes, save
from onnxq.numerics.two_level import TwoLevel
from onnxq.passes.manager import Context, PassManager
from onnxq.passes.pack.multiples import PackMultiples
from onnxq.plan import Multiples
from onnxq.runtime.observe import optimized

K, N = 72, 48  # the last block of 16 is short


def model(folder: Path, op: str = "MatMul", opset: int = 17) -> Path:
    weights = {"w": random(K, N), "b": random(N)}
    nodes = [node("Gemm", "x w b", "y")] if op == "Gemm" else [node("MatMul", "x w", "t"), node("Add", "t b", "y")]
    path = folder / "m.onnx"
    onnx.save(make_model(nodes, {"x": ["n", K]}, {"y": ["n", N]}, weights, opset=opset), path)
    return path


def codes_of(plan: Plan) -> np.ndarray:
    """float64: what the layer's weight stands for."""
    return plan.rounded["w"] * plan.weights["w"].scale.astype(np.float64)


@pytest.mark.parametrize("form", ["qoperator", "qdq"])
@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_the_file_holds_4_bits_and_the_kernels_are_those_of_int8(tmp_path: Path, op: str, form: str) -> None:
    out = tmp_path / "q.onnx"
    report = onnxq.compile(model(tmp_path, op), out, scheme="w4a8", format=form, measure=False,
                           save_plan=tmp_path / "plan")
    assert report.ok, report.verdict.failures
    stored = {t.name: t for t in onnx.load(out).graph.initializer}
    assert stored["w.levels"].data_type == stored["w.multiples"].data_type == onnx.TensorProto.INT4
    assert list(stored["w.levels"].dims) == [5, 16, N]
    assert not any(t.data_type == onnx.TensorProto.INT8 and t.ByteSize() > N * 16 for t in stored.values())
    ran = [e.op for e in optimized(out, ONE_THREAD, read_nodes)]
    kernel = "com.microsoft.MatMulIntegerToFloat" if form == "qoperator" else "MatMulInteger"
    assert any(name.startswith(kernel) for name in ran), ran
    assert not {"Cast", "Slice", "Reshape"} & set(ran) or form == "qdq"
    x = random(5, K, seed=7)
    plan = Plan.load(tmp_path / "plan")
    exact = x @ codes_of(plan) + random(N)
    found = run(out, {"x": x}, optimize=True)["y"]
    # activations are off by half a step of their rows
    bound = 0.51 * np.ptp(x, axis=1)[:, None] / 255 * np.abs(codes_of(plan)).sum(axis=0)
    assert (np.abs(found - exact) <= bound).all()


def test_what_it_stores_is_bit_for_bit_what_kernels_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    multiples = rng.choice([m for m in range(-8, 8) if m], (5, N)).astype(np.int8)
    two = TwoLevel(np.full(N, 0.5, np.float32), multiples, 16)
    codes = two.codes(rng.integers(-8, 8, (K, N)).astype(np.int8))
    path = tmp_path / "m.onnx"
    onnx.save(make_model([node("Cast", "c", "f", to=1), node("MatMul", "x f", "y")], {"x": ["n", K]},
                         {"y": ["n", N]}, {"c": codes}, opset=21), path)
    plan = Plan("w4a8", "cpu", weights={"w": two.channels}, multiples={"w": Multiples(16, multiples)})
    graph = load(path)
    [cast] = [n for n in graph.nodes if n.op == "Cast"]
    graph.replace_input(cast, 0, graph.constant("w.q", codes))
    assert PackMultiples().run(graph, Context(CPU, plan))
    assert not PackMultiples().run(graph, Context(CPU, plan)), "a second run edits nothing"
    save(graph, tmp_path / "q.onnx")
    for optimize in (False, True):
        found = run(tmp_path / "q.onnx", {"x": np.eye(K, dtype=np.float32)}, optimize)["y"]
        np.testing.assert_array_equal(found, codes.astype(np.float32))


def test_an_older_opset_keeps_int8(tmp_path: Path) -> None:
    graph = canonical(load(model(tmp_path)))
    plan = Plan("w4a8", "cpu", multiples={"w": Multiples(16, np.ones((5, N), np.int8))})
    graph.constant("w.q", np.zeros((K, N), np.int8))
    context = Context(CPU, plan)
    PassManager([PackMultiples()]).run(graph, context)
    assert not graph.has("w.levels")


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    path = model(tmp_path)
    onnxq.compile(path, tmp_path / "a.onnx", scheme="w4a8", measure=False, save_plan=tmp_path / "plan")
    onnxq.compile(path, tmp_path / "b.onnx", plan=tmp_path / "plan", measure=False)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
