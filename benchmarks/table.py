"""python -m benchmarks.table: onnxq beside onnxruntime.quantization on every model, from one run.

Each tool works in a process of its own, so that a crash is a cell and memory is not mixed. Tables go to stdout,
progress to stderr; --markdown and --json write files. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from benchmarks import goals, layout, models, runs
from onnxq.runtime.measure import environment
from onnxq.version import VERSION

_WIDTH = 160  # where there is no terminal
_BEGUN = time.perf_counter()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write; status 1 when a goal was missed (never for a smoke run), 2 for wrong usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for path in (options.json, options.markdown):
        if path is not None and not path.parent.is_dir():
            parser.error(f"the folder of {path} does not exist")
    settings = runs.Settings.make(options.threads, options.quick)
    where = {"onnxq": VERSION, **environment(), "onnx": version("onnx"), "numpy": version("numpy")}
    begun = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "load_average": list(os.getloadavg())}
    screen = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    with TemporaryDirectory(prefix="onnxq-bench-") as scratch:
        try:
            cases = models.find(options.models, options.only or [], Path(scratch))
        except ValueError as error:
            parser.error(str(error))
        wanted = [g for g in goals.of_table(goals.read()) if g.model in {c.name for c in cases}]
        rows, memory = _run(cases, wanted, settings, screen)
    outcomes = goals.check(wanted, rows, memory)
    text = layout.markdown(rows, memory, outcomes, settings, where)
    print(f"\n{text}")
    _say("done")
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")
    if options.json is not None:
        found = {"environment": where, "run": {**begun, "seconds": time.perf_counter() - _BEGUN},
                 "settings": dataclasses.asdict(settings), "rows": [dataclasses.asdict(r) for r in rows],
                 "memory": [{**dataclasses.asdict(m), "growth": m.growth} for m in memory],
                 "goals": [dataclasses.asdict(o) for o in outcomes]}
        options.json.write_text(json.dumps(_finite(found), indent=1) + "\n", encoding="utf-8")
    return 1 if any(o.met is False for o in outcomes) and not settings.quick else 0


def _parser() -> argparse.ArgumentParser:
    shared = models.SHARED_MODELS if models.SHARED_MODELS.is_dir() else None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=shared, metavar="DIR",
                        help="folders with model.onnx, calib.npz, eval.npz and meta.json (default: ../shared/models of "
                             "the repository where it exists)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models alone")
    parser.add_argument("--threads", type=int, default=2, help="threads of every session (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument("--quick", action="store_true", help="a smoke run: the figures mean nothing")
    return parser


def _run(cases: Sequence[models.Case], wanted: Sequence[goals.Goal], settings: runs.Settings, screen: Console,
         ) -> tuple[list[runs.Row], list[runs.Memory]]:
    rows: list[runs.Row] = []
    for number, case in enumerate(cases, 1):
        _say(f"{case.name}, {number} of {len(cases)} models")
        found = runs.run_case(case, settings, _say)
        screen.print(layout.case_table(found))
        rows += found
    named = goals.of_memory(wanted)
    memory = [runs.run_memory(case, settings, _say) for case in cases if case.name in named]
    return rows, memory


def _say(text: str) -> None:
    print(f"{time.perf_counter() - _BEGUN:6.1f} s  {text}", file=sys.stderr, flush=True)


def _finite(value: Any) -> Any:
    """JSON knows no infinities and NaN: None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
