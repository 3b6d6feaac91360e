"""Kernel times on disk: what comes back, and that nothing which can happen to a file is more than a notice."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onnxq.runtime import timings
from onnxq.runtime.measure import kernel_environment
from onnxq.runtime.race import KernelTime
from onnxq.runtime.session import SessionOptions
from onnxq.runtime.timings import TimingCache, clear, default_folder, listed

ENVIRONMENT = {"processor": "P", "threads": 2}
KERNEL = {"op": "MatMul", "shapes": [[8, 64], [64, 64]], "attributes": {"alpha": -math.inf}}
TIMES = {"float": KernelTime(2.0, 1.9, 2.2, 300), "int8": KernelTime(0.1 + 0.2, 0.3, 0.31, 900)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "some" / "kernels"


def only_file(folder: Path) -> Path:
    [path] = folder.glob("*.jsonl")
    return path


def test_what_is_put_comes_back(folder: Path) -> None:
    cache = TimingCache(ENVIRONMENT, folder)
    assert cache.get(KERNEL) is None
    cache.put(KERNEL, TIMES)
    assert cache.get(KERNEL) == TIMES
    again = TimingCache(dict(reversed(ENVIRONMENT.items())), folder)
    assert again.get(KERNEL) == TIMES
    assert list(again.get(KERNEL) or ()) == ["float", "int8"]
    assert again.notices == cache.notices == []


def test_nothing_is_written_before_there_is_something(folder: Path) -> None:
    cache = TimingCache(ENVIRONMENT, folder)
    assert cache.get(KERNEL) is None
    assert cache.checked("k") is None
    assert not folder.parent.exists()


def test_a_later_time_takes_the_place_of_the_one_before(folder: Path) -> None:
    cache = TimingCache(ENVIRONMENT, folder)
    cache.put(KERNEL, {"float": KernelTime(9.0, 9.0, 9.0, 9)})
    cache.put(KERNEL, TIMES)
    assert TimingCache(ENVIRONMENT, folder).get(KERNEL) == cache.get(KERNEL) == TIMES


@pytest.mark.parametrize("other", [
    {**KERNEL, "op": "Gemm"}, {**KERNEL, "shapes": [[8, 64], [64, 65]]}, {**KERNEL, "more": None}, {}])
def test_another_kernel_is_not_known(folder: Path, other: dict[str, object]) -> None:
    TimingCache(ENVIRONMENT, folder).put(KERNEL, TIMES)
    assert TimingCache(ENVIRONMENT, folder).get(other) is None


def test_the_order_of_keys_and_tuples_for_lists_make_no_difference(folder: Path) -> None:
    cache = TimingCache(ENVIRONMENT, folder)
    cache.put({"a": (1, 2), "b": 3}, TIMES)
    assert cache.get({"b": 3, "a": [1, 2]}) == TIMES


def test_every_environment_has_a_file_of_its_own(folder: Path) -> None:
    others = [{**ENVIRONMENT, "threads": 4}, {**ENVIRONMENT, "emitter": 2}, {"processor": "P"}]
    TimingCache(ENVIRONMENT, folder).put(KERNEL, TIMES)
    assert [TimingCache(other, folder).get(KERNEL) for other in others] == [None] * 3
    for other in others:
        TimingCache(other, folder).put(KERNEL, TIMES)
    assert len(list(folder.glob("*.jsonl"))) == 4


@pytest.mark.parametrize("db", [43.1, -2.0, math.inf, -math.inf])
def test_checks_come_back(folder: Path, db: float) -> None:
    cache = TimingCache(ENVIRONMENT, folder)
    assert cache.checked("weights a") is None
    cache.note_check("weights a", db)
    assert cache.checked("weights a") == TimingCache(ENVIRONMENT, folder).checked("weights a") == db
    assert cache.checked("weights b") is None


def test_a_check_that_found_no_number_comes_back(folder: Path) -> None:
    TimingCache(ENVIRONMENT, folder).note_check("k", math.nan)
    assert math.isnan(TimingCache(ENVIRONMENT, folder).checked("k") or 0.0)


def test_entries_tell_what_they_are(folder: Path) -> None:
    cache = TimingCache(ENVIRONMENT, folder)
    cache.put(KERNEL, TIMES)
    cache.note_check("k", 40.0)
    [stored] = listed(folder)
    assert stored.environment == ENVIRONMENT
    [kernel] = stored.kernels.values()
    assert (kernel.description, kernel.times) == (KERNEL, TIMES)
    assert kernel.date[:2] == "20"
    assert stored.checks["k"].sqnr_db == 40.0
    assert stored.bytes == stored.path.stat().st_size
    assert stored.age_seconds < 1000
    assert stored.bad == 0


def test_processes_that_write_at_the_same_time_lose_nothing(folder: Path) -> None:
    code = ("import sys; from pathlib import Path; from onnxq.runtime.timings import TimingCache\n"
            "from onnxq.runtime.race import KernelTime\n"
            "cache = TimingCache({'p': 1}, Path(sys.argv[1]))\n"
            "for number in range(50):\n"
            "    cache.put({'who': sys.argv[2], 'n': number, 'text': 'x' * 20_000}, {'a': KernelTime(1., 1., 1., 1)})\n"
            "print(*cache.notices)")
    started = [subprocess.Popen([sys.executable, "-c", code, str(folder), name], stdout=subprocess.PIPE, text=True)
               for name in "abcd"]
    for process in started:
        assert process.communicate()[0].strip() == ""
        assert process.returncode == 0
    [stored] = listed(folder)
    assert len(stored.kernels) == 200
    assert stored.bad == 0


def test_two_caches_of_one_process_lose_nothing(folder: Path) -> None:
    a, b = TimingCache(ENVIRONMENT, folder), TimingCache(ENVIRONMENT, folder)
    assert a.get(KERNEL) is b.get(KERNEL) is None
    a.put(KERNEL, TIMES)
    b.put({"op": "Conv"}, TIMES)
    again = TimingCache(ENVIRONMENT, folder)
    assert again.get(KERNEL) == again.get({"op": "Conv"}) == TIMES


# ------------------------------------------------------------------ damage

BAD_LINES = ["{", "[]", "3", '{"entry": "kernel"}', '"\\ud800"',
             '{"entry": "kernel", "key": "k", "date": "", "description": {}, "times": {"a": {"ms": 1}}}',
             '{"entry": "kernel", "key": "k", "date": "", "description": {}, '
             '"times": {"a": {"ms": -1.0, "low": 1.0, "high": 1.0, "runs": 1}}}',
             '{"entry": "check", "key": "k", "date": "", "sqnr_db": "much"}']


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_damaged_line_costs_itself_alone(folder: Path, bad: str) -> None:
    cache = TimingCache(ENVIRONMENT, folder)
    cache.put({"n": 1}, TIMES)
    path = only_file(folder)
    path.write_bytes(path.read_bytes() + bad.encode() + b"\n")
    cache.put({"n": 2}, TIMES)
    cache.note_check("k", 40.0)
    damaged = path.read_bytes()
    again = TimingCache(ENVIRONMENT, folder)
    assert again.get({"n": 1}) == again.get({"n": 2}) == TIMES
    assert again.checked("k") == 40.0
    [notice] = again.notices
    aside = path.with_suffix(".damaged")
    assert f"set aside as {aside}; what could be read of it (2 kernels) is kept" in notice
    assert aside.read_bytes() == damaged
    again.put({"n": 3}, TIMES)
    healed = TimingCache(ENVIRONMENT, folder)
    assert healed.get({"n": 3}) == healed.get({"n": 1}) == TIMES
    assert healed.checked("k") == 40.0
    assert healed.notices == []
    assert sorted(found.bad for found in listed(folder)) == [0, 1]


def test_a_write_that_broke_off_costs_itself_alone(folder: Path) -> None:
    cache = TimingCache(ENVIRONMENT, folder)
    cache.put({"n": 1}, TIMES)
    cache.put({"n": 2}, TIMES)
    path = only_file(folder)
    path.write_bytes(path.read_bytes()[:-30])
    cache.put({"n": 3}, TIMES)
    again = TimingCache(ENVIRONMENT, folder)
    assert again.get({"n": 1}) == again.get({"n": 3}) == TIMES
    assert again.get({"n": 2}) is None
    assert len(again.notices) == 1


@pytest.mark.parametrize("content", [b"\x00\xff\xfe" * 100, b"\n", b"{}", b'{"format": 99, "environment": {}}\n'])
def test_a_file_of_something_else_is_set_aside(folder: Path, content: bytes) -> None:
    cache = TimingCache(ENVIRONMENT, folder)
    cache.put(KERNEL, TIMES)
    path = only_file(folder)
    path.write_bytes(content)
    again = TimingCache(ENVIRONMENT, folder)
    assert again.get(KERNEL) is None
    assert len(again.notices) == 1
    again.put(KERNEL, TIMES)
    healed = TimingCache(ENVIRONMENT, folder)
    assert (healed.get(KERNEL), healed.notices) == (TIMES, [])


def test_entries_outlive_a_damaged_first_line(folder: Path) -> None:
    TimingCache(ENVIRONMENT, folder).put(KERNEL, TIMES)
    path = only_file(folder)
    path.write_bytes(b"?" + path.read_bytes())
    assert TimingCache(ENVIRONMENT, folder).get(KERNEL) == TIMES
    healed = TimingCache(ENVIRONMENT, folder)
    assert (healed.get(KERNEL), healed.notices) == (TIMES, [])


def test_an_empty_file_is_a_new_one(folder: Path) -> None:
    TimingCache(ENVIRONMENT, folder).put(KERNEL, TIMES)
    only_file(folder).write_bytes(b"")
    cache = TimingCache(ENVIRONMENT, folder)
    assert cache.get(KERNEL) is None
    cache.put(KERNEL, TIMES)
    assert cache.notices == []
    assert TimingCache(ENVIRONMENT, folder).get(KERNEL) == TIMES


# ------------------------------------------------------------------ folders that are of no use


def test_a_folder_that_can_not_be_made_is_a_notice(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = TimingCache(ENVIRONMENT, tmp_path / "file" / "kernels")
    cache.put(KERNEL, TIMES)
    cache.put({"n": 2}, TIMES)
    assert cache.get(KERNEL) == TIMES
    assert any("make that folder writable" in notice for notice in cache.notices)
    assert len(cache.notices) <= 2


def test_a_folder_that_can_not_be_written_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, whom no mode of a folder stops."""
    TimingCache(ENVIRONMENT, folder).put(KERNEL, TIMES)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(timings, "_append", refuse)
    cache = TimingCache(ENVIRONMENT, folder)
    assert cache.get(KERNEL) == TIMES
    cache.put({"n": 2}, TIMES)
    cache.note_check("k", 1.0)
    assert cache.get({"n": 2}) == TIMES
    assert cache.notices == [f"kernel times can't be kept in {folder} (Permission denied) and will be measured again "
                             "next time; make that folder writable to save the time"]


