"""python -m benchmarks.cost: what a compilation costs beside just running the float model over the same samples.

For each model and way to find ranges: the seconds of every stage up to the written file, those of the checks behind it
(verify, accuracy), and the bound. Calibration rows are repeated until the float model takes `--seconds` for them, so
that the constant part does not hide the rest. Float runs before and after each compilation; their mean counts, for
machines drift. Nothing else should run on the machine meanwhile; status 1 when a bound was missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

import onnxq
from benchmarks import models
from benchmarks.memory import repeated
from benchmarks.models import Case
from onnxq.recipe import Calibration, Recipe
from onnxq.runtime.measure import environment
from onnxq.runtime.session import Session, SessionOptions
from onnxq.schemes import scheme

CONSTANT = 3.0  # seconds, whatever the data
BOUNDS = {"minmax": 1.5, "percentile": 2.5, "entropy": 3.0, "mse": 3.0}  # times the float run
_CHECKS = ("accuracy", "verify")
_ROWS = 64  # of which the float run is timed first


@dataclass(frozen=True)
class Cost:
    """One compilation: seconds of the float run, of the stages up to the file and of the checks behind it."""

    model: str
    ranges: str
    rows: int
    float_seconds: float
    file_seconds: float
    check_seconds: float
    stages: dict[str, float]

    @property
    def bound(self) -> float:
        """Seconds that the compilation may take."""
        return BOUNDS[self.ranges] * self.float_seconds + CONSTANT

    @property
    def held(self) -> bool:
        """Whether the file was written within the bound."""
        return self.file_seconds <= self.bound


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; status 1 when a bound was missed, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("--models", type=Path, default=models.SHARED_MODELS, metavar="DIR",
                        help="a folder of models beside the project's own")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models alone")
    parser.add_argument("--seconds", type=float, default=4.0, help="what the float run shall take at least [4]")
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads [2]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, too")
    options = parser.parse_args(arguments)
    with TemporaryDirectory(prefix="onnxq-cost-") as scratch:
        try:
            cases = models.find(options.models, options.only or [], Path(scratch))
        except ValueError as error:
            parser.error(str(error))
        found = [cost for case in cases for cost in costs(case, options.seconds, options.threads, Path(scratch))]
    if options.json is not None:
        options.json.write_text(json.dumps([{**dataclasses.asdict(c), "held": c.held} for c in found], indent=1) + "\n")
    screen = Console() if sys.stdout.isatty() else Console(width=120)
    screen.print(table(found))
    screen.print(", ".join(f"{k} {v}" for k, v in environment().items()), f", {options.threads} threads")
    return 0 if all(c.held for c in found) else 1


def costs(case: Case, seconds: float, threads: int, folder: Path) -> list[Cost]:
    """The model compiled with each way to find ranges, over the same rows."""
    options = SessionOptions(threads=threads)
    few = run_float(case, _ROWS, options)
    rows = max(_ROWS, int(_ROWS * seconds / few)) // case.batch(8) * case.batch(8)
    found = []
    for ranges in BOUNDS:
        print(f"{case.name}: {ranges} over {rows} rows", file=sys.stderr, flush=True)
        before = run_float(case, rows, options)
        how = replace(Calibration(), samples=rows, ranges=ranges, batch=case.batch(8))
        start = time.perf_counter()
        report = onnxq.compile(case.model, folder / "cost.onnx", recipe=Recipe(scheme("w8a8"), calibration=how),
                               calib=repeated(case, rows), threads=threads, measure=False, force=True)
        total = time.perf_counter() - start
        stages = {s.name: s.seconds for s in report.stages}
        checks = sum(stages.get(name, 0.0) for name in _CHECKS)
        after = run_float(case, rows, options)
        found.append(Cost(case.name, ranges, rows, (before + after) / 2, total - checks, checks, stages))
    return found


def run_float(case: Case, rows: int, options: SessionOptions) -> float:
    """Seconds that the float model takes for the rows, without loading it."""
    session = Session(case.model, options)
    feeds = repeated(case, rows)
    session.run(next(feeds()))
    start = time.perf_counter()
    for feed in feeds():
        session.run(feed)
    return time.perf_counter() - start


def table(found: Sequence[Cost]) -> Table:
    """The figures, a line per compilation."""
    made = Table("model", "ranges", "rows", "float s", "to the file s", "times float", "bound s", "held", "checks s")
    for c in found:
        made.add_row(c.model, c.ranges, str(c.rows), f"{c.float_seconds:.2f}", f"{c.file_seconds:.2f}",
                     f"{c.file_seconds / c.float_seconds:.2f}x", f"{c.bound:.2f}", "yes" if c.held else "NO",
                     f"{c.check_seconds:.2f}")
    return made


if __name__ == "__main__":
    sys.exit(main())
