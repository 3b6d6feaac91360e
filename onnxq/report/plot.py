"""The result of onnxq.analyze as a drawing: a pair of bars for each layer, in execution order; one file, no scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from onnxq.errors import OutputError, UsageError
from onnxq.report import analysis, html, wording

KINDS = (".html", ".svg")
_STEP = 10.0  # dB between lines
_ROW, _BAR = 26, 9  # pixels
_TOP, _LEFT, _WIDE, _RIGHT, _BOTTOM = 74, 320, 560, 70, 16
_LONGEST = 44  # characters of a name: its end tells layers apart
_SERIES = (("alone", "sqnr_db", "with nothing else quantized"),
           ("accumulated", "accumulated_db", "with everything quantized"))
# plain colours: viewers other than browsers know neither variables nor media queries
_STYLE = """
.onnxq-plot { font: 12px system-ui, sans-serif; } .onnxq-plot text { fill: #1b1f24; }
.onnxq-plot .heading { font-size: 14px; font-weight: 600; } .onnxq-plot .figure { font-size: 9px; }
.onnxq-plot .ground { fill: #ffffff; } .onnxq-plot text.faint { fill: #5c6670; } .onnxq-plot line { stroke: #d8dde3; }
.onnxq-plot .alone { fill: #4a7fb5; } .onnxq-plot .accumulated { fill: #d08a2e; }
@media (prefers-color-scheme: dark) { .onnxq-plot text { fill: #e4e8ec; } .onnxq-plot text.faint { fill: #9aa5b1; }
  .onnxq-plot .ground { fill: #14181d; } .onnxq-plot line { stroke: #363f49; }
  .onnxq-plot .alone { fill: #6ea3d8; } .onnxq-plot .accumulated { fill: #e0a95c; } }
"""


def save(found: Mapping[str, Any], path: str | Path) -> None:
    """Write the drawing as .svg, or in a page with all figures as .html. Raises UsageError and OutputError."""
    write(Path(path), lambda: svg(found), lambda: page(found))


def write(path: Path, drawn: Callable[[], str], paged: Callable[[], str]) -> None:
    """Write what one of these gives, by the kind of the file. Raises UsageError and OutputError."""
    check(path)
    try:
        path.write_text(drawn() if path.suffix.lower() == ".svg" else paged(), encoding="utf-8")
    except OSError as e:
        raise OutputError(f"the plot can't be written to {path} ({e.strerror}); name another file") from None


def check(path: Path) -> None:
    """Raises UsageError for a file of another kind."""
    if path.suffix.lower() not in KINDS:
        raise UsageError(f"a plot can't be written as {path.name!r}; name a file that ends in .html or .svg")


def page(found: Mapping[str, Any]) -> str:
    """The drawing and a table, as one HTML page."""
    name = html.text(PurePath(found["model"]).name)
    notes = "".join(f"<p class=faint>{html.text(line)}</p>" for line in (*analysis.outputs(found), *found["notices"]))
    rows = [analysis.cells(layer) for layer in found["layers"]]
    table = html.table(analysis.TITLES, rows, range(2, len(analysis.TITLES)))
    return html.page(name, (f"<header><h1>{name}</h1><p class=faint>{html.text(analysis.heading(found))}</p></header>",
                            notes, f"<div class=wide>{svg(found)}</div>", "<h2>Figures</h2>", table))


def svg(found: Mapping[str, Any]) -> str:
    """A standalone drawing: SQNR in dB of each layer's result, by itself and accumulated; longer bars are better."""
    layers, name = found["layers"], html.text(PurePath(found["model"]).name)
    height, width = _TOP + _ROW * len(layers) + _BOTTOM, _LEFT + _WIDE + _RIGHT
    low, high = _bounds(layers)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="onnxq-plot" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img">',
        f"<title>SQNR by layer: {html.text(analysis.heading(found))}</title>", f"<style>{_STYLE}</style>",
        f'<rect class="ground" width="{width}" height="{height}"/>',
        f'<text class="heading" x="12" y="20">{name}: SQNR of each layer in dB</text>',
        *_legend(), *_grid(low, high, height)]
    for index, layer in enumerate(layers):
        parts += _layer(layer, _TOP + _ROW * index, low, high)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bounds(layers: list[Mapping[str, Any]]) -> tuple[float, float]:
    """Whole steps around all figures and 0; what has no figure at all does not stretch them."""
    values = [v for layer in layers for _, key, _ in _SERIES if (v := layer[key]) is not None and v > -100.0]
    return (_STEP * math.floor(min(values, default=0.0) / _STEP) if min(values, default=0.0) < 0 else 0.0,
            _STEP * max(math.ceil(max(values, default=0.0) / _STEP), 1))


def _legend() -> Iterator[str]:
    x = 12
    for name, _, meaning in _SERIES:
        yield f'<rect class="{name}" x="{x}" y="31" width="12" height="12" rx="2"/>'
        yield f'<text x="{x + 18}" y="41">{name}: {meaning}</text>'
        x += 230


def _grid(low: float, high: float, height: int) -> Iterator[str]:
    for k in range(round((high - low) / _STEP) + 1):
        value = low + k * _STEP
        x = _x(value, low, high)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{height - _BOTTOM}"/>'
        yield f'<text class="faint" x="{x:.1f}" y="{_TOP - 12}" text-anchor="middle">{value:.0f}</text>'


def _layer(layer: Mapping[str, Any], top: int, low: float, high: float) -> Iterator[str]:
    name = wording.clean(layer["name"])
    figures = ", ".join(f"{title} {cell}" for title, cell in zip(analysis.TITLES[1:], analysis.cells(layer)[1:],
                                                                  strict=True))
    short = name if len(name) <= _LONGEST else "…" + name[1 - _LONGEST:]
    yield f"<g><title>{html.text(name)}: {html.text(figures)}</title>"
    yield f'<text x="{_LEFT - 10}" y="{top + 14}" text-anchor="end">{html.text(short)}</text>'
    zero = _x(max(low, 0.0), low, high)
    for k, (kind, key, _) in enumerate(_SERIES):
        value, y = layer[key], top + 2 + k * (_BAR + 1)
        end = _x(high if value is None else min(max(value, low), high), low, high)  # identical: to the edge
        yield (f'<rect class="{kind}" x="{min(zero, end):.1f}" y="{y}" width="{max(abs(end - zero), 1.0):.1f}" '
               f'height="{_BAR}" rx="2"/>')
        yield (f'<text class="figure faint" x="{max(zero, end) + 4:.1f}" y="{y + _BAR - 1}">'
               f"{wording.decibels(value).removesuffix(' dB')}</text>")
    yield "</g>"


def _x(value: float, low: float, high: float) -> float:
    return _LEFT + _WIDE * (value - low) / (high - low)
