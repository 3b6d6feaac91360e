"""The error of each layer by itself: a shadow gives what a model gives in which nothing else is quantized."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random
from lowering_support import HERE, MODELS, ONE_THREAD, Made, make

from onnxq.calibration.readers import open_data
from onnxq.graph import load
from onnxq.numerics.comparison import Comparison
from onnxq.planner import alone, sensitivity
from onnxq.recipe import Calibration

ALL = Calibration(samples=None)
WEIGHTS = {"w0": random(32, 16, 3, 3), "b0": random(32), "w1": random(32, 32, 1, 1), "m": random(32, 32),
           "b": random(32), "g": random(32, 32, seed=1), "h": random(32)}
NAMES = ("conv", "next", "linear", "gemm")


def model() -> onnx.ModelProto:
    """Conv with bias and Relu, Conv, the mean, MatMul with bias, Gemm with bias."""
    return make_model(
        [node("Conv", "x w0 b0", "c", name="conv"), node("Relu", "c", "r"), node("Conv", "r w1", "d", name="next"),
         node("GlobalAveragePool", "d", "p"), node("Flatten", "p", "f"), node("MatMul", "f m", "k", name="linear"),
         node("Add", "k b", "l"), node("Tanh", "l", "t"), node("Gemm", "t g h", "y", name="gemm")],
        {"x": ["n", 16, 6, 6]}, {"y": None}, WEIGHTS)


FEEDS = [{"x": random(4, 16, 6, 6, seed=k)} for k in range(4)]


def errors(made: Made, group: int, monkeypatch: pytest.MonkeyPatch, steps: list[int] | None = None) -> \
        dict[str, Comparison]:
    graph = load(made.canonical)
    monkeypatch.setattr(alone, "GROUP", group)
    layers = sensitivity.layers(made.plan.nodes, graph)
    return alone.errors(graph, made.plan, layers, open_data(made.feeds, graph.ports()), ALL, ONE_THREAD,
                        steps.append if steps is not None else None).alone


def quantized_alone(folder: Path, name: str, scheme: str, others: Sequence[str]) -> tuple[Made, Comparison]:
    """A model where all but one layer are kept float, and its result against float's."""
    made = make(model(), folder, FEEDS, "qdq", name=scheme, keep=others)
    result = made.plan.nodes[name].result
    assert result is not None
    found = Comparison()
    for feed in FEEDS:
        pair = []
        for path in (made.canonical, made.twin):
            taps = onnx.load(path)
            if all(o.name != result for o in taps.graph.output):
                taps.graph.output.append(onnx.helper.make_empty_tensor_value_info(result))
            onnx.save(taps, folder / "taps.onnx")
            pair.append(made.run(folder / "taps.onnx", feed)[result])
        found.update(*pair)
    return made, found


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w8a8-dynamic-tensor"])
def test_a_shadow_is_the_layer_quantized_alone(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = errors(make(model(), tmp_path, FEEDS, name=scheme), 3, monkeypatch)
    assert list(found) == list(NAMES if scheme == "w8a8" else NAMES[2:])
    for name, comparison in found.items():
        _, wanted = quantized_alone(tmp_path, name, scheme, [n for n in NAMES if n != name])
        assert comparison.sqnr_db == pytest.approx(wanted.sqnr_db, abs=0.05), name
        assert 20 < comparison.sqnr_db < 70


def test_groups_change_nothing_and_progress_goes_on_through_them(tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    made, steps = make(model(), tmp_path, FEEDS), list[int]()
    whole, parts = errors(made, 32, monkeypatch), errors(made, 1, monkeypatch, steps)
    assert {k: v.sqnr_db for k, v in parts.items()} == pytest.approx({k: v.sqnr_db for k, v in whole.items()})
    assert steps == list(range(4, 65, 4))
    assert alone.runs(4) == 4
    assert alone.runs(0) == 0


@pytest.mark.parametrize("name", ["digits_cnn", "text_encoder", "recurrent"])
def test_the_models_that_come_with_onnxq(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with np.load(MODELS / name / "calib.npz") as z:
        feeds = [{k: z[k][:16] for k in z.files if k != "labels"}]
    found = errors(make(MODELS / name / "model.onnx", tmp_path, feeds), 32, monkeypatch)
    assert found
    assert all(25 < comparison.sqnr_db < 70 for comparison in found.values())


def test_weights_on_the_left_and_shared_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = make_model([node("MatMul", "x w", "a", name="right"), node("MatMul", "v x", "b", name="left"),
                       node("MatMul", "x u", "c", name="third")], {"x": [128, 128]}, dict.fromkeys("abc"),
                      {"w": random(128, 128), "v": random(128, 128, seed=1), "u": random(128, 128, seed=2)})
    found = errors(make(both, tmp_path, [{"x": random(128, 128, seed=3)}]), 32, monkeypatch)
    here = ("MatMul", "left") in HERE.lowerings  # without VNNI there is no such kernel
    assert {k: 35 < v.sqnr_db < 50 for k, v in found.items()} == dict.fromkeys(
        ["right", "left", "third"] if here else ["right", "third"], True)


def test_what_is_not_listed_stays_out_of_the_shadow(tmp_path: Path) -> None:
    made = make(model(), tmp_path, FEEDS)
    graph = load(made.canonical)
    [first, *_] = sensitivity.layers(made.plan.nodes, graph)
    shadowed = alone.shadow(graph, made.plan, [first])
    added: list[Any] = [n.op for n in shadowed.nodes if n.name not in {m.name for m in graph.nodes}]
    # of x, the weight and the bias, then the kernel, whose Relu is the saturation of its codes
    assert sorted(added) == sorted(["QuantizeLinear", *["DequantizeLinear"] * 3, "Conv", "QuantizeLinear",
                                    "DequantizeLinear"])
    assert [n.name for n in graph.nodes] == [n.name for n in load(made.canonical).nodes]
