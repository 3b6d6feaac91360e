"""Weights kept as int8: they fold at load, bodies included, and tables are decoded row by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import body, make_model, node, random, run
from onnx import TensorProto

from onnxq import compile
from onnxq.graph import read_nodes
from onnxq.runtime.session import Session


def _compiled(tmp_path: Path, model: onnx.ModelProto) -> tuple[Path, dict[str, str]]:
    source, out = tmp_path / "m.onnx", tmp_path / "q.onnx"
    source.write_bytes(model.SerializeToString())
    report = compile(source, out, scheme="w8a8-dynamic-tensor", measure=False)
    assert report.ok, report.verdict.failures
    return out, {n.name: n.lowering for n in report.nodes}


def _ran(tmp_path: Path, path: Path) -> list[str]:
    """Operators of the graph as onnxruntime optimized it."""
    Session(path, optimized_path=str(tmp_path / "optimized.onnx"))
    return [op for _, op, _, _, _ in read_nodes(tmp_path / "optimized.onnx")]


def _weight_bytes(path: Path) -> int:
    return sum(len(t.raw_data) for t in onnx.load(path).graph.initializer)


@pytest.mark.parametrize(("op", "shape", "attrs"), [
    ("Conv", (24, 16, 3, 3), {}), ("ConvTranspose", (16, 24, 3, 3), {}),
    ("ConvTranspose", (16, 12, 3, 3), {"group": 2})])
def test_a_float_operator_reads_decoded_weights(tmp_path: Path, op: str, shape: tuple[int, ...],
                                                attrs: dict[str, int]) -> None:
    model = make_model([node(op, "x w", "y", **attrs)], {"x": ["n", 16, 8, 8]}, {"y": None}, {"w": random(*shape)})
    out, lowerings = _compiled(tmp_path, model)
    assert lowerings[f"{op}_y"] == "stored"
    assert not {"Cast", "Mul", "DequantizeLinear"} & set(_ran(tmp_path, out))  # folded
    assert _weight_bytes(out) < 0.3 * _weight_bytes(tmp_path / "m.onnx")
    feed = {"x": random(2, 16, 8, 8, seed=1)}
    exact, found = run(tmp_path / "m.onnx", feed)["y"], run(out, feed, optimize=True)["y"]
    assert np.abs(exact - found).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_recurrent_layers_of_both_directions(tmp_path: Path, op: str) -> None:
    gates = {"LSTM": 4, "GRU": 3}[op]
    model = make_model([node(op, "x w r", "y", hidden_size=16, direction="bidirectional")],
                       {"x": ["s", "n", 24]}, {"y": None},
                       {"w": random(2, gates * 16, 24) / 5, "r": random(2, gates * 16, 16) / 4})
    out, lowerings = _compiled(tmp_path, model)
    assert lowerings[f"{op}_y"] == "stored"
    feed = {"x": random(6, 3, 24, seed=1)}
    exact, found = run(tmp_path / "m.onnx", feed)["y"], run(out, feed, optimize=True)["y"]
    assert np.abs(exact - found).max() < 0.02


def test_a_look_up_decodes_only_the_rows_that_it_reads(tmp_path: Path) -> None:
    table = random(500, 64) * np.logspace(-2, 1, 500)[:, None].astype(np.float32)  # rows of very different size
    model = make_model([node("Gather", "t i", "y")], {"i": (TensorProto.INT64, ["n", "s"])}, {"y": ["n", "s", 64]},
                       {"t": table})
    out, lowerings = _compiled(tmp_path, model)
    assert lowerings["Gather_y"] == "stored"
    feed = {"i": np.array([[0, 499, 250], [1, 2, 3]])}
    exact, found = run(tmp_path / "m.onnx", feed)["y"], run(out, feed, optimize=True)["y"]
    assert (np.abs(exact - found) <= np.abs(exact).max(-1, keepdims=True) / 254 * 1.001).all()


def test_weights_inside_an_if_body_are_stored_there(tmp_path: Path) -> None:
    then = body([node("Conv", "x w1", "a")], {"a": None}, "then", {"w1": random(24, 16, 3, 3)})
    other = body([node("Conv", "x w2", "b")], {"b": None}, "other", {"w2": random(24, 16, 3, 3, seed=2)})
    model = make_model([node("If", "c", "y", then_branch=then, else_branch=other)],
                       {"c": (TensorProto.BOOL, []), "x": ["n", 16, 8, 8]}, {"y": None})
    out, lowerings = _compiled(tmp_path, model)
    assert lowerings["Conv_a"] == lowerings["Conv_b"] == "stored"
    assert out.stat().st_size < 0.5 * (tmp_path / "m.onnx").stat().st_size
    for flag in (True, False):
        feed = {"c": np.array(flag), "x": random(2, 16, 8, 8, seed=1)}
        exact, found = run(tmp_path / "m.onnx", feed)["y"], run(out, feed, optimize=True)["y"]
        assert np.abs(exact - found).max() < 0.02 * np.abs(exact).max()


def test_a_table_that_an_int8_kernel_reads_another_way_stays_float(tmp_path: Path) -> None:
    model = make_model([node("Gather", "t i", "e"), node("MatMul", "e t", "y")],
                       {"i": (TensorProto.INT64, ["n"])}, {"y": ["n", 160]}, {"t": random(160, 160)})
    _, lowerings = _compiled(tmp_path, model)
    assert (lowerings["Gather_e"], lowerings["MatMul_y"]) == ("float", "DynamicQuantizeMatMul")


def test_a_weight_that_two_branches_share_is_stored_once(tmp_path: Path) -> None:
    """As the runtime sees it: one copy in the outer graph, decoded there."""
    then, other = (body([node("Conv", "x w", name)], {name: None}, name) for name in "ab")
    model = make_model([node("If", "c", "y", then_branch=then, else_branch=other)],
                       {"c": (TensorProto.BOOL, []), "x": ["n", 16, 8, 8]}, {"y": None}, {"w": random(24, 16, 3, 3)})
    out, lowerings = _compiled(tmp_path, model)
    assert lowerings["Conv_a"] == lowerings["Conv_b"] == "stored"
    assert out.stat().st_size < 0.5 * (tmp_path / "m.onnx").stat().st_size
    assert [n.op_type for n in onnx.load(out).graph.node].count("Cast") == 1
    for flag in (True, False):
        feed = {"c": np.array(flag), "x": random(2, 16, 8, 8, seed=1)}
        exact, found = run(tmp_path / "m.onnx", feed)["y"], run(out, feed, optimize=True)["y"]
        assert np.abs(exact - found).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("reader", ["Exp", "Gather"])
def test_a_weight_that_something_else_reads_as_floats_is_not_stored_beside_them(tmp_path: Path, reader: str) -> None:
    """A copy in int8 would make the file larger."""
    second = node("Exp", "w", "e") if reader == "Exp" else node("Gather", "w i", "e", axis=1)
    model = make_model([node("MatMul", "w x", "y"), second], {"x": [64, "n"], "i": (TensorProto.INT64, ["m"])},
                       {"y": None, "e": None}, {"w": random(64, 64)})
    _, lowerings = _compiled(tmp_path, model)
    assert lowerings["MatMul_y"] == "float"


@pytest.mark.parametrize("op", ["Conv", "Gather", "GRU"])
def test_a_second_compilation_changes_nothing(tmp_path: Path, op: str) -> None:
    models = {
        "Conv": make_model([node(op, "x w", "y")], {"x": ["n", 16, 8, 8]}, {"y": None}, {"w": random(24, 16, 3, 3)}),
        "Gather": make_model([node(op, "t x", "y")], {"x": (TensorProto.INT64, ["n"])}, {"y": ["n", 64]},
                             {"t": random(500, 64)}),
        "GRU": make_model([node(op, "x w r", "y", hidden_size=32)], {"x": ["s", "n", 24]}, {"y": None},
                          {"w": random(1, 96, 24), "r": random(1, 96, 32)})}
    out, _ = _compiled(tmp_path, models[op])
    report = compile(out, tmp_path / "again.onnx", scheme="w8a8-dynamic-tensor", measure=False)
    assert {n.scheme for n in report.nodes} == {"float", "given"}
    before, after = onnx.load(out).graph, onnx.load(tmp_path / "again.onnx").graph
    assert [n.op_type for n in before.node] == [n.op_type for n in after.node]
    assert ({i.name: i.SerializeToString() for i in before.initializer}
            == {i.name: i.SerializeToString() for i in after.initializer})


def test_a_node_kept_float_keeps_its_weights(tmp_path: Path) -> None:
    source = tmp_path / "m.onnx"
    source.write_bytes(make_model([node("Conv", "x w", "y")], {"x": ["n", 16, 8, 8]}, {"y": None},
                                  {"w": random(24, 16, 3, 3)}).SerializeToString())
    report = compile(source, tmp_path / "q.onnx", scheme="w8a8-dynamic-tensor", keep_float=["w"], measure=False)
    assert [n.lowering for n in report.nodes] == ["float"]
