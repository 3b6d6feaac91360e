"""Which encoding each weight gets: the fewest bytes together, inside what may be in memory while a model is loaded.

The runtime decodes one weight after the other, but what the decoders compute on the way is freed only when all are
done. `left_behind` is what a weight adds to that, `held` what its decoder takes besides while it runs. The peak of a
load is near

    BASE + the file + what is left behind, of all weights + the most that is held, of one + the dense weights

since kernels lay the dense weights out anew; that of a dense model is BASE + twice the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.numerics import encodings
from onnxq.numerics.allocation import Option, allocate, least
from onnxq.numerics.encodings import Declared, Encoded, Outline

Array = npt.NDArray[Any]

BASE = 45_000_000  # bytes of a process with the runtime and no model; measured: onnxruntime 1.32, Linux
MOST_FOLDED = 1 << 30  # bytes of one result; the runtime leaves what makes a larger one to be computed in each run
LEAST_GAIN = 0.1  # of a weight's bytes: less is not worth what decoding takes
PATTERNS = ((2, 4), (4, 8), (1, 4))
# Bytes that a decoder takes beyond its results, measured as the peak of loading one weight: of an exception, of an
# element behind a bitmap, in groups.
_HELD_BY_EXCEPTION, _HELD_BY_BITMAP, _HELD_BY_GROUPS = 12, 3, 2
_STEP_BYTES = 2.1  # of an exception: a step of 8 bits and a value, and now and then an entry on the way
_FINEST = 0.01  # of the memory: bounds on what one decoder holds are tried down to this share
_LOOKS_SPARSE = 0.1  # zeros below this share are not worth a bit for each element
_DTYPES = ("int8", "uint8", "float32")


@dataclass(frozen=True)
class Form:
    """How to encode: `kind` narrow, bitmap, gaps, groups or codebook; `bits` of its codes or of the values in it (8: as
    they are); `pattern` and `axis` of groups."""

    kind: str
    bits: int = 8
    pattern: tuple[int, int] = (0, 0)
    axis: int = -1

    def encode(self, values: Array) -> Encoded:
        """Encode an array [..]. ValueError where its values or its size don't fit."""
        if self.kind == "narrow":
            return encodings.narrow(values, self.bits)
        if self.kind == "bitmap":
            return encodings.bitmap(values, self.bits)
        if self.kind == "groups":
            return encodings.groups(values, self.pattern, self.axis, self.bits)
        if self.kind == "gaps":
            return encodings.gaps(values, self.bits)
        return encodings.codebook(values, self.bits)


@dataclass(frozen=True)
class Choice:
    """A form of one weight (none: dense), its outline, bytes in the file, and what its decoder leaves and holds."""

    form: Form | None
    outline: Outline | None
    nbytes: int
    left: int = 0
    held: int = 0


def choices(values: Array) -> list[Choice]:
    """The dense form of a weight [..] first, then each encoding that takes clearly fewer bytes."""
    found = [Choice(None, None, values.nbytes)]
    if str(values.dtype) not in _DTYPES or not values.size:
        return found
    for form in _forms(values):
        try:
            outline = form.encode(values).outline()
        except ValueError:  # a size that doesn't fill bytes
            continue
        if outline.nbytes <= (1 - LEAST_GAIN) * values.nbytes and largest(outline) <= MOST_FOLDED:
            found.append(Choice(form, outline, outline.nbytes, left_behind(outline), held(outline)))
    return found


def choose(weights: Sequence[Sequence[Choice]], most: int) -> list[int]:
    """The index of each weight's choice: the fewest bytes in the file with at most `most` bytes in memory, of the file,
    of what decoders leave behind and of what one holds. Where even the least is more, that.

    A multiple-choice knapsack (see allocation), once for each of several bounds on what one may hold.
    """
    best: list[int] = []
    bound = max((choice.held for found in weights for choice in found), default=0)
    while True:
        allowed = [[k for k, choice in enumerate(found) if choice.held <= bound] for found in weights]
        items = [[Option(found[k].nbytes + found[k].left, found[k].nbytes) for k in kept]
                 for found, kept in zip(weights, allowed, strict=True)]
        picked = allocate(items, max(most - bound, least(items)))
        chosen = [kept[index] for kept, index in zip(allowed, picked, strict=True)]
        if (best == [] or _bytes(weights, chosen) < _bytes(weights, best)) and (
                most - bound >= least(items) or bound == 0):
            best = chosen
        if bound == 0:
            return best
        bound = bound // 2 if bound > most * _FINEST else 0


def peak(weights: Sequence[Choice], dense: int) -> int:
    """The estimated peak of loading a model with weights so, which take `dense` bytes when they are decoded."""
    return BASE + dense + sum(c.nbytes + c.left for c in weights) + max((c.held for c in weights), default=0)


def _bytes(weights: Sequence[Sequence[Choice]], picked: Sequence[int]) -> int:
    return sum(found[index].nbytes for found, index in zip(weights, picked, strict=True))


