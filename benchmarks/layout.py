"""The table as text: rows of cells for the terminal, Markdown for the README, all from the same few formats."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from benchmarks.goals import COLD, LATENCY, WARM, Goal, Outcome
from benchmarks.runs import FLOAT, PEERS, Memory, Row, Settings
from benchmarks.worker import ONNXQ, PER_TOKEN, TIMED_ROWS, UNMEASURED

NAMES = {"top1": "top-1", "frame_accuracy": "accuracy", "perplexity": "perplexity", "spearman": "Spearman",
          "psnr": "PSNR", "agreement: top1": "same top-1", "agreement: detections:ultraface": "F1 to float"}
_SHARES = ("top1", "frame_accuracy", "agreement: top1", "agreement: detections:ultraface")
_REASON = 60  # characters of an error in a cell
HEADINGS = ("tool", "accuracy", "lost", "cosine", "SQNR dB", "speed", "from - to", "size", "made in s", "peak MB",
            "note")


def accuracy(row: Row) -> str:
    """The metric, and the cosine where that says more."""
    found = [value(row.metric, row.score["value"])]
    if "pooled_cosine" in row.score or row.metric.startswith("agreement"):
        found.append(f"cosine {row.score.get('pooled_cosine', row.score['cosine']):.4f}")
    return ", ".join(found)


def case_table(rows: Sequence[Row]) -> Table:
    """One model's rows, for a terminal."""
    table = Table(title=Text(_title(rows)), title_justify="left", title_style="bold")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("tool", "note") else "right",
                         overflow="fold" if heading == "note" else "ignore", no_wrap=heading != "note")
    for row in rows:
        table.add_row(*(Text(cell) for cell in cells(row)))
    return table


def cells(row: Row) -> list[str]:
    """What HEADINGS name, of one row; speed is float time / its time."""
    if row.error:
        return [row.tool, "fails", *[""] * (len(HEADINGS) - 3), short(row)]
    score, speed, plain = row.score, row.speed, row.tool == FLOAT
    cosine, noise = score.get("pooled_cosine", score.get("cosine")), score.get("sqnr_db")
    seconds, peak = row.made.get("seconds"), row.made.get("peak_bytes")
    return [
        row.tool, value(row.metric, score["value"]), "" if plain else _lost(row),
        "" if cosine is None else f"{cosine:.4f}", "" if noise is None else f"{noise:.1f}",
        f"{speed['ms']:.3g} ms" if plain else f"{speed['ratio']:.2f}x",
        "" if plain else f"{speed['low']:.2f} - {speed['high']:.2f}",
        _megabytes(row.bytes) if plain else f"{(row.bytes or 0) / row.float_bytes:.2f}x",
        "" if seconds is None else f"{seconds:.1f}", "" if peak is None else f"{peak / 1e6:.0f}", _note(row)]


def summary(rows: Iterable[Row]) -> str:
    """Markdown: a line per model, a column per tool, in each cell accuracy and speed."""
    lines = [line(["model: metric of float", *PEERS, PER_TOKEN, ONNXQ]), line(["---"] * (len(PEERS) + 3))]
    for model, given in _by_model(rows).items():
        tools = {row.tool: row for row in given}
        plain = tools[FLOAT]
        name = NAMES.get(plain.metric, plain.metric)
        known = not plain.error and not plain.metric.startswith("agreement")
        head = f"{model}: {name} {value(plain.metric, plain.score['value'])}" if known else f"{model}: {name}"
        lines.append(line([head, *(_both(tools[tool]) for tool in PEERS),
                            _ours(tools, PER_TOKEN), _ours(tools, ONNXQ)]))
    return "\n".join(lines)


def details(rows: Iterable[Row]) -> str:
    """Markdown: a table of all figures for each model."""
    parts = []
    for given in _by_model(rows).values():
        parts.append("\n".join([f"**{_title(given)}**", "", line(HEADINGS), line(["---"] * len(HEADINGS)),
                                *(line(cells(row)) for row in given)]))
    return "\n\n".join(parts)


def memory(found: Iterable[Memory]) -> str:
    """Markdown: peak memory of percentile compilations."""
    lines = [line(["model", "rows", "peak", "rows", "peak", "growth", "seconds"]), line(["---"] * 7)]
    for m in found:
        if m.error or m.growth is None:
            lines.append(line([m.model, str(m.rows), f"fails: {cut(m.error)}", "", "", "", ""]))
        else:
            lines.append(line([m.model, str(m.rows), _megabytes(m.peak_bytes), str(10 * m.rows),
                                _megabytes(m.peak_bytes_tenfold), f"{m.growth:.2f}x",
                                f"{m.seconds:.0f}, {m.seconds_tenfold:.0f}"]))
    return "\n".join(lines)


def goals(outcomes: Iterable[Outcome]) -> str:
    """Markdown: each goal with what was measured."""
    lines = [line(["model", "goal", "measured", ""]), line(["---"] * 4)]
    for outcome in outcomes:
        word = {True: "met", False: "missed", None: outcome.why}[outcome.met]
        lines.append(line([outcome.goal.model, outcome.goal.goal, _measured(outcome), word]))
    return "\n".join(lines)


