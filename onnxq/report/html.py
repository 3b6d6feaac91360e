"""A report as one HTML page: no scripts, nothing fetched, every text escaped, light or dark as the system is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import PurePath
from typing import Any

import yaml

from onnxq.report import packed, wording
from onnxq.report.report import Report

_TITLES = {wording.INT8: "Quantized", wording.STORED: "Float, on weights stored as codes",
           wording.GIVEN: "Quantized before, kept as they were", wording.FLOAT: "Float", wording.FOLDED: "Folded away"}
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #5c6670; --ground: #ffffff; --card: #f4f6f8;
  --rule: #d8dde3; --good: #1a7f4b; --bad: #b3261e; --bar: #4a7fb5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --faint: #9aa5b1; --ground: #14181d; --card: #1e242b;
  --rule: #363f49; --good: #5fd39a; --bad: #ff8a80; --bar: #6ea3d8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .3rem 0; } .faint { color: var(--faint); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.3rem; line-height: 1.3; } .card span { display: block; color: var(--faint); }
.good { color: var(--good); } .bad { color: var(--bad); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide > table { width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--rule); }
th { color: var(--faint); font-weight: 600; } .number { text-align: right; white-space: nowrap; }
td.name { min-width: 12rem; overflow-wrap: anywhere; } td.text { min-width: 14rem; }
details { border: 1px solid var(--rule); border-radius: .4rem; margin: .35rem 0; padding: 0 .8rem; }
details[open] { padding-bottom: .6rem; } summary { cursor: pointer; padding: .35rem 0; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: .4rem; padding: .8rem; overflow-x: auto;
  overflow-wrap: normal; font-size: 13px; }
.bar { background: var(--bar); height: .7rem; min-width: 1px; border-radius: .2rem; }
.track { width: 16rem; vertical-align: middle; }
"""


def render(report: Report) -> str:
    """The whole page as a string; it stays usable with thousands of nodes, which are grouped and folded."""
    name = text(PurePath(report.model).name)
    heading = f"{text(report.model)} &rarr; {text(report.output or 'nothing written')}"
    parts = (
        f"<header><h1>{name}</h1><p class=faint>{heading}</p></header>",
        f'<div class=cards>{_verdict(report)}{_size(report)}{_latency(report)}{_accuracy(report)}</div>',
        _messages("Failed checks", report.verdict.failures, "bad"),
        _messages("Notices", report.verdict.notices, ""),
        _outputs(report), _semantic(report), _nodes(report), _pruned(report), _packing(report), _layers(report),
        _stages(report),
        _environment(report.environment), _recipe(report.recipe))
    return page(name, parts)


def page(title: str, parts: Iterable[str]) -> str:
    """A page of these parts, empty ones left out; all of it is escaped already."""
    # lone surrogates (a file name that is not UTF-8) can't be written as UTF-8; text() leaves none
    return ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>onnxq: {title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            + "\n".join(part for part in parts if part) + "\n</body>\n</html>\n")


# ------------------------------------------------------------------ cards


def _verdict(report: Report) -> str:
    if not report.ok:
        return _card("Verdict", "failed", [wording.plural(len(report.verdict.failures), "failed check")], "bad")
    scheme = [f"scheme {report.scheme}"] if report.scheme else []
    return _card("Verdict", "ok", [*scheme, wording.tally(wording.groups(report.nodes))], "good")


def _size(report: Report) -> str:
    if report.size is None:
        return ""
    found = report.size
    return _card("Size", wording.size_change(found),
                 [f"{wording.size(found.float_bytes)} to {wording.size(found.compiled_bytes)}"])


def _latency(report: Report) -> str:
    if report.latency is None:
        return _card("Latency", "not measured", [])
    found = report.latency
    speed, _, spread = wording.speed(found.speedup, found.low, found.high).partition(" (")
    return _card("Latency", speed,
                 [f"{wording.milliseconds(found.float_ms)} to {wording.milliseconds(found.compiled_ms)}, rounds from "
                  f"{spread.rstrip(')')}", wording.timed_on(found)])


def _accuracy(report: Report) -> str:
    if report.accuracy is None:
        return _card("Accuracy", "not measured", [])
    found = report.accuracy
    value = f"{found.metric} {wording.score(found.metric, found.compiled)}"
    in_float = wording.score(found.metric, found.float)
    before = f"float {in_float}: {wording.drop(found)}" if found.drop is not None else ""
    return _card("Accuracy", value, [before, f"{wording.plural(found.rows, 'row')} of {found.data}", found.note])


def _card(title: str, value: str, lines: Iterable[str], tone: str = "") -> str:
    below = "".join(f"<span>{text(line)}</span>" for line in lines if line)
    return f'<div class=card><span>{title}</span><b class="{tone}">{text(value)}</b>{below}</div>'


# ------------------------------------------------------------------ sections


def _messages(title: str, messages: Sequence[str], tone: str) -> str:
    if not messages:
        return ""
    items = "".join(f'<li class="{tone}">{text(message)}</li>' for message in messages)
    return f"<h2>{title}</h2><ul>{items}</ul>"


def _outputs(report: Report) -> str:
    if report.accuracy is None or not report.accuracy.outputs:
        return ""
    rows = [(name, wording.decibels(found.sqnr_db), f"{found.cosine:.6f}", f"{found.max_abs:.4g}")
            for name, found in report.accuracy.outputs.items()]
    return "<h2>Outputs against float</h2>" + table(("output", "SQNR", "cosine", "max error"), rows, (1, 2, 3))


