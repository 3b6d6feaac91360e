"""python -m benchmarks.table: onnxq beside onnxruntime.quantization on every model, from one run.

Each tool works in a process of its own, so that a crash is a cell and memory is not mixed. Tables go to stdout,
progress to stderr; --markdown and --json write files. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from benchmarks import goals, layout, models, runs
from benchmarks import options as common

_WIDTH = 160  # where there is no terminal


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write; status 1 when a goal was missed (never for a smoke run), 2 for wrong usage."""
    parser = common.parser("table", __doc__)
    options = parser.parse_args(arguments)
    common.check_folders(parser, options.json, options.markdown)
    settings = runs.Settings.make(options.threads, options.quick)
    where = common.where()
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
    common.say("done")
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")
    if options.json is not None:
        found = {"environment": where, "run": {**begun, "seconds": common.seconds()},
                 "settings": dataclasses.asdict(settings), "rows": [dataclasses.asdict(r) for r in rows],
                 "memory": [{**dataclasses.asdict(m), "growth": m.growth} for m in memory],
                 "goals": [dataclasses.asdict(o) for o in outcomes]}
        options.json.write_text(json.dumps(common.finite(found), indent=1) + "\n", encoding="utf-8")
    return 1 if any(o.met is False for o in outcomes) and not settings.quick else 0


def _run(cases: Sequence[models.Case], wanted: Sequence[goals.Goal], settings: runs.Settings, screen: Console,
         ) -> tuple[list[runs.Row], list[runs.Memory]]:
    rows: list[runs.Row] = []
    for number, case in enumerate(cases, 1):
        common.say(f"{case.name}, {number} of {len(cases)} models")
        found = runs.run_case(case, settings, common.say)
        screen.print(layout.case_table(found))
        rows += found
    named = goals.of_memory(wanted)
    memory = [runs.run_memory(case, settings, common.say) for case in cases if case.name in named]
    return rows, memory


if __name__ == "__main__":
    sys.exit(main())
