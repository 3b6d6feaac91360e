"""A sweep as a table, as lines and as drawings."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from onnxq.errors import OutputError, UsageError
from onnxq.report import plot, sweep, sweep_plot, terminal

SVG = "{http://www.w3.org/2000/svg}"


def row(size: int, bits: int, count: int, error: float, db: float | None, metric: float | None) -> dict[str, Any]:
    times = [{"float_ms": 2.0, "compiled_ms": 1.0, "speedup": 2.0, "low": 1.9, "high": 2.1},
             {"float_ms": 8.0, "compiled_ms": 16.0, "speedup": 0.5, "low": 0.4, "high": 0.6}]
    return {"group_size": size, "bits": bits, "bytes": count, "weight_error": error, "sqnr_db": db, "metric": metric,
            "latency": times}


def found(metric: str | None = "perplexity", known: bool = True) -> dict[str, Any]:
    rows = [row(size, bits, 1000 * size * bits, 0.4 / bits + size / 1e4, 30.0 - size / 100 if known else None,
                13.9 + size / 1000 if metric else None) for size in (32, 128) for bits in (4, 8)]
    return {"model": "folder/<m>.onnx", "scheme": "w4a16", "target": "cpu", "metric": metric, "data": "eval.npz",
            "vary": ["group_size", "bits"], "float": {"bytes": 4_000_000, "metric": 13.8 if metric else None},
            "feeds": [{"ids": [1, 1], "mask": [1, 1]}, {"ids": [1, 64], "mask": [1, 64]}], "threads": 2, "rows": rows,
            "notices": ["by the way"]}


def test_the_table() -> None:
    told = found()
    assert sweep.titles(told) == ["group size", "bits", "size", "of float", "weight error", "output", "perplexity",
                                  "speed 1x1", "speed 1x64"]
    assert sweep.cells(told, told["rows"][0]) == ["32", "4", "128.0 kB", "3.2%", "10.32%", "29.7 dB", "13.932",
                                                  "2.00x, 1.00 ms", "0.50x, 16.0 ms"]
    text = terminal.sweep(told)
    assert "<m>.onnx: w4a16 on cpu, 4 combinations" in text
    assert "float: 4.0 MB, perplexity 13.8" in text
    assert "float's time / the compiled model's, 2 threads, on ids 1x1, mask 1x1; ids 1x64, mask 1x64" in text
    assert len(text.splitlines()) == 1 + 1 + 1 + 4 + 3


def test_what_is_not_known_is_a_dash() -> None:
    told = found(None, False)
    assert "perplexity" not in sweep.titles(told)
    assert sweep.cells(told, told["rows"][0])[5] == "-"
    assert len(sweep.cells(told, told["rows"][0])) == len(sweep.titles(told))


def test_a_line_for_each_combination() -> None:
    told = found()
    assert terminal.combination(told["rows"][1]) == (
        "group_size 32, bits 8: 256.0 kB, weight error 5.32%, output 29.7 dB, metric 13.932, 2.00x float, 0.50x float")
    assert "metric" not in terminal.combination(found(None)["rows"][0])


@pytest.mark.parametrize(("shapes", "names"), [
    ([{"x": [1, 8]}], ["1x8"]), ([{"x": [1, 8], "y": [2]}, {"x": [1, 8], "y": [3]}], ["2", "3"]),
    ([{"x": [a], "y": [b]} for a in (1, 2) for b in (1, 2)], ["1 1", "1 2", "2 1", "2 2"])])
def test_feeds_are_called_by_what_tells_them_apart(shapes: list[dict[str, list[int]]], names: list[str]) -> None:
    assert sweep.feeds(found() | {"feeds": shapes}) == names


def test_the_drawing_has_a_panel_for_each_figure_and_a_point_for_each_combination() -> None:
    drawn = ElementTree.fromstring(sweep_plot.svg(found()))
    titles = [t.text for t in drawn.iter(f"{SVG}text")]
    panels = ["weight error, %", "output SQNR, dB", "perplexity", "speed 1x1, x float", "speed 1x64, x float"]
    assert [t for t in titles if t in panels] == panels
    assert len(list(drawn.iter(f"{SVG}circle"))) == 5 * 4
    assert len(list(drawn.iter(f"{SVG}polyline"))) == 5 * 2  # a line for each number of bits
    assert titles[0] == "<m>.onnx: w4a16 on cpu, 4 combinations"
    width, height = (float(drawn.attrib[key]) for key in ("width", "height"))
    for point in drawn.iter(f"{SVG}circle"):
        assert 0 < float(point.attrib["cx"]) < width
        assert 0 < float(point.attrib["cy"]) < height
    assert any(t is not None and "bits 8: 128: 1.0 MB" in t for t in (t.text for t in drawn.iter(f"{SVG}title")))


def test_what_is_not_known_has_no_panel() -> None:
    drawn = ElementTree.fromstring(sweep_plot.svg(found(None, False)))
    assert "output SQNR, dB" not in [t.text for t in drawn.iter(f"{SVG}text")]
    assert len(list(drawn.iter(f"{SVG}circle"))) == 3 * 4


def test_one_combination_is_drawn_too() -> None:
    told = found()
    drawn = ElementTree.fromstring(sweep_plot.svg(told | {"rows": told["rows"][:1], "vary": ["group_size"]}))
    assert len(list(drawn.iter(f"{SVG}circle"))) == 5


def test_the_page_has_all_figures_and_notices() -> None:
    page = sweep_plot.page(found())
    assert "&lt;m&gt;.onnx" in page
    assert "<m>" not in page
    for text in ("by the way", "10.32%", "0.50x, 16.0 ms", "<svg"):
        assert text in page


def test_files(tmp_path: Path) -> None:
    for name in ("s.svg", "s.html"):
        plot.write(tmp_path / name, lambda: "drawn", lambda: "paged")
    assert (tmp_path / "s.svg").read_text() == "drawn"
    assert (tmp_path / "s.html").read_text() == "paged"
    with pytest.raises(UsageError, match=r"\.html or \.svg"):
        plot.write(tmp_path / "s.png", lambda: "", lambda: "")
    with pytest.raises(OutputError, match="name another file"):
        plot.write(tmp_path / "missing" / "s.svg", lambda: "", lambda: "")
