"""analyze(): what quantizing costs each layer, on the models that come with onnxq."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random
from lowering_support import MODELS

import onnxq
from onnxq.errors import DataError, UsageError
from onnxq.planner import alone


def analyzed(name: str, **options: Any) -> dict[str, Any]:
    folder = MODELS / name
    return onnxq.analyze(folder / "model.onnx", **{"calib": folder / "calib.npz", "samples": 32, **options})


@pytest.mark.parametrize(("name", "scheme"), [
    ("digits_cnn", "w8a8"), ("text_encoder", "w8a8"), ("text_encoder", "w8a8-dynamic"), ("recurrent", "w8a8"),
    ("decoder", "w8a8-dynamic-tensor"), ("decoder", "w8a8")])
def test_figures_of_every_scheme(name: str, scheme: str) -> None:
    found = analyzed(name, scheme=scheme)
    assert (found["scheme"], found["rows"]) == (scheme, 32)
    first = found["layers"][0]
    # nothing before the first layer is quantized, and masks and biases of these models change nothing in front of it
    if name != "text_encoder" and name != "decoder":
        assert first["sqnr_db"] == pytest.approx(first["accumulated_db"], abs=0.1)
    for layer in found["layers"]:
        assert 20 < layer["accumulated_db"] <= layer["sqnr_db"] + 1, layer
        assert layer["sqnr_db"] < 70
        assert layer["range_parm"] > 1
        static = scheme == "w8a8" and layer["op"] != "LSTM"
        assert (layer["scale"] is not None) == (layer["clipped"] is not None) == static
        if static:
            assert layer["low"] <= 0 <= layer["high"]
            assert layer["high"] - layer["low"] == pytest.approx(255 * layer["scale"])
            assert layer["clipped"] < 2e-3  # ranges are those of the same rows, but for a few that are clipped
    assert json.loads(json.dumps(found)) == found


def test_a_relu_in_front_of_codes_belongs_to_its_layer() -> None:
    """On targets whose codes clamp nothing: it is computed in float, and the layer's codes are behind it."""
    found = analyzed("digits_cnn", target="tensorrt")
    assert len(found["layers"]) > 10
    assert all(20 < layer["sqnr_db"] < 70 for layer in found["layers"])


def test_layers_and_outputs_are_those_of_a_compilation(tmp_path: Path) -> None:
    found = analyzed("digits_cnn")
    made = onnxq.compile(MODELS / "digits_cnn" / "model.onnx", tmp_path / "o.onnx", samples=32, measure=False,
                         calib=MODELS / "digits_cnn" / "calib.npz")
    weighted = {n.name: n.lowering for n in made.nodes if n.weights and n.scheme == "w8a8"}
    assert {layer["name"]: layer["kernel"] for layer in found["layers"]} == weighted
    assert made.accuracy is not None
    assert found["outputs"]["logits"] == pytest.approx(made.accuracy.outputs["logits"].sqnr_db, abs=0.5)


def test_statistics_are_of_what_a_layer_reads() -> None:
    found = analyzed("digits_cnn")["layers"][0]
    with np.load(MODELS / "digits_cnn" / "calib.npz") as z:
        x = z["image"][:32].astype(np.float64)
    assert found["reads"] == "image"
    assert found["range_parm"] == pytest.approx(np.abs(x).max() / x.std())
    assert found["kurtosis"] == pytest.approx(((x - x.mean())**4).mean() / x.std()**4 - 3)
    clipped = analyzed("digits_cnn", ranges="percentile", recipe=None)["layers"]
    assert all(layer["clipped"] <= 1e-4 for layer in clipped)


