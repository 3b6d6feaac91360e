"""Calibration as a service: named tensors of any graph, observed in one streamed run of onnxruntime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from onnxq.calibration.dataset import Batch, Dataset
from onnxq.errors import DataError, UsageError
from onnxq.graph import Graph, save
from onnxq.numerics import ranges
from onnxq.numerics.comparison import Comparison
from onnxq.numerics.dtypes import by_name
from onnxq.numerics.padding import real_positions, without_padding
from onnxq.recipe import Calibration
from onnxq.runtime.session import Session, SessionOptions
from onnxq.schemes import TensorSpec

Progress = Callable[[int], None]
Tensors: TypeAlias = dict[str, npt.NDArray[Any]]
Key = TypeVar("Key")

AUTO = "auto"  # of the ranges: chosen by errors; on its own, a tensor has the one between its extremes


class Statistic(Protocol):
    """What a tensor's values are folded into; ValueError for values that it can't take."""

    def update(self, x: npt.NDArray[Any]) -> None:
        """Fold in one batch."""


class Paired(Protocol):
    """What a tensor and its reference are folded into."""

    def update(self, reference: npt.NDArray[Any], result: npt.NDArray[Any]) -> None:
        """Fold in one batch of both."""


class Halves(Protocol):
    """Two statistics of the same tensor that see every other row of the data each: one to search on, one to judge by
    what it has not seen."""

    @property
    def halves(self) -> tuple[Statistic, Statistic]:
        """For the even and for the odd rows."""


def make(wanted: Sequence[str], how: Calibration, spec: TensorSpec | None) -> dict[str, ranges.Range]:
    """Tensor name -> a new range as the calibration wants it, always with 0 inside; infinities don't count.

    `spec` is how the tensors will be quantized (None: uint8, asymmetric); entropy and mse are searched for it.
    """
    method = "minmax" if how.ranges == AUTO else how.ranges
    return {name: ranges.make(method, **_settings(how, spec)) for name in wanted}


def fold(graph: Graph, running: Mapping[str, Statistic | Halves], data: Dataset, how: Calibration,
         options: SessionOptions, progress: Progress | None = None,
         beside: Sequence[Mapping[str, Statistic | Halves]] = (), twin: Graph | None = None) -> None:
    """Fold named tensors of a graph into running statistics, and into those `beside`, batch by batch.

    With a `twin`, another form of the graph, a tensor [.., K] comes as [.., 2 K]: as the twin makes it, and then as the
    graph does.

    The graph runs fully optimized with the tensors as extra outputs; each batch is dropped behind it, so memory is that
    of one. `progress` gets the rows done so far. Positions that a fed attention_mask hides are left out of tensors
    [B, S, K].
    Raises DataError when the data are empty, or when a tensor holds NaN, naming it (or the input, when that already
    holds NaN) and the row, or the rows of the batch for a tensor without a row axis.
    """
    everything = [running, *beside]
    wanted = [name for some in everything for name in some]
    graphs = [graph] if twin is None else [twin, graph]
    for batch, made in _runs(graphs, [wanted] * len(graphs), data, how, options, progress, "calibrate"):
        found = made[0] if twin is None else {name: np.concatenate([m[name] for m in made], -1) for name in wanted}
        for some in everything:  # in order: NaN is blamed on the first tensor that holds it
            for name, statistic in some.items():
                for part, values, real in _parts(statistic, found[name], batch):
                    _fold(part, without_padding(values, real), name, batch)


def compare(graphs: Sequence[Graph], pairs: Mapping[Key, tuple[str, int, str]], data: Dataset, how: Calibration,
            options: SessionOptions, progress: Progress | None = None,
            beside: Mapping[str, Sequence[Statistic]] | None = None) -> dict[Key, Comparison]:
    """Key -> a computed tensor against its reference, over the data; both are dropped behind each batch.

    `pairs` maps a key to (a tensor of the first graph, the reference; the index of a graph; a tensor of that one).
    `beside` are statistics of tensors of the first graph, folded in the same run. Positions that a fed
    attention_mask hides are left out of tensors [B, S, K]. Raises DataError as `fold` does.
    """
    found = {key: Comparison() for key in pairs}
    fold_pairs(graphs, pairs, found, data, how, options, progress, beside)
    return found


def fold_pairs(graphs: Sequence[Graph], pairs: Mapping[Key, tuple[str, int, str]], running: Mapping[Key, Paired],
               data: Dataset, how: Calibration, options: SessionOptions, progress: Progress | None = None,
               beside: Mapping[str, Sequence[Statistic]] | None = None) -> None:
    """Fold a computed tensor and its reference into what `running` has of the same key; all else as for `compare`."""
    wanted = [[there for _, k, there in pairs.values() if k == index] for index in range(len(graphs))]
    wanted[0] += [*(reference for reference, _, _ in pairs.values()), *(beside or {})]
    for batch, made in _runs(graphs, wanted, data, how, options, progress, "compare"):
        real = real_positions(batch.feed)
        for name, statistics in (beside or {}).items():
            for statistic in statistics:
                _fold(statistic, without_padding(made[0][name], real), name, batch)
        for key, (reference, index, name) in pairs.items():
            running[key].update(without_padding(made[0][reference], real), without_padding(made[index][name], real))


def trials(graph: Graph, feeds: Mapping[Key, Mapping[str, npt.NDArray[Any]]], plain: Mapping[str, npt.NDArray[Any]],
           outputs: Sequence[str], data: Dataset, how: Calibration, options: SessionOptions, first_row: int = 0,
           ) -> dict[Key, dict[str, Comparison]]:
    """Key -> the graph's outputs with its feed beside the data's, against those with the `plain` one, over the data
    from about `first_row` on (whole batches).

    Both feed inputs that the data don't have. Positions that a fed attention_mask hides are left out of tensors
    [B, S, K]. Without any rows nothing is folded in.
    """
    found: dict[Key, dict[str, Comparison]] = {key: {name: Comparison() for name in outputs} for key in feeds}
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        path = Path(folder) / "trials.onnx"
        save(graph, path)
        session = Session(path, _calm(options))
        for batch in data.batches(how.batch, how.samples):
            if batch.first_row < first_row:
                continue
            real = real_positions(batch.feed)
            wanted = session.run({**batch.feed, **plain}, outputs)
            for key, feed in feeds.items():
                made = session.run({**batch.feed, **plain, **feed}, outputs)
                for name in outputs:
                    found[key][name].update(*(without_padding(run[name], real) for run in (wanted, made)))
    return found


def _runs(graphs: Sequence[Graph], wanted: Sequence[Sequence[str]], data: Dataset, how: Calibration,
          options: SessionOptions, progress: Progress | None, use: str) -> Iterator[tuple[Batch, list[Tensors]]]:
    """Each batch with the tensors that are wanted of each graph, inputs among them; one batch is held at a time.

    `use` says what for. Raises DataError when there is no batch.
    """
    rows = 0
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        sessions: list[tuple[Session, list[str]]] = []
        for index, (graph, names) in enumerate(zip(graphs, wanted, strict=True)):
            path, inputs = Path(folder) / f"{index}.onnx", {t.name for t in graph.inputs}
            computed = list(dict.fromkeys(name for name in names if name not in inputs))
            save(graph, path, extra_outputs=computed)
            sessions.append((Session(path, _calm(options)), computed))
        for batch in data.batches(how.batch, how.samples):
            yield batch, [{**batch.feed, **session.run(batch.feed, computed)} for session, computed in sessions]
            rows += batch.rows
            if progress is not None:
                progress(rows)
    if rows == 0:
        raise DataError(f"{data.name} gave no rows to {use} on; check that it isn't empty")


def _calm(options: SessionOptions) -> SessionOptions:
    """Without idle threads that spin: what folds the results computes on several threads, too."""
    return replace(options, config=(*options.config, ("session.intra_op.allow_spinning", "0")))


def _settings(how: Calibration, spec: TensorSpec | None) -> dict[str, Any]:
    if how.ranges == "percentile":
        return {"percent": how.percentile}
    if how.ranges in ("entropy", "mse") and spec is not None:
        return {"dtype": by_name(spec.dtype), "symmetric": spec.symmetric}
    return {}


def _parts(statistic: Statistic | Halves, values: npt.NDArray[Any], batch: Batch,
           ) -> Iterator[tuple[Statistic, npt.NDArray[Any], npt.NDArray[np.bool_] | None]]:
    """(statistic, the values for it, which of their positions are real); rows are those of axis 0."""
    real = real_positions(batch.feed)
    if not hasattr(statistic, "halves"):
        yield statistic, values, real
        return
    for number, half in enumerate(statistic.halves):
        start = (number - batch.first_row) % 2
        yield half, values[start::2], real[start::2] if real is not None and len(real) == len(values) else None


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
    if how.ranges not in (AUTO, *ranges.OPTIONS):
        raise UsageError(f"ranges {how.ranges!r} are not known; use one of {', '.join((AUTO, *ranges.OPTIONS))}")
    if not 50 < how.percentile <= 100:
        raise UsageError(f"percentile {how.percentile} makes no range; use a number above 50 and up to 100")
