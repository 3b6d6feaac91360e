"""What packing weights did, in words: encodings by what they store, weights in groups of like ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxq.report import wording

TITLES = ("weight", "shape", "stored as", "zeros", "dense", "packed", "share")
MOST_ROWS = 20

Found = Mapping[str, Any]


def encoding(names: Sequence[str]) -> str:
    """Encodings from the outermost one on, in words: 'bitmap, values in 4 bits and exceptions'."""
    outer, inner = names[0], list(names[1:])
    kind, *numbers = outer.split("_")
    if kind == "Transposed":
        return f"{encoding(inner)}, along axis 0"
    if kind == "Planes":
        return f"{numbers[0]} bits"
    if kind == "Codebook":
        return f"places in a table of {2 ** int(numbers[0])}"
    if kind == "Filled":
        return "one value"
    if kind == "Exceptions":
        if inner[0] == "Filled":
            return f"steps, {_values(inner[1:])}"
        return f"{encoding(inner)} and exceptions"
    named = f"{numbers[0]}:{numbers[1]}" if kind.endswith("Groups") else "bitmap"
    return f"{named}, {_values(inner)}"


def _values(inner: Sequence[str]) -> str:
    return f"values in {encoding(inner)}" if inner else "values"


def rows(weights: Sequence[Found]) -> list[tuple[str, ...]]:
    """Of weights, the largest first, cells under TITLES; of those read from a packed model no share of zeros."""
    ordered = sorted(weights, key=lambda weight: -int(weight["dense_bytes"]))
    return [(wording.clean(w["name"]), wording.shape(w["shape"]), encoding(w["encodings"]),
             f"{w['zeros']:.0%}" if "zeros" in w else "-", wording.size(w["dense_bytes"]),
             wording.size(w["packed_bytes"]), f"{w['packed_bytes'] / w['dense_bytes']:.1%}") for w in ordered]


def total(found: Found) -> str:
    """The file before and after."""
    dense, packed = found["size"]["dense"], found["size"]["packed"]
    count = wording.plural(len(found["weights"]), "weight")
    return f"{count} packed: file {wording.size(packed)}, dense {wording.size(dense)} ({packed / dense:.1%})"


def conditions(found: Found) -> list[str]:
    """What a packed model costs, and what more memory would allow."""
    lines = [f"loading takes an estimated {wording.size(found['peak'])} of memory, dense "
             f"{wording.size(found['dense_peak'])}; allowed were {wording.size(found['limit'])}",
             "the weights are decoded once, as the model is loaded: speed and memory are then the dense model's"]
    stored = sum(w["packed_bytes"] for w in found["weights"])
    spared = found["packed_bytes"] - found["fewest_bytes"]
    if (stored and spared > 0.02 * found["size"]["packed"]) or (not stored and spared > 0):
        lines.append(f"another {wording.size(spared)} could go with --load-memory {_rounded(found['fewest_peak'])}")
    return lines


def _rounded(count: int) -> str:
    """Bytes as --load-memory takes them, rounded up."""
    return f"{-(-count // 1_000_000)}MB"
