"""onnxq export and onnxq verify BUNDLE: what they print where, and their exit status."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from exporting_support import compiled, rows

from onnxq.cli import cli

SAMPLE = rows("digits_cnn")


def onnxq(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    found = onnxq("export", compiled(tmp_path, "digits_cnn"), "-o", tmp_path / "bundle", "--sample", SAMPLE)
    assert found.exit_code == 0, found.stderr
    lines = found.stdout.splitlines()
    assert lines[0] == f"{tmp_path / 'digits_cnn.w8a8.onnx'}: bundle with the sample first row of eval.npz"
    assert lines[1].split() == ["model", "output", "error", "allowed"]
    assert [line.split()[:3] for line in lines[2:-2]] == [["model.onnx", "logits", "0"]]
    assert lines[-1] == f"wrote {tmp_path / 'bundle'}"
    assert found.stderr == ("Note: the manifest tells nothing of accuracy and speed; give --report of the compilation, "
                            "or --float MODEL with --eval to measure them\n")
    return tmp_path / "bundle"


def test_verify_runs_a_bundle(bundle: Path) -> None:
    found = onnxq("verify", bundle)
    assert (found.exit_code, found.stderr) == (0, "")
    assert found.stdout.splitlines()[-1] == "as expected"
    data = json.loads(onnxq("verify", bundle, "--json").stdout)
    assert (data["ok"], data["bundle"], data["format"]) == (True, str(bundle), "bundle")
    assert data["models"][0]["output"] == "logits"
    assert onnxq("verify", bundle, "-q").output == ""


def test_an_altered_file_ends_with_3(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes() + b"x")
    found = onnxq("verify", bundle)
    assert (found.exit_code, found.stdout) == (3, "")
    assert found.stderr.startswith(f"Error: {bundle}: model.onnx was altered since the export; copy the folder again")


def test_a_wrong_output_ends_with_1(bundle: Path) -> None:
    from onnxq.exporting.manifest import checksum

    path = bundle / "sample" / "output0.bin"
    np.full(10, 1e6, "<f4").tofile(path)
    data = json.loads((bundle / "manifest.json").read_text())
    data["files"]["sample/output0.bin"] = checksum(path)
    (bundle / "manifest.json").write_text(json.dumps(data))
    found = onnxq("verify", bundle)
    assert found.exit_code == 1
    assert found.stderr.startswith("Failed: model.onnx gives logits with an error of 1e+06 on the sample, above the ")
    assert found.stdout.splitlines()[2].split()[-1] == "wrong"
    assert "as expected" not in found.stdout


@pytest.mark.parametrize("arguments", [["m.onnx"], ["absent/"]])
def test_one_argument_has_to_be_a_bundle(arguments: list[str]) -> None:
    found = onnxq("verify", *arguments)
    assert found.exit_code == 2
    assert f"Missing argument 'COMPILED'; {arguments[0]} is no folder that onnxq export wrote." in found.stderr


def test_other_checks_need_two_models(bundle: Path) -> None:
    for options in (["--layers"], ["--data", "random"], ["--min-sqnr", "20"], ["--target", "cpu"]):
        found = onnxq("verify", bundle, *options)
        assert found.exit_code == 2
        assert "A BUNDLE brings its own sample; for other checks name FLOAT and COMPILED." in found.stderr


@pytest.mark.parametrize("given", ["session.x", "=1"])
def test_session_entries_are_keys_with_values(tmp_path: Path, given: str) -> None:
    found = onnxq("export", tmp_path / "m.onnx", "--session", given)
    assert found.exit_code == 2
    assert f"'{given}' is no entry and value; write for example --session" in found.stderr


def test_json_and_session_entries(tmp_path: Path) -> None:
    found = onnxq("export", compiled(tmp_path, "digits_cnn"), "-o", tmp_path / "out", "--format", "ort", "--json",
                  "--session", "session.set_denormal_as_zero=1", "--session", "a.b=x=y", "--threads", "1")
    data = json.loads(found.stdout)
    assert (found.exit_code, data["format"], data["output"]) == (0, "ort", str(tmp_path / "out"))
    model = json.loads((tmp_path / "out" / "manifest.json").read_text())["models"][0]
    assert model["config"] == {"session.set_denormal_as_zero": "1", "a.b": "x=y"}
