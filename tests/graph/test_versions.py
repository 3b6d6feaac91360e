"""Raising the opset: outputs stay, names and what the converter drops stay, weights are never handed to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from conftest import Opener, assert_same, body, make_model, node, random, run, text
from onnx import TensorProto, version_converter

from onnxq.errors import GraphError
from onnxq.graph import Graph, dtype_of, load, raise_opset, save, shape_of, widen

Written = Callable[[Graph], Path]
MODELS = Path(__file__).parents[2] / "models"
CASES = sorted(p.parent.name for p in MODELS.glob("*/model.onnx"))


@pytest.mark.parametrize("version", [21, 25])
@pytest.mark.parametrize("name", CASES)
def test_models_compute_what_they_did(tmp_path: Path, name: str, version: int) -> None:
    """To the same bits, with and without the runtime's optimizations."""
    path = MODELS / name / "model.onnx"
    graph = raise_opset(load(path), version)
    assert graph.opset == version
    save(graph, tmp_path / "m.onnx")
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    with np.load(MODELS / name / "calib.npz") as data:
        feed = {t.name: data[t.name][:2] for t in graph.inputs}
    for optimize in (False, True):
        assert_same(run(tmp_path / "m.onnx", feed, optimize), run(path, feed, optimize))


def reduced() -> onnx.ModelProto:
    """A graph whose ReduceMean nodes, one of them in each branch of an If, change at opset 18: axes become an input."""
    def branch(scale: float) -> onnx.GraphProto:
        return body([node("MatMul", "m w", "p"), node("Mul", "p s", "r"), node("ReduceMean", "r", "o", axes=[1])],
                    {"o": [2, 1]}, "b", {"s": np.float32(scale), "w": random(30, 40)})

    return make_model([node("MatMul", "x v", "h"), node("ReduceMean", "h", "mean", axes=[0]),
                       node("Sub", "h mean", "m"),
                       node("If", "c", "y", then_branch=branch(2.0), else_branch=branch(-3.0)),
                       node("Gelu", "y", "z", domain="com.microsoft")],
                      {"c": (TensorProto.BOOL, []), "x": [2, 20]}, {"z": [2, 1]}, {"v": random(20, 30)},
                      domains={"com.microsoft": 1})


def assert_runs_like(path: Path, model: onnx.ModelProto) -> None:
    for flag in (True, False):
        feed = {"c": np.array(flag), "x": random(2, 20)}
        assert_same(run(path, feed), run(model, feed))


@pytest.mark.parametrize(("version", "ir_version"), [(18, 8), (21, 10), (25, 13)])
def test_operators_that_changed(opened: Opener, written: Written, version: int, ir_version: int) -> None:
    graph = opened(reduced())
    raised = raise_opset(graph, version)
    assert (graph.opset, raised.opset) == (17, version)
    assert raised.check() == []
    path = written(raised)
    assert onnx.load(path).ir_version == ir_version
    assert {o.domain: o.version for o in onnx.load(path).opset_import} == {"": version, "com.microsoft": 1}
    assert_runs_like(path, reduced())
    assert_runs_like(written(graph), reduced())
    assert {n.name for n, _ in graph.walk()} <= {n.name for n, _ in raised.walk()}
    assert [p.name for p in raised.ports()] == ["c", "x"]


def test_a_graph_that_is_there_already_is_given_back(opened: Opener) -> None:
    graph = opened(reduced())
    before = text(graph)
    assert raise_opset(graph, 17) is graph
    assert raise_opset(graph, 13) is graph
    assert text(graph) == before


