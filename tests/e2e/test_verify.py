"""verify(): a compiled model against its float original."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random, run
from lowering_support import BOTH_FORMATS, MODELS

import onnxq
from onnxq import verification
from onnxq.errors import DataError, ModelError, UsageError
from onnxq.recipe import Preprocessing, Recipe
from onnxq.report.report import Report
from onnxq.schemes import scheme

FLOAT = MODELS / "digits_cnn" / "model.onnx"
EVAL = str(MODELS / "digits_cnn" / "eval.npz")


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    real = verification.measure.compare_models
    monkeypatch.setattr(verification.measure, "compare_models",
                        lambda a, b, feeds, **more: real(a, b, feeds, **{**more, "block_seconds": 0.01, "rounds": 3}))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("verify")

    def make(fmt: str) -> Path:
        path = folder / f"{fmt}.onnx"
        if not path.exists():
            onnxq.compile(FLOAT, path, calib=str(MODELS / "digits_cnn" / "calib.npz"), measure=False, format=fmt)
        return path

    return make


def verified(path: Path, **options: Any) -> Report:
    return onnxq.verify(FLOAT, path, **{"data": EVAL, "samples": 64, "threads": 1, **options})


@BOTH_FORMATS
def test_layers_are_compared_in_the_order_of_the_float_graph(fmt: str, compiled: Callable[[str], Path]) -> None:
    report = verified(compiled(fmt), metric="top1", layers=True)
    assert report.ok
    assert report.accuracy is not None
    assert (report.accuracy.metric, report.accuracy.rows) == ("top1", 64)
    order = [t for n in onnx.load(FLOAT).graph.node for t in n.output]
    names = [layer.name for layer in report.layers]
    assert names == [t for t in order if t in names]
    assert len(names) > 15
    assert names[-1] == "logits"
    assert all(layer.cosine > 0.99 for layer in report.layers)
    assert all(layer.sqnr_db is not None and layer.sqnr_db > 20 for layer in report.layers)
    # the first layer has the rounding of its input, weights and result alone; errors only grow behind it
    assert report.layers[0].sqnr_db > min(layer.sqnr_db for layer in report.layers)  # type: ignore[operator,type-var]
    assert report.layers[-1].max_abs == pytest.approx(report.accuracy.outputs["logits"].max_abs, rel=0.5)


def test_layers_decode_codes_as_the_model_does(compiled: Callable[[str], Path]) -> None:
    """In the lowered file tensors are codes, in the QDQ one they are float: the errors are the same."""
    found = {fmt: {x.name: x for x in verified(compiled(fmt), layers=True).layers} for fmt in ("qdq", "qoperator")}
    shared = found["qdq"].keys() & found["qoperator"].keys()
    assert len(shared) > 15
    for name in shared:
        a, b = found["qdq"][name], found["qoperator"][name]
        assert a.sqnr_db == pytest.approx(b.sqnr_db, abs=1.0)
        assert a.max_abs == pytest.approx(b.max_abs, rel=0.3)


def test_what_ran_and_what_the_file_says_of_itself(compiled: Callable[[str], Path]) -> None:
    report = verified(compiled("qoperator"))
    assert report.scheme == "w8a8"
    assert report.recipe["scheme"]["name"] == "w8a8"
    ran = [row.ran_as.rpartition(".")[2] for row in report.nodes]
    assert ran.count("QLinearConv") == 11
    assert {row.scheme for row in report.nodes if "QLinearConv" in row.ran_as} == {"int8"}
    assert report.size is not None
    assert report.size.ratio < 0.35
    assert report.latency is not None
    assert report.latency.data == "eval.npz"
    assert [s.name for s in report.stages] == ["load", "measure", "read back", "accuracy"]


def test_times_of_another_machine_are_told_as_such(compiled: Callable[[str], Path]) -> None:
    said = "this machine is not web: times and kernels are those of the CPU provider here"
    assert said in verified(compiled("qoperator"), target="web").verdict.notices
    assert said not in verified(compiled("qoperator")).verdict.notices


def test_a_model_against_itself_is_identical() -> None:
    report = verified(FLOAT, layers=True)
    assert report.accuracy is not None
    assert report.accuracy.outputs["logits"].sqnr_db is None
    assert report.accuracy.drop == pytest.approx(0, abs=1e-12)
    assert {layer.max_abs for layer in report.layers} == {0.0}
    assert any("was not made by onnxq" in n for n in report.verdict.notices)


def test_checks_that_hold_and_that_do_not(compiled: Callable[[str], Path]) -> None:
    path = compiled("qoperator")
    assert verified(path, min_sqnr=20).ok
    report = verified(path, min_sqnr=90)
    assert not report.ok
    assert report.verdict.failures[0].startswith("the least SQNR of an output is ")
    assert "below the 90 dB" in report.verdict.failures[0]
    assert not verified(path, max_drop="0").ok
    assert verified(path, max_drop="1%").ok


def test_a_broken_model_is_found(tmp_path: Path, compiled: Callable[[str], Path]) -> None:
    """A scale ten times too large: the layer where it happens is the first that is off."""
    model = onnx.load(compiled("qoperator"))
    conv = next(n for n in model.graph.node if n.op_type == "QLinearConv")
    stored = {t.name: t for t in model.graph.initializer}
    weight = stored[conv.input[4]]
    values = onnx.numpy_helper.to_array(weight) * np.float32(10)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "broken.onnx")
    report = verified(tmp_path / "broken.onnx", min_sqnr=10, layers=True)
    assert not report.ok
    assert report.layers[0].sqnr_db is not None
    assert report.layers[0].sqnr_db < 10


def test_without_data_nothing_is_claimed(compiled: Callable[[str], Path]) -> None:
    report = onnxq.verify(FLOAT, compiled("qoperator"), threads=1)
    assert report.accuracy is None
    assert report.latency is not None
    assert any("no data were given" in n for n in report.verdict.notices)


@pytest.mark.parametrize("options", [{"metric": "top1"}, {"max_drop": "1%"}, {"min_sqnr": 20}, {"layers": True}])
def test_checks_that_need_data(options: dict[str, Any], compiled: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="give --data DATA"):
        onnxq.verify(FLOAT, compiled("qoperator"), **options)


def test_models_that_do_not_fit_one_another(tmp_path: Path) -> None:
    onnx.save(make_model([node("Relu", "x", "logits")], {"x": ["batch", 4]}, {"logits": ["batch", 4]}),
              tmp_path / "in.onnx")
    with pytest.raises(ModelError, match=r"the models have different inputs \(image and x\)"):
        verified(tmp_path / "in.onnx")
    onnx.save(make_model([node("Relu", "image", "y")], {"image": ["batch", 4]}, {"y": ["batch", 4]}),
              tmp_path / "out.onnx")
    with pytest.raises(ModelError, match=r"the models have different outputs \(logits and y\)"):
        verified(tmp_path / "out.onnx")
    with pytest.raises(ModelError, match="does not exist"):
        verified(tmp_path / "missing.onnx")


def test_data_of_another_model(tmp_path: Path, compiled: Callable[[str], Path]) -> None:
    np.savez(tmp_path / "d.npz", picture=random(2, 1, 16, 16))
    with pytest.raises(DataError, match="which the model does not take"):
        verified(compiled("qoperator"), data=str(tmp_path / "d.npz"))


def test_a_model_without_float_outputs_has_nothing_to_agree_on(tmp_path: Path) -> None:
    onnx.save(make_model([node("MatMul", "x w", "m"), node("ArgMax", "m", "y", axis=1, keepdims=0)], {"x": ["N", 32]},
                         {"y": (onnx.TensorProto.INT64, ["N"])}, {"w": random(32, 32)}), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=random(8, 32))
    path, data = tmp_path / "m.onnx", str(tmp_path / "d.npz")
    report = onnxq.verify(path, path, data=data)
    assert report.accuracy is not None
    assert "no output is of floats" in report.accuracy.note
    assert '"compiled": null' in report.to_json()
    assert not onnxq.verify(path, path, data=data, min_sqnr=20).ok
    assert not onnxq.verify(path, path, data=data, max_drop="1%").ok


def test_images_are_read_as_the_compilation_read_them(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    with np.load(EVAL) as z:
        rows, labels = z["image"][:60], z["labels"][:60]
    for k, (row, label) in enumerate(zip(rows, labels, strict=True)):
        folder = tmp_path / "images" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(np.rint(row[0] * 2).astype(np.uint8)).save(folder / f"{k}.png")
    recipe = Recipe(scheme("w8a8"), data=Preprocessing(scale=0.5))
    onnxq.compile(FLOAT, tmp_path / "q.onnx", recipe=recipe, calib=tmp_path / "images", measure=False)
    found = onnxq.verify(FLOAT, tmp_path / "q.onnx", data=tmp_path / "images", metric="top1").accuracy
    feed = np.rint(rows * 2).astype(np.float32)
    right, dim = ((run(FLOAT, {"image": feed * np.float32(by)})["logits"].argmax(-1) == labels).mean()
                  for by in (0.5, 1 / 255))
    assert found is not None
    assert found.float == pytest.approx(right)
    assert dim < right - 0.2  # what the default scale would have given
