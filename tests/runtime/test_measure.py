"""Timing: ratios of very different work with wide margins, and the order and number of runs, never absolute times."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from itertools import groupby, pairwise

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxq.errors import DataError, UsageError
from onnxq.runtime import measure
from onnxq.runtime.session import Session, SessionOptions


def work(times: int) -> Callable[[], None]:
    array = np.linspace(0.0, 1.0, 2_000)  # short beside a time slice, so that a busy machine matters little

    def call() -> None:
        for _ in range(times):
            np.sin(array)

    return call


def product(width: int, repeats: int) -> Session:
    """x [n, width] through `repeats` matrix products of [width, width], on one thread."""
    weight = numpy_helper.from_array(np.eye(width, dtype=np.float32), "w")
    tensors = ["x", *[f"t{i}" for i in range(repeats - 1)], "y"]
    nodes = [helper.make_node("MatMul", [a, "w"], [b]) for a, b in pairwise(tensors)]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return Session(model.SerializeToString(), SessionOptions(threads=1))


def test_twenty_times_the_work_is_seen() -> None:
    timing = measure.compare(work(20), work(1), block_seconds=0.02, rounds=3)
    assert 8 < timing.ratio < 50
    assert timing.ratio_low <= timing.ratio <= timing.ratio_high
    assert timing.a_ms > timing.b_ms > 0
    assert timing.rounds == 3
    other_way = measure.compare(work(1), work(20), block_seconds=0.02, rounds=3)
    assert 1 / 50 < other_way.ratio < 1 / 8


def test_time_is_the_time_of_one_run() -> None:
    once, often = (measure.time(work(times), block_seconds=0.02, rounds=3) for times in (1, 20))
    assert 8 < often / once < 50


def test_blocks_alternate_and_their_order_too() -> None:
    log: list[str] = []
    rounds_seen: list[int] = []
    measure.compare(
        lambda: log.append("a"),
        lambda: log.append("b"),
        block_seconds=1e-9,
        rounds=3,
        progress=lambda: rounds_seen.append(len(log)),
    )
    blocks = [(name, len(list(runs))) for name, runs in groupby(log)]
    # Two runs of each to warm up, then A B, B A, A B in blocks of the least length; equal neighbours merge.
    assert blocks == [("a", 2), ("b", 2), ("a", 6), ("b", 12), ("a", 12), ("b", 6)]
    assert rounds_seen == [16, 28, 40]


def test_the_first_third_of_a_block_is_dropped() -> None:
    slow, quick = work(40), work(1)
    runs = 0

    def slow_at_first() -> None:
        nonlocal runs
        runs += 1
        (slow if 2 < runs <= 4 else quick)()  # runs 1 and 2 warm up; 3 and 4 are the first third of the block's 6

    steady = measure.time(quick, block_seconds=1e-9, rounds=1)
    assert measure.time(slow_at_first, block_seconds=1e-9, rounds=1) < 10 * steady
    assert runs == 8


def test_a_block_lasts_about_as_long_as_asked() -> None:
    """Ten times the block holds more runs; how many depends on the machine, so the margin is wide."""
    counts = []
    for seconds in (0.005, 0.1):
        log: list[int] = []
        measure.time(lambda log=log: log.append(1), block_seconds=seconds, rounds=1)  # type: ignore[misc]
        counts.append(len(log))
    assert counts[1] > 3 * counts[0]


def test_models_are_timed_per_feed() -> None:
    feeds = [{"x": np.ones((rows, 64), np.float32)} for rows in (256, 128)]
    timing = measure.compare_models(product(64, 40), product(64, 1), feeds, block_seconds=0.02, rounds=3)
    assert timing.ratio > 4
    both = [measure.time(product(64, 40).runner(feed), block_seconds=0.02, rounds=3) for feed in feeds]
    assert 1 / 3 < timing.a_ms / (sum(both) / 2) < 3


def test_every_feed_counts_alike_in_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def runner(session: Session, feed: dict[str, np.ndarray]) -> Callable[[], None]:
        return lambda: log.append(f"{'a' if session is a else 'b'}{feed['x'].shape[0]}")

    monkeypatch.setattr(Session, "runner", runner)
    a, b = product(4, 1), product(4, 1)
    for count, cycles in ((1, 6), (2, 3), (4, 3)):
        log.clear()
        feeds = [{"x": np.ones((rows + 1, 4), np.float32)} for rows in range(count)]
        measure.compare_models(a, b, feeds, block_seconds=1e-9, rounds=1)
        names = [str(rows + 1) for rows in range(count)]
        assert log == [m + n for m, runs in (("a", 2), ("b", 2), ("a", cycles), ("b", cycles)) for n in names * runs]


def test_what_can_not_be_timed_is_refused() -> None:
    with pytest.raises(UsageError, match="rounds is 0"):
        measure.compare(work(1), work(1), rounds=0)
    with pytest.raises(UsageError, match="block_seconds is 0"):
        measure.time(work(1), block_seconds=0)
    with pytest.raises(UsageError, match="block_seconds is nan"):
        measure.compare(work(1), work(1), block_seconds=float("nan"))
    with pytest.raises(DataError, match="no feeds"):
        measure.compare_models(product(4, 1), product(4, 1), [])
    with pytest.raises(DataError, match="input 'x'"):
        measure.compare_models(product(4, 1), product(4, 1), [{"x": np.ones((1, 5), np.float32)}])


def test_peak_memory_is_that_of_this_process_alone() -> None:
    """In a fresh process: 100 MB that were held and given back stay in the peak, this process's memory is not in it."""
    lines = [
        "from onnxq.runtime.measure import peak_memory_bytes",
        "before = peak_memory_bytes()",
        "held = b'x' * 100_000_000",
        "del held",
        "print(before, peak_memory_bytes())",
    ]
    here = np.ones(600_000_000, np.uint8)
    printed = subprocess.run(
        [sys.executable, "-c", "; ".join(lines)], capture_output=True, text=True, check=True
    ).stdout
    before, after = (int(number) for number in printed.split())
    assert after - before > 90_000_000
    assert before > 10_000_000
    if sys.platform == "linux":
        assert after < here.nbytes


def test_the_environment_names_machine_and_versions() -> None:
    found = measure.environment()
    assert set(found) == {"processor", "cores", "cpu_flags", "onnxruntime", "python", "os"}
    assert found["processor"]
    assert isinstance(found["cores"], int)
    assert found["cores"] >= 1
    assert found["onnxruntime"] == onnxruntime.__version__
    assert found["python"] == platform.python_version()
    assert isinstance(found["cpu_flags"], list)


def test_cpu_flags_are_read_as_whole_words(monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = "model name\t: Some Processor 9000\nflags\t\t: fpu avx avx2 avx512vnni avx512_vnni_x amx_int8\n"
    monkeypatch.setattr(measure.Path, "read_text", lambda *_, **__: cpuinfo)
    found = measure.environment()
    assert found["processor"] == "Some Processor 9000"
    assert found["cpu_flags"] == ["avx2", "amx_int8"]
