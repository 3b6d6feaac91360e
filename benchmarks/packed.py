"""python -m benchmarks.packed DENSE PACKED [PACKED ...]: what packed weights cost when a model is loaded, and after.

Each model is loaded in a fresh process, DENSE and PACKED by turns, `--rounds` times: the median seconds of making the
session, of wall clock and of processor, and the median peak of resident memory, that of an empty process told beside.
Then outputs are compared bit for bit, and the two are timed in alternating blocks. Status 1 when outputs differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.options import check_folders, say, where
from onnxq.runtime.measure import compare_models
from onnxq.runtime.session import Session, SessionOptions


@dataclass(frozen=True)
class Load:
    """One making of a session: seconds of wall clock and of processor, peak bytes of the process before and after."""

    seconds: float
    processor_seconds: float
    empty_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Result:
    """A packed model beside the dense one: medians of loads, and packed over dense for size, load, peak and time.

    `latency` is the median over rounds of the times' ratio, `low` and `high` its least and greatest.
    """

    model: str
    bytes: int
    dense: Load
    packed: Load
    size_ratio: float
    load_ratio: float
    peak_ratio: float
    latency: float
    low: float
    high: float
    equal: bool


def loads(models: Sequence[Path], rounds: int, threads: int) -> list[Load]:
    """The medians for each model, one load of each in every round."""
    found: list[list[Load]] = [[] for _ in models]
    for number in range(rounds):
        order = range(len(models)) if number % 2 == 0 else reversed(range(len(models)))
        for index in order:
            call = [sys.executable, "-m", "benchmarks.load_once", str(models[index]), str(threads)]
            done = subprocess.run(call, capture_output=True, text=True, check=True)
            found[index].append(Load(**json.loads(done.stdout)))
    return [Load(*(median(getattr(load, name) for load in each) for name in Load.__dataclass_fields__))
            for each in found]


def compare(dense: Path, packed: Path, feeds: Sequence[dict[str, Any]], rounds: int, threads: int,
            block_seconds: float) -> Result:
    """Load both by turns, compare what they compute, and time them."""
    there, here = loads((dense, packed), rounds, threads)
    options = SessionOptions(threads=threads)
    a, b = Session(dense, options), Session(packed, options)
    equal = all(_same(a.run(feed), b.run(feed)) for feed in feeds)
    timing = compare_models(b, a, feeds, rounds=rounds, block_seconds=block_seconds)
    sizes = [path.stat().st_size for path in (dense, packed)]
    return Result(str(packed), sizes[1], there, here, sizes[1] / sizes[0], here.seconds / there.seconds,
                  here.peak_bytes / there.peak_bytes, timing.ratio, timing.ratio_low, timing.ratio_high, equal)


def _same(a: dict[str, np.ndarray[Any, Any]], b: dict[str, np.ndarray[Any, Any]]) -> bool:
    return list(a) == list(b) and all(
        (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()) for x, y in zip(a.values(), b.values(),
                                                                                            strict=True))


def table(found: Sequence[Result]) -> Table:
    """A line for each packed model."""
    made = Table("model", "size MB", "of dense", "load s", "of dense", "processor s", "peak MB", "of dense", "empty MB",
                 "time of dense", "outputs")
    for r in found:
        made.add_row(Path(r.model).name, f"{r.bytes / 1e6:.2f}", f"{r.size_ratio:.3f}x", f"{r.packed.seconds:.3f}",
                     f"{r.load_ratio:.2f}x", f"{r.packed.processor_seconds:.3f}", f"{r.packed.peak_bytes / 1e6:.0f}",
                     f"{r.peak_ratio:.2f}x", f"{r.packed.empty_bytes / 1e6:.0f}",
                     f"{r.latency:.3f}x ({r.low:.3f} to {r.high:.3f})", "equal" if r.equal else "DIFFER")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; status 1 when outputs differ, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packed",
                                     description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("models", nargs="*", type=Path, metavar="DENSE PACKED", help="the dense one, then packed ones")
    parser.add_argument("--data", default="random", help="what to run on, as onnxq bench takes it [random]")
    parser.add_argument("--batch", type=int, default=8, help="rows at once [8]")
    parser.add_argument("--rounds", type=int, default=7, help="loads of each model, and blocks of each [7]")
    parser.add_argument("--block-seconds", type=float, default=0.5, help="how long a block lasts [0.5]")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads [1]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, too")
    options = parser.parse_args(arguments)
    check_folders(parser, options.json)
    if len(options.models) < 2:
        parser.error("name a dense model and at least one packed one")
    dense, *packed = options.models
    feeds, found = _feeds(dense, options.data, options.batch), []
    for path in packed:
        say(path.name)
        found.append(compare(dense, path, feeds, options.rounds, options.threads, options.block_seconds))
    if options.json is not None:
        options.json.write_text(json.dumps({"where": where(), "dense": str(dense),
                                            "packed": [asdict(r) for r in found]}, indent=1) + "\n")
    screen = Console() if sys.stdout.isatty() else Console(width=160)
    screen.print(table(found))
    return 0 if all(r.equal for r in found) else 1


def _feeds(model: Path, data: str, batch: int) -> list[dict[str, Any]]:
    from onnxq import verification
    from onnxq.calibration.readers import open_data
    from onnxq.graph import load

    return verification.first_feeds(open_data(data, load(model).ports()), batch, 1)


if __name__ == "__main__":
    sys.exit(main())
