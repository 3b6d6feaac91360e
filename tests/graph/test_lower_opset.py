"""Graphs of a later opset that are graphs of an earlier one, too."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random, run
from onnx import TensorProto

from onnxq.graph import lower_opset, save


@pytest.mark.parametrize("later", range(14, 24))
def test_what_has_not_changed_is_called_older_and_computes_the_same(opened, tmp_path, later):
    model = make_model(
        [node("Conv", "x w", "c", pads=[1, 1, 1, 1]), node("Relu", "c", "r"), node("Reshape", "r shape", "f"),
         node("MatMul", "f m", "y")], {"x": [1, 2, 4, 4]}, {"y": [1, 5]},
        {"w": random(3, 2, 3, 3), "shape": np.asarray([1, -1]), "m": random(48, 5)}, opset=later, ir_version=10)
    graph, x = opened(model), random(1, 2, 4, 4)
    assert lower_opset(graph, 13) is None
    assert graph.opset == 13
    save(graph, tmp_path / "out.onnx")
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    assert [o.version for o in onnx.load(tmp_path / "out.onnx").opset_import] == [13]
    np.testing.assert_array_equal(run(tmp_path / "out.onnx", {"x": x})["y"], run(model, {"x": x})["y"])


@pytest.mark.parametrize(("made", "inputs", "stored", "later", "older"), [
    (node("ReduceSum", "x", "y"), {"x": [2, 3]}, {}, 14, None),
    (node("ReduceMean", "x axes", "y"), {"x": [2, 3]}, {"axes": np.asarray([1])}, 18, 17),
    (node("Gelu", "x", "y"), {"x": [2, 3]}, {}, 20, 19),
    (node("Split", "x", "y z", num_outputs=2), {"x": [2, 4]}, {}, 18, 17),
    (node("LayerNormalization", "x s", "y"), {"x": [2, 3]}, {"s": np.ones(3, np.float32)}, 17, 16),
    (node("Pad", "x pads", "y", mode="wrap"), {"x": [2, 3]}, {"pads": np.asarray([0, 1, 0, 1])}, 19, 18),
    (node("ReduceMax", "x", "y"), {"x": (TensorProto.BOOL, [2, 3])}, {}, 20, 18),
], ids=["same", "axes as input", "new operator", "attribute", "norm", "value", "type"])
def test_what_came_with_a_version_stands_in_the_way(opened, made, inputs, stored, later, older):
    kind = TensorProto.BOOL if made.op_type == "ReduceMax" else TensorProto.FLOAT
    graph = opened(make_model([made], inputs, {"y": (kind, None)}, stored, opset=later, ir_version=9))
    if older is None:
        assert lower_opset(graph, 13) is None
        return
    assert made.op_type in (lower_opset(graph, older) or "")
    assert graph.opset == later


def test_an_earlier_model_stays_as_it_is(opened):
    graph = opened(make_model([node("Relu", "x", "y")], {"x": [2]}, {"y": [2]}, opset=13))
    assert lower_opset(graph, 20) is None
    assert graph.opset == 13
