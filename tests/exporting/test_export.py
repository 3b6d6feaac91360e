"""export() and verify_bundle(): what a device needs, in a folder that can be moved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random
from exporting_support import MODELS, compiled, rows

from onnxq.errors import DataError, ModelError, OutputError, RuntimeUnavailable, UsageError
from onnxq.exporting import FORMATS, export, exporter, formats, verify_bundle
from onnxq.packing import pack

CNN = "digits_cnn"
SAMPLE = rows(CNN)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("compiled"), CNN)


@pytest.fixture(scope="module")
def written(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle; tests that change one take a copy."""
    folder = tmp_path_factory.mktemp("written") / "bundle"
    found = export(model, folder, sample=SAMPLE, threads=1)
    assert (found["ok"], found["failures"], found["sample"]) == (True, [], "first row of eval.npz")
    return folder


@pytest.fixture
def bundle(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "bundle")


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def test_a_bundle_and_its_manifest(written: Path, model: Path) -> None:
    assert sorted(p.relative_to(written).as_posix() for p in written.rglob("*") if p.is_file()) == [
        "manifest.json", "model.onnx", "package.json", "sample/input0.bin", "sample/output0.bin", "smoke.cpp",
        "smoke.mjs", "smoke.py"]
    assert (written / "model.onnx").read_bytes() == model.read_bytes()
    found = manifest(written)
    assert (found["name"], found["kind"], found["threads"], found["measured"]) == ("digits_cnn.w8a8", "bundle", 1, None)
    assert found["models"] == [{"file": "model.onnx", "format": "onnx", "provider": "CPUExecutionProvider",
                                "config": {}, "provider_options": {}, "data": [], "details": {}}]
    assert found["target"] == "cpu"
    assert found["inputs"] == [{"name": "image", "dtype": "float32", "shape": ["batch", 1, 16, 16]}]
    assert found["outputs"] == [{"name": "logits", "dtype": "float32", "shape": ["batch", 10]}]
    assert found["recipe"]["scheme"]["name"] == "w8a8"
    assert found["preprocessing"] == found["recipe"]["data"]
    assert len(found["plan"]) == 64
    assert json.loads((written / "package.json").read_text())["dependencies"] == {"onnxruntime-node": "1.30.0"}


def test_the_sample_is_the_first_row_and_what_the_model_makes_of_it(written: Path, model: Path) -> None:
    sample = manifest(written)["sample"]
    (given,), (expected,) = sample["inputs"], sample["outputs"]
    image = np.fromfile(written / given["file"], "<f4").reshape(given["shape"])
    np.testing.assert_array_equal(image, np.load(SAMPLE)["image"][:1])
    logits = np.fromfile(written / expected["file"], "<f4").reshape(expected["shape"])
    from onnxq.runtime.session import Session, SessionOptions

    np.testing.assert_array_equal(Session(model, SessionOptions(threads=1)).run({"image": image})["logits"], logits)
    assert 0 < expected["tolerance"] < 0.1 * float(np.abs(logits).max())


def test_a_bundle_that_was_moved_verifies(bundle: Path, tmp_path: Path) -> None:
    moved = tmp_path / "far" / "away"
    moved.parent.mkdir()
    shutil.move(bundle, moved)
    found = verify_bundle(moved)
    assert (found["ok"], found["failures"], found["notices"]) == (True, [], [])
    (row,) = found["models"]
    assert (row["file"], row["output"], row["error"], row["ok"]) == ("model.onnx", "logits", 0.0, True)


def python(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(folder / "smoke.py")], capture_output=True, text=True, check=False)


def test_the_program_in_python(bundle: Path) -> None:
    done = python(bundle)
    allowed = manifest(bundle)["sample"]["outputs"][0]["tolerance"]
    assert (done.returncode, done.stdout, done.stderr) == (
        0, f"model.onnx logits: error 0, allowed {allowed}: ok\n", "")
    np.full(10, 1e6, "<f4").tofile(bundle / "sample" / "output0.bin")
    done = python(bundle)
    assert done.returncode == 1
    assert done.stdout.endswith(": WRONG\n")


def forge(folder: Path) -> None:
    """Checksums that fit what the folder holds now."""
    from onnxq.exporting.manifest import checksum

    found = manifest(folder)
    found["files"] = {name: checksum(folder / name) for name in found["files"]}
    (folder / "manifest.json").write_text(json.dumps(found))


