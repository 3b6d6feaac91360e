"""The real wheel onnxruntime-cann where there is no CANN: nothing falls back to the CPU in silence, with numpy 1.26."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from exporting_support import MODELS

import onnxq
from onnxq.version import VERSION

pytestmark = pytest.mark.edge

CNN = MODELS / "digits_cnn"


@pytest.fixture(scope="session")
def python(request: pytest.FixtureRequest) -> Path:
    found = Path(request.config.getoption("--edge") or "").resolve() / "cann" / "bin" / "python"
    if not found.exists():
        pytest.skip("no environment with onnxruntime-cann; run tests/edge/setup.sh DIR, then pytest --edge=DIR")
    return found


@pytest.fixture(scope="session")
def run(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs that environment's Python with onnxq in it, and none of what is installed beside onnxq here."""
    alone = tmp_path_factory.mktemp("alone")
    (alone / "onnxq").symlink_to(Path(onnxq.__file__).parent)
    told = alone / f"onnxq-{VERSION}.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: onnxq\nVersion: {VERSION}\n")

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(python), *words], capture_output=True, text=True, check=False, cwd=alone,
                              env={**os.environ, "PYTHONPATH": str(alone)})

    return call


def test_the_wheel_names_a_provider_that_does_not_start(run):
    done = run("-c", "import numpy, onnxruntime as o; print(numpy.__version__, o.get_available_providers())")
    assert done.stdout.startswith("1.26")
    assert "CANNExecutionProvider" in done.stdout
    listed = json.loads(run("-m", "onnxq", "targets", "--json").stdout)
    assert {t["name"]: t["here"] for t in listed}["cann"] is False


def test_a_model_is_compiled_and_checked_by_the_cpu_and_says_so(run, tmp_path):
    output = tmp_path / "out.onnx"
    done = run("-m", "onnxq", "compile", str(CNN / "model.onnx"), "-o", str(output), "--target", "cann",
               "--shape", "batch=10", "--batch", "10", "--eval", str(CNN / "eval.npz"), "--metric", "top1",
               "--max-drop", "0.5pt")
    assert done.returncode == 0, done.stderr
    assert "CANNExecutionProvider is not here" in done.stderr
    assert "source its set_env.sh" in done.stderr
    asked = run("-m", "onnxq", "verify", str(CNN / "model.onnx"), str(output), "--target", "cann")
    assert asked.returncode == 3
    assert "CANNExecutionProvider did not start" in asked.stderr
    assert "pip install onnxruntime-cann and the CANN toolkit" in asked.stderr
    assert len(asked.stderr.strip().splitlines()) == 1
