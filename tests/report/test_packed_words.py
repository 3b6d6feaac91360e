"""What packing did, in words, on the terminal and on the page."""

from __future__ import annotations

from typing import Any

import pytest

from onnxq.numerics import encodings
from onnxq.report import packed, terminal
from onnxq.report.html import render
from onnxq.report.report import Report

PACKING: dict[str, Any] = {
    "weights": [
        {"name": "small", "encodings": ["Bitmap"], "shape": [8, 16], "zeros": 0.5, "dense_bytes": 128,
         "packed_bytes": 80},
        {"name": "large\x1b[31m<b>", "encodings": ["Exceptions", "Planes_4"], "shape": [100, 20], "zeros": 0.125,
         "dense_bytes": 2000, "packed_bytes": 1050}],
    "limit": 90_000_000, "dense_peak": 50_000_000, "peak": 80_000_000, "packed_bytes": 1130, "fewest_bytes": 1000,
    "fewest_peak": 120_000_001}


@pytest.mark.parametrize(("names", "words"), [
    (["Planes_4"], "4 bits"),
    (["Exceptions", "Planes_5"], "5 bits and exceptions"),
    (["Exceptions", "Filled"], "steps, values"),
    (["Exceptions", "Filled", "Planes_4"], "steps, values in 4 bits"),
    (["Exceptions", "Filled", "Exceptions", "Planes_4"], "steps, values in 4 bits and exceptions"),
    (["Bitmap"], "bitmap, values"),
    (["FloatBitmap"], "bitmap, values"),
    (["Bitmap", "Exceptions", "Planes_6"], "bitmap, values in 6 bits and exceptions"),
    (["Groups_2_4_3", "Planes_4"], "2:4, values in 4 bits"),
    (["Transposed", "FloatGroups_4_8_1"], "4:8, values, along axis 0"),
    (["Codebook_2"], "places in a table of 4"),
    (["Filled"], "one value"),
])
def test_encodings(names: list[str], words: str) -> None:
    assert all(encodings.part_names(name) for name in names)
    assert packed.encoding(names) == words


def test_summary_of_a_compilation() -> None:
    text = terminal.summary(Report("m.onnx", "o.onnx", "w8a8", packing=PACKING)).splitlines()
    assert text[-6:] == [
        "2 weights packed, 998 B saved",
        "  1 as bitmap, values: 128 B to 80 B",
        "  1 as 4 bits and exceptions: 2.0 kB to 1.1 kB",
        "loading takes an estimated 80.0 MB of memory, dense 50.0 MB; allowed were 90.0 MB",
        "weights are decoded once, as the model is loaded, and run as dense ones do: zeros save bytes, not time",
        "another 130 B could go with --load-memory 121MB"]
    assert "packed" not in terminal.summary(Report("m.onnx", "o.onnx", "w8a8"))


def test_more_memory_is_told_where_it_helps() -> None:
    assert not any("--load-memory" in line for line in packed.conditions({**PACKING, "fewest_bytes": 1120}))


def test_table_of_a_command() -> None:
    found = {**PACKING, "form": "functions", "size": {"dense": 3000, "packed": 2000}}
    lines = terminal.packed(found).splitlines()
    assert lines[1].split() == ["large\\x1b[31m<b>", "100x20", "4", "bits", "and", "exceptions", "12%", "2.0", "kB",
                                "1.1", "kB", "52.5%"]
    assert lines[2].split() == ["small", "8x16", "bitmap,", "values", "50%", "128", "B", "80", "B", "62.5%"]
    assert lines[3] == "2 weights packed: file 2.0 kB, dense 3.0 kB (66.7%)"
    assert len(lines) == 7


def test_only_the_largest_weights_are_listed() -> None:
    weights = [{**PACKING["weights"][0], "name": f"w{k}", "dense_bytes": 1000 + k} for k in range(30)]
    lines = terminal.packed({"weights": weights, "size": {"dense": 3000, "packed": 2000}}).splitlines()
    assert lines[1].startswith("w29 ")
    assert len(lines) == 1 + packed.MOST_ROWS + 2
    assert lines[-2] == "+10 more, see --json"
    nothing = terminal.packed({"weights": [], "size": {"dense": 3000, "packed": 3000}})
    assert nothing == "0 weights packed: file 3.0 kB, dense 3.0 kB (100.0%)"


def test_page() -> None:
    page = render(Report("m.onnx", "o.onnx", "w8a8", packing=PACKING))
    assert "<h2>Packed weights</h2>" in page
    assert "4 bits and exceptions" in page
    assert "large\\x1b[31m&lt;b&gt;" in page
    assert "Packed weights" not in render(Report("m.onnx", "o.onnx", "w8a8"))
