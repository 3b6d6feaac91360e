"""Every model through every target's compile: python -m benchmarks.targets [--target NAME ...]

Of a target that runs here (the CPU kinds, portable, web by the CPU provider's kernels) the compiled model is scored on
its evaluation data against the goals of benchmarks/goals.yaml. What other targets get is held against their tables:
onnx's checker, and which nodes their provider takes; kernels that ran are held against those that were expected.
Agreement with float on other targets is that of the compile's own check, of codes that are rounded to the nearest after
few rows of calibration, which takes less time.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx

import onnxq
from benchmarks import goals, models, runs
from benchmarks import options as common
from benchmarks.runs import Settings
from benchmarks.scoring import Data, score
from onnxq.calibration.readers import open_data
from onnxq.errors import OnnxqError
from onnxq.graph import load
from onnxq.placement import check
from onnxq.runtime.machine import checking, target_here
from onnxq.runtime.session import Session
from onnxq.targets import TARGETS

FEW = 16  # rows of calibration where accuracy is not scored
_SIZES_APART = "sizes"  # in the reason of nodes that every provider leaves on the CPU


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write; status 1 when a compile failed, a model is not legal, or a goal was missed."""
    parser = common.parser("targets", __doc__)
    parser.add_argument("--target", nargs="+", default=list(TARGETS), choices=list(TARGETS), help="these alone")
    options = parser.parse_args(arguments)
    common.check_folders(parser, options.json, options.markdown)
    settings = Settings.make(options.threads, options.quick)
    with TemporaryDirectory(prefix="onnxq-bench-") as scratch:
        found: list[dict[str, Any]] = []
        for case in models.find(options.models, options.only or [], Path(scratch), ()):
            for target in options.target:
                common.say(f"{case.name} for {target}")
                found.append({"model": case.name, "target": target, **compiled(case, target, settings)})
                common.say(f"  {_cell(found[-1])}")
                _write(found, options)
    print(markdown(found))
    return 1 if any("error" in row or row.get("missed") or row["away"] for row in found) and not settings.quick else 0


def compiled(case: models.Case, target: str, settings: Settings) -> dict[str, Any]:
    """What became of one model for one target."""
    with TemporaryDirectory(prefix="onnxq-bench-") as folder:
        path, how = Path(folder) / "out.onnx", checking(target_here(target), settings.threads)
        work = {"samples": settings.samples} if how.reads_back else {
            "samples": FEW, "rounding": "nearest", "outliers": "none"}
        try:
            report = onnxq.compile(case.model, path, target=target, calib=case.calib, measure=False,
                                   threads=settings.threads, **work, **_sizes(case, target))
        except OnnxqError as e:
            return {"error": str(e), "away": []}
        row: dict[str, Any] = {"ok": report.ok, "failures": report.verdict.failures, "bytes": path.stat().st_size,
                               "scheme": report.scheme, "away": _away(path, target),
                               "quantized": sum(n.scheme not in ("float", "folded", "stored") for n in report.nodes)}
        onnx.checker.check_model(str(path), full_check=False)
        if report.accuracy is not None:
            row["agreement"] = {name: dataclasses.asdict(o) for name, o in report.accuracy.outputs.items()}
        if how.reads_back:
            data = Data(case, settings.limit)
            row["score"] = score(case, data, Session(case.model, how.options), Session(path, how.options))
            row["missed"] = _missed(case, row)
            row["expected"] = check(path, target=target, data=case.calib, threads=settings.threads)["agreement"]
        return row


def _sizes(case: models.Case, target: str) -> dict[str, Any]:
    """Fixed sizes for the targets that want such: those of the calibration data, 8 rows at once."""
    graph = load(case.model)
    ports = graph.ports()
    free = {d for p in ports for d in p.shape or () if isinstance(d, str)}
    if not TARGETS[target].static or not free:
        return {}
    batch = next(iter(open_data(case.calib, ports).batches(8))).feed
    sizes = {d: n for p in ports for d, n in zip(p.shape or (), batch[p.name].shape, strict=True) if isinstance(d, str)}
    return {"shapes": sizes, "batch": 8}


def _away(path: Path, target: str) -> list[str]:
    """Operators that the target's provider does not take."""
    placed = check(path, target=target, data=None) if TARGETS[target].operators is not None else None
    if placed is None:
        return []
    return sorted({n["op"] for n in placed["nodes"] if n["provider"] == "CPUExecutionProvider"
                   and _SIZES_APART not in n["reason"]})


def _missed(case: models.Case, row: dict[str, Any]) -> list[str]:
    """The goals of accuracy that a model misses; the bounds are those of w8a8."""
    made = runs.Row(case.name, "onnxq", case.scored_by, 0, score=row["score"])
    wanted = [g for g in goals.read() if g.model == case.name and g.figure in ("drop", "ratio", "value",
                                                                               "pooled_cosine") and g.tool == made.tool]
    return [o.goal.goal for o in goals.check(wanted, [made], []) if o.met is False]


def _write(found: list[dict[str, Any]], options: Any) -> None:
    if options.markdown is not None:
        options.markdown.write_text(markdown(found), encoding="utf-8")
    if options.json is not None:
        answer = {"environment": common.where(), "rows": found}
        options.json.write_text(json.dumps(common.finite(answer), indent=1) + "\n", encoding="utf-8")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Models down, targets across."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    cells = {(row["model"], row["target"]): _cell(row) for row in rows}
    lines = [f"| model | {' | '.join(targets)} |", "| --- " * (len(targets) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cells.get((name, target), '') for target in targets)} |"
              for name in dict.fromkeys(row["model"] for row in rows)]
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if "error" in row:
        return "failed: " + row["error"]
    parts = []
    if "score" in row:
        found = row["score"]
        parts.append(f"{found['ratio']:.4f}x" if "ratio" in found and found.get("drop") is None else
                     f"drop {found['drop']:.4f}" if found.get("drop") is not None else f"{found['value']:.4f}")
        parts += [f"cosine {found['pooled_cosine']:.4f}"] if "pooled_cosine" in found else []
        parts.append("missed" if row["missed"] else "met")
    elif "agreement" in row:
        worst = min((o["cosine"] for o in row["agreement"].values()), default=1.0)
        parts.append(f"cosine {worst:.4f}")
    if row.get("expected") is not None:
        parts.append(f"{row['expected']['kernel']} of {row['expected']['nodes']} kernels as expected")
    parts.append(f"{row['quantized']} nodes in {row['scheme']}")
    parts.append(f"away: {', '.join(row['away'])}" if row["away"] else "legal")
    return ", ".join([*parts, *row["failures"]])


if __name__ == "__main__":
    sys.exit(main())
