"""Kernel times on disk, so that the next compilation on the same machine need not measure again.

A file holds what was measured in one environment: processor, runtime, threads, whatever the caller says that a time
depends on. Its first line names that environment, each further line is an entry of its own. Entries are appended under
a lock, so that processes that measure at the same time lose nothing of each other's. What can't be read or written
costs time and no more: it is told by a notice, never by an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import platformdirs

from onnxq.runtime.race import KernelTime

_FORMAT = 1
_SUFFIX, _DAMAGED = ".jsonl", ".damaged"
_UNFINISHED = ".tmp"
_LOCK = "lock"
_LOCK_SECONDS = 10.0
_DAY_SECONDS = 86400.0

Description = Mapping[str, Any]


@dataclass(frozen=True)
class Kernel:
    """The times of one kernel's candidates, with the description that they were measured under and the date (UTC)."""

    description: dict[str, Any]
    times: dict[str, KernelTime]
    date: str


@dataclass(frozen=True)
class Check:
    """How far a candidate's output is from its reference, in dB of SQNR, and the date (UTC) at which it was found."""

    sqnr_db: float
    date: str


@dataclass
class Stored:
    """What one file holds. `bad` is the number of its lines that can't be read."""

    path: Path
    environment: dict[str, Any]
    kernels: dict[str, Kernel] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    bytes: int = 0
    age_seconds: float = 0.0
    bad: int = 0

    def to_dict(self, kernels: bool = False) -> dict[str, Any]:
        """As `onnxq cache --json` shows it; with `kernels`, each kernel with its candidates' times."""
        found: dict[str, Any] = {
            "path": str(self.path), "environment": self.environment, "kernels": len(self.kernels),
            "checks": len(self.checks), "bytes": self.bytes, "age_seconds": round(self.age_seconds),
            "damaged_lines": self.bad}
        if kernels:
            found["entries"] = [asdict(kernel) for kernel in self.kernels.values()]
        return found


class TimingCache:
    """Times and checks of one environment, in memory and in a file of `folder` (None: `default_folder()`).

    `environment` and the descriptions of kernels hold what JSON holds: two that are the same in JSON are the same. The
    file is read when first asked for; what other processes add after that is not seen, and not lost.

    `notices` tells in sentences what kept times from being read or written. A folder that can't be made or written
    leaves a cache in memory; a file with lines that can't be read is set aside, and what can be read goes on in a new
    one.
    """

    def __init__(self, environment: Mapping[str, object], folder: Path | None = None) -> None:
        self.notices: list[str] = []
        self._environment = json.loads(_canonical(environment))
        self._folder = folder if folder is not None else default_folder()
        self._path = self._folder / f"{_digest([_FORMAT, self._environment])}{_SUFFIX}"
        self._writes = True
        self._found: Stored | None = None
        if folder is None and not self._folder.is_absolute():  # `~`, of a user without a home
            self._writes, self._found = False, Stored(self._path, self._environment)
            self.notices.append("kernel times are not kept, since this user has no folder for caches; set HOME or "
                                "XDG_CACHE_HOME to a folder's full path to save the time of measuring again")

    def get(self, description: Description) -> dict[str, KernelTime] | None:
        """The times of the kernel's candidates, by the names that `put` was given; None when it is not known."""
        kernel = self._stored.kernels.get(_digest(description))
        return None if kernel is None else dict(kernel.times)

    def put(self, description: Description, times: Mapping[str, KernelTime]) -> None:
        """Keep a kernel's times, in the place of those before."""
        self._add(_line_of_kernel(_digest(description), Kernel(dict(description), dict(times), _now())))

    def checked(self, key: str) -> float | None:
        """The SQNR in dB that a check under this key found: infinite for equal outputs; None when there was none."""
        check = self._stored.checks.get(key)
        return None if check is None else check.sqnr_db

    def note_check(self, key: str, db: float) -> None:
        """Keep what a check found. The key must change with whatever was checked: graph, weights, inputs."""
        self._add(_line_of_check(key, Check(db, _now())))

    @property
    def _stored(self) -> Stored:
        if self._found is None:
            self._found = self._read()
        return self._found

    def _read(self) -> Stored:
        empty = Stored(self._path, self._environment)
        try:
            found = _load(self._path)
            if found is not None and found.bad:
                with _locked(self._folder):
                    found = _load(self._path)  # a line that was being written is whole now
                    if found is not None and found.bad:
                        self._mend(found)
        except OSError as e:
            self.notices.append(f"kernel times that were measured before can't be read from {self._path} "
                                f"({_why(e)}); make it readable to save the time of measuring again")
            return empty
        return found or empty

    def _mend(self, found: Stored) -> None:
        """Set the file aside and write what can be read of it anew; the lock is held."""
        aside = self._path.with_suffix(_DAMAGED)
        os.replace(self._path, aside)
        lines = [_line_of_kernel(key, kernel) for key, kernel in found.kernels.items()]
        lines += [_line_of_check(key, check) for key, check in found.checks.items()]
        if lines:
            _write_whole(self._path, [_first_line(self._environment), *lines])  # the environment named the file
        self.notices.append(f"a file of kernel times was damaged and is set aside as {aside}; what could be read of it "
                            f"({len(found.kernels)} kernels) is kept, the rest is measured again; nothing needs doing")

    def _add(self, line: str) -> None:
        _take(line, self._stored)
        if not self._writes:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _locked(self._folder):
                _append(self._path, self._environment, line)
        except OSError as e:
            self._writes = False
            self.notices.append(f"kernel times can't be kept in {self._folder} ({_why(e)}) and will be measured again "
                                "next time; make that folder writable to save the time")


