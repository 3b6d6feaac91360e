"""How well a model does: streaming task metrics, tensor comparisons and accuracy budgets, in constant memory.

Every metric is fed batch by batch with `update(outputs, labels, inputs)`: the outputs and inputs of some rows by name,
rows along the first axis, and the labels of the same rows. Only `spearman` differs: a label belongs to two rows
(`rows_per_label` is 2), which may come in different batches, so every call gets the array of all labels. A caller
checks len(labels) * rows_per_label == rows before it begins. A metric whose outputs hold NaN is NaN, but for the
classifications, where such a row is wrong; drop() takes NaN for an infinite drop.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnxq.errors import DataError, UsageError
from onnxq.numerics.budget import DIGITS, Budget, parse_drop
from onnxq.numerics.comparison import Comparison

__all__ = [
    "Budget",
    "Comparison",
    "MacroF1",
    "Metric",
    "Perplexity",
    "Psnr",
    "Spearman",
    "TopK",
    "drop",
    "make_metric",
    "parse_drop",
]

Array = npt.NDArray[Any]

# Logits worked on in float64 at a time (8 MB an array).
CHUNK = 1 << 20

# A mean squared error below this counts as this, so that equal images have a finite PSNR (100 dB).
SMALLEST_MSE = 1e-10

# The predicted class of a row whose output holds NaN: no label ever equals it.
NO_CLASS = int(np.iinfo(np.int64).min)

NAMES = ("top1", "topk", "f1", "psnr", "spearman", "perplexity")


class Metric(Protocol):
    """What evaluation asks of a task metric; see the head of this module for `update`."""

    @property
    def name(self) -> str:
        """The name that make_metric() knows it by."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger result is the better one."""

    @property
    def rows_per_label(self) -> int:
        """Rows of outputs that belong to one label."""

    def update(self, outputs: dict[str, Array], labels: Array | None, inputs: dict[str, Array]) -> None:
        """Fold in some rows; DataError when the labels are missing or don't fit the output."""

    def result(self) -> float:
        """The metric over all rows so far; DataError when there are none."""


@dataclass
class TopK:
    """Share of rows whose label is among the k classes with the highest scores.

    Output [.., C] holds scores, labels [..] class ids from 0 to C - 1. Of equal scores the lower class id ranks first,
    as in numpy's argmax. For k = 1 an output of integers or of rank 1 holds the class ids themselves. A row with NaN is
    wrong.
    """

    k: int = 1
    output: str | None = None
    higher_is_better: bool = True
    rows_per_label: int = 1
    _hits: int = 0
    _rows: int = 0

    @property
    def name(self) -> str:
        """ "top1", "top5" .."""
        return f"top{self.k}"

    def update(self, outputs: dict[str, Array], labels: Array | None, inputs: dict[str, Array]) -> None:
        """Fold in a batch: output [.., C], labels [..]."""
        scores = _scored(outputs, self.output)
        if self.k == 1:
            predicted = _classes(scores)
            hits = predicted == _class_labels(self.name, labels, predicted.shape, _class_count(scores))
        elif _holds_classes(scores):
            raise UsageError(f"{self.name} needs scores but the output holds class ids; use top1")
        else:
            wanted = _class_labels(self.name, labels, scores.shape[:-1], scores.shape[-1])[..., np.newaxis]
            own = np.take_along_axis(scores, wanted, axis=-1)
            earlier = np.arange(scores.shape[-1]) < wanted
            rank = ((scores > own) | ((scores == own) & earlier)).sum(axis=-1)
            hits = (rank < self.k) & ~np.isnan(scores).any(axis=-1)
        self._hits += int(np.count_nonzero(hits))
        self._rows += hits.size

    def result(self) -> float:
        """The share, from 0 to 1."""
        return self._hits / _some(self.name, self._rows)


