"""Reports for a terminal, as text: readable without colour, cut to no width but the terminal's own.

Functions return text rather than print, so that the command line alone writes to the streams. Progress bars are the
exception: they live on stderr while work goes on, and leave nothing behind.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from onnxq.progress import Progress, Silent
from onnxq.report import analysis, wording
from onnxq.report import packed as packing
from onnxq.report import sweep as sweeps
from onnxq.report.drawing import line as _line
from onnxq.report.drawing import table as _table
from onnxq.report.drawing import text as _text
from onnxq.report.report import NodeRow, Report

MAX_GROUPS = 15
MAX_OUTPUTS = 4
MAX_PRUNED = 5
MAX_NEIGHBOURS = 5


def summary(report: Report, details: str = "--report DIR or --json") -> str:
    """What a compilation or verification found: figures, and nodes in groups; `details` is where all nodes are."""

    def draw(console: Console) -> None:
        _line(console, _title(report), "bold")
        if report.size or report.latency or report.accuracy:
            _line(console)
            console.print(_figures(report))
        for note in _conditions(report):
            _line(console, note, "dim")
        _groups(console, report, details)
        _pruned(console, report, details)
        _layers(console, report)
        for text in packing.summary(report.packing) if report.packing is not None else ():
            _line(console, text, "dim")

    return _text(draw)


def bench(found: dict[str, Any]) -> str:
    """The result of onnxq.bench as a table."""
    peaks = found.get("peak_memory_bytes", {})
    models = [(key, found[name]) for key, name in (("a", "model"), ("b", "other")) if found.get(name) is not None]

    def draw(console: Console) -> None:
        rows = [(wording.clean(str(path)), wording.milliseconds(found[f"{key}_ms"]),
                 wording.size(peaks[key]) if peaks.get(key) else "-") for key, path in models]
        console.print(_table(("model", "per run", "peak memory"), rows))
        shapes = ", ".join(f"{wording.clean(k)} {wording.shape(v)}" for k, v in found["shapes"].items())
        conditions = (shapes, wording.threads(found["threads"]), wording.clean(str(found["data"])))
        _line(console, f"on {', '.join(part for part in conditions if part)}", "dim")
        if len(models) == 2:
            speed = wording.speed(found["ratio"], found["low"], found["high"])
            _line(console, f"{wording.clean(str(found['other']))} is {speed}", "bold")

    return _text(draw)


def inspection(found: dict[str, Any]) -> str:
    """The result of onnxq.inspect: ports, weights, and nodes in groups."""
    report = Report(found["model"], None, found["scheme"], nodes=[
        NodeRow(**{**row, "ran_as": row["lowering"]}) for row in found["nodes"]])  # what would run

    def draw(console: Console) -> None:
        _line(console, wording.clean(f"{found['model']}: opset {found['opset']}"), "bold")
        for kind in ("inputs", "outputs"):
            for name, port in found[kind].items():
                _line(console, wording.clean(f"  {kind[:-1]} {name}: {port}"))
        stored = ", ".join(f"{wording.size(count)} {dtype}" for dtype, count in found["weight_bytes"].items())
        _line(console, f"  weights: {stored or 'none'}; {found['int8_share']:.0%} of float weights would be int8")
        _line(console)
        _line(console, f"under scheme {found['scheme']} on {found['target']}, before anything is measured", "dim")
        _groups(console, report, "--json")

    return _text(draw)


def layers(found: dict[str, Any], sort: str, top: int) -> str:
    """The result of onnxq.analyze: the `top` worst layers by one of analysis.SORTS, and the model's outputs."""
    ordered = analysis.worst_first(found["layers"], sort)

    def draw(console: Console) -> None:
        _line(console, analysis.heading(found), "bold")
        if ordered:
            _line(console)
            console.print(_table(analysis.TITLES, [analysis.cells(layer) for layer in ordered[:top]]))
        if len(ordered) > top:
            _line(console, f"+{len(ordered) - top} more, see --top or --json", "dim")
        made = analysis.outputs(found)
        for text in made[:MAX_OUTPUTS]:
            _line(console, text, "dim")
        if len(made) > MAX_OUTPUTS:
            _line(console, f"+{wording.plural(len(made) - MAX_OUTPUTS, 'more output')}", "dim")

    return _text(draw)


def sweep(found: dict[str, Any]) -> str:
    """The result of onnxq.sweep: a row for each combination."""

    def draw(console: Console) -> None:
        _line(console, sweeps.heading(found), "bold")
        _line(console)
        console.print(_table(sweeps.titles(found), [sweeps.cells(found, row) for row in found["rows"]]))
        for text in sweeps.conditions(found):
            _line(console, text, "dim")

    return _text(draw)


def combination(row: dict[str, Any]) -> str:
    """One combination of a sweep in a line, as soon as it is known."""
    speeds = ", ".join(f"{one['speedup']:.2f}x float" for one in row["latency"])
    values = ", ".join(f"{name} {str(value).lower()}" for name, value in row.items() if name not in sweeps.FIGURES)
    metric = "" if row["metric"] is None else f", metric {row['metric']:.5g}"
    return wording.clean(f"{values}: {wording.size(row['bytes'])}, weight error {row['weight_error']:.2%}, output "
                         f"{sweeps.decibels(row)}{metric}, {speeds}")


