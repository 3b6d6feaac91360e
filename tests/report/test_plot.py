"""The table of an analysis and its drawing: the order, the words, well-formed and escaped, whatever the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_html import HOSTILE, Page

from onnxq.errors import OutputError, UsageError
from onnxq.report import analysis, plot, terminal

SVG = "{http://www.w3.org/2000/svg}"


def layer(name: str, alone: float | None = 30.0, accumulated: float | None = 25.0, **more: Any) -> dict[str, Any]:
    return {"name": name, "op": "MatMul", "kernel": "QLinearMatMul", "reads": "x", "makes": "y", "sqnr_db": alone,
            "accumulated_db": accumulated, "range_parm": 4.0, "kurtosis": 0.1, "clipped": 0.0, "low": -1.0,
            "high": 1.5, "scale": 0.0098, "zero_point": 102, **more}


def analyzed(*layers: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "models/m.onnx", "scheme": "w8a8", "target": "cpu", "data": "calib.npz", "rows": 128,
            "layers": list(layers), "outputs": {"logits": 33.3}, "notices": [], "recipe": {}, "environment": {}, **more}


LAYERS = (
    layer("a", 30.0, 29.0, range_parm=5.0, kurtosis=9.0, clipped=0.0),
    layer("b", None, 20.0, range_parm=50.0, kurtosis=-1.0, clipped=None, low=None, high=None, scale=None),
    layer("c", 10.0, 40.0, range_parm=5.0, kurtosis=3.0, clipped=0.25),
    layer("d", -5.0, None, range_parm=1.0, kurtosis=3.0, clipped=0.0002))


@pytest.mark.parametrize(("sort", "order"), [
    ("sqnr", "dcab"), ("accumulated", "bacd"), ("range_parm", "bacd"), ("kurtosis", "acdb"), ("clipped", "cdab")])
def test_the_worst_comes_first(sort: str, order: str) -> None:
    assert "".join(found["name"] for found in analysis.worst_first(LAYERS, sort)) == order


def test_the_table() -> None:
    lines = terminal.layers(analyzed(*LAYERS), "sqnr", 3).splitlines()
    assert lines[0] == "models/m.onnx: 4 layers under w8a8 on cpu, 128 rows of calib.npz"
    assert lines[2].split() == list(analysis.TITLES)
    assert [line.split()[0] for line in lines[3:6]] == ["d", "c", "a"]
    assert " ".join(lines[3].split()) == "d MatMul -5.0 dB identical 1.0 3.0 0.02 % -1 to 1.5 0.0098"
    assert lines[6:] == ["+1 more, see --top or --json",
                         "output logits: SQNR 33.3 dB with all of them quantized"]
    at_run_time = terminal.layers(analyzed(*LAYERS), "range_parm", 1).splitlines()[3]
    assert " ".join(at_run_time.split()) == "b MatMul identical 20.0 dB 50.0 -1.0 - at run time -"
    assert terminal.layers(analyzed(rows=None, outputs={}), "sqnr", 3) == (
        "models/m.onnx: 0 layers under w8a8 on cpu, calib.npz")
    many = terminal.layers(analyzed(*LAYERS, outputs={f"o{k}": None for k in range(6)}), "sqnr", 9).splitlines()
    assert many[-2:] == ["output o3: SQNR identical with all of them quantized", "+2 more outputs"]


def test_names_can_not_steer_a_terminal() -> None:
    assert "\x1b" not in terminal.layers(analyzed(layer(HOSTILE), model=HOSTILE), "sqnr", 3)


def bars(text: str, kind: str) -> list[tuple[float, float]]:
    """(x, width) of the bars of a series, in order; the first rectangle is the legend's."""
    found = [r for r in ElementTree.fromstring(text).iter(f"{SVG}rect") if r.get("class") == kind]
    return [(float(r.get("x", "")), float(r.get("width", ""))) for r in found[1:]]


def test_bars_are_as_long_as_their_figures() -> None:
    text = plot.svg(analyzed(layer("a", 30.0, 15.0), layer("b", 20.0, None), layer("c", 0.0, -300.0)))
    (zero, thirty), (_, twenty), (_, none) = bars(text, "alone")
    assert twenty == pytest.approx(thirty * 2 / 3, abs=0.1)
    assert none == 1.0
    assert [x for x, _ in bars(text, "accumulated")] == [zero] * 3
    assert [width for _, width in bars(text, "accumulated")] == pytest.approx([thirty / 2, thirty, 1.0], abs=0.1)
    texts = [t.text for t in ElementTree.fromstring(text).iter(f"{SVG}text")]
    assert {"30.0", "15.0", "identical", "-300.0", "0", "10", "20"} <= set(texts)


def test_below_zero_bars_go_to_the_left() -> None:
    (zero, _), (left, width) = bars(plot.svg(analyzed(layer("a", 20.0), layer("b", -8.0))), "alone")
    assert left < zero
    assert left + width == pytest.approx(zero, abs=0.2)


@pytest.mark.parametrize("layers", [(), LAYERS, tuple(layer(f"l{k}") for k in range(3000))])
def test_any_number_of_layers_is_well_formed(layers: tuple[dict[str, Any], ...]) -> None:
    root = ElementTree.fromstring(plot.svg(analyzed(*layers)))
    assert len(root.findall(f"{SVG}g")) == len(layers)
    Page(plot.page(analyzed(*layers)))


def test_everything_is_escaped_and_nothing_fetched() -> None:
    found = analyzed(layer(HOSTILE), model=HOSTILE, data=HOSTILE, outputs={HOSTILE: 1.0}, notices=[HOSTILE])
    drawing, whole = plot.svg(found), plot.page(found)
    ElementTree.fromstring(drawing)
    page = Page(whole)
    assert "script" not in page.tags
    assert {name for name, _ in page.attributes}.isdisjoint({"href", "src", "onclick"})
    for text in (drawing, whole):
        assert "\x1b" not in text
        text.encode("utf-8")


def test_long_names_keep_their_end_and_are_told_in_full() -> None:
    name = "/model/" + "layers/" * 20 + "down_proj"
    root = ElementTree.fromstring(plot.svg(analyzed(layer(name))))
    [group] = root.findall(f"{SVG}g")
    assert str(group[0].text).startswith(f"{name}: operator MatMul, alone 30.0 dB, accumulated 25.0 dB")
    assert str(group[1].text).startswith("…")
    assert str(group[1].text).endswith("down_proj")


def test_files(tmp_path: Path) -> None:
    found = analyzed(*LAYERS)
    plot.save(found, tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_text(encoding="utf-8") == plot.svg(found)
    plot.save(found, tmp_path / "p.HTML")
    page = Page((tmp_path / "p.HTML").read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 1
    assert page.tags.count("tr") == 1 + len(LAYERS)
    with pytest.raises(UsageError, match=r"can't be written as 'p.png'; name a file that ends in .html or .svg"):
        plot.save(found, tmp_path / "p.png")
    with pytest.raises(OutputError, match="name another file"):
        plot.save(found, tmp_path / "nowhere" / "p.svg")
