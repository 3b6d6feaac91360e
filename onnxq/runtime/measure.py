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
from typing import Any

import numpy as np
import onnxruntime

from onnxq.errors import DataError
from onnxq.runtime.blocks import LEAST_RUNS, alternate
from onnxq.runtime.session import Session, SessionOptions

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

    Why blocks: see onnxq.runtime.blocks.

    Raises UsageError for `block_seconds` or `rounds` that are not positive.
    """
    return _compare(a, b, block_seconds, rounds, LEAST_RUNS, progress)


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
    least_cycles = max(3, math.ceil(LEAST_RUNS / count))
    timing = _compare(a.cycle(feeds), b.cycle(feeds), block_seconds, rounds, least_cycles, progress)
    return replace(timing, a_ms=timing.a_ms / count, b_ms=timing.b_ms / count)


def time(a: Callable[[], None], *, block_seconds: float = 0.5, rounds: int = 5) -> float:
    """Milliseconds per run of `a`: the median over `rounds` blocks, each measured as in `compare`.

    For choosing between candidates that are timed in one go; for a speedup use `compare`.
    Raises UsageError for `block_seconds` or `rounds` that are not positive.
    """
    [blocks] = alternate({"": [a]}, block_seconds=block_seconds, rounds=rounds).values()
    return median(block.ms for block in blocks)


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


def kernel_environment(options: SessionOptions, emitter: int) -> dict[str, object]:
    """All that a kernel's time depends on, apart from the kernel: what tells one TimingCache from another.

    Of `environment`: `processor`, `cpu_flags`, `onnxruntime`, and, where onnxruntime chooses the number of threads by
    them, `cores`. Of the session's `options`: `threads` (0: onnxruntime's choice), `provider`, `optimize`, `config`.
    `emitter` is the version of what writes the kernels' graphs, onnxq.passes.lower.EMITTER_VERSION.
    """
    found = environment()
    kept = ("processor", "cpu_flags", "onnxruntime", *(() if options.threads else ("cores",)))
    return {
        **{key: found[key] for key in kept},
        "threads": options.threads,
        "provider": options.provider,
        "optimize": options.optimize,
        "config": dict(sorted(options.config)),
        "emitter": emitter,
    }


def _compare(
    a: Callable[[], None],
    b: Callable[[], None],
    block_seconds: float,
    rounds: int,
    least_runs: int,
    progress: Callable[[], None] | None,
) -> Timing:
    blocks = alternate({"a": [a], "b": [b]}, block_seconds=block_seconds, rounds=rounds, least_runs=least_runs,
                       progress=progress)
    pairs = [(a_block.ms, b_block.ms) for a_block, b_block in zip(blocks["a"], blocks["b"], strict=True)]
    ratios = [a_ms / b_ms for a_ms, b_ms in pairs]
    return Timing(
        a_ms=median(a_ms for a_ms, _ in pairs),
        b_ms=median(b_ms for _, b_ms in pairs),
        ratio=median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        rounds=rounds,
    )