def held(outline: Outline) -> int:
    """Bytes that the decoders of a weight take beyond their results while the most demanding one runs."""
    kind, _ = encodings.split(outline.name)
    count = prod(outline.shape)
    within = [held(part) for part in outline.parts.values() if isinstance(part, Outline)]
    steps = outline.parts["steps"] if kind == "Exceptions" else None
    own = (_HELD_BY_EXCEPTION * prod(steps.shape) if steps is not None
           else _HELD_BY_BITMAP * count if kind.endswith("Bitmap") else _HELD_BY_GROUPS * count
           if kind.endswith("Groups") else 0)
    return max([own, *within])


def left_behind(outline: Outline) -> int:
    """Bytes of all results of a decoder's nodes, the weight among them, but for tables that every weight shares."""
    kind, numbers = encodings.split(outline.name)
    count = prod(outline.shape)
    dense = count * outline.dtype.itemsize
    within = sum(left_behind(part) for part in outline.parts.values() if isinstance(part, Outline))
    declared = {name: part for name, part in outline.parts.items() if isinstance(part, Declared)}
    if kind == "Planes":
        return _planes_left(numbers[0], count)
    if kind in ("Bitmap", "FloatBitmap"):
        # bytes as numbers, their counts, sums twice; place in byte, place; mask; values, masked, shaped
        return within + 16 * prod(declared["bitmap"].shape) + 9 * count + 3 * dense
    if kind in ("Groups", "FloatGroups"):
        return within + 4 * prod(declared["codes"].shape) + 5 * count + 3 * dense
    if kind == "Codebook":
        return 4 * prod(declared["codes"].shape) + 2 * dense
    if kind == "Exceptions":
        return within + 8 * prod(declared["steps"].shape) + 2 * dense
    return within + dense


def largest(outline: Outline) -> int:
    """Bytes of the largest result of a decoder's nodes."""
    kind, _ = encodings.split(outline.name)
    count = prod(outline.shape)
    within = [largest(part) for part in outline.parts.values() if isinstance(part, Outline)]
    indices = {"Codebook": "codes", "Exceptions": "steps"}.get(kind)
    numbers = count if kind.endswith(("Bitmap", "Groups")) else prod(outline.parts[indices].shape) if indices else 0
    return max([4 * numbers, count * outline.dtype.itemsize, *within])


def _planes_left(bits: int, count: int) -> int:
    widths = encodings.PLANES[bits]
    looked_up = sum(4 * ceil(count * width / 8) + 2 * count for width in widths if width != 4)
    return looked_up + count * (4 in widths) + count * (len(widths) - 1)


def _forms(values: Array) -> Iterator[Form]:
    """The encodings that may be smaller than the dense form."""
    is_int8, flat = values.dtype == np.int8, np.ascontiguousarray(values).reshape(-1)
    codes = flat.view(f"u{flat.dtype.itemsize}")
    if is_int8:
        widths = _bytes_by_width(flat)
        for bits in sorted({4, min(widths, key=lambda width: widths[width])}):
            if widths[bits] < values.nbytes:
                yield Form("narrow", bits)
    counts = np.bincount(codes, minlength=256) if codes.dtype == np.uint8 else None
    zeros = 1 - np.count_nonzero(codes) / codes.size
    different = len(np.flatnonzero(counts)) if counts is not None else len(np.unique(codes[:4096]))
    for bits in (2, 4, 8) if counts is None else (2, 4):
        if different <= 2**bits:  # of numbers that are no bytes a lower bound, which encoding corrects
            yield Form("codebook", bits)
    if (zeros if counts is None else counts.max() / codes.size) >= 0.5:
        yield Form("gaps")
        if is_int8:
            yield Form("gaps", 4)
    if zeros < _LOOKS_SPARSE or values.dtype == np.uint8:
        return
    inner = {8}
    if is_int8:
        widths = _bytes_by_width(flat[codes != 0])
        inner.add(min(widths, key=lambda width: widths[width]))
    for width in sorted(inner, reverse=True):
        yield Form("bitmap", width)
        for pattern, axis in _patterns(values):
            yield Form("groups", width, pattern, axis)


def _bytes_by_width(codes: npt.NDArray[np.int8]) -> dict[int, float]:
    """About how many bytes codes [n] take in planes of each width, with exceptions, and as they are."""
    counts = np.bincount(codes.view(np.uint8), minlength=256)
    numbers = np.arange(256, dtype=np.uint8).view(np.int8)
    needed = {bits: codes.size * bits / 8 + _STEP_BYTES * counts[~encodings.fits(numbers, bits)].sum()
              for bits in encodings.PLANES}
    return needed | {8: float(codes.size)}


def _patterns(values: Array) -> Iterator[tuple[tuple[int, int], int]]:
    """(pattern, axis) of groups that values [..] keep to; the tightest one of each axis."""
    for axis in (-1, 0) if values.ndim > 1 else (-1,):
        for n, m in sorted(PATTERNS, key=lambda p: p[0] / p[1]):
            if values.shape[axis] % m == 0 and _keeps_to(values, (n, m), axis):
                yield (n, m), axis
                break


def _keeps_to(values: Array, pattern: tuple[int, int], axis: int) -> bool:
    n, m = pattern
    moved = np.moveaxis(values, axis, -1)
    return not bool((np.count_nonzero(moved.reshape(*moved.shape[:-1], -1, m), axis=-1) > n).any())
