"""Where the runtimes are that pip does not install; tests whose runtime is absent are skipped and say so."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import pytest
from browser import Browser

HOW = "run tests/edge/setup.sh DIR, then pytest --edge DIR"


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
    import onnxq

    source = Path(onnxq.__file__).parent / "exporting" / "smoke" / "smoke.cpp"
    subprocess.run(["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", str(source), "-isystem",
                    str(include or Path(edge) / "include"), f"-L{folder}", "-lonnxruntime", f"-Wl,-rpath,{folder}",
                    "-o", str(folder / "smoke")], check=True)
    return folder / "smoke"


def _library(edge: Path | None) -> Path | None:
    """onnxruntime's library: Python's own where it is apart from the binding, else that of onnxruntime-node."""
    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if edge is not None:
        found += sorted(edge.resolve().glob("node_modules/onnxruntime-node/bin/*/linux/x64/libonnxruntime.so.1"))
    return found[0] if found else None
