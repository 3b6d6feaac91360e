"""Pruned weights in place of the model's own."""

from __future__ import annotations

import numpy as np
from conftest import Opener, apply, make_model, node, random, run

from onnxq.graph import save
from onnxq.passes.manager import Context
from onnxq.passes.transform.prune import Prune
from onnxq.plan import Plan


def test_all_readers_get_the_pruned_weight_and_it_is_put_in_once(opened: Opener, tmp_path) -> None:
    model = make_model([node("MatMul", "x w", "a"), node("MatMul", "a w", "b"), node("MatMul", "b v", "y")],
                       {"x": [3, 8]}, {"y": None}, {"w": random(8, 8), "v": random(8, 4)})
    graph, pruned = opened(model), np.where(random(8, 8) > 0, random(8, 8), np.float32(0))
    context = Context(plan=Plan("float", "cpu", pruned={"w": pruned}))
    assert apply(Prune(), graph, context) == (True, [])
    assert [n.inputs[1].name for n in graph.nodes] == ["w.pruned", "w.pruned", "v"]
    save(graph, tmp_path / "out.onnx")
    x = random(3, 8, seed=1)
    np.testing.assert_allclose(run(tmp_path / "out.onnx", {"x": x})["y"], x @ pruned @ pruned @ random(8, 4),
                               rtol=1e-4, atol=1e-4)


def test_without_pruned_weights_nothing_is_edited(opened: Opener) -> None:
    model = make_model([node("MatMul", "x w", "y")], {"x": [3, 8]}, {"y": None}, {"w": random(8, 8)})
    assert apply(Prune(), opened(model), Context(plan=Plan("float", "cpu"))) == (False, [])
