"""Speedups that were recorded once, and whether today's are worse than noise explains.

A median of five rounds has a standard error of about 0.56 standard deviations, and the range of five is about 2.3 of
them: half the range is thus about two standard errors. The difference of two medians has the root of the sum of their
squares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.goals import EVERY, LATENCY, Goal
from benchmarks.layout import line
from benchmarks.runs import Row
from benchmarks.worker import ONNXQ

RECORD = Path(__file__).parent / "latency.yaml"
LEAST_TOLERANCE = 0.10
_HEAD = """\
# onnxq's speedups over the float model, by model and input, as `python -m benchmarks.latency --record` measured them;
# `spread` is the range of the rounds over their median. `--guard` compares with them on the same machine.
"""


@dataclass(frozen=True)
class Finding:
    """A speedup that was recorded (or the floor) and today's; `found` is None where `why` says why there is none."""

    model: str
    load: str
    recorded: float
    found: float | None
    tolerance: float
    why: str = ""

    @property
    def worse(self) -> bool:
        """Whether it fell by more than the tolerance, or failed."""
        return self.found is None or not self.found >= self.recorded * (1.0 - self.tolerance)


def machine(where: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """What speedups depend on most. Names of processors may hide what they can do, hence the flags."""
    return {"processor": where["processor"], "cores": where["cores"], "cpu_flags": list(where["cpu_flags"]),
            "threads": threads}


def record(path: Path, rows: Sequence[Row], where: Mapping[str, Any], threads: int) -> None:
    """Write onnxq's speedups; those of other models stay where they were taken on the same machine."""
    here = machine(where, threads)
    before = _read(path) if path.exists() else {}
    speedups = dict(before.get("speedups", {})) if before.get("machine") == here else {}
    for row in rows:
        if row.tool == ONNXQ and row.speeds:
            speedups[row.model] = {load: {"ratio": round(found["ratio"], 3), "spread": round(_spread(found), 3)}
                                   for load, found in row.speeds.items()}
    text = yaml.safe_dump({"machine": here, "onnxruntime": where["onnxruntime"],
                           "speedups": dict(sorted(speedups.items()))}, sort_keys=False, width=120)
    path.write_text(_HEAD + text, encoding="utf-8")


def floor(goals: Sequence[Goal]) -> float:
    """The speedup that is asked of every model."""
    return next(goal.least for goal in goals if (goal.model, goal.figure) == (EVERY, LATENCY))


def compare(path: Path, rows: Sequence[Row], where: Mapping[str, Any], threads: int, least: float,
            ) -> tuple[bool, list[Finding]]:
    """Whether the record was taken on this machine, and what became of onnxq's speedups.

    On another machine, and for what was not recorded, each is held against `least` alone.
    """
    record = _read(path)
    same = record["machine"] == machine(where, threads)
    found = []
    for row in rows:
        if row.tool == ONNXQ:
            found += _of_model(row, record["speedups"].get(row.model, {}) if same else {}, least)
    return same, found


def _of_model(row: Row, recorded: Mapping[str, Mapping[str, float]], least: float) -> list[Finding]:
    if row.error:
        return [Finding(row.model, "", least, None, 0.0, row.error)]
    found = []
    for load, speed in row.speeds.items():
        before = recorded.get(load)
        if before is None:
            found.append(Finding(row.model, load, least, speed["ratio"], _spread(speed) / 2, "asked of every model"))
        else:
            noise = math.hypot(before["spread"] / 2, _spread(speed) / 2)
            found.append(Finding(row.model, load, before["ratio"], speed["ratio"], max(LEAST_TOLERANCE, noise)))
    return found


def markdown(same: bool, found: Sequence[Finding]) -> str:
    """A table, below a sentence where the machine is another."""
    parts = [line(["model, input", "before", "now", "tolerance", ""]), line(["---"] * 5)]
    for f in found:
        now = "" if f.found is None else f"{f.found:.2f}x"
        word = f.why if f.found is None else ("WORSE" if f.worse else "holds") + (f" ({f.why})" if f.why else "")
        parts.append(line([f"{f.model}, {f.load}" if f.load else f.model, f"{f.recorded:.2f}x", now,
                           f"{100 * f.tolerance:.0f} %", word]))
    text = "\n".join(parts)
    if same:
        return text
    return f"The record is of another machine or number of threads: only what every model must reach counts.\n\n{text}"


def _spread(speed: Mapping[str, float]) -> float:
    return (speed["high"] - speed["low"]) / speed["ratio"]


def _read(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