@dataclass
class MacroF1:
    """Mean over classes of F1 = 2 TP / (predicted + actual), over the classes that occur in labels or predictions.

    Outputs and labels as for top1. A row with NaN counts as a prediction of a class of its own.
    """

    output: str | None = None
    name: str = "f1"
    higher_is_better: bool = True
    rows_per_label: int = 1
    _true: Counter[int] = field(default_factory=Counter)
    _occurrences: Counter[int] = field(default_factory=Counter)  # in labels and in predictions together

    def update(self, outputs: dict[str, Array], labels: Array | None, inputs: dict[str, Array]) -> None:
        """Fold in a batch: output [.., C], labels [..]."""
        scores = _scored(outputs, self.output)
        predicted = _classes(scores)
        actual = _class_labels(self.name, labels, predicted.shape, _class_count(scores))
        self._true.update(predicted[predicted == actual].tolist())
        self._occurrences.update(predicted.ravel().tolist())
        self._occurrences.update(actual.ravel().tolist())

    def result(self) -> float:
        """Macro F1, from 0 to 1."""
        f1 = (2 * self._true[label] / occurrences for label, occurrences in self._occurrences.items())
        return math.fsum(f1) / _some(self.name, len(self._occurrences))


@dataclass
class Psnr:
    """Mean over rows (images) of the PSNR in dB, -10 log10(mean((clip(output, 0, 1) - label)**2)).

    Output [N, ..] with peak 1, labels of the same shape, either uint8 (divided by 255) or floats from 0 to 1. A mean
    squared error below 1e-10 counts as 1e-10 (100 dB).
    """

    output: str | None = None
    name: str = "psnr"
    higher_is_better: bool = True
    rows_per_label: int = 1
    _sum: float = 0.0
    _rows: int = 0

    def update(self, outputs: dict[str, Array], labels: Array | None, inputs: dict[str, Array]) -> None:
        """Fold in a batch: output [N, ..], labels [N, ..]."""
        images = _scored(outputs, self.output)
        truth = _labels(self.name, labels, images.shape)
        scale = 255.0 if truth.dtype == np.uint8 else 1.0
        if scale == 1.0 and (truth.dtype.kind != "f" or not ((truth >= 0.0) & (truth <= 1.0)).all()):
            raise DataError(
                "psnr needs labels from 0 to 1 or as uint8; store them as uint8 or divide them by their peak"
            )
        for image, label in zip(images, truth, strict=True):
            error = np.clip(image, 0.0, 1.0) - label.astype(np.float64) / scale
            mse = float(np.mean(np.square(error)))
            self._sum += math.nan if math.isnan(mse) else -10.0 * math.log10(max(mse, SMALLEST_MSE))
            self._rows += 1

    def result(self) -> float:
        """Mean PSNR in dB; NaN when an output held NaN."""
        return self._sum / _some(self.name, self._rows)


