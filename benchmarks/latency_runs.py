"""The runs behind the latency table: each tool makes, is scored and timed in fresh processes, one after the other."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import goals
from benchmarks.goals import Goal
from benchmarks.models import Case
from benchmarks.runs import Row, Say, Settings, call
from benchmarks.worker import DYNAMIC, LINEARS, ONNXQ, OPENVINO_INT8, OPENVINOS, STATIC, UNSIGNED
from onnxq.graph import stored_bytes

QUANTIZERS = (STATIC, UNSIGNED, LINEARS, DYNAMIC)  # settings of onnxruntime.quantization
_RANDOM_WEIGHTS_LIMIT = 16  # evaluation rows where there is nothing but agreement to measure
_TRIAL_ROUNDS, _TRIAL_SECONDS = 1, 0.2


class CaseRuns:
    """One model: its tools' files and figures, in a folder of its own.

    `peers` is the python that has OpenVINO, if any; `alone` leaves all tools but onnxq out.
    onnxq's cache of kernel timings is empty at the beginning: nothing is taken from earlier runs.
    """

    def __init__(self, case: Case, wanted: Sequence[Goal], settings: Settings, peers: str | None, alone: bool, say: Say,
                 ) -> None:
        self.case, self.settings, self.say = case, settings, say
        self.goals = [goal for goal in wanted if goal.model == case.name]
        self.peers, self.alone = peers, alone
        self.limit = settings.limit
        if case.agreement:
            self.limit = min(settings.limit or _RANDOM_WEIGHTS_LIMIT, _RANDOM_WEIGHTS_LIMIT)

    def run(self) -> list[Row]:
        """Rows of onnxruntime.quantization's settings, of onnxq and, with an environment for it, of OpenVINO."""
        with TemporaryDirectory(prefix="onnxq-bench-") as name:
            self.folder = Path(name)
            rows = [self._scored(tool) for tool in (() if self.alone else QUANTIZERS)]
            self._time_the_best(rows)
            ours = self._scored(ONNXQ)
            if any(goal.figure == goals.WARM for goal in self.goals) and not ours.error:
                ours.made["warm_stages"] = self._made(ours, self._place(ours) / "warm.onnx").get("stages", {})
            rows.append(ours)
            self._time(ours)
            for tool in OPENVINOS if self.peers and not self.alone else ():
                rows.append(self._scored(tool))
                self._time(rows[-1])
        return rows

    def _model(self, row: Row) -> Path:
        if row.tool in OPENVINOS and row.tool != OPENVINO_INT8:
            return self.case.model  # OpenVINO reads ONNX
        return self._place(row) / f"compiled.{'xml' if row.tool in OPENVINOS else 'onnx'}"

    def _place(self, row: Row) -> Path:
        folder = self.folder / re.sub(r"\W+", "_", row.tool)
        folder.mkdir(exist_ok=True)
        return folder

    def _scored(self, tool: str) -> Row:
        row = Row(self.case.name, tool, self.case.scored_by, stored_bytes(self.case.model))
        model = self._model(row)
        if model != self.case.model:
            self.say(f"  {tool}: quantizing")
            row.made = self._made(row, model)
            if "error" in row.made:
                row.failed, row.error = "make", row.made.pop("error")
                return row
        row.bytes = None if tool in OPENVINOS else stored_bytes(model)
        self.say(f"  {tool}: scoring")
        found = self._call("score", row, kept=str(self.folder / "float.answers"), limit=self.limit)
        row.score = found.get("score", {})
        return row

    def _made(self, row: Row, output: Path) -> dict[str, Any]:
        return call("make", self._place(row), self.settings, python=self._python(row.tool),
                    environment={"XDG_CACHE_HOME": str(self.folder / "cache")}, case=self.case.to_dict(),
                    tool=row.tool, output=str(output), threads=self.settings.threads, samples=self.settings.samples)

    def _time(self, row: Row, wanted: Sequence[str] | None = None) -> None:
        if not row.error:
            self.say(f"  {row.tool}: timing")
            row.speeds = self._speeds(row, self.settings.rounds, self.settings.block_seconds, wanted)
            row.speed = next(iter(row.speeds.values()), {})

    def _time_the_best(self, rows: Sequence[Row]) -> None:
        """Time, with each load, the fastest of those whose accuracy holds; a short trial tells which that is."""
        held = [row for row in rows if not row.error and goals.holds(self.goals, row)]
        if len(held) == 1:
            self._time(held[0])
            return
        trials = {row.tool: self._speeds(row, _TRIAL_ROUNDS, _TRIAL_SECONDS) for row in held}
        best = fastest({row.tool: trials[row.tool] for row in held if not row.error})
        for row in held:
            if row.tool in best:
                self._time(row, best[row.tool])

    def _speeds(self, row: Row, rounds: int, seconds: float, wanted: Sequence[str] | None = None,
                ) -> dict[str, dict[str, Any]]:
        found = self._call("clock", row, wanted=wanted, rounds=rounds, block_seconds=seconds)
        return dict(found.get("speeds", {}))

    def _call(self, step: str, row: Row, **arguments: Any) -> dict[str, Any]:
        found = call(step, self._place(row), self.settings, python=self._python(row.tool), case=self.case.to_dict(),
                     tool=row.tool, model=str(self._model(row)), threads=self.settings.threads, **arguments)
        if "error" in found:
            row.failed, row.error = "run", str(found["error"])
        return found

    def _python(self, tool: str) -> str:
        return self.peers if self.peers and tool in OPENVINOS else sys.executable


def fastest(speeds: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, list[str]]:
    """From tool -> load -> speed: the loads at which a tool has the greatest ratio."""
    found: dict[str, list[str]] = {}
    for load in dict.fromkeys(name for of_tool in speeds.values() for name in of_tool):
        tool = max((t for t in speeds if load in speeds[t]), key=lambda t: speeds[t][load]["ratio"])
        found.setdefault(tool, []).append(load)
    return found
