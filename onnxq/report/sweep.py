"""The result of onnxq.sweep as a table: a row for each combination, columns for what it takes, costs and gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from onnxq.report import wording

FIGURES = frozenset({"bytes", "latency", "metric", "sqnr_db", "weight_error"})  # of a row; the rest is what varies

Found = Mapping[str, Any]


def titles(found: Found) -> list[str]:
    """Of the columns, those that vary first; of times those that tell the feeds apart."""
    metric = [found["metric"]] if found["metric"] is not None else []
    return [*(name.replace("_", " ") for name in found["vary"]), "size", "of float", "weight error", "output", *metric,
            *(f"speed {label}" for label in feeds(found))]


def cells(found: Found, row: Found) -> list[str]:
    """A combination's row under `titles`."""
    metric = [] if found["metric"] is None else [wording.score(found["metric"], row["metric"])]
    return [*(str(row[name]).lower() for name in found["vary"]), wording.size(row["bytes"]),
            f"{row['bytes'] / max(found['float']['bytes'], 1):.1%}", f"{row['weight_error']:.2%}",
            decibels(row), *metric,
            *(f"{one['speedup']:.2f}x, {wording.milliseconds(one['compiled_ms'])}" for one in row["latency"])]


def heading(found: Found) -> str:
    """What was swept."""
    count = wording.plural(len(found["rows"]), "combination")
    return wording.clean(f"{PurePath(found['model']).name}: {found['scheme']} on {found['target']}, {count}")


def conditions(found: Found) -> list[str]:
    """What the figures are told against, and where they come from."""
    before = found["float"]
    name = found["metric"]
    score = "" if before["metric"] is None else f", {name} {wording.score(name, before['metric'])}"
    shapes = [", ".join(f"{wording.clean(name)} {wording.shape(feed[name])}" for name in _differing(found))
              for feed in found["feeds"]]
    threads = f", {wording.threads(found['threads'])}" if found["threads"] else ""
    return [f"float: {wording.size(before['bytes'])}{score}",
            wording.clean(f"output: SQNR of the first one; on {found['data']}"),
            f"speed: float's time / the compiled model's{threads}, on {'; '.join(shapes)}"]


def feeds(found: Found) -> list[str]:
    """A short name of each feed: the sizes of as few of its inputs as tell feeds apart."""
    names = _differing(found)
    for count in range(1, len(names) + 1):
        found_names = [" ".join(wording.shape(feed[name]) for name in names[:count]) for feed in found["feeds"]]
        if len(set(found_names)) == len(found_names):
            break
    return found_names


def _differing(found: Found) -> list[str]:
    """Inputs whose sizes differ from feed to feed; the first one where none does."""
    shapes: Sequence[Mapping[str, Sequence[int]]] = found["feeds"]
    return [name for name in shapes[0] if len({tuple(feed[name]) for feed in shapes}) > 1] or list(shapes[0])[:1]


def decibels(row: Found) -> str:
    """The SQNR of the output, '-' where it is not known."""
    return "-" if row["sqnr_db"] is None else wording.decibels(row["sqnr_db"])
