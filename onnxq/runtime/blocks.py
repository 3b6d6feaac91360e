"""Blocks of runs, and the turns in which contenders take them: what every timing here is made of.

Blocks, and not one run of each in turn, because the threads of an onnxruntime session don't go to sleep when a run
ends: they spin for some while, waiting for more. With another session's run right behind, they hold the cores that it
needs, which slows the faster one most and so pulls every ratio towards 1. Within a block only one session works; the
others' threads fall asleep in the third that is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import median
from time import perf_counter

from onnxq.errors import UsageError

LEAST_RUNS = 6
_WARMUP_RUNS = 2

Call = Callable[[], None]


@dataclass(frozen=True)
class Block:
    """Milliseconds per run, of the runs behind a block's first third: their median and their least; their number."""

    ms: float
    least_ms: float
    runs: int


def alternate(
    contenders: Mapping[str, Sequence[Call]],
    *,
    block_seconds: float,
    rounds: int,
    least_runs: int = LEAST_RUNS,
    give_up: float = math.inf,
    shares: Mapping[str, int] | None = None,
    progress: Callable[[], None] | None = None,
) -> dict[str, list[Block]]:
    """Each contender's blocks, one for every round that it took part in, the first contender first.

    A round is a block of each contender, about `block_seconds` long and at least `least_runs` calls. Odd rounds go
    through the contenders forwards and even rounds backwards, so that a machine that slows down or speeds up favours
    none. A contender's calls take turns, across blocks; each has run before the first block, at least two calls in all,
    since a first run allocates. A time is that of one call, divided by its contender's number in `shares` (1 if none).

    Who stood behind in the first round by more than `give_up` takes no part in the others. That is judged by the least
    of its runs against the best contender's median: what disturbs a block makes runs slower, hardly ever faster.
    `progress` is called after each round.

    Raises UsageError for `block_seconds` or `rounds` that are not positive, and for a contender without calls.
    """
    _check(contenders, block_seconds, rounds)
    turns = {name: cycle(calls) for name, calls in contenders.items()}
    for name, calls in contenders.items():
        for _ in range(max(_WARMUP_RUNS, len(calls))):
            next(turns[name])()
    blocks: dict[str, list[Block]] = {name: [] for name in turns}
    running = list(turns)
    for number in range(rounds):
        for name in running if number % 2 == 0 else reversed(running):
            blocks[name].append(_block(turns[name], block_seconds, least_runs, (shares or {}).get(name, 1)))
        if number == 0 and running:
            limit = give_up * min(blocks[name][0].ms for name in running)
            running = [name for name in running if blocks[name][0].least_ms <= limit]
        if progress is not None:
            progress()
    return blocks


def _block(turns: Iterator[Call], seconds: float, least_runs: int, share: int) -> Block:
    runs: list[float] = []
    start = before = perf_counter()
    while len(runs) < least_runs or before - start < seconds:
        next(turns)()
        after = perf_counter()
        runs.append(after - before)
        before = after
    kept = runs[len(runs) // 3 :]
    return Block(median(kept) * 1000.0 / share, min(kept) * 1000.0 / share, len(kept))


def _check(contenders: Mapping[str, Sequence[Call]], block_seconds: float, rounds: int) -> None:
    if not block_seconds > 0:
        raise UsageError(f"block_seconds is {block_seconds}; give a positive number of seconds")
    if rounds < 1:
        raise UsageError(f"rounds is {rounds}; give at least 1")
    for name, calls in contenders.items():
        if not calls:
            raise UsageError(f"'{name}' has no calls to time; give at least one")