def packed(found: dict[str, Any]) -> str:
    """The result of onnxq.packing: the largest weights, the size of the file, and what loading takes."""
    cells = packing.rows(found["weights"])

    def draw(console: Console) -> None:
        if cells:
            console.print(_table(packing.TITLES, cells[:packing.MOST_ROWS]))
        if len(cells) > packing.MOST_ROWS:
            _line(console, f"+{len(cells) - packing.MOST_ROWS} more, see --json", "dim")
        _line(console, packing.total(found), "bold")
        for text in packing.conditions(found) if "form" in found else ():
            _line(console, text, "dim")

    return _text(draw)


def explanation(found: dict[str, Any]) -> str:
    """The result of onnxq.explain: the verdict, then each tensor with what is known of it."""

    def draw(console: Console) -> None:
        where = "in the report on" if found["source"] == "report" else f"in the {found['source']}"
        inside = f", in a body of {found['inside']}" if found["inside"] else ""
        _line(console, wording.clean(f"{found['node']}: {found['op']} {where} {found['model']}{inside}"), "bold")
        _line(console, wording.clean(found["summary"]))
        if found["reason"]:
            _line(console, wording.clean(f"why: {found['reason']}"))
        if found["times"]:
            _line(console, wording.clean(f"timed alone: {wording.raced(found['times'])}"))
        _line(console)
        for part in (*found["inputs"], *found["outputs"]):
            _part(console, part)
        attributes = ", ".join(f"{name} {_value(value)}" for name, value in found["attributes"].items())
        if attributes:
            _line(console, wording.clean(f"attributes: {attributes}"))
        for note in found["notes"]:
            _line(console, wording.clean(note), "dim")

    return _text(draw)


def cache(found: dict[str, Any]) -> str:
    """What `onnxq cache` found: a line per file, and the kernels in it where they are listed."""

    def draw(console: Console) -> None:
        if not found["files"]:
            _line(console, f"no kernel times in {wording.clean(found['folder'])}")
            return
        _line(console, f"kernel times in {wording.clean(found['folder'])}", "bold")
        rows = [(str(file["kernels"]), str(file["checks"]), f"{wording.age(file['age_seconds'])} ago",
                 wording.size(file["bytes"]), wording.clean(wording.measured_in(file))) for file in found["files"]]
        console.print(_table(("kernels", "checks", "written", "size", "measured on"), rows))
        for file in found["files"]:
            if file.get("entries"):
                _line(console)
                _line(console, wording.clean(wording.measured_in(file)), "bold")
            for entry in file.get("entries", ()):
                _line(console, wording.clean(wording.described(entry["description"])))
                _line(console, f"  {wording.clean(wording.candidates(entry['times']))}")

    return _text(draw)


def schemes(rows: Sequence[tuple[str, str]]) -> str:
    """Names with their summaries."""
    return _text(lambda console: console.print(_table(("scheme", "what it does"), rows)))


def continuations(found: dict[str, Any]) -> str:
    """What two models made of one prompt: each with its rates and text, and how far they agree."""

    def draw(console: Console) -> None:
        for key in ("float", "compiled"):
            made = found[key]
            _line(console, f"{wording.clean(made['model'])}: {wording.generated(made)}", "bold")
            text = made["text"] if made["text"] is not None else " ".join(map(str, made["ids"]))
            console.print(Text(wording.printable(text)), soft_wrap=True)
            _line(console)
        most, agreed = max(len(found[key]["ids"]) for key in ("float", "compiled")), found["agreed"]
        if agreed == most:
            _line(console, f"all {wording.plural(most, 'token')} agree", "green")
        else:
            _line(console, f"{agreed} of {wording.plural(most, 'token')} agree before the two part", "bold")

    return _text(draw)


def line(text: str, style: str = "", *, err: bool = False) -> str:
    """One line, styled for the stream that it goes to."""
    return _text(lambda console: _line(console, wording.clean(text), style), err=err)


# ------------------------------------------------------------------ parts


def _title(report: Report) -> str:
    made = f" -> {report.scheme}" if report.scheme else ""
    target = report.environment.get("target")
    return wording.clean(f"{report.model}{made}{f' for {target}' if target else ''}")


def _figures(report: Report) -> Table:
    rows = []
    if report.size is not None:
        size = report.size
        rows.append(("size", wording.size(size.float_bytes), wording.size(size.compiled_bytes),
                     wording.size_change(size)))
    if report.latency is not None:
        time = report.latency
        rows.append(("latency", wording.milliseconds(time.float_ms), wording.milliseconds(time.compiled_ms),
                     wording.speed(time.speedup, time.low, time.high)))
    if report.accuracy is not None:
        found = report.accuracy
        rows.append((wording.clean(found.metric), wording.score(found.metric, found.float),
                     wording.score(found.metric, found.compiled), wording.drop(found)))
        outputs = list(found.outputs.items())
        rows += [(wording.clean(name), "", "", wording.agreement(output)) for name, output in outputs[:MAX_OUTPUTS]]
        if len(outputs) > MAX_OUTPUTS:
            rows.append(("", "", "", f"+{wording.plural(len(outputs) - MAX_OUTPUTS, 'more output')}"))
    return _table(("", "float", "compiled", "change"), rows)


