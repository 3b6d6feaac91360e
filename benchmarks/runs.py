"""The runs behind the table: every tool on every model, each step in a fresh process, one after the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.memory import GROWTH
from benchmarks.models import ROOT, Case
from benchmarks.worker import DYNAMIC, LINEARS, ONNXQ, PER_TOKEN, STATIC, UNMEASURED
from onnxq.graph import stored_bytes
from onnxq.recipe import Calibration

FLOAT = "float"
PEERS = (STATIC, LINEARS, DYNAMIC)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How much is run. `samples`: calibration rows for every tool; `limit`: evaluation rows (None: all of them).

    `launcher` is a command that each step is started with, e.g. taskset or numactl with their options.
    """

    threads: int = 2
    samples: int = Calibration().samples or 128
    limit: int | None = None
    rounds: int = 5
    block_seconds: float = 0.5
    memory_rows: int = 64
    step_timeout_seconds: float = 900.0
    quick: bool = False
    launcher: tuple[str, ...] = ()

    @classmethod
    def make(cls, threads: int, quick: bool) -> Settings:
        """The usual ones, or those of a smoke run whose figures mean nothing."""
        if not quick:
            return cls(threads)
        return cls(threads, samples=16, limit=64, rounds=2, block_seconds=0.05, memory_rows=8, quick=True)


@dataclass
class Row:
    """One tool on one model; `error` says in one line why there are no figures, `failed` which step it was.

    `metric` is Case.scored_by; `made`, `score`, `speed` and `speeds` are what the steps of benchmarks.worker answered.
    """

    model: str
    tool: str
    metric: str
    float_bytes: int
    bytes: int | None = None
    made: dict[str, Any] = field(default_factory=dict)
    score: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)
    speeds: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: str = ""
    error: str = ""

    @property
    def left_float(self) -> bool:
        """Whether onnxq found that nothing is to be quantized here."""
        return bool(self.made.get("left_float"))


@dataclass
class Memory:
    """Peak resident bytes of a percentile compilation at `rows` rows and at ten times as many."""

    model: str
    rows: int
    peak_bytes: int | None = None
    peak_bytes_tenfold: int | None = None
    seconds: float | None = None
    seconds_tenfold: float | None = None
    error: str = ""

    @property
    def growth(self) -> float | None:
        """Peak at ten times the rows over peak at the rows."""
        return self.peak_bytes_tenfold / self.peak_bytes if self.peak_bytes and self.peak_bytes_tenfold else None


def run_case(case: Case, settings: Settings, say: Say) -> list[Row]:
    """The float model, the peers and onnxq on one model; where int8 did not pay, onnxq again without measuring."""
    size = stored_bytes(case.model)
    rows = [_run_tool(case, tool, size, settings, say) for tool in (FLOAT, *PEERS, PER_TOKEN, ONNXQ)]
    if rows[-1].made.get("int8_slower"):
        rows.append(_run_tool(case, UNMEASURED, size, settings, say))
    return rows


def run_memory(case: Case, settings: Settings, say: Say) -> Memory:
    """Two compilations in processes of their own."""
    found = Memory(case.name, settings.memory_rows)
    answers = []
    for rows in (settings.memory_rows, GROWTH * settings.memory_rows):
        say(f"{case.name}: peak memory with percentile ranges, {rows} rows")
        with TemporaryDirectory(prefix="onnxq-bench-") as folder:
            answers.append(call("memory", Path(folder), settings, case=case.to_dict(), rows=rows,
                                output=str(Path(folder) / "compiled.onnx"), threads=settings.threads))
    few, many = answers
    found.error = few.get("error") or many.get("error") or ""
    if not found.error:
        found.peak_bytes, found.seconds = few["peak_bytes"], few["seconds"]
        found.peak_bytes_tenfold, found.seconds_tenfold = many["peak_bytes"], many["seconds"]
    return found


def call(step: str, folder: Path, settings: Settings, *, python: str = sys.executable,
         environment: Mapping[str, str] | None = None, **arguments: Any) -> dict[str, Any]:
    """Run a step of benchmarks.worker in `folder`; its answer, with an `error` in one line when it failed.

    The folder is also the working directory, since onnxruntime's quantizers leave files there. `environment` is added
    to that of this process.
    """
    job, answer = folder / "job.json", folder / "answer.json"
    job.write_text(json.dumps(arguments), encoding="utf-8")
    answer.unlink(missing_ok=True)
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, **(environment or {}), "PYTHONPATH": search}
    command = [*settings.launcher, python, "-m", "benchmarks.worker", step, str(job), str(answer)]
    try:
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True,
                              errors="replace", timeout=settings.step_timeout_seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {settings.step_timeout_seconds:.0f} s"}
    if answer.exists():
        return dict(json.loads(answer.read_text(encoding="utf-8")))
    if done.returncode < 0:
        return {"error": f"killed by {signal.Signals(-done.returncode).name}"}
    return {"error": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}


def _run_tool(case: Case, tool: str, size: int, settings: Settings, say: Say) -> Row:
    row = Row(case.name, tool, case.scored_by, size)
    with TemporaryDirectory(prefix="onnxq-bench-") as name:
        folder = Path(name)
        model = folder / "compiled.onnx" if tool != FLOAT else None
        if model is not None:
            say(f"  {tool}: quantizing")
            row.made = call("make", folder, settings, case=case.to_dict(), tool=tool, output=str(model),
                            threads=settings.threads, samples=settings.samples)
            if "error" in row.made:
                row.failed, row.error = "make", row.made.pop("error")
                return row
        row.bytes = stored_bytes(model or case.model)
        say(f"  {tool}: scoring and timing")
        found = call("judge", folder, settings, case=case.to_dict(), model=str(model) if model else None,
                     threads=settings.threads, limit=settings.limit, rounds=settings.rounds,
                     block_seconds=settings.block_seconds)
    if "error" in found:
        row.failed, row.error = "run", found["error"]
    else:
        row.score, row.speed = found["score"], found["speed"]
    return row
