"""How good a model is on its evaluation data: the task's metric, and how far its outputs are from the float model's.

Both models run batch by batch in one process and nothing but sums is kept. Recurrent models run closed loop, each on
its own states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from benchmarks.detections import FaceF1
from benchmarks.models import LABELS, Array, Case, read
from onnxq.numerics.metrics import Comparison, Perplexity, Psnr, Spearman, TopK, drop

BATCH = 32  # rows at once where the batch is dynamic
_MASK = "attention_mask"


class Runnable(Protocol):
    """A model that can be run, see onnxq.runtime.session.Session."""

    def run(self, feed: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]: ...


class Metric(Protocol):
    """A task metric, fed batch by batch (see onnxq.numerics.metrics)."""

    def update(self, outputs: dict[str, Array], labels: Array | None, inputs: dict[str, Array]) -> None: ...
    def result(self) -> float: ...


class Agreement(Protocol):
    """A comparison with the float model's outputs, fed batch by batch; 1 is full agreement."""

    def update(self, reference: dict[str, Array], outputs: dict[str, Array]) -> None: ...
    def result(self) -> float: ...


@dataclass
class FrameAccuracy:
    """Share of frames whose probability is above 0.5 exactly where the label is 1; a negative label is left out."""

    output: str
    _right: int = 0
    _frames: int = 0

    def update(self, outputs: dict[str, Array], labels: Array | None, inputs: dict[str, Array]) -> None:
        """Fold in output [N, 1], labels [N]."""
        assert labels is not None
        known = labels >= 0
        said = outputs[self.output].reshape(labels.shape) > 0.5
        self._right += int(np.count_nonzero((said == (labels == 1)) & known))
        self._frames += int(np.count_nonzero(known))

    def result(self) -> float:
        """The share, from 0 to 1."""
        return self._right / self._frames


@dataclass
class CroppedPsnr:
    """PSNR in dB without `border` pixels on each side of output and label [N, C, H, W]."""

    output: str
    border: int
    _psnr: Psnr = field(default_factory=Psnr)

    def update(self, outputs: dict[str, Array], labels: Array | None, inputs: dict[str, Array]) -> None:
        """Fold in a batch."""
        assert labels is not None
        self._psnr.update({self.output: self._crop(outputs[self.output])}, self._crop(labels), inputs)

    def result(self) -> float:
        """Mean over images in dB."""
        return self._psnr.result()

    def _crop(self, images: Array) -> Array:
        height, width = images.shape[-2:]
        return images[..., self.border:height - self.border, self.border:width - self.border]


@dataclass
class SameTop1:
    """Share of rows in which two models choose the same class."""

    output: str
    _same: int = 0
    _rows: int = 0

    def update(self, reference: dict[str, Array], outputs: dict[str, Array]) -> None:
        """Fold in scores [N, C], or [N, C, 1, 1], of both."""
        first, second = (found[self.output].reshape(len(found[self.output]), -1) for found in (reference, outputs))
        same = first.argmax(axis=1) == second.argmax(axis=1)
        self._same += int(np.count_nonzero(same))
        self._rows += same.size

    def result(self) -> float:
        """The share, from 0 to 1."""
        return self._same / self._rows


