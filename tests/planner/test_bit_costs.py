"""What formats cost: against a small network computed by hand, where one weight at a time is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from conftest import Opener, body, make_model, node, random
from lowering_support import MODELS, ONE_THREAD, canonical

from onnxq.calibration.readers import Dataset, open_data
from onnxq.graph import Graph, load
from onnxq.numerics import affine, blocks
from onnxq.numerics.divergence import Divergence
from onnxq.numerics.dtypes import by_name
from onnxq.planner import bit_costs, weight_only
from onnxq.planner.bit_costs import LAYER, NATS, OUTPUT, WEIGHT, Costs, Seeing, Weight, measure
from onnxq.recipe import Calibration
from onnxq.runtime.session import Session
from onnxq.schemes import TensorSpec

Array = npt.NDArray[np.float32]
FORMATS = tuple(TensorSpec(dtype, dtype[0] == "i", "block", block_size=size)
                for dtype, size in (("uint2", 32), ("uint4", 64), ("uint4", 16), ("int8", 32)))
PROBE = 1  # the coarsest of 4 bits
WEIGHTS = {"first": random(64, 48), "second": random(48, 32), "table": random(50, 64)}
IDS = np.arange(40, dtype=np.int64).reshape(8, 5) % 50
ALL = Calibration(samples=None)


class Heard:
    """A progress bar."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.of: int | None = None

    def stage(self, name: str) -> None:
        raise AssertionError(name)

    def total(self, steps: int | None) -> None:
        self.of = steps

    def step(self, done: int) -> None:
        self.steps.append(done)


def network() -> onnx.ModelProto:
    return make_model([node("Gather", "table ids", "x", name="rows"), node("MatMul", "x first", "a", name="one"),
                       node("Tanh", "a", "b"), node("MatMul", "b second", "y", name="two")],
                      {"ids": (onnx.TensorProto.INT64, ["n", 5])}, {"y": None}, WEIGHTS)


def weights_of(graph: Graph) -> list[Weight]:
    return [Weight(name, tuple(readers), FORMATS) for name, readers in weight_only.readers(graph).items()]


def coded(values: Array, spec: TensorSpec) -> Array:
    """What a format makes of [K, N]; 2 bits by the search for the least squared error."""
    assert spec.block_size is not None
    params = blocks.choose(values, by_name(spec.dtype), spec.block_size, spec.symmetric,
                           "mse" if spec.dtype == "uint2" else "absmax")
    return affine.dequantize(affine.quantize(values, params), params)


def changed(name: str, spec: TensorSpec) -> dict[str, Array]:
    values = WEIGHTS[name]
    return {**WEIGHTS, name: coded(values.T, spec).T if name == "table" else coded(values, spec)}


def forward(weights: Mapping[str, Array]) -> dict[str, npt.NDArray[np.float64]]:
    given = {name: values.astype(np.float64) for name, values in weights.items()}
    x = given["table"][IDS].reshape(-1, 64)
    a = x @ given["first"]
    return {"x": x, "a": a, "b": np.tanh(a), "y": np.tanh(a) @ given["second"]}


def npz(folder: Path, graph: Graph, **arrays: Any) -> Dataset:
    np.savez(folder / "data.npz", **arrays)
    return open_data(str(folder / "data.npz"), graph.ports())


def noise(wanted: npt.NDArray[np.float64], got: npt.NDArray[np.float64]) -> float:
    return float(np.square(got - wanted).sum() / np.square(wanted).sum())


def test_damage_is_the_probes_at_the_output_times_the_ratio_at_the_layer(opened: Opener, tmp_path: Path) -> None:
    graph, heard = opened(network()), Heard()
    data = npz(tmp_path, ids=IDS, graph=graph)
    found = measure(graph, weights_of(graph), Seeing(data, ALL, ONE_THREAD), heard)
    plain = forward(WEIGHTS)
    own = {
        "first": [noise(plain["a"], plain["x"] @ changed("first", spec)["first"]) for spec in FORMATS],
        "second": [noise(plain["y"], plain["b"] @ changed("second", spec)["second"]) for spec in FORMATS],
        "table": [noise(WEIGHTS["table"].astype(np.float64), changed("table", spec)["table"].astype(np.float64))
                  for spec in FORMATS]}
    assert found.unit == OUTPUT
    assert found.damages.keys() == WEIGHTS.keys()
    for name, errors in own.items():
        probe = noise(plain["y"], forward(changed(name, FORMATS[PROBE]))["y"])
        # float32 differs from the float64 network in the seventh digit of an output, the fifth of its noise
        assert found.damages[name] == pytest.approx([probe * e / errors[PROBE] for e in errors], rel=1e-3), name
        assert sorted(found.damages[name], reverse=True) == found.damages[name]
    assert heard.steps == sorted(heard.steps)
    assert heard.of == heard.steps[-1] == 8 + 8  # rows of both runs: Hessians, then outputs


