"""Two models on the same data: how far their outputs are apart, and a task metric of each, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnxq.errors import DataError
from onnxq.numerics.comparison import Comparison
from onnxq.numerics.metrics import Metric
from onnxq.numerics.padding import real_positions, without_padding
from onnxq.runtime.session import Session

Array = npt.NDArray[Any]


class Batch(Protocol):
    """One feed with its labels (see calibration.readers.Batch)."""

    @property
    def feed(self) -> dict[str, Array]: ...
    @property
    def labels(self) -> Array | None: ...
    @property
    def rows(self) -> int: ...


@dataclass
class Evaluation:
    """Per output a Comparison; `cosines` the cosine of each row's (pooled) first output; the metric of each model."""

    outputs: dict[str, Comparison]
    rows: int = 0
    cosines: list[float] = field(default_factory=list)
    float_metric: float | None = None
    compiled_metric: float | None = None

    @property
    def mean_cosine(self) -> float:
        """Mean over rows of the cosine between the two models' first outputs."""
        return float(np.mean(self.cosines)) if self.cosines else 1.0


def evaluate(reference: Session, compiled: Session, batches: Iterable[Batch],
             metrics: tuple[Metric, Metric] | None = None, labels: Array | None = None,
             progress: Callable[[int], None] | None = None) -> Evaluation:
    """Run both models over the batches and fold what they give; memory is that of one batch.

    Of outputs [B, S, K], positions that a fed attention_mask hides are not compared.
    `metrics` are two fresh instances, one per model. Labels come with a batch, or for metrics with one label per two
    rows from `labels`, the whole array. Raises DataError when the batches are empty or labels are missing.
    """
    floats = [p.name for p in reference.outputs if p.dtype is not None and np.issubdtype(p.dtype, np.floating)]
    found = Evaluation({name: Comparison() for name in floats})
    for batch in batches:
        a, b, real = reference.run(batch.feed), compiled.run(batch.feed), real_positions(batch.feed)
        for name, comparison in found.outputs.items():
            comparison.update(without_padding(a[name], real), without_padding(b[name], real))
        if floats:
            found.cosines += row_cosines(a[floats[0]], b[floats[0]], batch.feed.get("attention_mask"))
        if metrics is not None:
            given = batch.labels if metrics[0].rows_per_label == 1 else labels
            metrics[0].update(a, given, batch.feed)
            metrics[1].update(b, given, batch.feed)
        found.rows += batch.rows
        if progress is not None:
            progress(found.rows)
    if found.rows == 0:
        raise DataError("the data hold no rows to compare on; check that they aren't empty")
    if metrics is not None:
        found.float_metric, found.compiled_metric = metrics[0].result(), metrics[1].result()
    return found


def least_sqnr(a: Session, b: Session, feeds: Iterable[Mapping[str, Array]]) -> float | None:
    """Least SQNR in dB over float outputs for all feeds, None when all are identical."""
    folds = {p.name: Comparison() for p in a.outputs if p.dtype is not None and np.issubdtype(p.dtype, np.floating)}
    for feed in feeds:
        x, y = a.run(feed), b.run(feed)
        for name, fold in folds.items():
            fold.update(x[name], y[name])
    return min((f.sqnr_db for f in folds.values() if f.sqnr_db is not None), default=None)


def row_cosines(a: Array, b: Array, mask: Array | None) -> list[float]:
    """Cosine between rows of two outputs [N, ...]; [N, S, D] with a mask [N, S] is averaged over it first (embeddings).

    Rows of zeros in both count as equal. float64.
    """
    if a.shape != b.shape:
        return [0.0]
    if a.ndim == 0:
        a, b = a.reshape(1), b.reshape(1)
    if a.ndim == 3 and mask is not None and mask.shape == a.shape[:2]:
        weight = (mask != 0)[..., None]
        a, b = (np.asarray(np.sum(v, axis=1, where=weight, dtype=np.float64)) for v in (a, b))
    found = []
    for x, y in zip(a, b, strict=True):
        u, v = x.reshape(-1).astype(np.float64), y.reshape(-1).astype(np.float64)
        norm = float(np.sqrt((u @ u) * (v @ v)))
        found.append(float(u @ v) / norm if norm > 0 else float(np.array_equal(u, v)))
    return found


@dataclass
class FunctionMetric:
    """A user's f(outputs, labels, inputs) -> float over all rows; it needs everything at once, so outputs are kept."""

    function: Callable[[dict[str, Array], Array | None, dict[str, Array]], float]
    name: str
    higher_is_better: bool
    rows_per_label: int = 1
    _outputs: list[dict[str, Array]] = field(default_factory=list)
    _inputs: list[dict[str, Array]] = field(default_factory=list)
    _labels: list[Array] = field(default_factory=list)

    def update(self, outputs: dict[str, Array], labels: Array | None, inputs: dict[str, Array]) -> None:
        """Keep a batch."""
        self._outputs.append(outputs)
        self._inputs.append(inputs)
        if labels is not None:
            self._labels.append(labels)

    def result(self) -> float:
        """The function's value. Raises DataError when it fails or gives no number."""
        if not self._outputs:
            raise DataError(f"metric {self.name} has nothing to score; give evaluation data with at least one row")
        labels = np.concatenate(self._labels) if self._labels else None
        try:
            return float(self.function(_joined(self._outputs), labels, _joined(self._inputs)))
        except Exception as e:
            raise DataError(f"metric {self.name} failed ({type(e).__name__}: {e}); it gets (outputs, labels, inputs) "
                            "as dictionaries of arrays and returns a number") from e


def _joined(parts: Sequence[dict[str, Array]]) -> dict[str, Array]:
    return {k: np.concatenate([np.atleast_1d(p[k]) for p in parts]) for k in parts[0]}
