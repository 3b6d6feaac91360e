"""Targets in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from onnxq.report import drawing

Facts = Mapping[str, Any]


def fact_rows(found: Facts) -> list[tuple[str, str]]:
    """What a target states, apart from its kernels, as (what, words)."""
    with_data, without = found["auto"]
    rows = [("provider", found["provider"]), ("format", found["format"]),
            ("schemes", ", ".join(found["schemes"])),
            ("scheme auto", f"{with_data} with calibration data, {without} without"),
            ("activations", found["activations"]), ("weights", found["weights"]),
            ("biases", found["biases"]), ("float parts", found["floats"]),
            ("onnxruntime", f"{found['since']} and later" + (
                f", opset {found['opset']} at most" if found["opset"] is not None else ""))]
    if found["blocks"] is not None:
        bits, sizes = (", ".join(map(str, found["blocks"][key])) for key in ("bits", "sizes"))
        rows.append(("weights in blocks", f"{bits} bits, blocks of {sizes}; others are decoded at load"))
    if found["saturates"]:
        rows.append(("saturation", "two products of uint8 by int8 never leave 16 bits: scales leave room"))
    if found["fixed_sizes"]:
        rows.append(("sizes", "fixed: each free axis gets one with --shape"))
    for what in ("session_options", "provider_options"):
        if found[what]:
            rows.append((what.replace("_", " "), ", ".join(f"{k}={v}" for k, v in found[what].items())))
    if found["operators"] is not None:
        rows.append(("operators", f"{len(found['operators'])} of ONNX: {', '.join(found['operators'])}"))
    return rows + list(found["limits"].items())


def one(found: Facts) -> str:
    """All that is known of a target."""

    def draw(console: Console) -> None:
        drawing.line(console, f"{found['name']}: {found['summary']}", "bold")
        drawing.line(console)
        console.print(drawing.table(("fact", ""), fact_rows(found)))
        if found["kernels"]:
            drawing.line(console)
            console.print(drawing.table(("operator", "result", "kernel"),
                                        [(k["operator"], k["result"], k["kernel"]) for k in found["kernels"]]))

    return drawing.text(draw)


def every(rows: Sequence[tuple[Facts, bool]]) -> str:
    """Targets with their summaries, and whether their models run on this machine."""
    cells = [(f["name"], f["summary"], f["provider"], f["auto"][0], "yes" if here else "no") for f, here in rows]
    return drawing.text(lambda console: console.print(
        drawing.table(("target", "for", "provider", "scheme auto", "runs here"), cells)))
