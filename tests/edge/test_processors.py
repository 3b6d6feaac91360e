"""One model on several processors, emulated by qemu: integers are the same, whatever instructions add them."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from exporting_support import MODELS
from onnx import TensorProto

import onnxq
from onnxq.runtime.session import Session, SessionOptions

pytestmark = pytest.mark.edge

HOW = "run tests/edge/setup.sh DIR, then pytest --edge=DIR"
RUN = """
import sys, numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed = dict(np.load(sys.argv[2]))
names = [o.name for o in session.get_outputs()]
np.savez(sys.argv[3], **{str(k): v for k, v in enumerate(session.run(names, feed))})
"""
ROWS = 2
X86 = ("Nehalem", "Haswell")  # SSE4.1 and AVX2, both without VNNI


def seen(folder: Path, name: str, **options) -> tuple[Path, list[str], Path]:
    """A compiled model that gives all its codes, too, the names of its outputs, and what it is fed."""
    path = folder / "model.onnx"
    onnxq.compile(MODELS / name / "model.onnx", path, calib=MODELS / name / "calib.npz", measure=False, runtime="1.22",
                  **options)
    model = onnx.load(path)
    codes = [n.output[0] for n in model.graph.node if n.op_type.startswith(("QLinear", "QuantizeLinear"))]
    for tensor in codes:
        model.graph.output.append(onnx.helper.make_tensor_value_info(tensor, TensorProto.UINT8, None))
    onnx.save(model, path)
    data = np.load(MODELS / name / "eval.npz")
    np.savez(folder / "feed.npz", **{i.name: data[i.name][:ROWS] for i in model.graph.input})
    return path, [o.name for o in model.graph.output], folder / "feed.npz"


def emulated(command: list[str], path: Path, feed: Path, packages: str) -> list[np.ndarray]:
    result = path.with_name("result.npz")
    done = subprocess.run([*command, "-c", RUN, str(path), str(feed), str(result)], capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHONPATH": packages, "OPENBLAS_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(result) as found:
        return [found[str(k)] for k in range(len(found.files))]


def native(path: Path, feed: Path, names: list[str]) -> list[np.ndarray]:
    found = Session(path, SessionOptions(threads=1)).run(dict(np.load(feed)))
    return [found[name] for name in names]


def alike(here: list[np.ndarray], there: list[np.ndarray]) -> None:
    """Codes of integer layers to the bit; what is computed in float up to its rounding."""
    codes = 0
    for mine, other in zip(here, there, strict=True):
        if mine.dtype == np.uint8:
            np.testing.assert_array_equal(mine, other)
            codes += 1
        else:
            np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5 * np.abs(mine).max())
    assert codes > 1


@pytest.mark.parametrize("processor", X86)
def test_any_x86_gives_the_same_codes(tmp_path, processor):
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        pytest.skip(f"no qemu-x86_64; {HOW}")
    path, names, feed = seen(tmp_path, "digits_cnn", target="cpu-portable")
    python = os.path.realpath(sys.executable)
    packages = os.pathsep.join(site.getsitepackages())
    alike(native(path, feed, names), emulated([qemu, "-cpu", processor, python], path, feed, packages))


@pytest.fixture(scope="session")
def arm(request: pytest.FixtureRequest) -> tuple[list[str], str]:
    """The command that runs a Python of 64-bit ARM, and its packages."""
    folder = Path(request.config.getoption("--edge") or "").resolve() / "arm64"
    qemu = shutil.which("qemu-aarch64")
    if qemu is None or not (folder / "site" / "onnxruntime").is_dir():
        pytest.skip(f"no emulated ARM with onnxruntime; {HOW}")
    root = folder / "root"
    return [qemu, "-cpu", "max", "-L", str(root), str(root / "usr/bin/python")], str(folder / "site")


def test_arm_gives_the_codes_of_x86(tmp_path, arm):
    command, packages = arm
    path, names, feed = seen(tmp_path, "digits_cnn", target="cpu-portable")
    alike(native(path, feed, names), emulated(command, path, feed, packages))


def test_arm_keeps_all_bits_of_weights(tmp_path, arm):
    """What cpu-arm64 gets would saturate on x86 without VNNI: its kernels there are held against its pairs of Q and DQ,
    which compute in float."""
    command, packages = arm
    path, _, feed = seen(tmp_path, "digits_cnn", target="cpu-arm64")
    pairs = tmp_path / "pairs.onnx"
    onnxq.compile(MODELS / "digits_cnn" / "model.onnx", pairs, calib=MODELS / "digits_cnn" / "calib.npz",
                  target="cpu-arm64", measure=False, format="qdq", runtime="1.22")
    [wanted] = Session(pairs, SessionOptions(threads=1, optimize=False)).run(dict(np.load(feed))).values()
    found = emulated(command, path, feed, packages)[0]
    error = np.square(found - wanted).sum() / np.square(wanted).sum()
    assert 10 * np.log10(1 / error) > 40
