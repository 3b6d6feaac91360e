"""An exported folder in words: what is in it, and how far its models are from what is expected of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console

from onnxq.report import drawing, wording

TITLES = ("model", "output", "error", "allowed", "")
MOST_ROWS = 8

Found = Mapping[str, Any]


def text(found: Found) -> str:
    """The result of onnxq.exporting.export or verify_bundle: a table between its title and its notes."""

    def draw(console: Console) -> None:
        drawing.line(console, title(found), "bold")
        if found["models"]:
            console.print(drawing.table(TITLES, rows(found)))
        for note in notes(found):
            drawing.line(console, note, "dim")

    return drawing.text(draw)


def title(found: Found) -> str:
    """What was exported or verified."""
    name = found["model"] if "output" in found else found["bundle"]
    return f"{wording.clean(str(name))}: {found['format']} with the sample {wording.clean(found['sample'])}"


def rows(found: Found) -> list[tuple[str, ...]]:
    """Cells under TITLES; of a model with many outputs the worst ones, by the share of what is allowed."""
    by_file: dict[str, list[Found]] = {}
    for row in found["models"]:
        by_file.setdefault(row["file"], []).append(row)
    return [(wording.clean(row["file"]), wording.clean(row["output"]), _error(row["error"]),
             f"{row['tolerance']:g}", "ok" if row["ok"] else "wrong")
            for members in by_file.values() for row in sorted(members, key=_share)[:MOST_ROWS]]


def notes(found: Found) -> Iterator[str]:
    """Outputs that are not shown, sizes, and what was measured."""
    more = len(found["models"]) - len(rows(found))
    if more > 0:
        yield f"{wording.plural(more, 'output')} more, nearer to what is expected"
    sizes = found.get("size", {})
    if len(sizes) > 1:
        own, *written = (f"{wording.clean(name)} {wording.size(count)}" for name, count in sizes.items())
        yield f"the {own} -> {', '.join(written)}"
    measured = found.get("measured") or {}
    accuracy, latency = measured.get("accuracy"), measured.get("latency")
    if accuracy is not None:
        yield (f"{accuracy['metric']} was {wording.score(accuracy['metric'], accuracy['compiled'])} on "
               f"{accuracy['rows']} rows of {wording.clean(accuracy['data'])}")
    if latency is not None:
        yield (f"latency was {wording.milliseconds(latency['compiled_ms'])}, {latency['speedup']:.2f}x as fast as "
               "float")


def _error(error: float | None) -> str:
    return "another type or shape" if error is None else f"{error:.3g}"


def _share(row: Found) -> float:
    """The worst first."""
    if row["error"] is None:
        return -float("inf")
    error, allowed = float(row["error"]), float(row["tolerance"])
    return -error / allowed if allowed else -error