def test_a_file_that_can_not_be_read_is_a_notice(folder: Path) -> None:
    cache = TimingCache(ENVIRONMENT, folder)
    cache.put(KERNEL, TIMES)
    path = only_file(folder)
    path.unlink()
    path.mkdir()
    again = TimingCache(ENVIRONMENT, folder)
    assert again.get(KERNEL) is None
    assert "can't be read" in again.notices[0]


def test_a_user_without_a_home_has_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timings.platformdirs, "user_cache_dir", lambda *_, **__: "~/.cache/onnxq")
    cache = TimingCache(ENVIRONMENT)
    cache.put(KERNEL, TIMES)
    assert cache.get(KERNEL) == TIMES
    assert len(cache.notices) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_default_folder_is_the_users(cache_home: Path) -> None:
    TimingCache(ENVIRONMENT).put(KERNEL, TIMES)
    assert default_folder().is_relative_to(cache_home)
    assert [stored.environment for stored in listed()] == [ENVIRONMENT]


def test_a_process_that_was_stopped_with_the_lock_does_not_stop_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timings, "_LOCK_SECONDS", 0.05)
    folder.mkdir(parents=True)
    with timings._locked(folder):
        TimingCache(ENVIRONMENT, folder).put(KERNEL, TIMES)
    assert TimingCache(ENVIRONMENT, folder).get(KERNEL) == TIMES