def test_weights_are_not_handed_over(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the converter, nor to the checker; and the new graph reads those of the old one, computed ones, too."""
    graph = opened(reduced())
    calls: list[int] = []

    def compute() -> Any:
        calls.append(1)
        return random(20, 30)

    graph.replace_input(graph.nodes[0], 1, graph.computed("made", np.float32, (20, 30), compute))
    sizes: list[int] = []
    for module, name in ((version_converter, "convert_version"), (onnx.checker, "check_model")):
        real = getattr(module, name)

        def spy(model: onnx.ModelProto, *rest: Any, real: Any = real, **more: Any) -> Any:
            sizes.append(model.ByteSize())
            return real(model, *rest, **more)

        monkeypatch.setattr(module, name, spy)
    raised = raise_opset(graph, 21)
    assert len(sizes) == 2
    assert max(sizes) < 4 * 20 * 30, "less than the smallest of the weights"
    assert calls == []
    np.testing.assert_array_equal(raised.read(raised.nodes[0].inputs[1]), random(20, 30))
    assert calls == [1]


def test_what_the_converter_does_not_know(tmp_path: Path, opened: Opener) -> None:
    model = reduced()
    model.doc_string, model.domain, model.model_version = "about", "org.test", 7
    model.metadata_props.add(key="author", value="me")
    model.graph.node[0].metadata_props.add(key="namespace", value="encoder.layer.0")
    model.graph.node[0].doc_string = "the first"
    graph = opened(model)
    made = graph.variable("made", np.float32, (2, 1))
    graph.add_node("Relu", "relu", [graph.nodes[-1].outputs[0]], [made])
    graph.half = ("float16",)
    raised = raise_opset(graph, 21)
    assert raised.scope(raised.nodes[0]) == "encoder/layer/0"
    assert (dtype_of(raised.made("made")), shape_of(raised.made("made"))) == (np.float32, (2, 1))
    assert raised.half == ("float16",)
    save(raised, tmp_path / "m.onnx")
    found = onnx.load(tmp_path / "m.onnx")
    assert (found.doc_string, found.domain, found.model_version) == ("about", "org.test", 7)
    assert {p.key: p.value for p in found.metadata_props} == {"author": "me"}
    assert found.graph.node[0].doc_string == "the first"


def test_external_halves_that_are_widened(tmp_path: Path, opened: Opener) -> None:
    """Weights in a file stay there, and stay widened."""
    half = random(30, 40).astype(np.float16)
    model = make_model([node("Cast", "w", "f", to=1), node("MatMul", "x f", "h"),
                        node("ReduceMean", "h", "y", axes=[1])], {"x": [2, 30]}, {"y": [2, 1]}, {"w": half})
    save(opened(model), tmp_path / "in.onnx", external_above=0)
    graph = load(tmp_path / "in.onnx")
    widen(graph.nodes[0].inputs[0])
    raised = raise_opset(graph, 21)
    weight = raised.nodes[0].inputs[0]
    assert dtype_of(weight) == np.float32
    np.testing.assert_array_equal(raised.read(weight), half.astype(np.float32))
    save(raised, tmp_path / "m.onnx", external_above=0)
    assert_same(run(tmp_path / "m.onnx", {"x": random(2, 30)}), run(model, {"x": random(2, 30)}))


def test_operators_that_only_the_runtime_knows(opened: Opener, tmp_path: Path) -> None:
    """SimplifiedLayerNormalization has no domain in models that onnxruntime wrote; onnx doesn't know it."""
    model = make_model([node("SimplifiedLayerNormalization", "x g", "n", axis=-1, epsilon=1e-5),
                        node("ReduceMean", "n", "y", axes=[1])], {"x": [2, 30]}, {"y": [2, 1]}, {"g": random(30)})
    raised = raise_opset(opened(model), 21)
    assert [(n.op, n.domain or "") for n in raised.nodes] == [("SimplifiedLayerNormalization", ""), ("ReduceMean", "")]
    save(raised, tmp_path / "m.onnx")
    assert [o.domain for o in onnx.load(tmp_path / "m.onnx").opset_import] == [""]
    assert_same(run(tmp_path / "m.onnx", {"x": random(2, 30)}), run(model, {"x": random(2, 30)}))


def test_what_it_is_for(opened: Opener, written: Written) -> None:
    graph = raise_opset(opened(make_model([node("Add", "x b", "y")], {"x": [3]}, {"y": [3]}, {"b": random(3)})), 21)
    codes = graph.constant("q", np.array([-8, 7, 1], ml_dtypes.int4))
    graph.add_cast("cast", codes, graph.variable("f", np.float32, (3,)))
    graph.replace_input(graph.nodes[0], 1, graph.made("f"))
    np.testing.assert_array_equal(run(written(graph), {"x": np.zeros(3, np.float32)})["y"], np.float32([-8, 7, 1]))


@pytest.mark.parametrize("fails", ["converter", "checker"])
def test_when_it_can_not_be_done(opened: Opener, monkeypatch: pytest.MonkeyPatch, written: Written, fails: str) -> None:
    graph = opened(reduced())
    if fails == "converter":
        graph.nodes[1].op = "Upsample"  # gone since opset 10
    else:
        graph.nodes[1].attrs["no_such_attribute"] = 1
    before = text(graph)
    with pytest.raises(GraphError, match=r"can't raise the model from opset 17 to 21 \(.+\); export it at opset 21"):
        raise_opset(graph, 21)
    assert text(graph) == before
