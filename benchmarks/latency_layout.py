"""The latency table as Markdown: a line per model and load, a column per tool."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.goals import KERNEL_STAGE, Outcome
from benchmarks.latency_runs import QUANTIZERS
from benchmarks.layout import NAMES, accuracy, cut, goals, line, value
from benchmarks.runs import Row, Settings
from benchmarks.worker import ONNXQ, OPENVINOS

_BEST = "onnxruntime.quantization's best"
_CLASS = r"^(Value|Runtime)Error: "
_MEASURE_STAGE = "measure"


def markdown(rows: Sequence[Row], outcomes: Sequence[Outcome], settings: Settings, where: Mapping[str, Any],
             peers: Mapping[str, str]) -> str:
    """The whole result; `peers` are the versions of the environment that has OpenVINO, none without one."""
    return "\n\n".join([summary(rows), conditions(settings, where, peers), "### Goals", goals(outcomes),
                        "### What onnxq's measuring costs", cost(rows)]) + "\n"


def summary(rows: Iterable[Row]) -> str:
    """For each model and load the float model's time and, of each tool, accuracy (said once) and speed."""
    rows = list(rows)
    ran = {row.tool for row in rows}
    columns = [*([_BEST] if ran & {*QUANTIZERS} else []), ONNXQ, *(tool for tool in OPENVINOS if tool in ran)]
    parts = [line(["model, input: metric of float", "float", *columns]), line(["---"] * (2 + len(columns)))]
    for model in dict.fromkeys(row.model for row in rows):
        parts += _lines([row for row in rows if row.model == model], columns)
    return "\n".join(parts)


def _lines(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    tools = {row.tool: row for row in rows}
    quantizers = [tools[tool] for tool in QUANTIZERS if tool in tools]
    found: list[str] = []
    for load in dict.fromkeys(load for row in rows for load in row.speeds) or {"": None}:
        timed = [row for row in (tools.get(ONNXQ, rows[0]), *rows) if load in row.speeds]
        ms = timed[0].speeds[load]["float_ms"] if timed else None
        first = not found
        found.append(line([
            _head(rows, load, first), "" if ms is None else f"{ms:.3g} ms",
            *(_best(quantizers, load, first) if tool == _BEST else _cell(tools.get(tool), load, first)
              for tool in columns)]))
    return found


def _head(rows: Sequence[Row], load: str, first: bool) -> str:
    row = next((row for row in rows if row.score), rows[0])
    head = f"{row.model}, {load}" if load else row.model
    if not first:
        return head
    name = NAMES.get(row.metric, row.metric)
    known = row.score and not row.metric.startswith("agreement")
    return f"{head}: {name} {value(row.metric, row.score['float'])}" if known else f"{head}: {name}"


def _best(rows: Sequence[Row], load: str, first: bool) -> str:
    for row in rows:
        if load in row.speeds:  # only what was fastest of what held was timed
            name = row.tool.removeprefix("onnxruntime ")
            return f"{name}: {_cell(row, load, first or next(iter(row.speeds)) == load)}"
    return "fails" if all(row.error for row in rows) else "accuracy lost"


def _cell(row: Row | None, load: str, first: bool) -> str:
    if row is None:
        return ""
    if row.error:
        return f"fails: {cut(re.sub(_CLASS, '', row.error))}" if first else "fails"
    if load not in row.speeds:
        return ""
    speed = f"{row.speeds[load]['ratio']:.2f}x"
    note = " (left float)" if row.left_float else " (unchanged)" if row.score["sqnr_db"] is None else ""
    return f"{accuracy(row)}, {speed}{note}" if first else speed


def cost(rows: Iterable[Row]) -> str:
    """Seconds of onnxq's compilations with an empty cache of kernel timings and, if run, with a filled one."""
    parts = [line(["model", "empty cache", "of which timing kernels", "of which the final A/B", "filled cache",
                   "of which timing kernels"]), line(["---"] * 6)]
    for row in rows:
        if row.tool == ONNXQ and row.made:
            cold, warm = row.made.get("stages", {}), row.made.get("warm_stages", {})
            parts.append(line([row.model, _seconds(sum(cold.values())), _seconds(cold.get(KERNEL_STAGE)),
                               _seconds(cold.get(_MEASURE_STAGE)), _seconds(sum(warm.values()) if warm else None),
                               _seconds(warm.get(KERNEL_STAGE))]))
    return "\n".join(parts)


def _seconds(found: float | None) -> str:
    return "" if found is None else f"{found:.1f} s"


def conditions(settings: Settings, where: Mapping[str, Any], peers: Mapping[str, str]) -> str:
    """Sentences that say under what the figures were made."""
    quick = "**Smoke run (--quick): few rows and rounds, so the figures mean nothing.** " if settings.quick else ""
    flags = ", ".join(where["cpu_flags"]) or "no flags listed"
    beside = ""
    if peers:
        beside = (f" OpenVINO {peers['openvino']}, tuned for latency and compiled for the very shapes, int8 by NNCF "
                  f"{peers['nncf']} and with its own choice of float precision, runs in an environment of its own, "
                  f"beside the float model in onnxruntime {peers['onnxruntime']} there.")
    return (f"{quick}Speed is the float model's time in onnxruntime / the tool's, in plain default sessions on "
            f"{settings.threads} threads: the median of {settings.rounds} rounds of alternating blocks of "
            f"{settings.block_seconds} s on real evaluation rows. onnxruntime.quantization's best is the fastest of "
            f"{len(QUANTIZERS)} settings that keep the accuracy asked of onnxq. Every tool calibrates on the "
            f"first {settings.samples} rows.{beside} {where['processor']}, {where['cores']} cores ({flags}); "
            f"onnxq {where['onnxq']}, onnxruntime {where['onnxruntime']}, onnx {where['onnx']}, Python "
            f"{where['python']}.")