# ------------------------------------------------------------------ clearing


def test_old_files_are_removed(folder: Path) -> None:
    for threads, days in ((1, 0), (2, 40), (3, 10)):
        cache = TimingCache({"threads": threads}, folder)
        cache.put(KERNEL, TIMES)
        [path] = (stored.path for stored in listed(folder) if stored.environment == {"threads": threads})
        then = time.time() - days * 86400
        os.utime(path, (then, then))
    assert [stored.environment["threads"] for stored in listed(folder)] == [1, 3, 2]
    assert len(clear(folder, older_than_days=30)) == 1
    assert [stored.environment["threads"] for stored in listed(folder)] == [1, 3]
    (folder / "x.damaged").write_text("")
    (folder / "x.tmp").write_text("")
    (folder / "something-else.txt").write_text("")
    assert len(clear(folder)) == 4
    assert listed(folder) == clear(folder) == []
    assert (folder / "something-else.txt").exists()


def test_no_folder_is_an_empty_one(folder: Path) -> None:
    assert listed(folder) == clear(folder) == []
    assert not folder.exists()


# ------------------------------------------------------------------ environments


def test_the_environment_changes_with_all_that_times_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = kernel_environment(SessionOptions(threads=2), 1)
    assert plain == kernel_environment(SessionOptions(threads=2), 1)
    assert json.loads(json.dumps(plain)) == plain
    assert "cores" not in plain
    assert "cores" in kernel_environment(SessionOptions(), 1)
    others = [kernel_environment(SessionOptions(threads=1), 1), kernel_environment(SessionOptions(threads=2), 2),
              kernel_environment(SessionOptions(threads=2, optimize=False), 1),
              kernel_environment(SessionOptions(threads=2, config=(("session.disable_quant_qdq", "1"),)), 1)]
    assert plain not in others
    found = kernel_environment(SessionOptions(threads=2, config=(("b", "1"), ("a", "2"))), 1)
    assert found == kernel_environment(SessionOptions(threads=2, config=(("a", "2"), ("b", "1"))), 1)
