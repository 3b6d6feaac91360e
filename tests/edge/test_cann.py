"""The real wheel onnxruntime-cann where there is no CANN: nothing falls back to the CPU in silence, with numpy 1.26."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from exporting_support import MODELS

import onnxq

pytestmark = pytest.mark.edge

CNN = MODELS / "digits_cnn"


@pytest.fixture(scope="session")
def python(request: pytest.FixtureRequest) -> Path:
    found = Path(request.config.getoption("--edge") or "").resolve() / "cann" / "bin" / "python"
    if not found.exists():
        pytest.skip("no environment with onnxruntime-cann; run tests/edge/setup.sh DIR, then pytest --edge=DIR")
    return found


def run(python: Path, *words: str) -> subprocess.CompletedProcess[str]:
    packages = str(Path(onnxq.__file__).parent.parent)
    return subprocess.run([str(python), *words], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": packages})


def test_the_wheel_names_a_provider_that_does_not_start(python):
    done = run(python, "-c", "import numpy, onnxruntime as o; print(numpy.__version__, o.get_available_providers())")
    assert done.stdout.startswith("1.26")
    assert "CANNExecutionProvider" in done.stdout
    listed = json.loads(run(python, "-m", "onnxq", "targets", "--json").stdout)
    assert {t["name"]: t["here"] for t in listed}["cann"] is False


def test_a_model_is_compiled_and_checked_by_the_cpu_and_says_so(python, tmp_path):
    output = tmp_path / "out.onnx"
    done = run(python, "-m", "onnxq", "compile", str(CNN / "model.onnx"), "-o", str(output), "--target", "cann",
               "--shape", "batch=10", "--batch", "10", "--eval", str(CNN / "eval.npz"), "--metric", "top1",
               "--max-drop", "0.5pt")
    assert done.returncode == 0, done.stderr
    assert "CANNExecutionProvider is not here" in done.stderr
    assert "source its set_env.sh" in done.stderr
    asked = run(python, "-m", "onnxq", "verify", str(CNN / "model.onnx"), str(output), "--target", "cann")
    assert asked.returncode == 3
    assert "CANNExecutionProvider did not start" in asked.stderr
    assert "pip install onnxruntime-cann and the CANN toolkit" in asked.stderr
    assert len(asked.stderr.strip().splitlines()) == 1