def test_an_output_that_is_off_fails(bundle: Path) -> None:
    expected = np.fromfile(bundle / "sample" / "output0.bin", "<f4")
    expected[3] += 1
    expected.tofile(bundle / "sample" / "output0.bin")
    with pytest.raises(ModelError, match=r"sample/output0\.bin was altered since the export"):
        verify_bundle(bundle)
    forge(bundle)
    found = verify_bundle(bundle)
    assert not found["ok"]
    assert found["models"][0]["error"] == pytest.approx(1, abs=1e-5)
    assert found["failures"] == [f"model.onnx gives logits with an error of 1 on the sample, above the "
                                 f"{found['models'][0]['tolerance']:g} allowed"]


def test_other_inputs_than_the_manifest_tells_of_fail(bundle: Path) -> None:
    found = manifest(bundle)
    found["inputs"][0]["shape"][0] = "rows"
    (bundle / "manifest.json").write_text(json.dumps(found))
    assert verify_bundle(bundle)["failures"] == [
        "model.onnx has the inputs image float32 [batch, 1, 16, 16], and its manifest says image float32 "
        "[rows, 1, 16, 16]"]


def test_a_sample_of_another_shape_fails(bundle: Path) -> None:
    found = manifest(bundle)
    found["sample"]["outputs"][0]["shape"] = [10, 1]
    (bundle / "manifest.json").write_text(json.dumps(found))
    row = verify_bundle(bundle)["models"][0]
    assert (row["error"], row["ok"]) == (None, False)
    assert "error inf" in python(bundle).stdout


def test_weights_in_a_file_of_their_own_come_along(model: Path, tmp_path: Path) -> None:
    (tmp_path / "from" / "data").mkdir(parents=True)
    onnx.save(onnx.load(model), tmp_path / "from" / "m.onnx", save_as_external_data=True, location="m.bin",
              size_threshold=0)
    export(tmp_path / "from" / "m.onnx", tmp_path / "bundle", sample=SAMPLE)
    shutil.rmtree(tmp_path / "from")
    found = manifest(tmp_path / "bundle")
    assert found["models"][0]["data"] == ["m.bin"]
    assert "m.bin" in found["files"]
    assert verify_bundle(tmp_path / "bundle")["models"][0]["error"] == 0


