"""Calibration as a service: named tensors of any graph, observed in one streamed run of onnxruntime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.calibration.readers import Dataset
from onnxq.errors import DataError, UsageError
from onnxq.graph import Graph, save
from onnxq.numerics import ranges
from onnxq.numerics.dtypes import by_name
from onnxq.recipe import Calibration, TensorSpec
from onnxq.runtime.session import Session, SessionOptions

Progress = Callable[[int], None]


def observe(graph: Graph, wanted: Sequence[str], data: Dataset, how: Calibration, options: SessionOptions,
            progress: Progress | None = None, spec: TensorSpec | None = None) -> dict[str, tuple[float, float]]:
    """Tensor name -> (min, max) over the data, always with 0 inside; infinities don't count.

    The graph runs fully optimized with the wanted tensors as extra outputs; each batch is folded into the running
    ranges and dropped, so memory is that of one batch. `progress` gets the rows done so far. `spec` is how the tensors
    will be quantized (None: uint8, asymmetric); the ranges entropy and mse are searched for it.
    Raises DataError when the data are empty, or when a tensor holds NaN, naming it and the first row of the batch.
    """
    settings = _settings(how, spec)
    running = {name: ranges.make(how.ranges, **settings) for name in wanted}
    inputs = {t.name for t in graph.inputs}
    computed = [name for name in wanted if name not in inputs]
    rows = 0
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        path = Path(folder) / "calibrate.onnx"
        save(graph, path, extra_outputs=computed)
        session = Session(path, options)
        for batch in data.batches(how.batch, how.samples):
            found = {**batch.feed, **session.run(batch.feed, computed)}
            for name in wanted:  # in their order, so that NaN is blamed on the first tensor that holds it
                _fold(running[name], found[name], name, batch.first_row, batch.rows)
            rows += batch.rows
            if progress is not None:
                progress(rows)
    if rows == 0:
        raise DataError(f"{data.name} gave no rows to calibrate on; check that it isn't empty")
    return {name: fold.result() for name, fold in running.items()}


def _settings(how: Calibration, spec: TensorSpec | None) -> dict[str, Any]:
    if how.ranges == "percentile":
        return {"percent": how.percentile}
    if how.ranges in ("entropy", "mse") and spec is not None:
        return {"dtype": by_name(spec.dtype), "symmetric": spec.symmetric}
    return {}


def _fold(running: ranges.Range, values: np.ndarray[tuple[int, ...], np.dtype[np.generic]], name: str, first: int,
          rows: int) -> None:
    try:
        running.update(values)
    except ValueError:
        where = f"row {first}" if rows == 1 else f"rows {first} to {first + rows - 1}"
        raise DataError(f"tensor {name!r} holds NaN for {where} of the calibration data; look at that input, and at "
                        "the float model with onnxq verify MODEL MODEL") from None


def check(how: Calibration) -> None:
    """Refuse calibration settings that no observer has. Raises UsageError."""
    if how.ranges not in ranges.OPTIONS:
        raise UsageError(f"ranges {how.ranges!r} are not known; use one of {', '.join(ranges.OPTIONS)}")
    if not 50 < how.percentile <= 100:
        raise UsageError(f"percentile {how.percentile} makes no range; use a number above 50 and up to 100")
