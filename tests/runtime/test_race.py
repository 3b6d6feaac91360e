"""Races: who runs when and how often, and figures of very different work; never absolute times."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from onnxq.errors import UsageError
from onnxq.runtime import blocks, race
from onnxq.runtime.race import copies_needed, last_level_cache_bytes


def work(times: int) -> Callable[[], None]:
    array = np.linspace(0.0, 1.0, 2_000)

    def call() -> None:
        for _ in range(times):
            np.sin(array)

    return call


class Clock:
    """In the place of the clock: each call takes as long as it says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.log: list[str] = []
        monkeypatch.setattr(blocks, "perf_counter", lambda: self.now)

    def call(self, name: str, *milliseconds: float) -> Callable[[], None]:
        """A call of these durations in turn, the last one from then on."""
        left = list(milliseconds)

        def run() -> None:
            self.now += (left.pop(0) if len(left) > 1 else left[0]) / 1000.0
            self.log.append(name)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_work_is_told_apart() -> None:
    times = race.race({"much": [work(20)], "little": [work(1)]}, block_seconds=0.02, give_up=math.inf)
    assert 8 < times["much"].ms / times["little"].ms < 50
    for found in times.values():
        assert 0 < found.low <= found.ms <= found.high
        assert found.runs >= 3 * 4


def test_blocks_go_forwards_and_backwards_over_all_candidates(clock: Clock) -> None:
    race.race({name: [clock.call(name, 1.0)] for name in "abc"}, block_seconds=1e-9, rounds=3)
    found = [(name, len(list(runs))) for name, runs in groupby(clock.log)]
    warm = [("a", 2), ("b", 2), ("c", 2)]
    assert found == [*warm, ("a", 6), ("b", 6), ("c", 12), ("b", 6), ("a", 12), ("b", 6), ("c", 6)]


def test_a_block_is_as_long_as_asked_and_drops_its_first_third(clock: Clock) -> None:
    warm, slow, quick = [1.0] * 2, [50.0] * 4, [10.0] * 7
    times = race.race({"a": [clock.call("a", *warm, *slow, *quick)]}, block_seconds=0.265, rounds=1)
    assert len(clock.log) == 2 + 11  # 4 of 50 ms and 7 of 10 ms: the first sum that reaches 265 ms
    found = times["a"]
    assert found == race.KernelTime(pytest.approx(10.0), pytest.approx(10.0), pytest.approx(10.0), 8)


def test_a_time_is_the_median_of_the_rounds(clock: Clock) -> None:
    durations = [1.0, 1.0, *[2.0] * 6, *[9.0] * 6, 4.0]
    [found] = race.race({"a": [clock.call("a", *durations)]}, block_seconds=1e-9).values()
    assert found == race.KernelTime(pytest.approx(4.0), pytest.approx(2.0), pytest.approx(9.0), 12)


def test_who_is_far_behind_after_the_first_round_runs_no_more(clock: Clock) -> None:
    calls = {"best": [clock.call("best", 1.0)], "near": [clock.call("near", 1.9)], "far": [clock.call("far", 2.1)]}
    times = race.race(calls, block_seconds=1e-9)
    assert {name: found.runs for name, found in times.items()} == {"best": 12, "near": 12, "far": 4}
    assert times["far"].low == times["far"].high == pytest.approx(2.1)
    assert clock.log.count("far") == 2 + 6


def test_a_disturbed_block_does_not_end_a_race(clock: Clock) -> None:
    """All but one of its runs were slow: the machine had something else to do."""
    unlucky = clock.call("unlucky", 1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 0.9, 9.0, 0.9)
    times = race.race({"steady": [clock.call("steady", 1.0)], "unlucky": [unlucky]}, block_seconds=1e-9)
    assert times["unlucky"].ms == pytest.approx(0.9)
    assert times["unlucky"].high == pytest.approx(9.0)


def test_infinite_patience(clock: Clock) -> None:
    calls = {"best": [clock.call("best", 1.0)], "far": [clock.call("far", 100.0)]}
    assert {found.runs for found in race.race(calls, block_seconds=1e-9, give_up=math.inf).values()} == {12}


def test_copies_take_turns_across_blocks(clock: Clock) -> None:
    copies = [clock.call(str(number), 1.0) for number in range(4)]
    race.race({"a": copies}, block_seconds=1e-9, rounds=2)
    assert clock.log == [str(number % 4) for number in range(4 + 6 + 6)]


def test_a_call_of_many_kernels_counts_as_one_of_each(clock: Clock) -> None:
    calls = {"chain": [clock.call("chain", 8.0)], "one": [clock.call("one", 1.0)]}
    times = race.race(calls, block_seconds=1e-9, per_call={"chain": 10})
    assert times["chain"].ms == pytest.approx(0.8)
    assert times["chain"].runs == times["one"].runs == 12


def test_nothing_to_race_is_no_race() -> None:
    assert race.race({}) == {}


def test_what_can_not_be_raced_is_refused() -> None:
    with pytest.raises(UsageError, match="rounds is 0"):
        race.race({"a": [work(1)]}, rounds=0)
    with pytest.raises(UsageError, match="block_seconds is -1"):
        race.race({"a": [work(1)]}, block_seconds=-1)
    with pytest.raises(UsageError, match="'a' has no calls"):
        race.race({"a": []})
    with pytest.raises(UsageError, match="per_call of 'a' is 0"):
        race.race({"a": [work(1)]}, per_call={"a": 0})


def cache(folder: Path, cpu: str, index: int, level: str, size: str) -> None:
    place = folder / cpu / "cache" / f"index{index}"
    place.mkdir(parents=True)
    (place / "level").write_text(f"{level}\n")
    (place / "size").write_text(f"{size}\n")


def test_the_last_level_is_found_among_caches_of_any_size(tmp_path: Path) -> None:
    for cpu in ("cpu0", "cpu1"):
        cache(tmp_path, cpu, 0, "1", "48K")
        cache(tmp_path, cpu, 1, "2", "2048K")
        cache(tmp_path, cpu, 2, "3", "36M" if cpu == "cpu1" else "512K")
    (tmp_path / "cpufreq").mkdir()
    assert last_level_cache_bytes(tmp_path) == 36 << 20


def test_a_system_that_lists_no_caches_counts_as_usual(tmp_path: Path) -> None:
    assert last_level_cache_bytes(tmp_path / "none") == 32 << 20
    cache(tmp_path, "cpu0", 0, "", "")
    cache(tmp_path, "cpu0", 1, "3", "unknown")
    assert last_level_cache_bytes(tmp_path) == 32 << 20


def test_copies_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "last_level_cache_bytes", lambda: 10_000)
    assert copies_needed(1_000) == 20
    assert copies_needed(3_000) == 7
    assert copies_needed(50_000) == 1
    assert copies_needed(1_000, model_bytes=4_500) == 5
    assert copies_needed(1_000, model_bytes=10**9) == 20
    assert copies_needed(1) == copies_needed(0) == 64