def default_folder() -> Path:
    """Where kernel times are kept for this user: `kernels` in the system's folder for caches of onnxq."""
    return Path(platformdirs.user_cache_dir("onnxq", appauthor=False)) / "kernels"


def listed(folder: Path | None = None) -> list[Stored]:
    """What is in each file of the folder, those set aside too, the one written last first.

    A file that can't be opened has one bad line.
    """
    found = []
    for path in _files(folder or default_folder(), _SUFFIX, _DAMAGED):
        try:
            stored = _load(path)
        except OSError:
            stored = Stored(path, {}, bad=1)
        if stored is not None:
            found.append(stored)
    return sorted(found, key=lambda stored: (stored.age_seconds, stored.path.name))


def clear(folder: Path | None = None, older_than_days: float = 0.0) -> list[Path]:
    """Remove the files, those set aside too, that were not written to for so many days; gives those removed.

    Raises OSError for one that can't be removed.
    """
    folder = folder or default_folder()
    removed = []
    for path in _files(folder, _SUFFIX, _DAMAGED, _UNFINISHED):
        with _locked(folder):
            if time.time() - path.stat().st_mtime >= older_than_days * _DAY_SECONDS:
                path.unlink()
                removed.append(path)
    return removed


def _files(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix in suffixes)


# ------------------------------------------------------------------ a file's lines


def _load(path: Path) -> Stored | None:
    """What a file holds, None where there is none. Raises OSError."""
    try:
        data = path.read_bytes()
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
    if not data:  # made, and then the disk was full
        return None
    found = Stored(path, {}, bytes=len(data), age_seconds=max(age, 0.0))
    first, *rest = data.decode("utf-8", errors="replace").splitlines()
    try:
        head = json.loads(first)
        if head["format"] != _FORMAT:
            raise ValueError
        found.environment = dict(head["environment"])
    except (ValueError, KeyError, TypeError):
        found.bad = 1
    for line in rest:
        try:
            _take(line, found)
        except (ValueError, KeyError, TypeError, AttributeError):
            found.bad += 1
    found.bad += not data.endswith(b"\n")  # a write that broke off may still read as JSON
    return found


def _take(line: str, found: Stored) -> None:
    """Put the entry of a line into `found`. Raises ValueError, KeyError, TypeError or AttributeError for no entry."""
    entry = json.loads(line)
    key, date = str(entry["key"]), str(entry["date"])
    if entry["entry"] == "check":
        found.checks[key] = Check(float(entry["sqnr_db"]), date)
        return
    times = {str(name): KernelTime(**given) for name, given in entry["times"].items()}
    for given in times.values():
        if not all(math.isfinite(ms) and ms > 0 for ms in (given.ms, given.low, given.high, given.runs)):
            raise ValueError(f"{given} is not a time")
    found.kernels[key] = Kernel(dict(entry["description"]), times, date)


def _first_line(environment: Mapping[str, Any]) -> str:
    return json.dumps({"format": _FORMAT, "environment": environment})


def _line_of_kernel(key: str, kernel: Kernel) -> str:
    times = {name: asdict(found) for name, found in kernel.times.items()}
    return json.dumps({"entry": "kernel", "key": key, "date": kernel.date, "times": times,
                       "description": kernel.description})


def _line_of_check(key: str, check: Check) -> str:
    # JSON has no infinity: as a string, which float() reads alike
    db = check.sqnr_db if math.isfinite(check.sqnr_db) else str(check.sqnr_db)
    return json.dumps({"entry": "check", "key": key, "date": check.date, "sqnr_db": db})


def _canonical(data: object) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def _digest(data: object) -> str:
    return hashlib.sha256(_canonical(data).encode()).hexdigest()[:32]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _why(error: OSError) -> str:
    return error.strerror or str(error)


# ------------------------------------------------------------------ writing


def _append(path: Path, environment: Mapping[str, Any], line: str) -> None:
    """Add a line in one write, and the first line before it where the file is new. The lock is held."""
    with path.open("ab+") as file:
        text = line + "\n"
        if file.tell() == 0:
            text = f"{_first_line(environment)}\n{text}"
        else:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a write broke off: let it spoil its own line alone
                text = "\n" + text
        file.write(text.encode())


def _write_whole(path: Path, lines: Sequence[str]) -> None:
    """Put a file of these lines in the place of `path`, at once."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=_UNFINISHED)
    try:
        with open(handle, "wb") as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock against other processes, where the system has locks; wait some seconds for it at most.

    Going on without it risks a line of either process, which then is measured again; waiting without end for a
    process that was stopped would be worse.
    """
    with (folder / _LOCK).open("ab") as file:
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _try_lock(file.fileno()) and time.monotonic() < deadline:
            time.sleep(0.01)
        yield  # closing the file gives the lock back


def _try_lock(handle: int) -> bool:
    """Whether the lock is held now, or can't be had on this file system at all."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
