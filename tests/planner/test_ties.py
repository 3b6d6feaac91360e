"""Tied embeddings: codes are in the file once, for the table and for the layer that is its transpose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, make_model, node, random, run
from lowering_support import CPU, canonical, recipe
from onnx import TensorProto

import onnxq
from onnxq import Plan
from onnxq.errors import UsageError
from onnxq.passes.canonicalize.fold_constants import FoldConstants
from onnxq.passes.manager import Context
from onnxq.planner import ties
from onnxq.planner.outline import Measured, Outline, outline
from onnxq.recipe import Match, Rule

V, D = 320, 64


def table() -> np.ndarray[Any, Any]:
    return random(V, D)


def model(head: str = "Transpose", weight: np.ndarray[Any, Any] | None = None, width: int = D,
          opset: int = 17) -> onnx.ModelProto:
    """ids [n] -> logits [n, V], by a table and its transpose: by that operator, as a constant, or by Gemm's transB."""
    stored = {"t": table()[:, :width]}
    last = {"Transpose": [node("Transpose", "t", "tt", perm=[1, 0]), node("MatMul", "h tt", "y", name="head")],
            "constant": [node("MatMul", "h w", "y", name="head")],
            "Gemm": [node("Gemm", "h t", "y", name="head", transB=1)]}[head]
    if head == "constant":
        stored["w"] = np.ascontiguousarray(stored["t"].T) if weight is None else weight
    return make_model([node("Gather", "t ids", "e", name="look"), node("Tanh", "e", "h"), *last],
                      {"ids": (TensorProto.INT64, ["n"])}, {"y": ["n", V]}, stored, opset=opset)


def outlined(opened: Opener, of: onnx.ModelProto, tied: bool = True, **measured: Any) -> tuple[Outline, dict[str, str]]:
    graph = canonical(opened(of))
    pairs = ties.find(graph)
    return outline(graph, recipe("w4a16"), CPU, Measured(**measured), tied=pairs if tied else {}), pairs


@pytest.mark.parametrize("head", ["Transpose", "constant", "Gemm"])
def test_a_table_and_its_transpose_are_a_pair(opened: Opener, head: str) -> None:
    found, pairs = outlined(opened, model(head))
    assert list(pairs) == ["t"]
    assert found.ties == pairs
    assert found.nodes["look"].lowering == "GatherBlockQuantized"
    assert found.nodes["look"].reason.endswith(f"; the codes are those of {pairs['t']}")
    assert found.nodes["head"].lowering == "MatMulNBits"


def test_what_differs_in_one_number_is_none(opened: Opener) -> None:
    weight = np.ascontiguousarray(table().T)
    weight[D - 1, V - 1] += 1
    assert outlined(opened, model("constant", weight))[1] == {}
    assert outlined(opened, model("constant", random(D, V, seed=9)))[1] == {}


def test_rows_that_are_no_whole_blocks_are_stored_twice(opened: Opener) -> None:
    found, pairs = outlined(opened, model(width=48))
    assert pairs
    assert found.ties == {}


def test_the_table_is_decoded_where_the_layer_is(opened: Opener) -> None:
    found, pairs = outlined(opened, model(), refused={"head": "slower"})
    assert found.ties == pairs
    assert (found.nodes["look"].lowering, found.nodes["head"].lowering) == ("stored", "stored")
    assert found.nodes["look"].reason.endswith(
        f"decoded as the model is loaded and looked up in float, as {pairs['t']} is, whose codes they are")


def test_a_table_that_is_decoded_alone_is_stored_twice(opened: Opener) -> None:
    found, _ = outlined(opened, model(), refused={"look": "slower"})
    assert found.ties == {}
    assert (found.nodes["look"].lowering, found.nodes["head"].lowering) == ("stored", "MatMulNBits")


def test_other_formats_are_stored_twice(opened: Opener) -> None:
    graph = canonical(opened(model()))
    pairs = ties.find(graph)
    mixed = recipe("w4a16", rules=[Rule(Match(name="head"), "w8a16")])
    assert outline(graph, mixed, CPU, tied=pairs).ties == {}
    assert outline(graph, recipe("w4a16"), replace(CPU, portable=True), tied=pairs).ties == {}
    assert outline(graph, recipe("w4a16", keep=["head"]), CPU, tied=pairs).ties == {}


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("rounding", ["auto", "nearest"])
def test_one_tensor_serves_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool, rounding: str) -> None:
    onnx.save(model("constant"), tmp_path / "m.onnx")
    np.savez(tmp_path / "calib.npz", ids=np.random.default_rng(0).integers(0, V, 256))
    if refused:
        monkeypatch.setattr("onnxq.planner.weight_only.no_kernel", lambda n, s, t: "slow" if n.op == "MatMul" else None)
    report = onnxq.compile(tmp_path / "m.onnx", tmp_path / "q.onnx", scheme="w4a16", measure=False, rounding=rounding,
                           calib=str(tmp_path / "calib.npz"), save_plan=tmp_path / "plan")
    assert report.ok, report.verdict.failures
    plan = Plan.load(tmp_path / "plan")
    assert plan.ties == {"t": "w"}
    assert plan.weights.keys() == plan.rounded.keys() == {"w"}
    stored = {t.name: t for t in onnx.load(tmp_path / "q.onnx").graph.initializer}
    codes = sum(t.ByteSize() for t in stored.values())
    assert V * D / 2 < codes < 0.75 * V * D
    params = plan.weights["w"]
    decoded = (plan.rounded["w"].astype(float) - np.repeat(params.zero_point, 32, axis=0)) * np.repeat(
        params.scale.astype(float), 32, axis=0)
    ids = np.arange(0, V, 7)
    exact = np.tanh(decoded.T[ids]) @ decoded
    found = run(tmp_path / "q.onnx", {"ids": ids}, optimize=True)["y"]
    # MatMulNBits rounds what it reads, up to 1 in size, to 127 steps
    bound = 2e-6 * np.abs(exact).max() if refused else 0.51 / 127 * np.abs(decoded).sum(axis=0).max()
    assert np.abs(found - exact).max() <= bound
    assert report.tensors["t"].code_bytes == 0
    assert report.tensors["t"].dtype == report.tensors["w"].dtype == "uint4"
    onnxq.compile(tmp_path / "m.onnx", tmp_path / "b.onnx", plan=tmp_path / "plan", measure=False, rounding=rounding)
    assert (tmp_path / "q.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_large_table_is_transposed_as_it_is_read(opened: Opener) -> None:
    graph = opened(model())
    assert FoldConstants(max_bytes=1000).run(graph, Context(CPU))
    [head] = [n for n in graph.nodes if n.name == "head"]
    np.testing.assert_array_equal(graph.read(head.inputs[1]), table().T)
    assert [n.op for n in graph.nodes] == ["Gather", "Tanh", "MatMul"]
    assert list(ties.find(graph)) == ["t"]


def test_a_plan_for_a_model_that_is_not_tied_is_refused(tmp_path: Path) -> None:
    for name, weight in (("a", None), ("b", random(D, V, seed=9))):
        onnx.save(model("constant", weight), tmp_path / f"{name}.onnx")
    onnxq.compile(tmp_path / "a.onnx", tmp_path / "q.onnx", scheme="w4a16", measure=False, save_plan=tmp_path / "plan")
    with pytest.raises(UsageError, match="'t' is not the transpose of 'w' in this one"):
        onnxq.compile(tmp_path / "b.onnx", tmp_path / "o.onnx", plan=tmp_path / "plan", measure=False)
