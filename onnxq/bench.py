"""bench(): one model, or two against each other."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import verification
from onnxq.calibration.readers import open_data
from onnxq.errors import ModelError, UsageError
from onnxq.graph import load
from onnxq.ports import Port
from onnxq.progress import Progress, Silent
from onnxq.runtime import measure
from onnxq.runtime.machine import elsewhere, session_options, target_here
from onnxq.runtime.session import Session
from onnxq.version import VERSION

BLOCK_SECONDS = 0.6


def bench(model: str | Path, other: str | Path | None = None, *, data: Any = None,
          shapes: Mapping[str, int] | None = None, threads: int = 0, batch: int | None = None,
          target: str = "cpu", progress: Progress | None = None) -> dict[str, Any]:
    """Milliseconds per run, for two models in alternating blocks with the ratio model / other, and peak memory.

    Both run on the provider of `target`. Inputs come from the first batch of `data`, or are random with dynamic axes as
    `shapes` says (axis name -> size). Peak memory is of a process of its own per model, in bytes. Raises
    UsageError for shapes beside data and for axes that the model does not have.
    """
    if shapes and data is not None:
        raise UsageError("--shape sizes random inputs; leave it out with --data, whose shapes are what they are")
    bar = progress or Silent()
    bar.stage("load")
    ports = _sized(load(model).ports(), shapes or {})
    given = open_data(data if data is not None else "random", ports)
    feeds = verification.first_feeds(given, batch, 1)
    options = session_options(target_here(target), threads, must=True)
    bar.stage("measure")
    found: dict[str, Any] = {
        "model": str(model), "other": str(other) if other is not None else None,
        "shapes": {k: list(v.shape) for k, v in feeds[0].items()}, "threads": threads,
        "data": given.name if data is not None else "random inputs"}
    a = Session(model, options)
    if other is None:
        call = a.runner(feeds[0])
        found["a_ms"] = measure.time(call, block_seconds=BLOCK_SECONDS)
    else:
        timing = measure.compare_models(a, Session(other, options), feeds, block_seconds=BLOCK_SECONDS)
        found |= {"a_ms": timing.a_ms, "b_ms": timing.b_ms, "ratio": timing.ratio, "low": timing.ratio_low,
                  "high": timing.ratio_high}
    said = elsewhere(target_here(target))
    found["notices"] = [said] * bool(said)
    bar.stage("memory")
    found["peak_memory_bytes"] = {key: peak_memory(path, feeds[0], threads, target)
                                  for key, path in (("a", model), ("b", other)) if path is not None}
    found["environment"] = {"onnxq": VERSION, **measure.environment()}
    return found


def _sized(ports: list[Port], shapes: Mapping[str, int]) -> list[Port]:
    free = sorted({d for p in ports for d in p.shape or () if isinstance(d, str)})
    for axis in shapes:
        if axis not in free:
            raise UsageError(f"the model has no dynamic axis {axis!r}; it has {', '.join(free) or 'none'}")
        if shapes[axis] < 1:
            raise UsageError(f"axis {axis!r} can't have {shapes[axis]} elements; give at least 1")
    return [replace(p, shape=tuple(shapes.get(d, d) if isinstance(d, str) else d for d in p.shape)
                    if p.shape is not None else None) for p in ports]


def peak_memory(model: str | Path, feed: Mapping[str, np.ndarray[Any, Any]], threads: int, target: str) -> int:
    """Peak resident bytes of a fresh process that loads a model and runs it three times."""
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        path = Path(folder) / "feed.npz"
        np.savez(path, **feed)  # type: ignore[arg-type]
        call = [sys.executable, "-m", "onnxq.runtime.once", str(model), str(path), str(threads), target]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ModelError(f"{model} can't be run in a process of its own ({done.stderr.strip().splitlines()[-1:]}); "
                         "run it with onnxruntime to see why")
    return int(done.stdout)
