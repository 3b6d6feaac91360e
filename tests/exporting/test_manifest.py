"""manifest.json is read back as it was written, and anything else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxq.errors import ModelError
from onnxq.exporting import manifest as manifests
from onnxq.exporting.manifest import Described, Manifest, Model, Stored
from onnxq.ports import Port

WRITTEN = Manifest(
    "model", "bundle", "cpu", (Model("model.onnx", "onnx", "CPUExecutionProvider", {"session.x": "1"}, {"y": "2"},
                                     ("weights.bin",), {"made": "so"}),),
    2, (Described("x", "float32", ("batch", 3, None)),),
    (Described("y", "int64", ()),), "first row of eval.npz", (Stored("x", "float32", (1, 3, 2), "sample/input0.bin"),),
    (Stored("y", "int64", (), "sample/output0.bin", 0.5),), {"scale": 1.0}, {"scheme": "w8a8"}, "abc",
    {"accuracy": None}, {"onnxq": "1"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sample").mkdir()
    for name in ("model.onnx", "weights.bin", "sample/input0.bin", "sample/output0.bin"):
        (tmp_path / name).write_text(name)
    WRITTEN.write(tmp_path)
    return tmp_path


def test_it_comes_back_with_checksums(folder: Path) -> None:
    found = manifests.read(folder)
    assert [*found.files] == ["model.onnx", "sample/input0.bin", "sample/output0.bin", "weights.bin"]
    # printf model.onnx | sha256sum
    assert found.files["model.onnx"] == "d7c4b743081e6ccdf263598ab3a94f5df38c9f2aec014973c0806819d7762f26"
    assert Manifest(**{**vars(found), "files": {}}) == WRITTEN
    manifests.check_files(folder, found)


def test_files_that_are_missing_or_were_altered_are_named(folder: Path) -> None:
    (folder / "model.onnx").write_text("Model.onnx")
    (folder / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"model\.onnx was altered, weights\.bin is missing since the export; copy"):
        manifests.check_files(folder, manifests.read(folder))


def test_other_files_do_not_matter(folder: Path) -> None:
    (folder / "node_modules").mkdir()
    (folder / "node_modules" / "x").write_text("")
    manifests.check_files(folder, manifests.read(folder))


def change(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    data.update(changes)
    (folder / "manifest.json").write_text(json.dumps(data))


@pytest.mark.parametrize("name", ["../model.onnx", "/model.onnx", "a/../../model.onnx", "..\\model.onnx"])
def test_files_outside_of_the_folder_are_refused(folder: Path, name: str) -> None:
    model = {"file": name, "format": "onnx", "provider": "CPUExecutionProvider", "config": {}, "data": [],
             "details": {}}
    change(folder, models=[model])
    with pytest.raises(ModelError, match="lies outside of the folder; export the model again"):
        manifests.read(folder)


def test_a_model_without_a_checksum_is_refused(folder: Path) -> None:
    change(folder, files={"sample/input0.bin": "", "sample/output0.bin": ""})
    with pytest.raises(ModelError, match=r"has no checksum of 'model\.onnx'; export"):
        manifests.read(folder)


@pytest.mark.parametrize("changes", [{"models": 1}, {"inputs": [{"name": "x"}]}, {"more": 1}, {"sample": {}}])
def test_what_onnxq_does_not_write_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    change(folder, **changes)
    with pytest.raises(ModelError, match="is not as onnxq writes it"):
        manifests.read(folder)


@pytest.mark.parametrize(("text", "wanted"), [
    ("{", "is no JSON; export"), ('{"onnxq_bundle": 2}', "is of another version than 1"), ("[]", "or not onnxq's")])
def test_no_manifest(tmp_path: Path, text: str, wanted: str) -> None:
    with pytest.raises(ModelError, match=r"holds no manifest\.json .*; name a folder that onnxq export wrote"):
        manifests.read(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ModelError, match=wanted):
        manifests.read(tmp_path)


def test_ports_in_the_words_of_the_manifest() -> None:
    assert manifests.described(Port("x", np.dtype(np.float32), ("N", None, 3))) == Described(
        "x", "float32", ("N", None, 3))
    for port in (Port("x", None, None), Port("x", np.dtype(object), (1,)), Port("x", np.dtype(np.float32), (1,), True)):
        with pytest.raises(ModelError, match=r"'x' is .*, and exported samples hold numbers of whole bytes only; make"):
            manifests.described(port)
