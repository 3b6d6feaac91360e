"""Bounds that were set beforehand (goals.yaml), held against what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.runs import Memory, Row
from benchmarks.worker import ONNXQ

GOALS = Path(__file__).parent / "goals.yaml"
SCORES = ("drop", "ratio", "value", "pooled_cosine")  # keys of benchmarks.scoring.score
MEMORY = ("peak_bytes", "peak_growth")
FIGURES = (*SCORES, "speedup", "size", *MEMORY)


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of one model: at least `least` or at most `most`; `goal` says it in words."""

    model: str
    figure: str
    goal: str
    least: float = -math.inf
    most: float = math.inf
    tool: str = ONNXQ


@dataclass(frozen=True)
class Outcome:
    """A goal and the figure; `met` is None, and `found` too, where nothing was measured, and `why` says why."""

    goal: Goal
    found: float | None
    met: bool | None
    why: str = ""


def read(path: Path = GOALS) -> list[Goal]:
    """The goals of a YAML file. Raises ValueError for a figure that there is not."""
    found = [Goal(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]
    for goal in found:
        if goal.figure not in FIGURES:
            raise ValueError(f"{path.name}: there is no figure {goal.figure!r}; there are {', '.join(FIGURES)}")
    return found


def of_memory(goals: Iterable[Goal]) -> list[str]:
    """Models whose memory is to be measured."""
    return list(dict.fromkeys(g.model for g in goals if g.figure in MEMORY))


def check(goals: Iterable[Goal], rows: Sequence[Row], memory: Sequence[Memory]) -> list[Outcome]:
    """Each goal with what was found."""
    row_of = {(row.model, row.tool): row for row in rows}
    memory_of = {found.model: found for found in memory}
    return [_check(goal, row_of.get((goal.model, goal.tool)), memory_of.get(goal.model)) for goal in goals]


def _check(goal: Goal, row: Row | None, memory: Memory | None) -> Outcome:
    ran = memory if goal.figure in MEMORY else row
    if ran is None:
        return Outcome(goal, None, None, "not run")
    if ran.error:
        return Outcome(goal, None, False, ran.error)
    value = _figure(goal.figure, row, memory)
    if value is None:
        return Outcome(goal, None, None, "not measured")
    return Outcome(goal, value, goal.least <= value <= goal.most)  # NaN meets nothing


def _figure(name: str, row: Row | None, memory: Memory | None) -> float | None:
    if name in MEMORY:
        assert memory is not None
        if name == "peak_growth":
            return memory.growth
        peaks = [peak for peak in (memory.peak_bytes, memory.peak_bytes_tenfold) if peak]
        return float(max(peaks)) if peaks else None
    assert row is not None
    if name == "size":
        return None if row.bytes is None else row.bytes / row.float_bytes
    value = row.speed.get("ratio") if name == "speedup" else row.score.get(name)
    return None if value is None else float(value)
