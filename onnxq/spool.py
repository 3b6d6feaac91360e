"""Results of long work kept in a folder, so that a run that was interrupted goes on where it ended.

An entry is a folder named after its key, with one .npy file per array and a list of their checksums. It is written
under another name and renamed when it is whole; what a writer that was killed left behind is never read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # with it NumPy knows bfloat16, int4 and the like by name
import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OutputError

Array = NDArray[Any]

_LIST = "list.json"
_PARTIAL = "partial-"  # no key: it isn't hexadecimal


class Spool:
    """Arrays by key in a folder that is made with the first entry."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def get(self, key: str) -> dict[str, Array] | None:
        """The arrays of a key, mapped from disk and not to be written to; None where there is no whole entry."""
        entry = self._entry(key)
        try:
            listed: dict[str, dict[str, Any]] = json.loads((entry / _LIST).read_text(encoding="utf-8"))
            return {name: _load(entry / part["file"], part) for name, part in listed.items()}
        except (OSError, ValueError, LookupError, TypeError, EOFError):
            return None  # missing, cut short or changed: to be computed again

    def put(self, key: str, arrays: Mapping[str, Array]) -> None:
        """Keep arrays of any name and dtype under a key, in place of what it held before.

        Raises OutputError when the folder can't be written or the disk is full.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.folder))
            try:
                listed = {name: _write(partial / f"{number}.npy", array)
                          for number, (name, array) in enumerate(arrays.items())}
                (partial / _LIST).write_text(json.dumps(listed), encoding="utf-8")
                shutil.rmtree(self._entry(key), ignore_errors=True)
                os.replace(partial, self._entry(key))
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as e:
            raise OutputError(f"{self.folder} can't be written ({e.strerror}); free some space or choose another "
                              "folder") from None

    def size(self) -> int:
        """Bytes on disk, those of entries that are not whole included."""
        return sum(f.stat().st_size for entry in self._entries() for f in entry.iterdir())

    def remove(self) -> None:
        """Delete all entries, and the folder unless it holds something else."""
        for entry in self._entries():
            shutil.rmtree(entry, ignore_errors=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _entry(self, key: str) -> Path:
        if not _is_key(key):
            raise ValueError(f"{key!r} is no key; make one with digest()")
        return self.folder / key

    def _entries(self) -> list[Path]:
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return [p for p in found if p.is_dir() and (_is_key(p.name) or p.name.startswith(_PARTIAL))]


def _is_key(name: str) -> bool:
    return len(name) == 2 * _DIGEST_BYTES and set(name) <= set("0123456789abcdef")


def _write(path: Path, array: Array) -> dict[str, Any]:
    """Write an array and return what `_load` needs; a .npy file can't name the dtypes of ml_dtypes."""
    plain = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    np.save(path, plain, allow_pickle=False)
    return {"file": path.name, "dtype": array.dtype.name, "shape": list(array.shape), "crc": zlib.crc32(plain.data)}


def _load(path: Path, part: dict[str, Any]) -> Array:
    """Raises ValueError when the bytes are not those that were written."""
    plain = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    if zlib.crc32(plain.data) != part["crc"]:
        raise ValueError("its bytes changed")
    values: Array = plain.view(np.dtype(part["dtype"])).reshape(part["shape"])
    return values


# ------------------------------------------------------------------ keys

_DIGEST_BYTES = 16


def digest(*parts: object) -> str:
    """A key from all that decides a result: numbers, texts, arrays, dataclasses, and tuples, lists and dicts of these.

    The order of a dict's items counts. Raises TypeError for anything else, whose text may differ from run to run.
    """
    found = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for piece in _spelled(parts):
        found.update(len(piece).to_bytes(8, "little"))
        found.update(piece)
    return found.hexdigest()


def _spelled(part: object) -> Iterator[bytes | memoryview]:
    """What a part consists of, its type and length first, so that no two parts are spelled alike."""
    yield type(part).__name__.encode()
    if part is None or isinstance(part, (bool, int, float, complex, str)):
        yield repr(part).encode()
    elif isinstance(part, bytes):
        yield part
    elif isinstance(part, (np.ndarray, np.generic)):
        array = np.ascontiguousarray(part)
        yield f"{array.dtype.name} {np.shape(part)}".encode()
        yield array.reshape(-1).view(np.uint8).data
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        for field in dataclasses.fields(part):
            yield field.name.encode()
            yield from _spelled(getattr(part, field.name))
    elif isinstance(part, Mapping):
        yield str(len(part)).encode()
        for pair in part.items():
            yield from _spelled(pair)
    elif isinstance(part, (tuple, list)):
        yield str(len(part)).encode()
        for one in part:
            yield from _spelled(one)
    else:
        raise TypeError(f"a {type(part).__name__} can't be part of a key")
