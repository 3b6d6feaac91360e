"""Exports in the runtimes of their devices: onnxruntime-web in Chromium, onnxruntime-node, and C++.

Pip installs none of these; tests whose runtime is absent are skipped and say so.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from browser import Browser, served
from conftest import make_model, node
from exporting_support import MODELS as MODELS_FOLDER
from exporting_support import compiled, rows

import onnxq
from onnxq.exporting import export
from onnxq.exporting.manifest import DTYPES

pytestmark = pytest.mark.edge

# kernels of every kind: QLinearConv, MatMulIntegerToFloat, DynamicQuantizeMatMul, DynamicQuantizeLSTM, MatMulNBits
MODELS = [("digits_cnn", "w8a8"), ("text_encoder", "w8a8"), ("text_encoder", "w8a8-dynamic"), ("recurrent", "w8a8"),
          ("recurrent", "w8a8-dynamic"), ("decoder", "w8a8"), ("decoder", "w4a16")]
EACH = pytest.mark.parametrize(("name", "scheme"), MODELS, ids=[f"{name}-{scheme}" for name, scheme in MODELS])


PROGRAMS = Path(onnxq.__file__).parent / "exporting" / "smoke"
HOW = "run tests/edge/setup.sh DIR, then pytest --edge=DIR"


@pytest.fixture(scope="session")
def modules(request: pytest.FixtureRequest) -> Path:
    """The folder of onnxruntime-node and onnxruntime-web."""
    folder = request.config.getoption("--edge")
    found = Path(folder or "").resolve() / "node_modules"
    if folder is None or shutil.which("node") is None:
        pytest.skip(f"no node with onnxruntime's packages; {HOW}")
    assert (found / "onnxruntime-web").is_dir(), f"{folder} is not what tests/edge/setup.sh makes"
    return found


@pytest.fixture(scope="session")
def browser(modules: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if program is None:
        pytest.skip(f"no Chromium; {HOW}")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ program, compiled: one for all models."""
    include, edge = (request.config.getoption(name) for name in ("--ort-include", "--edge"))
    if shutil.which("g++") is None or (include is None and edge is None):
        pytest.skip(f"no g++ with onnxruntime's headers, which Python's package lacks; {HOW}, or give --ort-include")
    folder = tmp_path_factory.mktemp("smoke")
    library = _library(Path(edge) if edge is not None else None)
    if library is None:
        pytest.skip("this onnxruntime for Python has no library of its own to link with; "
                    f"install a newer one, or {HOW}")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):  # the name to link with, and the one to load
        (folder / name).symlink_to(library)
    subprocess.run(["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", str(PROGRAMS / "smoke.cpp"), "-isystem",
                    str(include or Path(edge) / "include"), f"-L{folder}", "-lonnxruntime", f"-Wl,-rpath,{folder}",
                    "-o", str(folder / "smoke")], check=True)
    return folder / "smoke"


def _library(edge: Path | None) -> Path | None:
    """onnxruntime's library: Python's own where it is apart from the binding, else that of onnxruntime-node."""
    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if edge is not None:
        found += sorted(edge.resolve().glob("node_modules/onnxruntime-node/bin/*/linux/x64/libonnxruntime.so.1"))
    return found[0] if found else None


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def bundle(models: Path, name: str, scheme: str) -> Path:
    """A bundle of the ONNX model and its form in ORT format, written once."""
    model = compiled(models, name, scheme)
    folder = model.with_suffix("")
    if not folder.exists():
        assert export(model, folder, sample=rows(name), platform="amd64")["ok"]
    return folder


