"""Fills of masks: rows of scores at the ends of the range keep their softmax, and nothing in them is denormal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.numerics import masking
from onnxq.numerics.masking import ERROR, REACH, Fill, Scores

ENDS = st.floats(-40.0, 40.0)
KEYS = st.integers(1, 4096)
ROWS = st.lists(st.tuples(st.floats(0.0, 1.0), st.booleans()), min_size=2, max_size=60)
Array = np.ndarray[Any, np.dtype[np.float64]]
Seen = np.ndarray[Any, np.dtype[np.bool_]]


def softmax(x: Array) -> Array:
    with np.errstate(under="ignore"):
        e = np.exp(x - x.max())
        return np.asarray(e / e.sum())


def scores(a: float, b: float, keys: int) -> Scores:
    return Scores(min(a, b), max(a, b), keys)


def row(found: Scores, parts: list[tuple[float, bool]], grown: float) -> tuple[Array, Seen]:
    """Scores within the range grown, and which of them are seen: the first at least."""
    x = grown * np.array([found.low + part * (found.high - found.low) for part, _ in parts])
    return x, np.array([True, *(seen for _, seen in parts[1:])])


def error(x: Array, seen: Seen, raised: Array) -> float:
    return float(np.abs(softmax(np.where(seen, x, -np.inf)) - softmax(raised)).sum())


@given(ENDS, ENDS, KEYS, ROWS, st.floats(0.0, REACH))
def test_what_is_added_is_exact_for_grown_scores(a: float, b: float, keys: int, parts: list[tuple[float, bool]],
                                                 grown: float) -> None:
    found = scores(a, b, max(keys, len(parts)))
    fill = masking.added(found)
    if fill is not None:
        assert fill.reach >= REACH
        x, seen = row(found, parts, grown)
        assert error(x, seen, np.where(seen, x, x + fill.value)) <= ERROR


@given(ENDS, ENDS, KEYS, ROWS, st.floats(0.0, REACH))
def test_a_floor_is_exact_for_grown_scores(a: float, b: float, keys: int, parts: list[tuple[float, bool]],
                                           grown: float) -> None:
    found = scores(a, b, max(keys, len(parts)))
    fill = masking.floor(found)
    if fill is not None:
        assert fill.reach >= REACH
        x, seen = row(found, parts, grown)
        assert error(x, seen, np.maximum(np.where(seen, x, -np.inf), fill.value)) <= ERROR


@given(ENDS, ENDS, KEYS, ROWS)
def test_no_weight_is_denormal_for_scores_as_calibrated(a: float, b: float, keys: int,
                                                        parts: list[tuple[float, bool]]) -> None:
    found = scores(a, b, max(keys, len(parts)))
    x, seen = row(found, parts, 1.0)
    added, floor = masking.added(found), masking.floor(found)
    if added is not None:
        assert softmax(np.where(seen, x, x + added.value)).min() >= np.finfo(np.float32).tiny
    if floor is not None:
        assert softmax(np.maximum(np.where(seen, x, -np.inf), floor.value)).min() >= np.finfo(np.float32).tiny


@given(ENDS, ENDS, KEYS)
def test_a_fill_is_exact_in_float32_and_reaches_as_far_as_it_says(a: float, b: float, keys: int) -> None:
    found = scores(a, b, keys)
    least = masking.gap(found.longest)
    fill = masking.added(found)
    if fill is not None:
        assert float(np.float32(fill.value)) == fill.value
        if math.isfinite(fill.reach):
            assert fill.value + fill.reach * (found.high - found.low) == pytest.approx(-least)
    fill = masking.floor(found)
    if fill is not None and math.isfinite(fill.reach):
        assert fill.reach * found.low - fill.value == pytest.approx(least)


def test_long_rows_and_wide_scores_have_no_fill() -> None:
    assert masking.added(Scores(-5.0, 5.0, 64)) == Fill(-51.0, pytest.approx(3.09, abs=0.02))
    assert masking.added(Scores(-9.0, 9.0, 64)) is None
    assert masking.floor(Scores(-9.0, 9.0, 64)) is not None
    assert masking.floor(Scores(-20.0, 9.0, 64)) is None
    assert masking.added(Scores(-7.0, 7.0, 64)) is not None
    assert masking.added(Scores(-7.0, 7.0, 64_000)) is None


def test_scores_of_one_number_have_any_reach() -> None:
    for found in (masking.added(Scores(2.0, 2.0, 8)), masking.floor(Scores(0.0, 0.0, 8))):
        assert found is not None
        assert found.reach == math.inf
        assert masking.gap(32) <= -found.value <= masking.depth(32)


def test_growth_is_shared_between_exact_and_fast() -> None:
    """Where there is room, scores may grow as far before they are slow as before they are inexact."""
    found = Scores(-1.0, 1.0, 16)
    fill = masking.added(found)
    assert fill is not None
    assert fill.reach > 10.0
    assert 2.0 * fill.reach - fill.value == pytest.approx(masking.depth(64), abs=0.25)
