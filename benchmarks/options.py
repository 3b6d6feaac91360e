"""What the programs of this package share: options, progress on stderr, figures as JSON."""

from __future__ import annotations

import argparse
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import models
from onnxq.runtime.measure import environment
from onnxq.version import VERSION

_BEGUN = time.perf_counter()


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """--models, --only, --threads, --json, --markdown and --quick."""
    shared = models.SHARED_MODELS if models.SHARED_MODELS.is_dir() else None
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}", description=description,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", type=Path, default=shared, metavar="DIR",
                      help="folders with model.onnx, calib.npz, eval.npz and meta.json (default: ../shared/models of "
                           "the repository where it exists)")
    made.add_argument("--only", nargs="+", metavar="NAME", help="these models alone")
    made.add_argument("--threads", type=int, default=2, help="threads of every session (default 2)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found")
    made.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    made.add_argument("--quick", action="store_true", help="a smoke run: the figures mean nothing")
    return made


def check_folders(made: argparse.ArgumentParser, *files: Path | None) -> None:
    """Wrong usage where a file is to be written into a folder that there is not."""
    for path in files:
        if path is not None and not path.parent.is_dir():
            made.error(f"the folder of {path} does not exist")


def where() -> dict[str, Any]:
    """The machine and the versions."""
    return {"onnxq": VERSION, **environment(), "onnx": version("onnx"), "numpy": version("numpy")}


def seconds() -> float:
    """Since the program began."""
    return time.perf_counter() - _BEGUN


def say(text: str) -> None:
    """A line of progress."""
    print(f"{seconds():6.1f} s  {text}", file=sys.stderr, flush=True)


def finite(value: Any) -> Any:
    """JSON knows no infinities and NaN: None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
