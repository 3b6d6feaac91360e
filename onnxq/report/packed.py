"""What packing weights did, in words: encodings by what they store, weights in groups of like ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onnxq.report import wording

TITLES = ("weight", "shape", "stored as", "zeros", "dense", "packed", "share")
MOST_ROWS = 20
_WORTH_TELLING = 0.02  # of the bytes of weights

Found = Mapping[str, Any]


def encoding(names: Sequence[str]) -> str:
    """Encodings from the outermost one on, in words: 'bitmap, values in 4 bits and exceptions'."""
    outer, inner = names[0], list(names[1:])
    kind, *numbers = outer.split("_")
    if kind == "SparseInitializer":
        return "sparse initializer"
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


def summary(packing: Found) -> Iterator[str]:
    """What packing did in a report: weights by encoding, and what loading takes."""
    weights = packing["weights"]
    saved = sum(w["dense_bytes"] - w["packed_bytes"] for w in weights)
    yield f"{wording.plural(len(weights), 'weight')} packed, {wording.size(saved)} saved"
    by_encoding: dict[str, list[Found]] = {}
    for weight in weights:
        by_encoding.setdefault(encoding(weight["encodings"]), []).append(weight)
    for name, members in by_encoding.items():
        dense, small = (sum(w[key] for w in members) for key in ("dense_bytes", "packed_bytes"))
        yield f"  {len(members)} as {name}: {wording.size(dense)} to {wording.size(small)}"
    yield from conditions(packing)


def total(found: Found) -> str:
    """The file before and after."""
    dense, packed = found["size"]["dense"], found["size"]["packed"]
    count = wording.plural(len(found["weights"]), "weight")
    return f"{count} packed: file {wording.size(packed)}, dense {wording.size(dense)} ({packed / dense:.1%})"


def conditions(found: Found) -> list[str]:
    """What a packed model costs, and what more memory would allow."""
    if found.get("form") == "sparse-initializer":
        return ["a sparse initializer takes 8 bytes and the value for each element that is not 0: int8 gains from 89 % "
                "zeros on, float32 from 67 %", "the runtime makes weights dense as it loads the model: zeros save "
                "bytes, not time; --as functions is smaller"]
    lines = [f"loading takes an estimated {wording.size(found['peak'])} of memory, dense "
             f"{wording.size(found['dense_peak'])}; allowed were {_limit(found['limit'])}",
             "weights are decoded once, as the model is loaded, and run as dense ones do: zeros save bytes, not time"]
    spared = found["packed_bytes"] - found["fewest_bytes"]
    if spared > _WORTH_TELLING * found["packed_bytes"]:
        lines.append(f"another {wording.size(spared)} could go with --load-memory {_rounded(found['fewest_peak'])}")
    return lines


def _limit(count: int) -> str:
    """The limit; none where one on the file's size goes before it."""
    return "any" if count == sys.maxsize else wording.size(count)


def _rounded(count: int) -> str:
    """Bytes as --load-memory takes them, rounded up."""
    return f"{-(-count // 1_000_000)}MB"