def conditions(settings: Settings, environment: Mapping[str, Any]) -> str:
    """Sentences that say under what the figures were made."""
    quick = "**Smoke run (--quick): few rows and rounds, so the figures mean nothing.** " if settings.quick else ""
    rows = "all evaluation rows" if settings.limit is None else f"the first {settings.limit} evaluation rows"
    flags = ", ".join(environment["cpu_flags"]) or "no flags listed"
    return (f"{quick}Speed is float time / model time in plain default sessions on {settings.threads} threads, the "
            f"median of {settings.rounds} rounds of alternating blocks of {settings.block_seconds} s, with "
            f"{TIMED_ROWS} rows a run or what the model fixes; accuracy on {rows}; calibration on the first "
            f"{settings.samples} rows for every tool. Seconds and peak MB are of the process that quantized; onnxq "
            f"measures and verifies in them, too. {environment['processor']}, {environment['cores']} cores ({flags}); "
            f"onnxq {environment['onnxq']}, onnxruntime {environment['onnxruntime']}, onnx {environment['onnx']}, "
            f"Python {environment['python']}.")


def markdown(rows: Sequence[Row], measured: Sequence[Memory], outcomes: Sequence[Outcome], settings: Settings,
             environment: Mapping[str, Any]) -> str:
    """The whole result."""
    parts = [summary(rows), conditions(settings, environment), "### Goals", goals(outcomes)]
    if measured:
        parts += ["### Peak memory of compiling with percentile ranges", memory(measured)]
    return "\n\n".join([*parts, "### All figures", details(rows)]) + "\n"


def short(row: Row) -> str:
    """Which step failed and the beginning of why."""
    step = {"make": "quantizer", "run": "result"}.get(row.failed, row.failed)
    return f"{step} fails: {cut(row.error)}"


def cut(error: str) -> str:
    """The beginning of a reason, without the name of the file in front of it."""
    reason = re.sub(r"^ModelError: onnxruntime (can't load|failed in a run of) \S+: ", "", error)
    reason = re.sub(r"^Load model from \S+ failed: ?", "", reason)
    return reason if len(reason) <= _REASON else reason[:_REASON - 1].rstrip() + "…"


def _by_model(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.model, []).append(row)
    return found


def _title(rows: Sequence[Row]) -> str:
    row = next((r for r in rows if r.speed), rows[0])
    shapes = ["x".join(map(str, shape)) or "scalar" for shape in row.speed.get("shapes", {}).values()]
    fed = ", ".join(dict.fromkeys(shapes))
    scored = f", {row.score['rows']} rows" if row.score else ""
    return f"{row.model} ({NAMES.get(row.metric, row.metric)}{scored}; timed at {fed or 'nothing'})"


def _both(row: Row) -> str:
    """Accuracy and speed in one cell."""
    if row.error:
        return f"fails ({'quantizing' if row.failed == 'make' else 'to run'})"
    return f"{accuracy(row)}, {row.speed['ratio']:.2f}x" + (" (unchanged)" if row.score["sqnr_db"] is None else "")


def _ours(tools: Mapping[str, Row], tool: str) -> str:
    row = tools[tool]
    if row.error or not row.left_float:
        return _both(row)
    known = tool == ONNXQ and UNMEASURED in tools
    return f"left float (int8: {_both(tools[UNMEASURED])})" if known else "left float"


def value(metric: str, found: float) -> str:
    """A metric's value with its unit."""
    if metric in _SHARES:
        return f"{100 * found:.2f} %"
    return {"perplexity": f"{found:.4g}", "psnr": f"{found:.2f} dB"}.get(metric, f"{found:.4f}")


def _lost(row: Row) -> str:
    if row.metric in _SHARES:
        return f"{100 * row.score['drop']:.2f} pt"
    if row.metric == "perplexity":
        return f"{row.score['ratio']:.4g}x"
    return value(row.metric, row.score["drop"])


def _note(row: Row) -> str:
    found = [f"check failed: {cut(failure)}" for failure in row.made.get("failures", [])]
    if row.left_float:
        found.append("nothing pays, left float" if row.made.get("int8_slower") else "left float")
    elif row.tool != FLOAT and row.score["sqnr_db"] is None:
        found.append("outputs unchanged")
    if row.score.get("pooled_cosine_min") is not None:
        found.append(f"least cosine {row.score['pooled_cosine_min']:.4f}")
    return "; ".join(found)


def _measured(outcome: Outcome) -> str:
    value, goal = outcome.found, outcome.goal
    if value is None:
        return cut(outcome.why) if outcome.met is False else ""
    return _figure(goal, value)


def _figure(goal: Goal, value: float) -> str:
    if goal.figure == "peak_bytes":
        return _megabytes(int(value))
    if goal.figure in (COLD, WARM):
        return f"{value:.1f} s"
    if goal.figure in ("speedup", LATENCY, "peak_growth", "size"):
        return f"{value:.2f}x"
    if goal.figure == "ratio":
        return f"{value:.4f}x"
    return f"{value:.4f}"


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.3g} MB" if size < 1e8 else f"{size / 1e6:.0f} MB"


def line(parts: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(part.replace('|', '/') for part in parts)} |"