def _semantic(report: Report) -> str:
    if report.semantic is None:
        return ""
    found = report.semantic
    rows = [("the compiled graph against its QDQ form, both without the runtime's optimizations",
             wording.decibels(found.twin_sqnr_db)),
            ("the compiled graph as it runs against itself without the runtime's optimizations",
             wording.decibels(found.runtime_sqnr_db))]
    return "<h2>Is it the right graph?</h2>" + table(("compared", "SQNR"), rows, (1,))


def _nodes(report: Report) -> str:
    found = wording.groups(report.nodes)
    if not found:
        return ""
    parts = [f"<h2>Nodes</h2><p class=faint>{text(wording.tally(found))}</p>"]
    for kind in wording.KINDS:
        of_kind = [group for group in found if group.kind == kind]
        if of_kind:
            parts.append(f"<h3>{_TITLES[kind]}</h3>" + "".join(_group(group) for group in of_kind))
    return "\n".join(parts)


def _group(group: wording.Group) -> str:
    titles = ["node", "planned", "ran as", "provider", "ms"]
    rows = [[node.name, node.lowering, wording.short(node.ran_as), node.provider.removesuffix("ExecutionProvider"),
             "" if node.ms is None else f"{node.ms:.4f}"] for node in group.nodes]
    if any(node.times for node in group.nodes):
        titles.append("timed alone")
        for row, node in zip(rows, group.nodes, strict=True):
            row.append(wording.raced(node.times))
    if group.kind == wording.INT8:  # the others share their reason, which their heading gives
        titles.append("reason")
        for row, node in zip(rows, group.nodes, strict=True):
            row.append(node.reason)
    return f"<details><summary>{text(group.text)}</summary>{table(titles, rows, (4,))}</details>\n"


def _layers(report: Report) -> str:
    if not report.layers:
        return ""
    rows = [(row.name, row.op, wording.decibels(row.sqnr_db), f"{row.cosine:.6f}", f"{row.max_abs:.4g}")
            for row in report.layers]
    inner = table(("output", "made by", "SQNR", "cosine", "max error"), rows, (2, 3, 4))
    return ("<h2>Layers</h2><p class=faint>Each with the error of those before it.</p>"
            f"<details><summary>{wording.plural(len(rows), 'layer')}</summary>{inner}</details>")


def _pruned(report: Report) -> str:
    if not report.pruned:
        return ""
    inner = table(wording.PRUNED_TITLES, [wording.pruned_cells(row) for row in report.pruned], (1, 2, 4))
    return (f"<h2>Pruned</h2><p class=faint>{text(wording.pruned(report.pruned))}</p>"
            f"<details><summary>{wording.plural(len(report.pruned), 'weight')}</summary>{inner}</details>")


def _packing(report: Report) -> str:
    if report.packing is None:
        return ""
    weights = report.packing["weights"]
    said = "".join(f"<p class=faint>{text(line)}</p>" for line in packed.conditions(report.packing))
    inner = table(packed.TITLES, packed.rows(weights), (3, 4, 5, 6))
    return (f"<h2>Packed weights</h2>{said}"
            f"<details><summary>{wording.plural(len(weights), 'weight')}</summary>{inner}</details>")


def _stages(report: Report) -> str:
    if not report.stages:
        return ""
    total = sum(stage.seconds for stage in report.stages)
    rows = "".join(
        f'<tr><td>{text(stage.name)}</td><td class=number>{stage.seconds:.2f} s</td><td class=track>'
        f'<div class=bar style="width: {100 * stage.seconds / max(total, 1e-9):.1f}%"></div></td></tr>'
        for stage in report.stages)
    return f"<h2>Stages</h2><p class=faint>{total:.1f} s in all</p><table>{rows}</table>"


def _environment(environment: dict[str, Any]) -> str:
    if not environment:
        return ""
    rows = [(str(key), ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))
            for key, value in environment.items()]
    return "<h2>Environment</h2>" + table(("", ""), rows)


def _recipe(recipe: dict[str, Any]) -> str:
    if not recipe:
        return ""
    # YAML writes control characters as escapes of its own
    text = escape(yaml.safe_dump(recipe, sort_keys=False, width=110))
    return f"<h2>Recipe</h2><p class=faint>Save it as a file for --recipe.</p><pre>{text}</pre>"


# ------------------------------------------------------------------ pieces


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """A table of texts: `numbers` are the columns that are set flush right; the first column holds names."""
    kinds = ["number" if k in numbers else "name" if k == 0 else "text" if k == len(titles) - 1 else ""
             for k in range(len(titles))]
    head = f"<thead>{_row('th', titles, kinds)}</thead>" if any(titles) else ""
    body = "\n".join(_row("td", row, kinds) for row in rows)
    return f"<div class=wide><table>{head}<tbody>{body}</tbody></table></div>"


def _row(tag: str, cells: Sequence[str], kinds: Sequence[str]) -> str:
    inner = "".join(f'<{tag} class="{kind}">{text(cell)}</{tag}>' for kind, cell in zip(kinds, cells, strict=True))
    return f"<tr>{inner}</tr>"


def text(value: str) -> str:
    """A text of anybody's as HTML and XML take it."""
    return escape(wording.clean(value))
