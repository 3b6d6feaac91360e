"""Models in onnxruntime's own format."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import make_model, node, random, run

from onnxq.errors import ModelError
from onnxq.runtime import ort_format
from onnxq.runtime.session import Session, SessionOptions

ONE = SessionOptions(threads=1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Conv of 32 channels, which the CPU provider computes in blocks of channels where it may."""
    nodes = [node("Conv", "x w b", "c", pads=[1, 1, 1, 1]), node("Relu", "c", "y")]
    stored = {"w": random(32, 16, 3, 3), "b": random(32)}
    onnx.save(make_model(nodes, {"x": ["N", 16, 8, 8]}, {"y": ["N", 32, 8, 8]}, stored), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("at_run_time", [False, True], ids=["fixed", "runtime"])
@pytest.mark.parametrize("platform", [None, *ort_format.PLATFORMS])
def test_results_are_those_of_the_model(model: Path, platform: str | None, at_run_time: bool) -> None:
    path = model.with_suffix(".ort")
    ort_format.convert(model, path, platform=platform, at_run_time=at_run_time)
    assert path.read_bytes()[4:8] == b"ORTM"
    feed = {"x": random(2, 16, 8, 8)}
    options = SessionOptions(threads=1, config=(ort_format.REPLAY,) if at_run_time else ())
    found, right = Session(path, options).run(feed)["y"], run(model, feed)["y"]
    # 144 products and a bias per sum, in other orders: each off by at most 145 roundings of the sum of magnitudes
    most = 145 * 2.0 ** -24 * float(np.abs(right).max()) * 8
    np.testing.assert_allclose(found, right, rtol=0, atol=most)


def operators(path: Path) -> set[str]:
    """Operators of a configuration, with their domains."""
    return {f"{domain}:{op}" for line in path.read_text().splitlines() if not line.startswith("#")
            for domain, _, ops in [line.split(";")] for op in ops.split(",")}


def written(model: Path, **options: object) -> tuple[set[str], str]:
    path = model.with_suffix(".ort")
    ort_format.convert(model, path, **options)  # type: ignore[arg-type]
    plain, typed = ort_format.write_operators_of(model, path, model.parent, **options)  # type: ignore[arg-type]
    assert plain.name == "model.required_operators.config"
    assert typed.name == "model.required_operators_and_types.config"
    return operators(plain), typed.read_text()


def test_layouts_of_one_processor_are_for_that_platform_alone(model: Path) -> None:
    assert written(model)[0] == {"com.microsoft:FusedConv"}
    assert written(model, platform="arm")[0] == {"com.microsoft:FusedConv"}
    blocks = written(model, platform="amd64")[0]
    assert blocks == {"com.microsoft.nchwc:Conv", "com.microsoft.nchwc:ReorderOutput"} | blocks
    assert not any("FusedConv" in op for op in blocks)


def test_operators_before_and_behind_saved_optimizations_are_named(model: Path) -> None:
    """A session that does not replay what was saved runs those before."""
    assert written(model, at_run_time=True)[0] >= {"ai.onnx:Conv", "ai.onnx:Relu"}


def test_types_are_named_and_no_folders(model: Path) -> None:
    text = written(model)[1]
    assert text.startswith("# operators of model.ort\n")
    assert str(model.parent) not in text
    nodes = [node("Add", "x x", "y")]
    onnx.save(make_model(nodes, {"x": ["N"]}, {"y": ["N"]}), model)
    assert 'Add{"inputs": {"0": ["float"]}}' in written(model)[1]


def test_nothing_is_printed_and_logging_stays_as_it_is(model: Path, capfd: pytest.CaptureFixture[str],
                                                       caplog: pytest.LogCaptureFixture) -> None:
    before = list(logging.getLogger().handlers)
    written(model)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert logging.getLogger().handlers == before
    assert logging.root.manager.disable == logging.NOTSET


def test_a_model_that_the_runtime_refuses(tmp_path: Path) -> None:
    onnx.save(make_model([node("Nothing", "x", "y")], {"x": [1]}, {"y": [1]}), tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"can't write .*model\.onnx in ORT format: .*; export it with --format"):
        ort_format.convert(tmp_path / "model.onnx", tmp_path / "model.ort")


def test_the_runtime_knows_the_entry_that_replays(model: Path) -> None:
    """An entry of a wrong name is taken silently: the name is that of onnxruntime's own converter."""
    source = Path(onnxruntime.__file__).parent / "tools" / "convert_onnx_models_to_ort.py"
    assert ort_format.REPLAY[0] in source.read_text(encoding="utf-8")
