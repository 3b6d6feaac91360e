"""Kernels for the same work, timed against each other."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from onnxq.errors import UsageError
from onnxq.runtime.blocks import Call, alternate

BLOCK_SECONDS = 0.2
ROUNDS = 3
GIVE_UP = 2.0

_CACHE_MARGIN = 2  # caches are not replaced in strict order: weights just larger than one would partly stay
_MOST_COPIES = 64
_USUAL_CACHE_BYTES = 32 << 20
_CPUS = Path("/sys/devices/system/cpu")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class KernelTime:
    """How long one candidate takes, in milliseconds.

    `ms` is the median over rounds of each block's median, `low` and `high` are the least and the greatest round; one
    round only, and so all the same, for a candidate that gave up. `runs` is the number of calls behind them.
    """

    ms: float
    low: float
    high: float
    runs: int


def race(
    candidates: Mapping[str, Sequence[Call]],
    *,
    block_seconds: float = BLOCK_SECONDS,
    rounds: int = ROUNDS,
    give_up: float = GIVE_UP,
    per_call: Mapping[str, int] | None = None,
) -> dict[str, KernelTime]:
    """Time candidates in alternating blocks (onnxq.runtime.blocks), in the order in which they are given.

    A candidate is a sequence of calls that take turns, one in most cases. Its time is that of one call, divided by
    `per_call` for a candidate whose call runs a kernel so many times; 1 where it is not named. Copies of the weights
    that together exceed the cache (`copies_needed`) belong into one model, as so many nodes that one call runs. In
    sessions of their own that take turns, kernels of M = 1 and 16 showed 2 to 2.5 times the time: each session has
    threads that sleep or spin when their turn comes.

    A candidate whose quickest run of the first round took longer than `give_up` times the best's median runs no more.
    `math.inf` lets all candidates run to the end.

    Raises UsageError for `block_seconds`, `rounds`, or a number of `per_call` that are not positive, and for a
    candidate without calls; and what the calls raise.
    """
    shares = {name: (per_call or {}).get(name, 1) for name in candidates}
    for name, share in shares.items():
        if share < 1:
            raise UsageError(f"per_call of '{name}' is {share}; give the number of kernels that one call runs")
    blocks = alternate(candidates, block_seconds=block_seconds, rounds=rounds, give_up=give_up, shares=shares)
    times = {}
    for name, found in blocks.items():
        each = [block.ms for block in found]
        times[name] = KernelTime(median(each), min(each), max(each), sum(block.runs for block in found))
    return times


def last_level_cache_bytes(cpus: Path = _CPUS) -> int:
    """Bytes of the processor's largest cache of the last level, as Linux lists it below `cpus`; elsewhere 32 MiB."""
    found = [(0, 0)]
    for folder in cpus.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level = int((folder / "level").read_text())
            size = re.fullmatch(r"(\d+)([KMG]?)", (folder / "size").read_text().strip())
        except (OSError, ValueError):
            continue
        if size:
            found.append((level, int(size[1]) * _UNITS[size[2]]))
    return max(found)[1] or _USUAL_CACHE_BYTES


def copies_needed(weight_bytes: int, model_bytes: int | None = None) -> int:
    """How many copies of a kernel's weights to go through, so that each is fetched from memory as in the model.

    Between two runs of a kernel a model goes through all its other weights. `model_bytes`, those of the whole model in
    the candidate's form, therefore bounds what the copies hold together: a model that fits the cache needs no
    more. Where it is None or larger, twice the last-level cache. At least 1 and at most 64 copies: weights so small
    that these fit the cache hardly ever wait for memory.
    """
    wanted = _CACHE_MARGIN * last_level_cache_bytes()
    if model_bytes is not None:
        wanted = min(wanted, model_bytes)
    return min(max(1, math.ceil(wanted / max(1, weight_bytes))), _MOST_COPIES)
