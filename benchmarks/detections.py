"""Faces found by two models: how many of them are the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.models import Array

_LEAST_SCORE = 0.7
_MOST_OVERLAP = 0.3  # of two faces that one model reports
_SAME_FACE = 0.5


def faces(scores: Array, boxes: Array) -> Array:
    """Boxes [F, 4] with a face score above 0.7, the best of each heap that overlaps by IoU 0.3 or more.

    Scores [A, 2] of background and face, boxes [A, 4] as corners x1 y1 x2 y2. Greedy non-maximum suppression.
    """
    likely = scores[:, 1] > _LEAST_SCORE
    left = boxes[likely][np.argsort(-scores[likely, 1], kind="stable")]
    kept = []
    while len(left):
        kept.append(left[0])
        left = left[1:][overlap(left[:1], left[1:])[0] < _MOST_OVERLAP]
    return np.array(kept, np.float64).reshape(-1, 4)


def overlap(a: Array, b: Array) -> Array:
    """Intersection over union of boxes [M, 4] and [N, 4], as [M, N]."""
    corner = np.maximum(a[:, None, :2], b[None, :, :2])
    opposite = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(opposite - corner, 0.0, None).prod(axis=-1)
    union = _area(a)[:, None] + _area(b)[None, :] - shared
    return np.asarray(shared / np.maximum(union, 1e-12))


def matches(reference: Array, found: Array) -> int:
    """Pairs of boxes of IoU 0.5 or more, chosen greedily by overlap, each box in one pair at most."""
    if not len(reference) or not len(found):
        return 0
    table = overlap(reference, found)
    pairs = 0
    while table.max() >= _SAME_FACE:
        row, column = np.unravel_index(np.argmax(table), table.shape)
        table[row, :] = table[:, column] = -1.0
        pairs += 1
    return pairs


@dataclass
class FaceF1:
    """F1 = 2 pairs / (faces of one model + faces of the other), over all images; 1 where neither finds any."""

    _pairs: int = 0
    _faces: int = 0

    def update(self, reference: dict[str, Array], outputs: dict[str, Array]) -> None:
        """Fold in `scores` [N, A, 2] and `boxes` [N, A, 4] of both models."""
        for row in range(len(reference["scores"])):
            wanted = faces(reference["scores"][row], reference["boxes"][row])
            found = faces(outputs["scores"][row], outputs["boxes"][row])
            self._pairs += matches(wanted, found)
            self._faces += len(wanted) + len(found)

    def result(self) -> float:
        """F1, from 0 to 1."""
        return 2 * self._pairs / self._faces if self._faces else 1.0


def _area(boxes: Array) -> Array:
    return np.asarray((boxes[:, 2:] - boxes[:, :2]).prod(axis=-1))