@pytest.mark.parametrize("name", ["../m.bin", "manifest.json", "smoke.py"])
def test_weights_that_would_lie_elsewhere_are_refused(model: Path, tmp_path: Path, name: str) -> None:
    light = onnx.load(model)
    light.graph.initializer[0].ClearField("raw_data")
    light.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    light.graph.initializer[0].external_data.add(key="location", value=name)
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "m.onnx").write_bytes(light.SerializeToString())
    with pytest.raises(ModelError, match=r"which can't lie beside an exported model; save it with its data under"):
        export(tmp_path / "from" / "m.onnx", tmp_path / "bundle", sample=SAMPLE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["from"], "nothing half-written is left"


# ------------------------------------------------------------------ ORT format


@pytest.mark.parametrize("options", [{}, {"platform": "arm"}, {"platform": "amd64"}, {"optimization": "runtime"}],
                         ids=["any", "arm", "amd64", "runtime"])
def test_ort_format_gives_what_the_model_gives(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    found = export(model, tmp_path / "ort", format="ort", sample=SAMPLE, **options)
    assert found["ok"]
    (entry,) = manifest(tmp_path / "ort")["models"]
    assert (entry["file"], entry["format"]) == ("model.ort", "ort")
    assert entry["details"] == {"platform": "any", "optimization": "fixed", **options}
    assert bool(entry["config"]) is ("optimization" in options)
    assert {p.suffixes[-1] for p in (tmp_path / "ort").glob("model.*")} == {".config", ".ort"}
    for path in (tmp_path / "ort").glob("*.config"):
        assert "QLinearConv" in path.read_text()
        assert str(tmp_path) not in path.read_text()
    assert verify_bundle(tmp_path / "ort")["ok"]
    assert python(tmp_path / "ort").returncode == 0


def test_a_bundle_for_a_platform_has_both_forms(model: Path, tmp_path: Path) -> None:
    found = export(model, tmp_path / "both", sample=SAMPLE, platform="arm")
    assert [row["file"] for row in found["models"]] == ["model.onnx", "model.ort"]
    assert found["size"] == {"model": model.stat().st_size, "model.onnx": model.stat().st_size,
                             "model.ort": (tmp_path / "both" / "model.ort").stat().st_size}


def test_packed_weights_become_dense_and_that_is_told(tmp_path: Path) -> None:
    """Of 200 x 100 weights nine in ten are zero: packed they take less than half."""
    weight = np.where(np.random.default_rng(0).random((200, 100)) < 0.9, 0, 1.5).astype(np.float32)
    onnx.save(make_model([node("MatMul", "x w", "y")], {"x": ["N", 200]}, {"y": ["N", 100]}, {"w": weight}),
              tmp_path / "dense.onnx")
    pack(tmp_path / "dense.onnx", tmp_path / "packed.onnx", load_memory="1GB")
    found = export(tmp_path / "packed.onnx", tmp_path / "ort", format="ort")
    (notice,) = (n for n in found["notices"] if "dense" in n)
    assert notice.startswith("ORT format stores weights dense: ")
    assert "with 1 packed of them become 8" in notice
    assert found["size"]["model.ort"] > 80_000 > 2 * found["size"]["model"]
    assert found["ok"]


def test_what_ort_format_can_not_hold_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "ORT_BYTES", 1000)
    with pytest.raises(ModelError, match=r"a file in ORT format can't take more than 1\.0 kB; export it with --format"):
        export(model, tmp_path / "ort", format="ort", sample=SAMPLE)


# ------------------------------------------------------------------ a page


def test_a_page(model: Path, tmp_path: Path) -> None:
    found = export(model, tmp_path / "page", format="web", sample=SAMPLE)
    assert found["ok"]
    assert sorted(p.name for p in (tmp_path / "page").iterdir()) == [
        "index.html", "manifest.json", "model.onnx", "package.json", "sample", "smoke.mjs"]
    assert json.loads((tmp_path / "page" / "package.json").read_text())["dependencies"] == {"onnxruntime-web": "1.30.0"}
    text = (tmp_path / "page" / "index.html").read_text() + (tmp_path / "page" / "smoke.mjs").read_text()
    assert "://" not in text, "nothing is loaded from elsewhere"
    told = manifest(tmp_path / "page")
    assert (told["target"], told["models"][0]["provider"]) == ("web", "CPUExecutionProvider")
    assert verify_bundle(tmp_path / "page")["ok"]


def test_what_a_page_can_not_run_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(ModelError) as error:
            export(path, tmp_path / "page", format="web", sample=SAMPLE)
        return str(error.value)

    foreign = onnx.load(model)
    foreign.graph.node.append(node("Own", "image", "own", domain="my.domain"))
    onnx.save(foreign, tmp_path / "foreign.onnx")
    assert "onnxruntime-web has no operators my.domain.Own; export" in refused(tmp_path / "foreign.onnx")
    newer = onnx.load(model)
    newer.opset_import[0].version = 27
    onnx.save(newer, tmp_path / "newer.onnx")
    assert "onnxruntime-web 1.30.0 reads up to 26 and 13; export the model anew" in refused(tmp_path / "newer.onnx")
    monkeypatch.setattr(formats, "WEB_BYTES", 1000)
    assert "a page can't load more than 1.0 kB; compile it to fewer bits" in refused(model)


# ------------------------------------------------------------------ what was measured


def test_accuracy_and_speed_of_a_report(model: Path, tmp_path: Path) -> None:
    report = {"scheme": "w8a8", "size": {"compiled_bytes": model.stat().st_size}, "latency": {"compiled_ms": 1.5},
              "accuracy": {"metric": "top1"}, "environment": {"machine": "x"}, "nodes": []}
    (tmp_path / "report.json").write_text(json.dumps(report))
    for given in (tmp_path, tmp_path / "report.json"):
        found = export(model, tmp_path / "bundle", sample=SAMPLE, report=given, force=True)
        del report["nodes"]
        assert manifest(tmp_path / "bundle")["measured"] == {"source": "report of the compilation", **report}
        report["nodes"] = []
        assert found["notices"] == []
        assert verify_bundle(tmp_path / "bundle")["measured"]["latency"] == {"compiled_ms": 1.5}


def test_the_report_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"size": {"compiled_bytes": 5}}))
    with pytest.raises(DataError, match=r"tells of a model of 5 bytes, and .* has \d+; give the report of this model"):
        export(model, tmp_path / "bundle", report=tmp_path)
    for text in ("{", "{}", "[]", '{"size": null}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(DataError, match=r"is no report of a compilation; name the report\.json"):
            export(model, tmp_path / "bundle", report=tmp_path)
    with pytest.raises(DataError, match="can't be read"):
        export(model, tmp_path / "bundle", report=tmp_path / "absent.json")


def test_accuracy_and_speed_against_float(model: Path, tmp_path: Path) -> None:
    export(model, tmp_path / "bundle", sample=SAMPLE, float_model=MODELS / CNN / "model.onnx", eval=SAMPLE,
           metric="top1", threads=1)
    found = manifest(tmp_path / "bundle")["measured"]
    assert found["source"] == "verified as it was exported"
    assert (found["accuracy"]["metric"], found["accuracy"]["rows"]) == ("top1", 500)
    assert found["accuracy"]["compiled"] > 0.99
    assert found["latency"]["speedup"] > 0
    assert found["size"]["compiled_bytes"] == model.stat().st_size


def test_what_is_not_given_is_told(model: Path, tmp_path: Path) -> None:
    found = export(model, tmp_path / "bundle")
    assert found["sample"] == "made at random"
    assert [n.split(";")[0] for n in found["notices"]] == ["the manifest tells nothing of accuracy and speed",
                                                            "the sample is made at random"]


# ------------------------------------------------------------------ the call


def test_session_options_are_those_of_the_device(model: Path, tmp_path: Path) -> None:
    export(model, tmp_path / "bundle", sample=SAMPLE, threads=1, config={"session.set_denormal_as_zero": "1"})
    found = manifest(tmp_path / "bundle")
    assert found["models"][0]["config"] == {"session.set_denormal_as_zero": "1"}
    assert verify_bundle(tmp_path / "bundle")["ok"]
    assert python(tmp_path / "bundle").returncode == 0


def test_a_target_that_is_not_here(tmp_path: Path) -> None:
    """Sums in float16 are 2^13 times as coarse; what is expected was computed in float32 here."""
    path = tmp_path / "m.onnx"
    onnx.save(make_model([node("MatMul", "x w", "y")], {"x": [1, 8]}, {"y": [1, 4]}, {"w": random(8, 4)}), path)
    found = export(path, tmp_path / "cann", target="cann", config={"session.x": "1"})
    assert found["ok"]
    assert any(n.startswith("CANNExecutionProvider is not here: what is expected is what the CPU makes") for n in
               found["notices"])
    told = manifest(tmp_path / "cann")
    (entry,) = told["models"]
    assert (told["target"], entry["provider"]) == ("cann", "CANNExecutionProvider")
    assert (entry["config"], entry["provider_options"]["precision_mode"]) == ({"session.x": "1"}, "allow_fp32_to_fp16")
    output = told["sample"]["outputs"][0]
    largest = float(np.abs(np.fromfile(tmp_path / "cann" / output["file"], "<f4")).max())
    assert output["tolerance"] > 4 * 2.0 ** -10 * largest
    with pytest.raises(RuntimeUnavailable, match="has no CANNExecutionProvider"):
        verify_bundle(tmp_path / "cann")
    done = python(tmp_path / "cann")
    assert (done.returncode, done.stderr) == (1, "this onnxruntime has no CANNExecutionProvider\n")
    with pytest.raises(UsageError, match="--format ort is for onnxruntime's CPU kernels, and cann runs on CANN"):
        export(path, tmp_path / "ort", format="ort", target="cann")


def test_a_processor_that_saturates_where_the_device_does_not(model: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxq.runtime import machine

    for saturates in (True, False):
        monkeypatch.setattr(machine, "saturates", lambda: saturates)  # noqa: B023
        monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
        found = export(model, tmp_path / "arm", target="cpu-arm64", sample=SAMPLE, force=True)
        assert found["ok"]
        assert any(n.startswith("int8 may saturate on this processor, and does not on cpu-arm64") for n in
                   found["notices"]) is saturates


def test_a_folder_is_replaced_only_where_it_is_an_export(model: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists; give --force to replace it"):
        export(model, bundle, sample=SAMPLE)
    (bundle / "of_an_earlier_one").write_text("")
    export(model, bundle, format="web", sample=SAMPLE, force=True)
    assert manifest(bundle)["kind"] == "web"
    assert not (bundle / "of_an_earlier_one").exists()
    (tmp_path / "mine").mkdir()
    export(model, tmp_path / "mine", sample=SAMPLE)  # an empty one is no loss
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(OutputError, match="exists and holds no export; choose another -o"):
        export(model, tmp_path / "notes", sample=SAMPLE, force=True)
    assert (tmp_path / "notes" / "diary.txt").exists()
    with pytest.raises(OutputError, match="does not exist; make it"):
        export(model, tmp_path / "a" / "b", sample=SAMPLE)


def test_the_folder_is_named_by_the_model(model: Path, tmp_path: Path) -> None:
    shutil.copy(model, tmp_path / "small.w8a8.onnx")
    assert export(tmp_path / "small.w8a8.onnx", sample=SAMPLE)["output"] == str(tmp_path / "small.w8a8-bundle")


@pytest.mark.parametrize(("options", "wanted"), [
    ({"format": "zip"}, "there is no format 'zip'; use bundle, ort, web"),
    ({"platform": "sparc"}, "there is no platform 'sparc'; use arm or amd64"),
    ({"optimization": "none"}, "there is no optimization 'none'; use fixed or runtime"),
    ({"format": "web", "platform": "arm"}, "--platform is that of ORT format"),
    ({"optimization": "runtime"}, "--optimization is that of ORT format; give --format ort, or --platform"),
    ({"report": "r", "float_model": "f"}, "--report and --float exclude each other"),
    ({"eval": "random"}, "--eval compares with the float model; give --float MODEL")])
def test_wrong_calls(model: Path, tmp_path: Path, options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UsageError, match=wanted):
        export(model, tmp_path / "bundle", **options)


def test_models_that_can_not_be_exported(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_text("no")
    with pytest.raises(ModelError, match="is not an ONNX model"):
        export(tmp_path / "no.onnx")
    text = onnx.TensorProto.STRING
    onnx.save(make_model([node("Identity", "x", "y")], {"x": (text, [1])}, {"y": (text, [1])}), tmp_path / "t.onnx")
    with pytest.raises(ModelError, match=r"'x' is string .*exported samples hold numbers"):
        export(tmp_path / "t.onnx")
    model = make_model([node("Add", "a b", "y")], {"a": ["N", 3], "b": ["M", 3]}, {"y": None})
    onnx.save(model, tmp_path / "f.onnx")
    export(tmp_path / "f.onnx")
    model = make_model([node("Reshape", "a s", "y")], {"a": ["N"]}, {"y": None}, {"s": np.array([5, 7])})
    onnx.save(model, tmp_path / "r.onnx")
    with pytest.raises(DataError, match=r"the model does not run on made input .*; give --sample DATA"):
        export(tmp_path / "r.onnx")


def test_an_input_of_no_elements_is_stored(tmp_path: Path) -> None:
    """As the cache of a language model before its first token."""
    onnx.save(make_model([node("Concat", "past x", "y", axis=1)], {"past": [1, "P", 2], "x": [1, "S", 2]},
                         {"y": [1, None, 2]}), tmp_path / "m.onnx")
    np.savez(tmp_path / "s.npz", past=np.zeros((1, 1, 0, 2), np.float32), x=random(1, 1, 3, 2))
    found = export(tmp_path / "m.onnx", tmp_path / "bundle", sample=str(tmp_path / "s.npz"))
    assert found["ok"]
    assert (tmp_path / "bundle" / "sample" / "input0.bin").stat().st_size == 0
    assert python(tmp_path / "bundle").returncode == 0


def test_the_formats_of_the_command_line_are_those_there_are() -> None:
    from onnxq.cli import export as command
    from onnxq.runtime.ort_format import PLATFORMS

    assert tuple(FORMATS) == command.FORMATS
    assert (command.PLATFORMS, command.OPTIMIZATIONS) == (PLATFORMS, exporter.OPTIMIZATIONS)
