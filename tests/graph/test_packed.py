"""Packed weights in models that are loaded: dense constants again, computed as they are read, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import assert_same, body, make_model, node, random, run, text
from onnx import TensorProto, helper, numpy_helper
from packing_support import CONTRIB, SHAPE, Example, examples, packed

from onnxq.errors import ModelError
from onnxq.graph import Graph, Shared, constants, load, pack_weight, packed_weights, save
from onnxq.graph.decoders import PACKED
from onnxq.graph.tensors import Computed
from onnxq.numerics.encoding_choice import Form

EXAMPLES = examples()


def weights(graph: Graph) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: graph.read(t) for t in constants(graph)}


def put(graph: Graph, form: Form, name: str = "w") -> None:
    [weight] = [t for t in constants(graph) if t.name == name]
    pack_weight(graph, weight, form.encode(graph.read(weight)).outline(), form.encode, Shared())


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_loads_as_the_dense_model(example: Example, tmp_path: Path) -> None:
    """The same text and weights; saved again, the same file."""
    dense, small, graph = packed(example, tmp_path)
    assert graph.check() == []
    [told] = packed_weights(small)
    size = example.weight.nbytes
    assert (told.name, told.names, told.shape, told.dense_bytes) == ("w", example.names, SHAPE, size)
    assert told.packed_bytes == example.form.encode(example.weight).outline().nbytes < size
    a, b = load(dense), load(small)
    assert text(b) == text(a)
    assert {name: values.tobytes() for name, values in weights(b).items()} == {
        name: values.tobytes() for name, values in weights(a).items()}
    [weight] = [t for t in constants(b) if t.name == "w"]
    assert isinstance(weight._values, Computed)
    save(a, tmp_path / "a.onnx")
    save(b, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_dense_model_has_no_packed_weight(tmp_path: Path) -> None:
    onnx.save(make_model([node("Relu", "x", "y")], {"x": [2]}, {"y": [2]}), tmp_path / "m.onnx")
    assert packed_weights(tmp_path / "m.onnx") == []


def test_one_decoder_for_several_weights_and_readers(tmp_path: Path) -> None:
    """A weight that two nodes read is decoded once; nodes stand before the first reader."""
    sparse = EXAMPLES["bitmap"].weight
    nodes = [node("Relu", "x", "r"), *(node("DynamicQuantizeMatMul", f"r {w} scale", y, domain="com.microsoft")
                                       for w, y in (("w", "a"), ("v", "b"), ("w", "c")))]
    model = make_model(nodes, {"x": ["N", SHAPE[0]]}, dict.fromkeys("abc"),
                       {"w": sparse, "v": sparse[:, ::-1].copy(), "scale": np.float32(1)}, 21, CONTRIB, 10)
    onnx.save(model, tmp_path / "m.onnx")
    graph = load(tmp_path / "m.onnx")
    put(graph, Form("bitmap"))
    put(graph, Form("bitmap"), "v")
    assert [n.op for n in graph.nodes] == ["Relu", "Bitmap", "DynamicQuantizeMatMul", "Bitmap",
                                           "DynamicQuantizeMatMul", "DynamicQuantizeMatMul"]
    save(graph, tmp_path / "p.onnx")
    assert [f.name for f in onnx.load(tmp_path / "p.onnx").functions] == ["Bitmap"]
    feed = {"x": random(2, SHAPE[0])}
    assert_same(run(tmp_path / "p.onnx", feed), run(model, feed))
    assert text(load(tmp_path / "p.onnx")) == text(load(tmp_path / "m.onnx"))


def test_a_weight_in_a_body(tmp_path: Path) -> None:
    """It is decoded in the main graph, which the body sees."""
    weight = EXAMPLES["exceptions"].weight.astype(np.float32)
    inner = [body([node("MatMul", f"x {w}", f"{w}_y")], {f"{w}_y": None}, w, {w: weight}) for w in ("w", "v")]
    model = make_model([node("If", "c", "y", then_branch=inner[0], else_branch=inner[1])],
                       {"c": (TensorProto.BOOL, []), "x": [2, SHAPE[0]]}, {"y": None}, opset=21, ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    graph = load(tmp_path / "m.onnx")
    put(graph, Form("codebook", 8))
    save(graph, tmp_path / "p.onnx")
    feed = {"c": np.array(True), "x": random(2, SHAPE[0])}
    assert_same(run(tmp_path / "p.onnx", feed), run(model, feed))
    assert [w.name for w in packed_weights(tmp_path / "p.onnx")] == ["w"]
    assert_same(weights(load(tmp_path / "p.onnx")), weights(load(tmp_path / "m.onnx")))


def test_external_data(tmp_path: Path) -> None:
    """Arrays in a file of their own, of types below a byte, too, are mapped and decoded."""
    example = EXAMPLES["exceptions"]
    _, _, graph = packed(example, tmp_path)
    save(graph, tmp_path / "e.onnx", external_above=0)
    assert (tmp_path / "e.onnx.data").stat().st_size > 1000
    assert weights(load(tmp_path / "e.onnx"))["w"].tobytes() == example.weight.tobytes()
    feed = {"x": random(2, SHAPE[0])}
    assert_same(run(tmp_path / "e.onnx", feed), run(tmp_path / "dense.onnx", feed))


def test_another_decoder_of_the_name_is_inlined(tmp_path: Path) -> None:
    """Only what this version would write is taken for what it says; of others their nodes are carried, as of any."""
    _, small, _ = packed(EXAMPLES["filled"], tmp_path)
    model = onnx.load(small)
    [function] = model.functions
    function.node.insert(0, helper.make_node("Identity", ["value"], ["unused"]))
    onnx.save(model, tmp_path / "other.onnx")
    graph = load(tmp_path / "other.onnx")
    assert "Expand" in [n.op for n in graph.nodes]
    assert all(n.domain != PACKED for n in graph.nodes)
    assert packed_weights(tmp_path / "other.onnx") == []
    save(graph, tmp_path / "saved.onnx")
    feed = {"x": random(2, SHAPE[0])}
    assert_same(run(tmp_path / "saved.onnx", feed), run(small, feed))


def test_a_decoder_of_a_computed_tensor_is_inlined(tmp_path: Path) -> None:
    _, small, _ = packed(EXAMPLES["filled"], tmp_path)
    model = onnx.load(small)
    model.graph.node.insert(0, helper.make_node("Abs", ["w.value"], ["w.abs"]))
    model.graph.node[1].input[0] = "w.abs"
    onnx.save(model, tmp_path / "other.onnx")
    assert [n.op for n in load(tmp_path / "other.onnx").nodes if n.op in ("Abs", "Expand")] == ["Abs", "Expand"]


def test_damaged_arrays_are_an_error(tmp_path: Path) -> None:
    """Steps that lead behind the end."""
    _, small, _ = packed(EXAMPLES["exceptions"], tmp_path)
    model = onnx.load(small)
    [steps] = [t for t in model.graph.initializer if t.name == "w.steps"]
    steps.CopyFrom(numpy_helper.from_array(np.full(steps.dims, 255, np.uint8), "w.steps"))
    onnx.save(model, tmp_path / "bad.onnx")
    with pytest.raises(ModelError, match="packed weight does not fit"):
        weights(load(tmp_path / "bad.onnx"))


def test_a_name_that_is_taken_is_an_error(tmp_path: Path) -> None:
    from onnxq.errors import GraphError

    values = EXAMPLES["bitmap"].weight.astype(np.float32)
    model = make_model([node("MatMul", "x w", "w.bitmap"), node("Relu", "w.bitmap", "y")], {"x": [2, SHAPE[0]]},
                       {"y": None}, {"w": values}, 21, ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    graph = load(tmp_path / "m.onnx")
    with pytest.raises(GraphError, match=r"'w.bitmap' exists already"):
        put(graph, Form("bitmap"))
