"""How fast two things are next to each other, and on what machine.

Only ratios mean anything: absolute times differ from machine to machine and from hour to hour. Nothing here returns a
time for comparing with one that was taken in another call.
"""

from __future__ import annotations

import math
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime

from onnxq.errors import DataError, UsageError
from onnxq.runtime.session import Session

_LEAST_RUNS = 6
_WARMUP_RUNS = 2
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")


@dataclass(frozen=True)
class Timing:
    """Two things timed against each other.

    `a_ms` and `b_ms` are milliseconds per run, the median over rounds of each block's median. `ratio` is the median
    over rounds of a / b, so above 1 where b is faster; `ratio_low` and `ratio_high` are the least and the greatest
    round. `ratio` need not equal a_ms / b_ms: a round's two blocks stand next to each other in time, the medians not.
    """

    a_ms: float
    b_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int


def compare(
    a: Callable[[], None],
    b: Callable[[], None],
    *,
    block_seconds: float = 0.5,
    rounds: int = 5,
    progress: Callable[[], None] | None = None,
) -> Timing:
    """Time `a` against `b` in alternating blocks.

    A round is a block of one and then a block of the other, each about `block_seconds` long and at least 6 runs. The
    first third of a block's runs is dropped, the median of the rest stands for it. Odd rounds go A B, even rounds B A,
    so that a machine that slows down or speeds up favours neither. `progress` is called after each round.

    Blocks, and not one run of each in turn, because the threads of an onnxruntime session don't go to sleep when a run
    ends: they spin for some while, waiting for more. With the other session's run right behind, they hold the cores
    that it needs, which slows the faster of the two most and so pulls every ratio towards 1. Within a block only one
    session works; the other's threads fall asleep in the third that is dropped.

    Raises UsageError for `block_seconds` or `rounds` that are not positive.
    """
    return _compare(a, b, block_seconds, rounds, _LEAST_RUNS, progress)


def compare_models(
    a: Session,
    b: Session,
    feeds: Sequence[Mapping[str, np.ndarray[Any, Any]]],
    *,
    block_seconds: float = 0.5,
    rounds: int = 5,
    progress: Callable[[], None] | None = None,
) -> Timing:
    """Time two models on the same feeds, as `compare` does; milliseconds are per feed.

    A block goes through the feeds in order, in whole cycles, so that each feed counts alike in every block (an input's
    length or its padding changes the time). A block is at least 3 cycles, and at least 6 runs.

    Raises DataError for no feeds or feeds that don't fit a model, ModelError when a run fails, and UsageError as
    `compare` does.
    """
    if not feeds:
        raise DataError("there are no feeds to time the models on; give at least one")
    count = len(feeds)
    least_cycles = max(3, math.ceil(_LEAST_RUNS / count))
    timing = _compare(_cycle(a, feeds), _cycle(b, feeds), block_seconds, rounds, least_cycles, progress)
    return replace(timing, a_ms=timing.a_ms / count, b_ms=timing.b_ms / count)


def time(a: Callable[[], None], *, block_seconds: float = 0.5, rounds: int = 5) -> float:
    """Milliseconds per run of `a`: the median over `rounds` blocks, each measured as in `compare`.

    For choosing between candidates that are timed in one go; for a speedup use `compare`.
    Raises UsageError for `block_seconds` or `rounds` that are not positive.
    """
    _check(block_seconds, rounds)
    _warm_up(a)
    return median(_block_ms(a, block_seconds, _LEAST_RUNS) for _ in range(rounds))


def peak_memory_bytes() -> int:
    """The most memory, in bytes, that this process has held resident since it began; 0 where the system doesn't tell.

    On Linux this is VmHWM of /proc/self/status, since getrusage's ru_maxrss there also counts the process that started
    this one. Elsewhere it is ru_maxrss, in bytes on macOS and in KiB on the other systems. Windows doesn't tell.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource  # doesn't exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment() -> dict[str, object]:
    """The machine and the versions that a measurement was made with.

    Keys: `processor` (model name), `cores` (logical cores that this process may use), `cpu_flags` (those present of
    avx2, avx512f, avx512_vnni, avx_vnni, amx_int8; empty where the system doesn't list them), `onnxruntime`, `python`
    (versions) and `os`.
    """
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        cpuinfo = ""
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    listed = re.search(r"^flags\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = set(listed[1].split()) if listed else set()
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return {
        "processor": name[1].strip() if name else platform.processor() or platform.machine(),
        "cores": cores,
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in flags],
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "os": platform.platform(),
    }


def _compare(
    a: Callable[[], None],
    b: Callable[[], None],
    block_seconds: float,
    rounds: int,
    least_runs: int,
    progress: Callable[[], None] | None,
) -> Timing:
    _check(block_seconds, rounds)
    _warm_up(a)
    _warm_up(b)
    pairs: list[tuple[float, float]] = []
    for number in range(rounds):
        if number % 2 == 0:
            a_ms = _block_ms(a, block_seconds, least_runs)
            b_ms = _block_ms(b, block_seconds, least_runs)
        else:
            b_ms = _block_ms(b, block_seconds, least_runs)
            a_ms = _block_ms(a, block_seconds, least_runs)
        pairs.append((a_ms, b_ms))
        if progress is not None:
            progress()
    ratios = [a_ms / b_ms for a_ms, b_ms in pairs]
    return Timing(
        a_ms=median(a_ms for a_ms, _ in pairs),
        b_ms=median(b_ms for _, b_ms in pairs),
        ratio=median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        rounds=rounds,
    )


def _check(block_seconds: float, rounds: int) -> None:
    if not block_seconds > 0:
        raise UsageError(f"block_seconds is {block_seconds}; give a positive number of seconds")
    if rounds < 1:
        raise UsageError(f"rounds is {rounds}; give at least 1")


def _warm_up(call: Callable[[], None]) -> None:
    """The first runs allocate and touch memory for the first time; no block should hold them."""
    for _ in range(_WARMUP_RUNS):
        call()


def _block_ms(call: Callable[[], None], seconds: float, least_runs: int) -> float:
    """Milliseconds per run: the median of one block's runs after its first third."""
    runs: list[float] = []
    start = before = perf_counter()
    while len(runs) < least_runs or before - start < seconds:
        call()
        after = perf_counter()
        runs.append(after - before)
        before = after
    return median(runs[len(runs) // 3 :]) * 1000.0


def _cycle(session: Session, feeds: Sequence[Mapping[str, np.ndarray[Any, Any]]]) -> Callable[[], None]:
    calls = [session.runner(feed) for feed in feeds]

    def cycle() -> None:
        for call in calls:
            call()

    return cycle