def test_the_share_of_clipped_values(tmp_path: Path) -> None:
    """Of 6400 values two reach beyond the range that the 99.9th percentile leaves."""
    x = (random(200, 32) / 10).clip(-1, 1)
    x[3, 5], x[7, 9] = 50.0, -60.0
    model = make_model([node("MatMul", "x w", "y", name="m")], {"x": ["n", 32]}, {"y": None}, {"w": random(32, 32)})
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "c.npz", x=x)
    (tmp_path / "r.yaml").write_text("scheme: w8a8\ncalibration: {samples: null, ranges: percentile, percentile: 99.9}")
    [layer] = onnxq.analyze(tmp_path / "m.onnx", calib=tmp_path / "c.npz", recipe=tmp_path / "r.yaml")["layers"]
    assert layer["clipped"] == pytest.approx(((x < layer["low"]) | (x > layer["high"])).mean(), abs=1 / x.size)
    assert layer["clipped"] * x.size >= 2
    (tmp_path / "r.yaml").write_text("{scheme: w8a8, calibration: {ranges: minmax}, outliers: {method: none}}")
    [whole] = onnxq.analyze(tmp_path / "m.onnx", calib=tmp_path / "c.npz", samples=200,
                            recipe=tmp_path / "r.yaml")["layers"]
    assert whole["clipped"] == 0
    assert whole["range_parm"] == pytest.approx(60 / x.astype(np.float64).std(), rel=1e-6)


def test_groups_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = analyzed("text_encoder", threads=1)
    monkeypatch.setattr(alone, "GROUP", 5)
    steps: list[int] = []
    totals: list[int | None] = []

    class Heard:
        def stage(self, name: str) -> None:
            steps.clear()

        def total(self, count: int | None) -> None:
            totals.append(count)

        def step(self, done: int) -> None:
            steps.append(done)

    parts = analyzed("text_encoder", threads=1, progress=Heard())
    assert steps == list(range(8, 97, 8))
    assert totals[-1] == 96
    for a, b in zip(whole["layers"], parts["layers"], strict=True):
        # the runtime fuses other operators around other outputs, so that float itself differs by roundings
        for key, value in a.items():
            assert b[key] == (pytest.approx(value, rel=1e-3, abs=0.05) if isinstance(value, float) else value), key
    assert whole["outputs"] == pytest.approx(parts["outputs"], abs=0.05)


def test_layers_kept_float_are_no_layers(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("scheme: w8a8\nfallback: {level: 2, rank: sqnr}\n")
    every, rest = analyzed("text_encoder"), analyzed("text_encoder", recipe=tmp_path / "r.yaml")
    worst = {layer["name"] for layer in sorted(every["layers"], key=lambda layer: layer["sqnr_db"])[:2]}
    assert {layer["name"] for layer in every["layers"]} - {layer["name"] for layer in rest["layers"]} == worst


def test_a_model_without_layers(tmp_path: Path) -> None:
    onnx.save(make_model([node("Exp", "x", "y")], {"x": ["n", 4]}, {"y": None}), tmp_path / "m.onnx")
    found = onnxq.analyze(tmp_path / "m.onnx", calib="random")
    assert (found["layers"], found["outputs"]) == ([], {})
    assert found["notices"] == [
        "no layer of this model runs on codes under w8a8; onnxq inspect tells why",
        "the data are random, as asked: the figures tell nothing about real ones"]


def test_a_layer_that_makes_nothing_but_zeros(tmp_path: Path) -> None:
    """The Relu gives 0 throughout in float and in codes: no error, no figure."""
    model = make_model([node("Conv", "x w b", "c", name="c"), node("Relu", "c", "r"),
                        node("Conv", "r v", "y", name="d")], {"x": ["n", 16, 4, 4]}, {"y": None},
                       {"w": random(16, 16, 1, 1), "b": np.full(16, -1e3, np.float32), "v": random(16, 16, 1, 1)})
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "c.npz", x=random(8, 16, 4, 4))
    found = onnxq.analyze(tmp_path / "m.onnx", calib=tmp_path / "c.npz")["layers"]
    assert [layer["sqnr_db"] for layer in found] == [None, None]
    assert (found[1]["range_parm"], found[1]["kurtosis"]) == (0.0, 0.0)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing is quantized under the scheme float; name another"):
        analyzed("digits_cnn", scheme="float")
    with pytest.raises(UsageError, match="exclude one another"):
        analyzed("digits_cnn", scheme="w8a8", recipe=tmp_path / "r.yaml")
    np.savez(tmp_path / "c.npz", x=random(8, 3))
    with pytest.raises(DataError):
        analyzed("digits_cnn", calib=tmp_path / "c.npz")