def test_what_a_body_reads_is_measured_at_the_output_and_by_its_own_error(opened: Opener) -> None:
    """Calibration does not look into bodies, so formats are compared by what they change of the weight itself."""
    inner = body([node("MatMul", "x w", "inside", name="in_body")], {"inside": None})
    other = body([node("Identity", "x", "same")], {"same": None})
    graph = opened(make_model([node("If", "c", "y", then_branch=inner, else_branch=other)],
                              {"x": ["n", 64], "c": (onnx.TensorProto.BOOL, [])}, {"y": None}, {"w": random(64, 64)}))
    weights = weights_of(graph)
    assert [w.name for w in weights] == ["w"]
    x = random(16, 64, seed=3)
    data = open_data([{"x": x, "c": np.array(True)}], graph.ports())
    found = measure(graph, weights, Seeing(data, ALL, ONE_THREAD), Heard()).damages["w"]
    w = random(64, 64)
    errors = [noise(w.astype(np.float64), coded(w, spec).astype(np.float64)) for spec in FORMATS]
    probe = noise(x.astype(np.float64) @ w, x.astype(np.float64) @ coded(w, FORMATS[PROBE]))
    assert found == pytest.approx([probe * e / errors[PROBE] for e in errors], rel=1e-3)


def test_without_data_a_weights_own_error_counts(opened: Opener) -> None:
    graph, heard = opened(network()), Heard()
    found = measure(graph, weights_of(graph), None, heard)
    assert found.unit == WEIGHT
    for name, values in WEIGHTS.items():
        wanted = [noise(values.astype(np.float64), changed(name, spec)[name].astype(np.float64)) for spec in FORMATS]
        assert found.damages[name] == pytest.approx(wanted, rel=1e-5)
    assert heard.steps == [1, 2, 3]
    assert heard.of == 3


def test_a_model_that_is_too_large_to_be_written_so_often_is_judged_by_its_layers(
        opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bit_costs, "_MOST_PROBED", 1000)
    graph = opened(network())
    found = measure(graph, weights_of(graph), Seeing(npz(tmp_path, ids=IDS, graph=graph), ALL, ONE_THREAD), Heard())
    plain = forward(WEIGHTS)
    assert found.unit == LAYER
    assert found.damages["first"] == pytest.approx(
        [noise(plain["a"], plain["x"] @ changed("first", spec)["first"]) for spec in FORMATS], rel=1e-3)


def test_outputs_of_many_are_those_of_some(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a wide layer some columns stand for all; the seed's figures stay within a tenth."""
    wide = random(64, 4096, seed=5)
    graph = opened(make_model([node("MatMul", "x w", "y", name="wide")], {"x": ["n", 64]}, {"y": None}, {"w": wide}))
    some = measure(graph, weights_of(graph), None, Heard()).damages["w"]
    monkeypatch.setattr(bit_costs, "_COLUMNS", 4096)
    every = measure(graph, weights_of(graph), None, Heard()).damages["w"]
    assert some != every
    assert some == pytest.approx(every, rel=0.1)


def test_what_rounding_leaves_as_it_is_costs_nothing(opened: Opener, tmp_path: Path) -> None:
    graph = opened(make_model([node("MatMul", "x w", "y", name="zeros")], {"x": ["n", 64]}, {"y": None},
                              {"w": np.zeros((64, 64), np.float32)}))
    data = npz(tmp_path, x=random(4, 64), graph=graph)
    assert measure(graph, weights_of(graph), Seeing(data, ALL, ONE_THREAD), Heard()).damages == {"w": [0.0] * 4}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, Costs]:
    graph = canonical(load(MODELS / "decoder" / "model.onnx"))
    data = open_data(str(MODELS / "decoder" / "calib.npz"), graph.ports())
    heads = [w for w in weights_of(graph) if any(t.name == "logits" for _, n in w.readers for t in n.outputs)]
    return graph, measure(graph, heads, Seeing(data, Calibration(samples=8), ONE_THREAD), Heard())


def test_a_language_model_loses_nats(decoder: tuple[Graph, Costs], tmp_path: Path) -> None:
    """The probe of the head: the divergence of the logits, with the head replaced in the file."""
    graph, found = decoder
    assert found.unit == NATS
    [(name, damages)] = found.damages.items()
    model = onnx.load(MODELS / "decoder" / "model.onnx")
    [stored] = [t for t in model.graph.initializer if t.name == name]
    values = onnx.numpy_helper.to_array(stored)
    stored.CopyFrom(onnx.numpy_helper.from_array(coded(values, FORMATS[PROBE]), name))
    onnx.save(model, tmp_path / "changed.onnx")
    sessions = [Session(path, ONE_THREAD) for path in (MODELS / "decoder" / "model.onnx", tmp_path / "changed.onnx")]
    wanted = Divergence()
    for batch in open_data(str(MODELS / "decoder" / "calib.npz"), graph.ports()).batches(samples=8):
        real = batch.feed["attention_mask"].astype(bool)
        wanted.update(*(session.run(batch.feed, ["logits"])["logits"][real] for session in sessions))
    assert damages[PROBE] == pytest.approx(wanted.mean, rel=1e-3)
