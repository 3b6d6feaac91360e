"""Weights in fewer bytes, each form with its exact inverse: what a packed model stores, and what its decoders compute.

An encoding is a tree: `kind` says how the arrays in `parts` become the elements, and a part may be an encoding itself
(the values behind a bitmap in 4 bits, with exceptions). Elements go in C order; bytes fill from their low bits up. With
a, b, c .. for the elements in turn, and the high bits of a byte on the left:

    Planes_4      | b a |                                    one int4 for an element
    Planes_6      | b a |  | h g f e d c b a |               bits 0-3, then bits 4 and 5 of four elements in a byte
    Planes_5      | b a |  | h .. b a |                      bits 0-3, then bit 4 of eight elements in a byte
    Bitmap        | h g f e d c b a |  values                which of eight elements are not 0; those that are not
    Groups_2_4_3  | code |  values [6]                       which 2 of each 4 of 12 elements, as one number below 6**3
    Codebook_4    | b a |  table [16]                        the place of each element in the table
    Exceptions    dense  | step |  values                    how far it is to the next exception, and its value
    Filled        value                                      every element is that
    Transposed    rows                                       the first axis is the last one of what is stored

"Zero" means that all bits are 0: a float -0.0 is kept as a value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from math import comb, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.numerics.packing import pack_bits, unpack_bits

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

# how many bits the planes of a code have, from the low end
PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
_STEPS = (4, 8, 16)  # bits of a step to the next exception


@dataclass(frozen=True)
class Stored:
    """An array of an encoding: elements, those of 4 bits in a byte each, and the name of their type in the file."""

    values: Array
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes in the file, where two elements of 4 bits share one."""
        bits = 4 if self.dtype in ("int4", "uint4") else 8 * self.values.dtype.itemsize
        return -(-self.values.size * bits // 8)


@dataclass(frozen=True)
class Encoded:
    """An array of `shape` in fewer bytes; `numbers` complete the kind (see the module)."""

    kind: str
    parts: Mapping[str, Stored | Encoded]
    shape: tuple[int, ...]
    numbers: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Kind and numbers in one word, such as Groups_2_4_3."""
        return "_".join([self.kind, *map(str, self.numbers)])

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of the elements."""
        if self.kind == "Planes":
            return np.dtype(np.int8)
        part = self.parts[ELEMENTS[self.kind]]
        return part.values.dtype if isinstance(part, Stored) else part.dtype

    def arrays(self) -> list[Stored]:
        """All that is stored, in the order of the parts, those of a part in its place."""
        return [found for part in self.parts.values()
                for found in (part.arrays() if isinstance(part, Encoded) else [part])]

    def outline(self) -> Outline:
        """What it is, without its elements."""
        return Outline(self.name, self.shape, self.dtype, {
            name: part.outline() if isinstance(part, Encoded) else Declared(part.dtype, part.values.shape, part.nbytes)
            for name, part in self.parts.items()})


@dataclass(frozen=True)
class Declared:
    """Type, shape and bytes of a stored array."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Outline:
    """An encoding without its elements: `name` is Encoded.name, `dtype` that of what is decoded to `shape`."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    parts: Mapping[str, Declared | Outline]

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays in the file."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def names(self) -> tuple[str, ...]:
        """`name` of this one and of those in its parts."""
        inner = [part.names for part in self.parts.values() if isinstance(part, Outline)]
        return (self.name, *(name for names in inner for name in names))

    @property
    def paths(self) -> list[str]:
        """Names of all parts, those of a part behind its own and a dot."""
        return [path for name, part in self.parts.items()
                for path in (name, *(f"{name}.{p}" for p in (part.paths if isinstance(part, Outline) else ())))]

    @property
    def count(self) -> int:
        """How many arrays are stored."""
        return sum(part.count if isinstance(part, Outline) else 1 for part in self.parts.values())


# the part whose elements are of the decoded type
ELEMENTS = {"Bitmap": "values", "FloatBitmap": "values", "Groups": "values", "FloatGroups": "values",
            "Codebook": "table", "Exceptions": "values", "Filled": "value", "Transposed": "rows"}


def part_names(name: str) -> tuple[str, ...]:
    """The parts of an encoding of that `Encoded.name`, in the order in which its decoder takes them.

    ValueError for a name that there is none of.
    """
    kind, numbers = split(name)
    if kind == "Planes" and len(numbers) == 1 and numbers[0] in PLANES:
        return ("low", "high", "top")[:len(PLANES[numbers[0]])]
    known = {"Bitmap": ("bitmap", "values"), "FloatBitmap": ("bitmap", "values"), "Groups": ("codes", "values"),
             "FloatGroups": ("codes", "values"), "Codebook": ("codes", "table"),
             "Exceptions": ("dense", "steps", "values"), "Filled": ("value",), "Transposed": ("rows",)}
    wanted = 3 if kind.endswith("Groups") else 1 if kind == "Codebook" else 0
    if kind not in known or len(numbers) != wanted:
        raise ValueError(f"there is no encoding {name!r}; see onnxq.numerics.encodings")
    return known[kind]


def split(name: str) -> tuple[str, tuple[int, ...]]:
    """(kind, numbers) of an `Encoded.name`. ValueError where those are no numbers."""
    kind, *numbers = name.split("_")
    return kind, tuple(int(number) for number in numbers)


# ------------------------------------------------------------------ encoding


def planes(values: npt.NDArray[np.int8], bits: int) -> Encoded:
    """Codes [..] of `bits` bits, two's complement, in planes of 4, 2 and 1 bits.

    ValueError for codes that don't fit, and for a count that doesn't fill the bytes of planes below 4 bits.
    """
    if not fits(values, bits).all():
        raise ValueError(f"codes from {values.min()} to {values.max()} don't fit {bits} bits; use narrow()")
    names, parts, done = part_names(f"Planes_{bits}"), {}, 0
    codes = values.view(np.uint8)
    for name, width in zip(names, PLANES[bits], strict=True):
        plane = (codes >> np.uint8(done)) & np.uint8(2**width - 1)
        done += width
        if width == 4:
            signed = done == bits
            low = (plane ^ np.uint8(8)).view(np.int8) - np.int8(8) if signed else plane
            parts[name] = Stored(low, "int4" if signed else "uint4")
        else:
            parts[name] = Stored(_bytes_of(plane.reshape(-1), width), "uint8")
    return Encoded("Planes", parts, values.shape, (bits,))


def narrow(values: npt.NDArray[np.int8], bits: int) -> Encoded:
    """Codes [..] in `bits` bits, and those that don't fit as exceptions."""
    fitting = fits(values, bits)
    if fitting.all():
        return planes(values, bits)
    flat = values.reshape(-1)
    kept = np.where(fitting.reshape(-1), flat, np.int8(0))
    return _exceptions(values, planes(kept, bits), ~fitting.reshape(-1))


def gaps(values: Array, bits: int = 8) -> Encoded:
    """All elements [..] as exceptions but those of one value: the most frequent one of bytes, 0 of others.

    The exceptions of int8 are in 4 or 8 `bits`, with exceptions of their own.
    """
    flat = values.reshape(-1)
    codes = _bits(flat)
    common = int(np.bincount(codes, minlength=256).argmax()) if codes.dtype == np.uint8 else 0
    filled = {"value": _stored(np.array([common], codes.dtype).view(values.dtype))}
    others = codes != common
    if not others.any():
        return Encoded("Filled", filled, values.shape)
    return _exceptions(values, Encoded("Filled", filled, flat.shape), others, bits)


def bitmap(values: Array, bits: int = 8) -> Encoded:
    """A bit for each element [..] that tells zeros, and the others in turn, of int8 in `bits` bits with exceptions.

    The values end in zeros, at least one, which decoders may read. ValueError for a count that doesn't fill bytes.
    """
    flat = values.reshape(-1)
    given = _bits(flat) != 0
    count = int(given.sum())
    kept = np.zeros(-(-(count + 1) // 8) * 8, values.dtype)
    kept[:count] = flat[given]
    kind = "Bitmap" if values.dtype == np.int8 else "FloatBitmap"
    return Encoded(kind, {"bitmap": Stored(_bytes_of(given.view(np.uint8), 1), "uint8"), "values": _inner(kept, bits)},
                   values.shape)


def groups(values: Array, pattern: tuple[int, int], axis: int = -1, bits: int = 8) -> Encoded:
    """At most N of M neighbours along `axis`, the first or the last one of values [..], that are not 0.

    Each byte tells the places of several groups, as the numbers of their `combinations(range(M), N)`, the first one
    the least significant digit. ValueError for other values, or a size that M or the groups of a byte don't divide.
    """
    last = axis in (-1, values.ndim - 1)
    if not last:
        moved = np.ascontiguousarray(np.moveaxis(values, 0, -1))
        return Encoded("Transposed", {"rows": groups(moved, pattern, bits=bits)}, values.shape)
    n, m = pattern
    if values.shape[-1] % m:
        raise ValueError(f"rows of {values.shape[-1]} elements are no groups of {m}; choose another axis or pattern")
    each = groups_in_byte(pattern, values.size)
    rows = values.reshape(-1, m)
    given = _bits(rows) != 0
    if int(given.sum(axis=1).max()) > n:
        raise ValueError(f"more than {n} of {m} elements are not 0; choose another pattern")
    order = np.argsort(~given, axis=1, kind="stable")[:, :n]  # those that are not 0, then the first that are
    order.sort(axis=1)
    numbers = np.zeros(1 << m, np.uint8)
    for number, places in enumerate(combinations(range(m), n)):
        numbers[sum(1 << place for place in places)] = number
    digits = numbers[(1 << order).sum(axis=1)].reshape(-1, each)
    codes = (digits * comb(m, n) ** np.arange(each)).sum(axis=1).astype(np.uint8)
    kept = np.take_along_axis(rows, order, axis=1).reshape(-1, each * n)
    kind = "Groups" if values.dtype == np.int8 else "FloatGroups"
    return Encoded(kind, {"codes": Stored(codes, "uint8"), "values": _inner(kept, bits)}, values.shape, (n, m, each))


def groups_in_byte(pattern: tuple[int, int], size: int) -> int:
    """How many groups of a pattern one byte holds, of those counts that divide `size` elements. ValueError for none."""
    n, m = pattern
    for each in (4, 3, 2, 1):
        if comb(m, n) ** each <= 256 and size % (each * m) == 0:
            return each
    raise ValueError(f"{size} elements are no whole bytes of groups {n}:{m}; choose another pattern")


def codebook(values: Array, bits: int) -> Encoded:
    """The place of each element [..] in a table of the at most 2**bits different ones, for 2, 4 and 8 bits.

    ValueError for more, and for a count that doesn't fill bytes.
    """
    codes = _bits(values.reshape(-1))
    found = np.flatnonzero(np.bincount(codes, minlength=256)) if codes.dtype == np.uint8 else np.unique(codes)
    if len(found) > 2**bits:
        raise ValueError(f"{len(found)} different values need more than {bits} bits; use another encoding")
    table = np.zeros(2**bits, codes.dtype)
    table[:len(found)] = found
    places = np.searchsorted(found.astype(codes.dtype), codes).astype(np.uint8)
    return Encoded("Codebook", {"codes": Stored(_bytes_of(places, bits), "uint8"),
                                "table": _stored(table.view(values.dtype))}, values.shape, (bits,))


def fits(values: Array, bits: int) -> npt.NDArray[np.bool_]:
    """Which codes [..] have a two's complement of `bits` bits."""
    return np.asarray((values >= -(2 ** (bits - 1))) & (values < 2 ** (bits - 1)))


def _exceptions(values: Array, dense: Encoded, others: npt.NDArray[np.bool_], bits: int = 8) -> Encoded:
    """`dense` [n], but for the elements marked in `others` [n].

    A step that its bits can't count leads over elements on the way, which are listed, too.
    """
    flat, places = values.reshape(-1), np.flatnonzero(others)
    steps = np.diff(places, prepend=0)
    wide = min(_STEPS, key=lambda b: _entries(steps, b) * (b + bits * values.dtype.itemsize))
    most = 2**wide - 1
    before = np.maximum((steps - 1) // most, 0)
    listed = np.full(int(len(steps) + before.sum()), most)
    listed[np.cumsum(before + 1) - 1] = steps - before * most
    stored = Stored(listed.astype(np.uint16 if wide == 16 else np.uint8), f"uint{wide}")
    kept = _inner(flat[np.cumsum(listed)], bits)
    return Encoded("Exceptions", {"dense": dense, "steps": stored, "values": kept}, values.shape)


def _entries(steps: Array, bits: int) -> int:
    return int(len(steps) + np.maximum((steps - 1) // (2**bits - 1), 0).sum())


def _inner(values: Array, bits: int) -> Stored | Encoded:
    return _stored(values) if bits == 8 else narrow(values, bits)


def _stored(values: Array) -> Stored:
    return Stored(values, str(values.dtype))


def _bits(values: Array) -> Array:
    """The elements as unsigned numbers of the same bits."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def _bytes_of(codes: Bytes, width: int) -> Bytes:
    """Codes [n] of 1, 2, 4 or 8 bits in bytes [n * width / 8]. ValueError where they don't fill bytes."""
    if codes.size * width % 8:
        raise ValueError(f"{codes.size} codes of {width} bits don't fill bytes; use another encoding")
    return np.packbits(codes, bitorder="little") if width == 1 else pack_bits(codes, width)


# ------------------------------------------------------------------ decoding


def decode(encoded: Encoded) -> Array:
    """The array that was encoded, bit for bit."""
    parts = {name: decode(part) if isinstance(part, Encoded) else part.values for name, part in encoded.parts.items()}
    found = _DECODERS[encoded.kind](encoded, parts)
    return np.ascontiguousarray(found).reshape(encoded.shape)


def _from_planes(encoded: Encoded, parts: Mapping[str, Array]) -> Array:
    bits, done = encoded.numbers[0], 0
    codes = np.zeros(prod(encoded.shape), np.uint8)
    for plane, width in zip(parts.values(), PLANES[bits], strict=True):
        unsigned = plane.astype(np.uint8).reshape(-1) & np.uint8(15) if width == 4 else _codes_of(plane, width)
        codes |= unsigned << np.uint8(done)
        done += width
    sign = np.uint8(1 << (bits - 1))
    return (codes ^ sign).view(np.int8) - np.int8(1 << (bits - 1))


def _from_bitmap(encoded: Encoded, parts: Mapping[str, Array]) -> Array:
    given = _codes_of(parts["bitmap"], 1).view(np.bool_)
    values = parts["values"]
    found = np.zeros(len(given), values.dtype)
    found[given] = values[:int(given.sum())]
    return found


def _from_groups(encoded: Encoded, parts: Mapping[str, Array]) -> Array:
    table = group_table(*encoded.numbers)[parts["codes"]]
    found = np.take_along_axis(parts["values"], np.maximum(table, 0).astype(np.int64), axis=1)
    return np.where(table < 0, found.dtype.type(0), found)


def group_table(n: int, m: int, each: int) -> npt.NDArray[np.int8]:
    """[codes, each * m]: which value each element of `each` groups n:m is, by the byte that tells; -1 for a zero."""
    places = list(combinations(range(m), n))
    one = np.full((len(places), m), -1, np.int8)
    for row, chosen in zip(one, places, strict=True):
        row[list(chosen)] = np.arange(n)
    codes = np.arange(len(places) ** each)
    digits = [one[codes // len(places) ** k % len(places)] for k in range(each)]
    return np.concatenate([np.where(d < 0, d, d + k * n) for k, d in enumerate(digits)], axis=1).astype(np.int8)


def _from_codebook(encoded: Encoded, parts: Mapping[str, Array]) -> Array:
    return np.asarray(parts["table"][_codes_of(parts["codes"], encoded.numbers[0])])


def _from_exceptions(encoded: Encoded, parts: Mapping[str, Array]) -> Array:
    found = parts["dense"].copy()
    found[np.cumsum(parts["steps"].astype(np.int64))] = parts["values"]
    return found


def _filled(encoded: Encoded, parts: Mapping[str, Array]) -> Array:
    return np.full(encoded.shape, parts["value"][0])


def _from_rows(encoded: Encoded, parts: Mapping[str, Array]) -> Array:
    return np.moveaxis(parts["rows"], -1, 0)


def _codes_of(packed: Bytes, width: int) -> Bytes:
    """The codes in bytes [b], as they were before _bytes_of."""
    return (np.unpackbits(packed, bitorder="little") if width == 1
            else unpack_bits(packed, width, packed.size * 8 // width))


_DECODERS: dict[str, Callable[[Encoded, Mapping[str, Array]], Array]] = {
    "Planes": _from_planes, "Bitmap": _from_bitmap, "FloatBitmap": _from_bitmap, "Groups": _from_groups,
    "FloatGroups": _from_groups, "Codebook": _from_codebook, "Exceptions": _from_exceptions, "Filled": _filled,
    "Transposed": _from_rows}