@dataclass
class PooledCosine:
    """Cosine between two models' sentence embeddings: outputs [N, S, D] averaged where the mask [N, S] is not 0."""

    output: str
    values: list[float] = field(default_factory=list)

    def update(self, reference: dict[str, Array], outputs: dict[str, Array], mask: Array) -> None:
        """Fold in a batch."""
        a, b = self._pool(reference[self.output], mask), self._pool(outputs[self.output], mask)
        cosines = (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
        self.values += [float(c) for c in cosines]

    @staticmethod
    def _pool(tokens: Array, mask: Array) -> Array:
        weights = (mask != 0).astype(np.float64)
        pooled = np.einsum("nsd,ns->nd", tokens.astype(np.float64), weights)
        return np.asarray(pooled / weights.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Step:
    """What is fed at once: without states, and whether a sequence begins here (states as stored then)."""

    feed: dict[str, Array]
    labels: Array | None
    states: dict[str, Array] | None = None


class Data:
    """A case's evaluation data, all of it or its first `limit` rows (of pairs: the first limit / 2 pairs)."""

    def __init__(self, case: Case, limit: int | None = None) -> None:
        self.case = case
        self.arrays = read(case.evaluation)
        self.labels = self.arrays.pop(LABELS, None)
        self.sequences = case.sequences
        self.rows = len(self.arrays[next(iter(case.stored))])
        if limit is not None and limit < self.rows:
            self._cut(limit)

    def _cut(self, limit: int) -> None:
        if self.case.recurrent:
            self.sequences = tuple((a, min(b, limit)) for a, b in self.sequences if a < limit)
        pairs = self.labels is not None and 2 * len(self.labels) == self.rows
        half = self.rows // 2
        kept = np.r_[0:limit // 2, half:half + limit // 2] if pairs else np.arange(limit)
        self.arrays = {name: array[kept] for name, array in self.arrays.items()}
        if self.labels is not None:
            self.labels = self.labels[: limit // 2 if pairs else limit]
        self.rows = len(kept)

    def first(self, batch: int) -> dict[str, Array]:
        """The first `batch` rows, or as many as the model fixes; for timing."""
        return self.case.feed(self.arrays, 0, self.case.batch(batch))

    def steps(self) -> Iterator[Step]:
        """All rows, in order."""
        return self._closed_loop() if self.case.recurrent else self._batches()

    def _batches(self) -> Iterator[Step]:
        size = self.case.batch(BATCH)
        for start in range(0, self.rows, size):
            stop = min(start + size, self.rows)
            per_row = self.labels is not None and len(self.labels) == self.rows
            labels = self.labels[start:stop] if per_row and self.labels is not None else self.labels
            yield Step(self.case.feed(self.arrays, start, stop), labels)

    def _closed_loop(self) -> Iterator[Step]:
        states = list(self.case.recurrent)
        plain = [name for name in self.case.stored if name not in states]
        for first, last in self.sequences:
            for row in range(first, last):
                labels = None if self.labels is None else self.labels[row:row + 1]
                begin = self.case.feed(self.arrays, row, row + 1, states) if row == first else None
                yield Step(self.case.feed(self.arrays, row, row + 1, plain), labels, begin)


class _Loop:
    """A model that is fed its own states."""

    def __init__(self, session: Runnable, case: Case) -> None:
        self.session, self.case = session, case
        self.wanted = list(dict.fromkeys([*case.scored, *case.recurrent.values()]))
        self.states: dict[str, Array] = {}

    def run(self, step: Step) -> dict[str, Array]:
        if step.states is not None:
            self.states = step.states
        found = self.session.run({**step.feed, **self.states}, self.wanted)
        self.states = {name: found[output] for name, output in self.case.recurrent.items()}
        return {name: np.atleast_1d(found[name]) for name in self.case.scored}


def score(case: Case, data: Data, reference: Runnable, model: Runnable | None = None) -> dict[str, Any]:
    """Figures of a model beside the float `reference`, or of the latter alone.

    Keys: `float` and `value` (the metric of each), `drop` (positive when worse), `ratio` (value / float), `rows`; with
    a model also `cosine` (mean over scored outputs), `sqnr_db` (the worst output; None when all are identical) and, of
    sentence embeddings, `pooled_cosine` and `pooled_cosine_min` (mean and least over the rows), where classes are told
    apart, `agreement` (the share of rows in which both choose the same).
    """
    if case.metric == "agreement":
        return _agreement_score(case, data, reference, model)
    before, after = _metric(case), _metric(case)
    distance = _Distance(case)
    a, b = _Loop(reference, case), _Loop(model, case) if model is not None else None
    for step in data.steps():
        wanted = a.run(step)
        before.update(wanted, step.labels, step.feed)
        if b is not None:
            found = b.run(step)
            after.update(found, step.labels, step.feed)
            distance.update(wanted, found, step.feed)
    value = before.result()
    result = _figures(case, value, after.result() if b is not None else value, data.rows)
    return result | (distance.figures() if b is not None else {})


def _agreement_score(case: Case, data: Data, reference: Runnable, model: Runnable | None) -> dict[str, Any]:
    """As `score`, where there are no labels: 1 for the float model itself."""
    agreement = _agreement(case)
    if model is None:
        return _figures(case, 1.0, 1.0, data.rows)
    distance = _Distance(case)
    a, b = _Loop(reference, case), _Loop(model, case)
    for step in data.steps():
        wanted, found = a.run(step), b.run(step)
        agreement.update(wanted, found)
        distance.update(wanted, found, step.feed)
    return _figures(case, 1.0, agreement.result(), data.rows) | distance.figures()


def _figures(case: Case, before: float, after: float, rows: int) -> dict[str, Any]:
    return {"float": before, "value": after, "drop": drop(case.higher_is_better, before, after),
            "ratio": after / before, "rows": rows}


class _Distance:
    """How far the scored outputs are from the float model's."""

    def __init__(self, case: Case) -> None:
        self.folds = {name: Comparison() for name in case.scored}
        embeds = case.metric == "spearman" and _MASK in case.stored
        self.pooled = PooledCosine(case.scored[0]) if embeds else None
        self.same = SameTop1(case.scored[0]) if case.metric == "top1" else None

    def update(self, reference: dict[str, Array], outputs: dict[str, Array], inputs: Mapping[str, Array]) -> None:
        for name, fold in self.folds.items():
            fold.update(reference[name], outputs[name])
        if self.pooled is not None:
            self.pooled.update(reference, outputs, inputs[_MASK])
        if self.same is not None:
            self.same.update(reference, outputs)

    def figures(self) -> dict[str, Any]:
        noises = [f.sqnr_db for f in self.folds.values() if f.sqnr_db is not None]
        found: dict[str, Any] = {"cosine": math.fsum(f.cosine for f in self.folds.values()) / len(self.folds),
                                 "sqnr_db": min(noises, default=None)}
        if self.pooled is not None:
            found |= {"pooled_cosine": float(np.mean(self.pooled.values)), "pooled_cosine_min": min(self.pooled.values)}
        if self.same is not None:
            found["agreement"] = self.same.result()
        return found


def _metric(case: Case) -> Metric:
    output = case.scored[0]
    known: dict[str, Metric] = {
        "top1": TopK(1, output), "perplexity": Perplexity(output), "spearman": Spearman(output),
        "psnr": CroppedPsnr(output, case.border), "frame_accuracy": FrameAccuracy(output)}
    if case.metric not in known:
        raise ValueError(f"{case.name} is scored by {case.metric!r}, which is none of {', '.join(known)}")
    return known[case.metric]


def _agreement(case: Case) -> Agreement:
    known: dict[str, Agreement] = {"top1": SameTop1(case.scored[0]), "detections:ultraface": FaceF1()}
    if case.agreement not in known:
        raise ValueError(f"{case.name} compares {case.agreement!r}, which is none of {', '.join(known)}")
    return known[case.agreement]
