"""How stored arrays meet a model's inputs: what fits, which axis the rows lie along, how many make a batch.

Along axis 0 lie either the model's own batch axis ("cut": a[i:i+b] is fed) or, in an array of one axis more than the
input, samples ("leading": a[i] is fed). One leading array, or a fixed axis 0 in the model, sets the batch for all.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.calibration.sources import Array, Column, one_row
from onnxq.errors import DataError
from onnxq.ports import Port

Feed = dict[str, Array]
LABELS = "labels"


@dataclass(frozen=True)
class Part:
    """The input arrays of one file: `rows` rows, `step` of them to a batch (None: any number)."""

    columns: dict[str, Column]
    leading: frozenset[str]
    step: int | None
    rows: int


@dataclass(frozen=True)
class Section:
    """Consecutive parts whose rows may share a batch."""

    ports: Sequence[Port]
    parts: Sequence[Part]

    @property
    def step(self) -> int | None:
        """Rows per batch where the model or the layout fixes it."""
        return self.parts[0].step

    @property
    def rows(self) -> int:
        """Rows as stored."""
        return sum(part.rows for part in self.parts)

    @property
    def usable(self) -> int:
        """Rows that fill batches of a fixed size."""
        return self.rows // (self.step or 1) * (self.step or 1)

    def feeds(self, step: int, rows: int) -> Iterator[tuple[Feed, int]]:
        """(feed, its rows) for the first `rows` rows, `step` at a time, across parts; the last may be shorter."""
        pieces: list[Feed] = []
        held = 0
        for part in self.parts:
            left = min(part.rows, rows)
            rows -= left
            with ExitStack() as stack:
                readers = {name: column.open(stack) for name, column in part.columns.items()} if left else {}
                while left:
                    take = min(step - held, left)
                    pieces.append({port.name: cast(readers[port.name](take), port) for port in self.ports})
                    held, left = held + take, left - take
                    if held == step:
                        yield self._join(pieces), held
                        pieces, held = [], 0
        if held:
            yield self._join(pieces), held

    def _join(self, pieces: list[Feed]) -> Feed:
        feed = pieces[0]
        if len(pieces) > 1:
            feed = {name: np.concatenate([piece[name] for piece in pieces]) for name in feed}
        leading = self.parts[0].leading
        return {name: a.reshape(a.shape[1:]) if name in leading else a for name, a in feed.items()}


def sections(parts: Iterable[Part], ports: Sequence[Port]) -> list[Section]:
    """The parts in order, grouped where one follows another of the same layout, row shapes and dtypes."""
    groups: list[list[Part]] = []
    last = None
    for part in parts:
        rows = {name: (column.shape[1:], column.dtype) for name, column in part.columns.items()}
        key = (part.step, part.leading, rows)
        if key == last:
            groups[-1].append(part)
        else:
            groups.append([part])
        last = key
    return [Section(ports, group) for group in groups]


def lay_out(where: str, columns: Mapping[str, Column], ports: Sequence[Port], one_feed: bool = False) -> Part:
    """Fits the arrays of one file, one per port, to the model; `one_feed` allows a file that is a feed as it is.

    Raises DataError for an unknown or missing array, for one of the wrong rank, dimensions or dtype, for unequal
    numbers of rows, for none, and for inputs whose batch sizes can't be reconciled.
    """
    check_keys(where, columns, ports)
    for port in ports:
        check_dtype(columns[port.name].where, columns[port.name].dtype, columns[port.name].shape, port)
    if one_feed and _is_one_feed(columns, ports):
        columns = {name: one_row(column) for name, column in columns.items()}
    leading = frozenset(port.name for port in ports if _has_sample_axis(columns[port.name], port))
    counts = {port.name: columns[port.name].shape[0] for port in ports}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"'{name}' {count}" for name, count in counts.items())
        raise DataError(
            f"{where} has unequal numbers of rows ({found}); give every input the same number of rows along axis 0, "
            "with a leading sample axis where the input's own axis 0 is no batch axis"
        )
    rows = counts[ports[0].name]
    if not rows:
        raise DataError(f"{where} has no rows; give at least one row of data for each input")
    return Part({port.name: columns[port.name] for port in ports}, leading, _step(where, ports, leading), rows)


def check_keys(where: str, keys: Iterable[str], ports: Sequence[Port]) -> None:
    """Raises DataError unless the keys are the ports' names and, at will, `labels`."""
    names = [port.name for port in ports]
    given = set(keys)
    unknown = sorted(given - {*names, LABELS})
    if unknown:
        hints = []
        for key in unknown:
            near = difflib.get_close_matches(key, names, n=1)
            hints.append(f"'{key}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
        raise DataError(
            f"{where} has {', '.join(hints)}, which the model does not take; "
            f"name the arrays after its inputs ({', '.join(names)}) or {LABELS}"
        )
    missing = [name for name in names if name not in given]
    if missing:
        raise DataError(f"{where} lacks the model's inputs {', '.join(missing)}; add an array of that name for each")


def check_dtype(where: str, dtype: np.dtype[Any], shape: tuple[int, ...], port: Port) -> None:
    """Raises DataError for a cast that loses more than a float's last digits."""
    if port.dtype is None or np.can_cast(dtype, port.dtype, "safe") or dtype.kind == port.dtype.kind == "f":
        return
    raise DataError(
        f"{where} is {describe(dtype, shape)} and input '{port.name}' wants {describe(port.dtype, port.shape)}; "
        f"that cast would lose values, so convert it yourself with .astype('{port.dtype}') if that is right"
    )


def cast(array: Array, port: Port) -> Array:
    """`array` in the port's dtype; floats round to nearest even. Raises DataError where a finite value overflows."""
    if port.dtype is None or array.dtype == port.dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(port.dtype)
    narrower = array.dtype.kind == "f" and result.itemsize < array.itemsize
    if narrower and np.any(np.isinf(result) & np.isfinite(array)):
        raise DataError(
            f"input '{port.name}' got {array.dtype} values beyond the range of {port.dtype}; scale or clip the data"
        )
    return result


def check_feed_shape(where: str, array: Array, port: Port) -> None:
    """Raises DataError unless `array` can be fed to the port as it is."""
    if port.shape is not None and not _fits(array.shape, port.shape):
        raise _misfit(where, array.dtype, array.shape, port, "give each feed exactly the input's axes")


def describe(dtype: np.dtype[Any] | None, shape: Sequence[int | str | None] | None) -> str:
    """E.g. `float32 [N, 3, 224, 224]`; `?` for what is not declared."""
    dims = "of any rank" if shape is None else f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"
    return f"{'?' if dtype is None else dtype} {dims}"


def _has_sample_axis(column: Column, port: Port) -> bool:
    """Whether the array is "leading"; raises DataError unless it is that or "cut"."""
    rank = len(column.shape)
    if port.shape is None:
        if not rank:
            raise _misfit(column.where, column.dtype, column.shape, port, "store it with a leading sample axis")
        return False
    extra = rank - len(port.shape)
    if not rank or extra not in (0, 1):
        remedy = "store it with the input's axes, or with one leading sample axis more"
        raise _misfit(column.where, column.dtype, column.shape, port, remedy)
    if not _fits(column.shape[1:], port.shape if extra else port.shape[1:]):
        raise _misfit(column.where, column.dtype, column.shape, port, "make the fixed dimensions agree")
    return extra == 1


def _step(where: str, ports: Sequence[Port], leading: frozenset[str]) -> int | None:
    """Rows per batch, where the model or a leading array fixes it."""
    fixed = {port.name: port.shape[0] for port in ports if port.name not in leading and port.shape}
    sizes = {size for size in fixed.values() if isinstance(size, int)}
    if leading:
        sizes.add(1)
    if len(sizes) > 1:
        wide = [name for name, size in fixed.items() if isinstance(size, int) and size != 1]
        raise DataError(
            f"{where} can't be cut into batches that fit every input, as axis 0 of {', '.join(wide)} is fixed; "
            "store those inputs with a leading sample axis"
        )
    return sizes.pop() if sizes else None


def _is_one_feed(columns: Mapping[str, Column], ports: Sequence[Port]) -> bool:
    """Whether a file's arrays can only be a single feed: they fit as they are, but don't share their rows."""
    named: dict[str, int] = {}
    for port in ports:
        shape = columns[port.name].shape
        if port.shape is None or not _fits(shape, port.shape):
            return False
        for dim, size in zip(port.shape, shape, strict=True):
            if isinstance(dim, str) and named.setdefault(dim, size) != size:
                return False
    return len({columns[port.name].shape[:1] for port in ports}) > 1 or not all(port.shape for port in ports)


def _fits(shape: tuple[int, ...], dims: Sequence[int | str | None]) -> bool:
    return len(shape) == len(dims) and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(dims, shape, strict=True)
    )


def _misfit(where: str, dtype: np.dtype[Any], shape: tuple[int, ...], port: Port, remedy: str) -> DataError:
    wanted = describe(port.dtype, port.shape)
    return DataError(f"{where} is {describe(dtype, shape)} and input '{port.name}' wants {wanted}; {remedy}")
