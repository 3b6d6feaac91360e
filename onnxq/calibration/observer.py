"""Calibration as a service: named tensors of any graph, observed in one streamed run of onnxruntime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from onnxq.calibration.dataset import Batch, Dataset
from onnxq.errors import DataError, UsageError
from onnxq.graph import Graph, save
from onnxq.numerics import ranges
from onnxq.numerics.comparison import Comparison
from onnxq.numerics.dtypes import by_name
from onnxq.recipe import Calibration, TensorSpec
from onnxq.runtime.session import Session, SessionOptions

Progress = Callable[[int], None]
Key = TypeVar("Key")


class Statistic(Protocol):
    """What a tensor's values are folded into; ValueError for values that it can't take."""

    def update(self, x: npt.NDArray[Any]) -> None:
        """Fold in one batch."""


@dataclass(frozen=True)
class _Both:
    first: Statistic
    second: Statistic

    def update(self, x: npt.NDArray[Any]) -> None:
        self.first.update(x)
        self.second.update(x)


def observe(graph: Graph, wanted: Sequence[str], data: Dataset, how: Calibration, options: SessionOptions,
            progress: Progress | None = None, spec: TensorSpec | None = None,
            beside: Mapping[str, Statistic] | None = None) -> dict[str, tuple[float, float]]:
    """Tensor name -> (min, max) over the data, always with 0 inside; infinities don't count.

    The graph runs fully optimized with the wanted tensors as extra outputs; each batch is folded into the running
    ranges and dropped, so memory is that of one batch. `progress` gets the rows done so far. `spec` is how the tensors
    will be quantized (None: uint8, asymmetric); the ranges entropy and mse are searched for it. `beside` are other
    statistics, of these or other tensors, folded in the same run.
    Raises DataError when the data are empty, or when a tensor holds NaN, naming it (or the input, when that already
    holds NaN) and the row, or the rows of the batch for a tensor without a row axis.
    """
    settings = _settings(how, spec)
    running = {name: ranges.make(how.ranges, **settings) for name in wanted}
    extra = {name: _Both(running[name], found) if name in running else found for name, found in (beside or {}).items()}
    fold(graph, {**running, **extra}, data, how, options, progress)
    return {name: found.result() for name, found in running.items()}


def fold(graph: Graph, running: Mapping[str, Statistic], data: Dataset, how: Calibration, options: SessionOptions,
         progress: Progress | None = None) -> None:
    """Fold named tensors of a graph into running statistics, batch by batch; each batch is dropped behind it.

    Raises DataError as `observe` does.
    """
    inputs = {t.name for t in graph.inputs}
    computed = [name for name in running if name not in inputs]
    rows = 0
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        path = Path(folder) / "calibrate.onnx"
        save(graph, path, extra_outputs=computed)
        session = Session(path, options)
        for batch in data.batches(how.batch, how.samples):
            found = {**batch.feed, **session.run(batch.feed, computed)}
            for name, statistic in running.items():  # in order: NaN is blamed on the first tensor that holds it
                _fold(statistic, found[name], name, batch)
            rows += batch.rows
            if progress is not None:
                progress(rows)
    if rows == 0:
        raise DataError(f"{data.name} gave no rows to calibrate on; check that it isn't empty")


def compare(graphs: Sequence[Graph], pairs: Mapping[Key, tuple[str, int, str]], data: Dataset, how: Calibration,
            options: SessionOptions, progress: Progress | None = None,
            beside: Mapping[str, Sequence[Statistic]] | None = None) -> dict[Key, Comparison]:
    """Key -> a computed tensor against its reference, over the data; both are dropped behind each batch.

    `pairs` maps a key to (a tensor of the first graph, the reference; the index of a graph; a tensor of that one).
    `beside` are statistics of tensors of the first graph, folded in the same run. Raises DataError as `observe` does.
    """
    inputs = {t.name for t in graphs[0].inputs}
    wanted = [dict.fromkeys(there for _, k, there in pairs.values() if k == index) for index in range(len(graphs))]
    references = (*(reference for reference, _, _ in pairs.values()), *(beside or {}))
    wanted[0] |= dict.fromkeys(name for name in references if name not in inputs)
    found = {key: Comparison() for key in pairs}
    rows = 0
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        sessions = []
        for index, graph in enumerate(graphs):
            path = Path(folder) / f"{index}.onnx"
            save(graph, path, extra_outputs=list(wanted[index]))
            sessions.append(Session(path, options))
        for batch in data.batches(how.batch, how.samples):
            made = [session.run(batch.feed, list(names)) for session, names in zip(sessions, wanted, strict=True)]
            made[0] = {**batch.feed, **made[0]}
            for name, statistics in (beside or {}).items():
                for statistic in statistics:
                    _fold(statistic, made[0][name], name, batch)
            for key, (reference, index, name) in pairs.items():
                found[key].update(made[0][reference], made[index][name])
            rows += batch.rows
            if progress is not None:
                progress(rows)
    if rows == 0:
        raise DataError(f"{data.name} gave no rows to compare on; check that it isn't empty")
    return found


def _settings(how: Calibration, spec: TensorSpec | None) -> dict[str, Any]:
    if how.ranges == "percentile":
        return {"percent": how.percentile}
    if how.ranges in ("entropy", "mse") and spec is not None:
        return {"dtype": by_name(spec.dtype), "symmetric": spec.symmetric}
    return {}


def _fold(running: Statistic, values: npt.NDArray[Any], name: str, batch: Batch) -> None:
    try:
        running.update(values)
    except ValueError:
        given = next((k for k, v in batch.feed.items() if v.dtype.kind == "f" and np.isnan(v).any()), None)
        where = _where(values if given is None else batch.feed[given], batch)
        if given is not None:
            raise DataError(f"input {given!r} holds NaN in {where} of the calibration data; repair or leave out that "
                            "row") from None
        raise DataError(f"tensor {name!r} holds NaN for {where} of the calibration data, whose inputs hold none; the "
                        "float model itself makes it, so look at that row or leave it out") from None


def _where(values: npt.NDArray[Any], batch: Batch) -> str:
    """The first row with NaN, counted over all the data; the rows of the batch where axis 0 is none."""
    if values.ndim and len(values) == batch.rows:
        bad = np.isnan(values).reshape(batch.rows, -1).any(axis=1)
        return f"row {batch.first_row + int(np.argmax(bad))}"
    if batch.rows == 1:
        return f"row {batch.first_row}"
    return f"rows {batch.first_row} to {batch.first_row + batch.rows - 1}"


def check(how: Calibration) -> None:
    """Refuse calibration settings that no observer has. Raises UsageError."""
    if how.ranges not in ranges.OPTIONS:
        raise UsageError(f"ranges {how.ranges!r} are not known; use one of {', '.join(ranges.OPTIONS)}")
    if not 50 < how.percentile <= 100:
        raise UsageError(f"percentile {how.percentile} makes no range; use a number above 50 and up to 100")