def spoil(folder: Path) -> str:
    """Make the sample expect something else, by far; the line on it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    output = manifest["sample"]["outputs"][0]
    path = folder / output["file"]
    np.full_like(np.fromfile(path, output["dtype"]), 1e6).tofile(path)
    return f"{manifest['models'][0]['file']} {output['name']}: error 1"


def finds_all_well(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    """A smoke program told of each output of both models, and of nothing else."""
    assert (done.returncode, done.stderr) == (0, "")
    outputs = len(json.loads((folder / "manifest.json").read_text())["outputs"])
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["model.onnx"] * outputs + ["model.ort"] * outputs
    assert all(line.endswith(": ok") for line in lines)


@EACH
def test_bundles_run_in_node(modules: Path, models: Path, tmp_path: Path, name: str, scheme: str) -> None:
    folder = shutil.copytree(bundle(models, name, scheme), tmp_path / "moved")
    (folder / "node_modules").symlink_to(modules)
    done = subprocess.run(["node", "smoke.mjs"], cwd=folder, capture_output=True, text=True, check=False)
    finds_all_well(done, folder)


@EACH
def test_bundles_run_in_cpp(smoke: Path, models: Path, name: str, scheme: str) -> None:
    folder = bundle(models, name, scheme)
    done = subprocess.run([str(smoke), str(folder)], capture_output=True, text=True, check=False)
    finds_all_well(done, folder)


@EACH
def test_pages_run_in_a_browser(browser: Browser, modules: Path, models: Path, tmp_path: Path, name: str,
                                scheme: str) -> None:
    found = export(compiled(models, name, scheme), tmp_path / "page", format="web", sample=rows(name))
    (tmp_path / "page" / "node_modules").symlink_to(modules)
    with served(tmp_path / "page") as address:
        state, text = browser.result(f"{address}/index.html")
    assert state == "passed", text
    assert [line.split(":")[0] for line in text.splitlines()] == [f"model.onnx {row['output']}" for row in
                                                                  found["models"]]


def test_a_model_compiled_for_the_web(browser: Browser, modules: Path, tmp_path: Path) -> None:
    model = tmp_path / "web.onnx"
    onnxq.compile(MODELS_FOLDER / "text_encoder" / "model.onnx", model, target="web",
                  calib=str(MODELS_FOLDER / "text_encoder" / "calib.npz"), samples=16)
    export(model, tmp_path / "page", format="web", sample=rows("text_encoder"))
    (tmp_path / "page" / "node_modules").symlink_to(modules)
    with served(tmp_path / "page") as address:
        state, text = browser.result(f"{address}/index.html")
    assert state == "passed", text


def test_a_page_with_weights_in_a_file_of_their_own(browser: Browser, modules: Path, models: Path,
                                                    tmp_path: Path) -> None:
    model = onnx.load(compiled(models, "digits_cnn"))
    onnx.save(model, tmp_path / "apart.onnx", save_as_external_data=True, location="set apart #1.weights",
              size_threshold=0)
    export(tmp_path / "apart.onnx", tmp_path / "page", format="web", sample=rows("digits_cnn"))
    assert (tmp_path / "page" / "set apart #1.weights").stat().st_size > 100_000
    (tmp_path / "page" / "node_modules").symlink_to(modules)
    with served(tmp_path / "page") as address:
        state, text = browser.result(f"{address}/index.html")
    assert state == "passed", text


def test_values_of_every_type(modules: Path, browser: Browser, smoke: Path, tmp_path: Path) -> None:
    """The largest and the least number of each type go through as they are, and what is not a number, too."""
    values: dict[str, np.ndarray] = {}
    for dtype in DTYPES:
        kind = np.dtype(dtype)
        ends = [False, True] if dtype == "bool" else np.finfo(kind) if kind.kind == "f" else np.iinfo(kind)
        ends = ends if isinstance(ends, list) else [ends.min, ends.max, *([np.inf, np.nan] if kind.kind == "f" else [])]
        values[dtype] = np.array([ends], kind)
    ports = {name: (onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for name, v in values.items()}
    model = make_model([node("Identity", name, f"{name}.y") for name in values], ports,
                       {f"{name}.y": port for name, port in ports.items()})
    onnx.save(model, tmp_path / "types.onnx")
    np.savez(tmp_path / "sample.npz", **values)
    folder = tmp_path / "bundle"
    assert export(tmp_path / "types.onnx", folder, sample=str(tmp_path / "sample.npz"))["ok"]
    (folder / "node_modules").symlink_to(modules)
    shutil.copy(PROGRAMS / "index.html", folder)
    texts = [subprocess.run(call, cwd=folder, capture_output=True, text=True, check=True).stdout
             for call in (["node", "smoke.mjs"], [str(smoke), str(folder)])]
    with served(folder) as address:
        texts.append(browser.result(f"{address}/index.html")[1])
    for text in texts:
        assert [(line.split(":")[0], line.split(": ")[-1]) for line in text.splitlines()] == [
            (f"model.onnx {name}.y", "ok") for name in values], text


def test_what_is_wrong_is_seen_by_every_program(modules: Path, browser: Browser, smoke: Path, models: Path,
                                                tmp_path: Path) -> None:
    folder = shutil.copytree(bundle(models, "digits_cnn", "w8a8"), tmp_path / "spoilt")
    (folder / "node_modules").symlink_to(modules)
    wanted = spoil(folder)
    for call in (["node", "smoke.mjs"], [str(smoke), str(folder)]):
        done = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stderr
        first = done.stdout.splitlines()[0]
        assert first.startswith(wanted)
        assert first.endswith(": WRONG")
    shutil.copy(PROGRAMS / "index.html", folder)
    with served(folder) as address:
        state, text = browser.result(f"{address}/index.html")
    assert (state, text.splitlines()[0].split(": ")[-1]) == ("failed", "WRONG")


def test_cpp_says_what_it_can_not_read(smoke: Path, tmp_path: Path) -> None:
    for text, wanted in ((None, "manifest.json can't be read"), ('{"models": [', "cut short"), ("{}", "lacks sample")):
        if text is not None:
            (tmp_path / "manifest.json").write_text(text)
        done = subprocess.run([str(smoke), str(tmp_path)], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert wanted in done.stderr
