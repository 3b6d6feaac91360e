"""Bounds that were set beforehand (goals.yaml), held against what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from benchmarks.runs import Memory, Row
from benchmarks.worker import ONNXQ

GOALS = Path(__file__).parent / "goals.yaml"
# keys of benchmarks.scoring.score
SCORES = ("drop", "ratio", "value", "agreement", "pooled_cosine", "pooled_cosine_min")
MEMORY = ("peak_bytes", "peak_growth")
OF_TABLE = ("speedup", "size", *MEMORY)
LATENCY, COLD, WARM = "latency", "cold_seconds", "warm_seconds"
OF_LATENCY = (LATENCY, COLD, WARM)
FIGURES = (*SCORES, *OF_TABLE, *OF_LATENCY)
EVERY = "*"  # as a model: each that has no goal of its own for the figure
KERNEL_STAGE = "time kernels"


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of one model: at least `least` or at most `most`; `goal` says it in words.

    `at` is the load (see benchmarks.loads) that a latency is of; "" stands for the slowest.
    """

    model: str
    figure: str
    goal: str
    least: float = -math.inf
    most: float = math.inf
    tool: str = ONNXQ
    at: str = ""


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


def of_table(goals: Iterable[Goal]) -> list[Goal]:
    """The goals that benchmarks.table measures."""
    return [goal for goal in goals if goal.figure not in OF_LATENCY]


def of_latency(goals: Iterable[Goal], models: Sequence[str]) -> list[Goal]:
    """The goals of these models that benchmarks.latency measures: latency, its cost and onnxq's accuracy."""
    kept = [goal for goal in goals if goal.figure not in OF_TABLE and goal.tool == ONNXQ]
    own = {(goal.model, goal.figure) for goal in kept}
    every = [replace(goal, model=model) for goal in kept if goal.model == EVERY for model in models
             if (model, goal.figure) not in own]
    return [goal for goal in kept if goal.model in models] + every


def holds(goals: Iterable[Goal], row: Row) -> bool:
    """Whether a row, whatever its tool, keeps the accuracy that is asked of onnxq on the model."""
    bounds = [goal for goal in goals if goal.figure in SCORES and goal.tool == ONNXQ and goal.model == row.model]
    return all(_check(goal, row, None).met for goal in bounds)


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
    if goal.figure in OF_LATENCY:
        assert row is not None
        value = _latency_figure(goal, row)
    else:
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


def _latency_figure(goal: Goal, row: Row) -> float | None:
    if goal.figure == LATENCY:
        ratios = [found["ratio"] for load, found in row.speeds.items() if goal.at in ("", load)]
        return min(ratios, default=None)
    found: float | None = row.made.get("stages" if goal.figure == COLD else "warm_stages", {}).get(KERNEL_STAGE)
    return found
