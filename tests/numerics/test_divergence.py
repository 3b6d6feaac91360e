"""The divergence of probabilities, against its formula and against what it stands for: the rise of a loss."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import random
from hypothesis import given
from hypothesis import strategies as st

from onnxq.numerics import divergence
from onnxq.numerics.divergence import Divergence
from onnxq.numerics.metrics import Perplexity


def probabilities(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def test_two_classes_by_hand() -> None:
    """Probabilities 3/4 and 1/4 against halves: 3/4 ln(3/2) + 1/4 ln(1/2)."""
    found = Divergence()
    found.update(np.log(np.array([[3.0, 1.0]])), np.zeros((1, 2)))
    assert found.mean == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-12)


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 3))
def test_the_formula(rows: int, size: int, seed: int) -> None:
    a, b = random(2, rows, size, seed=seed), random(2, rows, size, seed=seed + 10)
    found = Divergence()
    for x, y in zip(a, b, strict=True):
        found.update(x, y)
    p, q = probabilities(a), probabilities(b)
    assert found.mean == pytest.approx(float((p * np.log(p / q)).sum(axis=-1).mean()), abs=1e-12)
    assert found.count == 2 * rows


def test_it_is_the_rise_of_the_loss_under_the_references_labels() -> None:
    """Each class as often as the reference says: cross-entropies then differ by the divergence."""
    a, b = np.log(np.array([[4.0, 3.0, 1.0]])), random(1, 3)
    labels = np.array([0] * 4 + [1] * 3 + [2])
    losses = []
    for scores in (a, b):
        metric = Perplexity()
        metric.update({"logits": np.repeat(scores, 8, axis=0)}, labels, {})
        losses.append(np.log(metric.result()))
    found = Divergence()
    found.update(a, b)
    assert found.mean == pytest.approx(losses[1] - losses[0], rel=1e-9)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random(3, 4, 7), random(3, 4, 7, seed=1)
    whole, parts = Divergence(), Divergence()
    whole.update(a, b)
    monkeypatch.setattr(divergence, "CHUNK", 14)
    parts.update(a, b)
    assert parts.mean == pytest.approx(whole.mean, rel=1e-12)


def test_a_class_that_cannot_be() -> None:
    found = Divergence()
    found.update(np.array([[0.0, -np.inf]]), np.array([[1.0, 1.0]]))
    assert found.mean == pytest.approx(np.log(2.0))
    found.update(np.array([[0.0, 0.0]]), np.array([[0.0, -np.inf]]))
    assert found.mean == np.inf


def test_no_figure() -> None:
    assert Divergence().mean == 0.0
    for a, b in ((np.zeros((2, 3)), np.zeros((2, 4))), (np.zeros((1, 2)), np.full((1, 2), np.nan))):
        found = Divergence()
        found.update(a, b)
        assert found.mean == np.inf