def _conditions(report: Report) -> Iterator[str]:
    if report.latency is not None:
        yield f"latency on {wording.timed_on(report.latency)}"
    if report.accuracy is not None:
        found = report.accuracy
        note = f": {found.note}" if found.note else ""
        yield wording.clean(f"accuracy on {wording.plural(found.rows, 'row')} of {found.data}{note}")


def _groups(console: Console, report: Report, details: str) -> None:
    found = wording.groups(report.nodes)
    if not found:
        return
    _line(console)
    _line(console, wording.tally(found), "bold")
    # the largest groups, then in the order quantized, given, float, folded
    for group in sorted(found[:MAX_GROUPS], key=lambda g: wording.KINDS.index(g.kind)):
        _line(console, f"  {group.line}")
    if len(found) > MAX_GROUPS:
        _line(console, f"  +{len(found) - MAX_GROUPS} more, see {details}", "dim")


def _layers(console: Console, report: Report) -> None:
    if not report.layers:
        return
    rows = [(wording.clean(row.name), wording.clean(row.op), wording.decibels(row.sqnr_db), f"{row.cosine:.5f}",
             f"{row.max_abs:.3g}") for row in report.layers]
    _line(console)
    _line(console, "layers, with the error of those before them", "bold")
    console.print(_table(("output", "made by", "SQNR", "cosine", "max error"), rows))


def _pruned(console: Console, report: Report, details: str) -> None:
    if not report.pruned:
        return
    ordered = sorted(report.pruned, key=lambda row: row.error or 0.0, reverse=True)
    _line(console)
    _line(console, wording.pruned(report.pruned), "bold")
    console.print(_table(wording.PRUNED_TITLES, [wording.pruned_cells(row) for row in ordered[:MAX_PRUNED]]))
    if len(ordered) > MAX_PRUNED:
        _line(console, f"  +{len(ordered) - MAX_PRUNED} more, see {details}", "dim")


def _part(console: Console, part: dict[str, Any]) -> None:
    """A tensor of an explanation: what it is, how it is stored, who is at its other end."""
    verb = {"input": "reads", "output": "makes"}.get(part["role"], part["role"])
    shape = ", ".join("?" if size is None else str(size) for size in part["shape"] or ())
    kind = f": {part['dtype'] or 'of unknown type'} [{shape}]" if part["shape"] is not None else ""
    values = f" = {', '.join(map(_value, part['values']))}" if part["values"] else ""
    _line(console, wording.clean(f"{verb} {part['name']}{kind}{values}"))
    for text in (*wording.statistics(part["statistics"] or {}), *wording.storage(part)):
        _line(console, wording.clean(f"  {text}"))
    others = [f"{n['node']} ({n['op']}{', ' if n['fate'] else ''}{n['fate']})" for n in part["nodes"][:MAX_NEIGHBOURS]]
    if others:
        more = len(part["nodes"]) - len(others)
        _line(console, wording.clean(f"  {'read' if part['role'] == 'output' else 'made'} by {', '.join(others)}"
                                     f"{f' and {more} more' if more else ''}"))
    if part["note"]:
        _line(console, wording.clean(f"  {part['note']}"))


def _value(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------ progress


@contextmanager
def progress(quiet: bool = False) -> Iterator[Progress]:
    """Bars on stderr while the block runs, when that is a terminal; else, and with `quiet`, nothing."""
    console = Console(stderr=True)
    if quiet or not sys.stderr.isatty() or console.is_dumb_terminal:
        yield Silent()
        return
    name, count = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[count]}")
    with RichProgress(name, BarColumn(), count, TimeElapsedColumn(), console=console, transient=True) as bars:
        yield Bars(bars)


class Bars:
    """A bar for each stage: it pulses until its length is known, and stays, full, when the next one begins."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self._total: int | None = None

    def stage(self, name: str) -> None:
        """A bar for `name`; the one before it is done."""
        if self._task is not None:
            full = self._total or 1
            self._bars.update(self._task, total=full, completed=full)
            self._bars.stop_task(self._task)
        self._total = None
        self._task = self._bars.add_task(wording.clean(name), total=None, count="")

    def total(self, steps: int | None) -> None:
        """The bar's length."""
        self._total = steps
        self._move(0)

    def step(self, done: int) -> None:
        """The bar at `done`."""
        self._move(done)

    def _move(self, done: int) -> None:
        if self._task is not None:
            count = str(done) if self._total is None else f"{done}/{self._total}"
            self._bars.update(self._task, total=self._total, completed=done, count=count)
