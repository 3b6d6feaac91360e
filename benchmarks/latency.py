"""python -m benchmarks.latency: how fast onnxq's models are beside those of other tools, all from one run.

Columns: the float model in onnxruntime, onnxruntime.quantization's best setting, onnxq and, where --peers-python names
the python of an environment that has them (pip install . -r benchmarks/peers/requirements.txt), OpenVINO in float, bf16
and int8 by NNCF. Everything is timed against the float model in onnxruntime, in alternating blocks, and scored. Each
step works in a process of its own, one after the other. Tables go to stdout, progress to stderr; --markdown and --json
write files, the latter after each model, from where --resume goes on. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import goals, guard, latency_layout, models
from benchmarks import options as common
from benchmarks.goals import Goal
from benchmarks.latency_runs import CaseRuns
from benchmarks.models import ROOT, Case
from benchmarks.runs import Row, Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write; status 1 when a goal was missed, or with --guard a speedup lost; 2 for wrong usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    settings = dataclasses.replace(Settings.make(options.threads, options.quick),
                                   launcher=tuple(shlex.split(options.launcher)))
    python = None if options.onnxq_only else _absolute(options.peers_python)
    peers = _peers(parser, python)
    state = {"environment": common.where(), "peers": peers, "settings": _plain(settings),
             "onnxq_only": options.onnxq_only}
    rows = _resumed(options.json, state) if options.resume else []
    every = goals.read()
    with TemporaryDirectory(prefix="onnxq-bench-") as scratch:
        cases = _cases(parser, options, every, Path(scratch))
        wanted = goals.of_latency(every, [case.name for case in cases])
        for number, case in enumerate(cases, 1):
            if any(row.model == case.name for row in rows):
                continue
            common.say(f"{case.name}, {number} of {len(cases)} models")
            rows += CaseRuns(case, wanted, settings, python, options.onnxq_only, common.say).run()
            _write(options.json, state, rows)
    return _finish(options, wanted, settings, state, rows, {case.name for case in cases})


def _parser() -> ArgumentParser:
    parser = common.parser("latency", __doc__)
    parser.add_argument("--peers-python", metavar="PATH", help="python of an environment with OpenVINO and NNCF")
    parser.add_argument("--onnxq-only", action="store_true", help="no other tools: enough for --guard and --record")
    parser.add_argument("--resume", action="store_true",
                        help="take over the models that --json FILE has, if of this machine and these settings")
    parser.add_argument("--launcher", default="", metavar="COMMAND",
                        help="start each step with this in front, e.g. 'numactl --physcpubind=0,1'")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write onnxq's speedups for --guard")
    parser.add_argument("--guard", type=Path, nargs="?", const=guard.RECORD, metavar="FILE",
                        help="compare with recorded speedups (default: benchmarks/latency.yaml)")
    return parser


def _check(parser: ArgumentParser, options: Namespace) -> None:
    common.check_folders(parser, options.json, options.markdown, options.record)
    if options.resume and options.json is None:
        parser.error("--resume needs --json FILE, which holds what was found so far")
    if options.guard is not None and not options.guard.is_file():
        parser.error(f"there is no record {options.guard}; write one with --record")


def _absolute(python: str | None) -> str | None:
    """Steps run in other folders; links stay, by which an environment's python is known."""
    return python and os.path.abspath(shutil.which(python) or python)


def _peers(parser: ArgumentParser, python: str | None) -> dict[str, str]:
    """Versions in the peers' environment."""
    if python is None:
        return {}
    try:
        done = subprocess.run([python, "-m", "benchmarks.peers_openvino"], cwd=ROOT, capture_output=True, text=True,
                              check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        parser.error(f"{python} can't be used ({reason}); there, pip install . -r benchmarks/peers/requirements.txt")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _cases(parser: ArgumentParser, options: Namespace, wanted: Sequence[Goal], scratch: Path) -> list[Case]:
    lights = {goal.model for goal in wanted if goal.figure == goals.LATENCY}
    try:
        return models.find(options.models, options.only or [], scratch, lights)
    except ValueError as error:
        parser.error(str(error))


def _resumed(path: Path, state: dict[str, Any]) -> list[Row]:
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if {key: found.get(key) for key in state} != common.finite(state):
        common.say(f"{path} is of another machine or other settings: beginning anew")
        return []
    return [Row(**row) for row in found["rows"]]


def _write(path: Path | None, state: dict[str, Any], rows: Sequence[Row], **more: Any) -> None:
    if path is not None:
        found = {**state, "rows": [dataclasses.asdict(row) for row in rows], **more}
        path.write_text(json.dumps(common.finite(found), indent=1) + "\n", encoding="utf-8")


def _plain(settings: Settings) -> dict[str, Any]:
    return {**dataclasses.asdict(settings), "launcher": list(settings.launcher)}


def _finish(options: Namespace, wanted: Sequence[Goal], settings: Settings, state: dict[str, Any],
            every: Sequence[Row], named: set[str]) -> int:
    rows = [row for row in every if row.model in named]
    outcomes = goals.check(wanted, rows, [])
    text = latency_layout.markdown(rows, outcomes, settings, state["environment"], state["peers"])
    missed = any(outcome.met is False for outcome in outcomes)
    if options.guard is not None:
        same, found = guard.compare(options.guard, rows, state["environment"], settings.threads,
                                    guard.floor(goals.read()))
        text += f"\n### Guard\n\n{guard.markdown(same, found)}\n"
        missed = any(finding.worse for finding in found)
    print(text)
    _write(options.json, state, every, goals=[dataclasses.asdict(outcome) for outcome in outcomes])
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")
    if options.record is not None:
        guard.record(options.record, rows, state["environment"], settings.threads)
    common.say("done")
    return 1 if missed and not settings.quick else 0


if __name__ == "__main__":
    sys.exit(main())
