"""The result of onnxq.sweep as drawings: each figure over the size of the file, combinations joined; no scripts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from onnxq.report import html, plot, sweep, wording

_WIDE, _HIGH, _LEFT, _TOP, _GAP = 330, 190, 64, 58, 70  # pixels of a panel, and around it
_LINES = 5  # of a scale, about
_COLOURS = ("#4a7fb5", "#d08a2e", "#5d9e63", "#a65d9e", "#8a8a3a", "#b5504a")
_STYLE = """
.onnxq-sweep { font: 12px system-ui, sans-serif; } .onnxq-sweep text { fill: #1b1f24; }
.onnxq-sweep .heading { font-size: 14px; font-weight: 600; } .onnxq-sweep .figure { font-size: 9px; }
.onnxq-sweep .ground { fill: #ffffff; } .onnxq-sweep text.faint { fill: #5c6670; }
.onnxq-sweep line { stroke: #d8dde3; } .onnxq-sweep polyline { fill: none; stroke-width: 1.5; }
@media (prefers-color-scheme: dark) { .onnxq-sweep text { fill: #e4e8ec; } .onnxq-sweep text.faint { fill: #9aa5b1; }
  .onnxq-sweep .ground { fill: #14181d; } .onnxq-sweep line { stroke: #363f49; } }
"""

Found = Mapping[str, Any]
Point = tuple[float, float, str]  # bytes, figure, what is varied first


def save(found: Found, path: str | Path) -> None:
    """Write the drawings as .svg, or in a page with all figures as .html. Raises UsageError and OutputError."""
    plot.write(Path(path), lambda: svg(found), lambda: page(found))


def page(found: Found) -> str:
    """The drawings and the table as one HTML page."""
    name = html.text(PurePath(found["model"]).name)
    notes = "".join(f"<p class=faint>{html.text(line)}</p>" for line in (*sweep.conditions(found), *found["notices"]))
    titles = sweep.titles(found)
    table = html.table(titles, [sweep.cells(found, row) for row in found["rows"]], range(len(titles)))
    return html.page(name, (f"<header><h1>{name}</h1><p class=faint>{html.text(sweep.heading(found))}</p></header>",
                            notes, f"<div class=wide>{svg(found)}</div>", "<h2>Figures</h2>", table))


def svg(found: Found) -> str:
    """A standalone drawing: a panel for each figure, over the size in megabytes."""
    panels = list(_panels(found))
    columns = min(len(panels), 2)
    width = columns * (_LEFT + _WIDE) + 40
    height = _TOP + -(-len(panels) // columns) * (_HIGH + _GAP)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" class="onnxq-sweep" width="{width}" height="{height}" '
             f'viewBox="0 0 {width} {height}" role="img">',
             f"<title>{html.text(sweep.heading(found))}</title>", f"<style>{_STYLE}</style>",
             f'<rect class="ground" width="{width}" height="{height}"/>',
             f'<text class="heading" x="12" y="20">{html.text(sweep.heading(found))}</text>', *_legend(found)]
    for number, (title, series) in enumerate(panels):
        left = _LEFT + number % columns * (_LEFT + _WIDE)
        parts += _panel(title, series, left, _TOP + 22 + number // columns * (_HIGH + _GAP))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panels(found: Found) -> Iterator[tuple[str, dict[str, list[Point]]]]:
    """(title, series by what is varied besides the first variable) of each figure that there is."""
    rows = found["rows"]
    figures = {"weight error, %": [100 * row["weight_error"] for row in rows],
               "output SQNR, dB": [row["sqnr_db"] for row in rows]}
    if found["metric"] is not None:
        figures[found["metric"]] = [row["metric"] for row in rows]
    for k, label in enumerate(sweep.feeds(found)):
        figures[f"speed {label}, x float"] = [row["latency"][k]["speedup"] for row in rows]
    for title, values in figures.items():
        series: dict[str, list[Point]] = {}
        for row, value in zip(rows, values, strict=True):
            if value is not None and math.isfinite(value):
                series.setdefault(_besides(found, row), []).append(
                    (row["bytes"], float(value), str(row[found["vary"][0]]).lower()))
        if series:
            yield title, series


def _besides(found: Found, row: Found) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {str(row[name]).lower()}" for name in found["vary"][1:])


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _legend(found: Found) -> Iterator[str]:
    names = list(dict.fromkeys(_besides(found, row) for row in found["rows"]))
    first = found["vary"][0].replace("_", " ")
    yield f'<text class="faint" x="12" y="40">numbers: {html.text(first)}</text>'
    for k, name in enumerate(names if len(names) > 1 else ()):
        x = 170 + 130 * k
        yield f'<rect fill="{_colour(k)}" x="{x}" y="31" width="12" height="12" rx="2"/>'
        yield f'<text x="{x + 18}" y="41">{html.text(name)}</text>'


def _panel(title: str, series: Mapping[str, Sequence[Point]], left: int, top: int) -> Iterator[str]:
    points = [point for members in series.values() for point in members]
    across, up = _scale([point[0] for point in points]), _scale([point[1] for point in points])

    def place(point: Point) -> tuple[float, float]:
        x = left + _WIDE * (point[0] - across[0]) / (across[-1] - across[0])
        return x, top + _HIGH - _HIGH * (point[1] - up[0]) / (up[-1] - up[0])

    yield f'<text x="{left}" y="{top - 8}">{html.text(title)}</text>'
    for value in up:
        _, y = place((across[0], value, ""))
        yield f'<line x1="{left}" x2="{left + _WIDE}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="faint" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>'
    for value in across:
        x, _ = place((value, up[0], ""))
        yield (f'<text class="faint" x="{x:.1f}" y="{top + _HIGH + 16}" text-anchor="middle">'
               f"{html.text(wording.size(round(value)))}</text>")
    for k, (name, members) in enumerate(series.items()):
        placed = [place(point) for point in members]
        yield f'<polyline stroke="{_colour(k)}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}"/>'
        for (x, y), point in zip(placed, members, strict=True):
            told = f"{name}: " if name else ""
            yield (f'<circle fill="{_colour(k)}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{html.text(told + point[2])}: '
                   f"{html.text(wording.size(round(point[0])))}, {point[1]:.6g}</title></circle>")
            yield f'<text class="figure faint" x="{x + 5:.1f}" y="{y - 5:.1f}">{html.text(point[2])}</text>'


def _scale(values: Sequence[float]) -> list[float]:
    """Round numbers around all values, at least two."""
    low, high = min(values), max(values)
    rough = (high - low or abs(high) or 1.0) / _LINES
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * k for k in range(first, max(last, first + 1) + 1)]