@dataclass
class Perplexity:
    """exp(mean negative log likelihood of the labels under softmax(logits)), over all positions with label >= 0.

    Output [.., V] holds logits (None: the one called so, or the first), labels [..] token ids below V; a negative label
    leaves its position out. Labels are used as they stand: the caller has shifted them. Log-sum-exp in float64, a chunk
    of positions at a time.
    """

    output: str | None = None
    name: str = "perplexity"
    higher_is_better: bool = False
    rows_per_label: int = 1
    _sum: float = 0.0
    _positions: int = 0

    def update(self, outputs: dict[str, Array], labels: Array | None, inputs: dict[str, Array]) -> None:
        """Fold in a batch: output [.., V], labels [..]."""
        logits = _scored(outputs, self.output or ("logits" if "logits" in outputs else None))
        if logits.ndim < 2:
            raise UsageError("perplexity needs logits [.., V]; name the output that holds them")
        size = logits.shape[-1]
        wanted = _class_labels(self.name, labels, logits.shape[:-1], size, negative=True).ravel()
        rows = logits.reshape(-1, size)
        step = max(1, CHUNK // size)
        for start in range(0, wanted.size, step):
            label = wanted[start : start + step]
            kept = np.flatnonzero(label >= 0)
            scores = rows[start : start + step][kept].astype(np.float64)
            with np.errstate(invalid="ignore"):  # a row of -inf has no likelihood: NaN
                scores -= scores.max(axis=1, keepdims=True)
            own = scores[np.arange(kept.size), label[kept]]
            np.exp(scores, out=scores)
            self._sum += float(np.sum(np.log(scores.sum(axis=1)) - own))
            self._positions += kept.size

    def result(self) -> float:
        """Perplexity, at least 1; inf beyond float64, NaN when an output held NaN."""
        with np.errstate(over="ignore"):
            return float(np.exp(self._sum / _some(self.name, self._positions)))


@dataclass
class Spearman:
    """Spearman's rank correlation of the labels with the cosine similarity of sentence pairs.

    Rows i and i + L are the pair that label i grades, L = len(labels) = rows / 2. Output [N, D] holds embeddings; an
    output [N, S, D] is averaged over the positions where inputs["attention_mask"] [N, S] is not 0 (over all positions
    without such an input). Equal values get their average rank. A pair with an embedding of zeros has the similarity 0.
    Only the embeddings are kept. Each update gets all L labels.
    """

    output: str | None = None
    name: str = "spearman"
    higher_is_better: bool = True
    rows_per_label: int = 2
    _labels: npt.NDArray[np.float64] | None = None
    _embeddings: list[npt.NDArray[np.float32]] = field(default_factory=list)
    _rows: int = 0

    def update(self, outputs: dict[str, Array], labels: Array | None, inputs: dict[str, Array]) -> None:
        """Fold in a batch: output [N, D] or [N, S, D], all labels [L]."""
        embeddings = _pooled(_scored(outputs, self.output), inputs.get("attention_mask"))
        grades = _present(self.name, labels).astype(np.float64)
        if self._labels is None:
            self._labels = grades
        self._rows += len(embeddings)
        if grades.ndim != 1 or grades.shape != self._labels.shape or self._rows > 2 * grades.size:
            raise DataError(
                f"spearman has labels {list(grades.shape)} for {self._rows} rows or more; "
                "give the first and then the second sentences of all pairs as rows, and one label for each pair"
            )
        self._embeddings.append(embeddings.astype(np.float32))

    def result(self) -> float:
        """The correlation, from -1 to 1 (0 when all similarities are equal); NaN when an output held NaN."""
        _some(self.name, self._rows)
        assert self._labels is not None
        pairs = self._labels.size
        if self._rows != 2 * pairs:
            raise DataError(f"spearman has {self._rows} rows for {pairs} labels; give twice as many rows as labels")
        if not np.ptp(self._labels) > 0.0:
            raise DataError("spearman needs labels that differ and are not NaN; give a graded similarity for each pair")
        rows = np.concatenate(self._embeddings).astype(np.float64)
        first, second = rows[:pairs], rows[pairs:]
        norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        similarity = (first * second).sum(axis=1) / np.where(norms == 0.0, 1.0, norms)
        if np.isnan(similarity).any():
            return math.nan
        if np.ptp(similarity) == 0.0:
            return 0.0
        return float(np.corrcoef(_average_ranks(self._labels), _average_ranks(similarity))[0, 1])


def make_metric(name: str, output: str | None = None) -> Metric:
    """A new metric: top1, topk (k = 5), topN for any N (top3), f1, psnr, spearman or perplexity.

    `output` names the scored output; None takes the first one. UsageError with the known names for any other `name`.
    """
    if match := re.fullmatch(r"top(k|[1-9][0-9]*)", name):
        return TopK(5 if match[1] == "k" else int(match[1]), output)
    for metric in (MacroF1(output), Psnr(output), Perplexity(output), Spearman(output)):
        if metric.name == name:
            return metric
    near = difflib.get_close_matches(name, NAMES, n=2)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise UsageError(f"unknown metric {name!r}{hint}; use one of {', '.join(NAMES)}, or topN such as top3")


def drop(higher_is_better: Metric | bool, float_value: float, compiled_value: float) -> float:
    """How much worse than the float model the compiled one is, in the metric's unit; negative when it is better.

    The first argument is the metric or its `higher_is_better`. The difference is rounded to 12 decimals, see Budget;
    inf when it is undefined, as with NaN, so that no budget allows it.
    """
    higher = higher_is_better if isinstance(higher_is_better, bool) else higher_is_better.higher_is_better
    worse = float_value - compiled_value if higher else compiled_value - float_value
    return math.inf if math.isnan(worse) else round(worse, DIGITS)


def _scored(outputs: dict[str, Array], output: str | None) -> Array:
    if output is None:
        return np.asarray(next(iter(outputs.values())))
    if output not in outputs:
        raise UsageError(f"the model has no output {output!r} to score; name one of {', '.join(outputs)}")
    return np.asarray(outputs[output])


def _some(name: str, rows: int) -> int:
    if rows == 0:
        raise DataError(f"{name} has nothing to score; give evaluation data with at least one labelled row")
    return rows


def _present(name: str, labels: Array | None) -> Array:
    if labels is None:
        raise DataError(f"{name} needs labels; add an array named labels to the evaluation data")
    return np.asarray(labels)


def _labels(name: str, labels: Array | None, shape: tuple[int, ...]) -> Array:
    """`labels` in the shape `shape`, from which they may differ in dimensions of 1 only."""
    array = _present(name, labels)
    if [size for size in array.shape if size != 1] != [size for size in shape if size != 1]:
        raise DataError(
            f"{name} has labels {list(array.shape)} for an output that needs labels {list(shape)}; "
            "store one label for each scored position, in the order of the rows"
        )
    return array.reshape(shape)


def _class_labels(
    name: str, labels: Array | None, shape: tuple[int, ...], classes: int | None, negative: bool = False
) -> npt.NDArray[np.int64]:
    """Labels as int64 in the shape `shape`: integers below `classes`, and not negative unless `negative`."""
    array = _labels(name, labels, shape)
    if array.dtype.kind not in "iub" and not (np.isfinite(array).all() and (array == np.rint(array)).all()):
        raise DataError(f"{name} needs class ids as labels but they are fractions; store integers")
    ids = array.astype(np.int64)
    if classes is not None and ids.size and (ids.max() >= classes or (ids.min() < 0 and not negative)):
        raise DataError(
            f"{name} has labels from {ids.min()} to {ids.max()} for an output of {classes} classes; "
            f"use class ids from 0 to {classes - 1} or score another output"
        )
    return ids


def _holds_classes(scores: Array) -> bool:
    return scores.ndim < 2 or scores.dtype.kind in "iub"


def _class_count(scores: Array) -> int | None:
    return None if _holds_classes(scores) else scores.shape[-1]


def _classes(scores: Array) -> npt.NDArray[np.int64]:
    """The predicted classes: arg max over the last axis, or the ids that the output holds; NO_CLASS for NaN."""
    if scores.dtype.kind in "iub":
        return scores.astype(np.int64)
    if scores.ndim < 2:
        broken = ~np.isfinite(scores)
        ids = np.where(broken, 0, scores)
        if not (ids == np.rint(ids)).all():
            raise DataError("the scored output holds neither scores per class nor class ids; score another output")
        return np.where(broken, NO_CLASS, ids.astype(np.int64))
    best = scores.argmax(axis=-1)
    top = np.take_along_axis(scores, best[..., np.newaxis], axis=-1)[..., 0]
    return np.where(np.isnan(top), NO_CLASS, best)


def _pooled(output: Array, mask: Array | None) -> Array:
    """Embeddings [N, D] of an output [N, D] or [N, S, D], the mean over the positions of a mask [N, S]."""
    if output.ndim == 2:
        return output
    if output.ndim != 3:
        raise UsageError(f"spearman needs an output [N, D] or [N, S, D], not {list(output.shape)}; name another output")
    kept = np.ones(output.shape[:2], dtype=bool) if mask is None else np.asarray(mask) != 0
    if kept.shape != output.shape[:2]:
        raise DataError(
            f"attention_mask {list(kept.shape)} does not fit an output {list(output.shape)}; give one [N, S] per batch"
        )
    # `where` leaves padding out even where it holds NaN, which a product with 0 would keep.
    total = output.sum(axis=1, where=kept[..., np.newaxis], dtype=np.float64)
    return np.asarray(total / np.maximum(kept.sum(axis=1, keepdims=True), 1))


def _average_ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2.0
    return np.asarray(ranks[inverse.reshape(-1)])
