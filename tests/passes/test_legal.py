"""Models for a provider with few operators, in float16 and of fixed shapes: nothing else is left in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import run
from onnx import defs

from onnxq.graph import Graph, load
from onnxq.passes.canonicalize import canonicalize
from onnxq.passes.decompose import decompose, lacking
from onnxq.passes.lower.to_half import ToHalf
from onnxq.passes.manager import Context, PassManager
from onnxq.passes.static_shapes import free_tensors, settled, static_shapes
from onnxq.planner import halving
from onnxq.targets import TARGETS
from onnxq.targets.cann_operators import CANN_OPERATORS

Written = Callable[[Graph], Path]
MODELS = Path(__file__).parents[2] / "models"
SIZES = {"text_encoder": {"batch": 8, "seq": 32}, "decoder": {"batch": 8, "sequence": 64, "total": 64, "past": 0},
         "digits_cnn": {"batch": 8}, "recurrent": {"batch": 8, "sequence": 16}}


def test_operators_are_those_of_onnx() -> None:
    assert len(CANN_OPERATORS) == 134
    assert all(defs.has(name) for name in CANN_OPERATORS)


@pytest.mark.parametrize("name", SIZES)
def test_models_are_legal(name: str, written: Written) -> None:
    path, context = MODELS / name / "model.onnx", Context(replace(TARGETS["cpu"], fused=frozenset()))
    graph = static_shapes(load(path), SIZES[name], context)
    PassManager([*canonicalize(), *decompose(CANN_OPERATORS)]).run(graph, context)
    graph = settled(graph, context)
    assert set(lacking(graph, CANN_OPERATORS).values()) == set()
    assert (free_tensors(graph), "Shape" in {n.op for n in graph.nodes}) == ([], False)
    context.plan.wide, context.plan.limits = halving.decide(graph)
    assert PassManager([ToHalf()]).run(graph, context)
    with np.load(MODELS / name / "eval.npz") as data:
        feed = {}
        for port in graph.inputs:
            given = data[port.name][:port.shape[0]]
            feed[port.name] = given[tuple(slice(0, size) for size in port.shape)]
            assert list(feed[port.name].shape) == port.shape
    found, wanted = run(written(graph), feed), run(path, feed)
    for key, right in wanted.items():
        left = found[key].astype(np.float64)
        assert left.shape == right.shape
        assert np.sum(left * right) / np.linalg.norm(left) / np.linalg.norm(right) > 0.9999, key
