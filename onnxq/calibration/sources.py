"""Columns: arrays that are read a few rows at a time, so that memory holds a batch and never the data set.

An .npy file and an .npz member that is stored uncompressed are mapped; a compressed member is decompressed in one
sequential pass (a Fortran-ordered one has no rows in sequence and is loaded whole). Pickles are never read.
"""

from __future__ import annotations

import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from onnxq.errors import DataError

Array = npt.NDArray[Any]
Reader = Callable[[int], Array]  # the next n rows, [n, ...], C-ordered and owned by the caller

_CHUNK = 1 << 18  # bytes decompressed at once; ZipExtFile.read joins its pieces quadratically when asked for much more
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,  # NumPy's word for a bad header
    SyntaxError,
    OverflowError,
    RuntimeError,  # an encrypted member, and NotImplementedError: an unknown compression
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


@dataclass(frozen=True)
class Column(ABC):
    """An array with its rows along axis 0; `where` names it in messages."""

    where: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @abstractmethod
    def open(self, stack: ExitStack) -> Reader:
        """Start a pass over the rows (a scalar counts as one row); what it opens closes with `stack`."""

    def load(self) -> Array:
        """The whole array, of shape `shape`."""
        with ExitStack() as stack:
            return self.open(stack)((self.shape or (1,))[0]).reshape(self.shape)

    def view(self) -> Array:
        """The whole array, to read: from the disk as it is looked at, where its file can be mapped."""
        return self.load()


@dataclass(frozen=True)
class Mapped(Column):
    """An array that lies in plain bytes at `offset` of a file."""

    path: Path
    offset: int
    fortran: bool

    def open(self, stack: ExitStack) -> Reader:
        return _cut(self.view())

    def view(self) -> Array:
        shape = self.shape or (1,)
        if not math.prod(shape):  # nothing to map
            return np.empty(shape, self.dtype)
        order: Literal["C", "F"] = "F" if self.fortran else "C"
        with readable(self.where):
            return np.memmap(self.path, self.dtype, "r", self.offset, shape, order)


@dataclass(frozen=True)
class Compressed(Column):
    """An array that is a compressed member of an .npz archive."""

    path: Path
    member: str
    fortran: bool

    def open(self, stack: ExitStack) -> Reader:
        shape = self.shape or (1,)
        with readable(self.where):
            archive = stack.enter_context(zipfile.ZipFile(self.path))
            stream = stack.enter_context(archive.open(self.member))
            _read_header(stream, self.where)
        if self.fortran:
            return _cut(self._read(stream, shape[::-1]).T)
        return lambda rows: self._read(stream, (rows, *shape[1:]))

    def _read(self, stream: IO[bytes], shape: tuple[int, ...]) -> Array:
        """The next bytes of `stream` as a C-ordered array of this shape."""
        block = np.empty(shape, self.dtype)
        with readable(self.where):
            free = block.reshape(-1).view(np.uint8).data
            while free:
                piece = stream.read(min(len(free), _CHUNK))
                if not piece:
                    raise EOFError("the data end early")
                free[: len(piece)] = piece
                free = free[len(piece) :]
        return block


@dataclass(frozen=True)
class OneRow(Column):
    """A column of shape [...] taken as the only row of an array [1, ...]."""

    column: Column

    def open(self, stack: ExitStack) -> Reader:
        return _cut(self.column.load()[None])


@dataclass(frozen=True)
class Random(Column):
    """Rows drawn from `seed`, the same however they are batched: floats normal, integers in [0, 2), or all ones."""

    seed: tuple[int, int]
    ones: bool

    def open(self, stack: ExitStack) -> Reader:
        generator = np.random.default_rng(self.seed)

        def read(rows: int) -> Array:
            shape = (rows, *self.shape[1:])
            if self.ones:
                return np.ones(shape, self.dtype)
            if self.dtype.kind == "f":
                return generator.standard_normal(shape).astype(self.dtype)
            # Drawn wide: narrow types share a draw among several values, so that the batch would change them.
            return generator.integers(0, 2, shape, np.int64).astype(self.dtype)

        return read


def one_row(column: Column) -> Column:
    """`column` [...] as an array [1, ...]."""
    return OneRow(column.where, column.dtype, (1, *column.shape), column)


def npz_columns(path: Path) -> dict[str, Column]:
    """The arrays of an .npz archive by key; reads headers only.

    Raises DataError for a file that is no archive, is truncated or encrypted, or holds something else than plain
    arrays. The checksum of a compressed member is checked when its last row is read, that of a mapped one never.
    """
    columns: dict[str, Column] = {}
    with readable(path.name), zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            key = info.filename.removesuffix(".npy")
            where = f"{path.name}, key '{key}'"
            with readable(where):
                with archive.open(info) as stream:
                    dtype, shape, fortran = _read_header(stream, where)
                    header = stream.tell()
                _check_size(where, info.file_size - header, dtype, shape)
                if info.compress_type == zipfile.ZIP_STORED:
                    offset = _data_offset(file, info) + header
                    columns[key] = Mapped(where, dtype, shape, path, offset, fortran)
                else:
                    columns[key] = Compressed(where, dtype, shape, path, info.filename, fortran)
    return columns


def npy_column(path: Path) -> Column:
    """The array of an .npy file; reads the header only. Raises DataError for a file that holds no plain array."""
    with readable(path.name), open(path, "rb") as file:
        dtype, shape, fortran = _read_header(file, path.name)
        offset = file.tell()
        _check_size(path.name, path.stat().st_size - offset, dtype, shape)
    return Mapped(path.name, dtype, shape, path, offset, fortran)


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Turns what a missing, truncated or damaged file raises into a DataError."""
    try:
        yield
    except _UNREADABLE as error:
        raise DataError(
            f"{where} can't be read ({error or type(error).__name__}); copy it again or write it anew with numpy.savez"
        ) from error


def _cut(data: Array) -> Reader:
    """Copies, because a mapped member of an archive is not aligned and the runtime wants aligned memory."""
    start = 0

    def read(rows: int) -> Array:
        nonlocal start
        block = np.array(data[start : start + rows], order="C")
        start += rows
        return block

    return read


def _read_header(stream: IO[bytes], where: str) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """(dtype, shape, Fortran-ordered?) of the .npy data that `stream` stands at (NumPy's NPY format 1.0 and 2.0)."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"NPY version {version[0]}.{version[1]} is not one of plain arrays")
    if dtype.hasobject:
        raise DataError(f"{where} holds Python objects, which are never unpickled; save a numeric array instead")
    if any(size < 0 for size in shape):
        raise ValueError(f"negative size in shape {shape}")
    return dtype, shape, fortran


def _check_size(where: str, size: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    wanted = math.prod(shape) * dtype.itemsize
    if size != wanted:
        raise EOFError(f"{size} bytes of data, the header says {wanted}")


def _data_offset(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: after a 30-byte local header, the name and the extra field (APPNOTE.TXT 4.3.7)."""
    file.seek(info.header_offset)
    name, extra = struct.unpack("<26xHH", file.read(30))
    return info.header_offset + 30 + int(name) + int(extra)
