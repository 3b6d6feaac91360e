"""python -m benchmarks.large: how fast and in how much memory a model is compiled that is larger than memory.

`--make DIR --gigabytes 12` writes a decoder with random weights (benchmarks/decoder.py). With a MODEL, it is compiled
in a process of its own whose resident memory is sampled, mapped pages included; `--floor` only rounds every weight to
4 bits by a given scale instead: what reading, a cheap pass and writing cost at least. Pages that the system still has
of the file make reading faster than from the disk; `--cold` drops them first. Status 1 when a bound was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from benchmarks import decoder
from onnxq.graph import Graph, Tensor, dtype_of, is_constant, load, raise_opset, save, shape_of, stored_bytes
from onnxq.runtime.measure import environment

MOST_BYTES = 2e9
LEAST_SPEED = 60e6  # weights per second
_LARGE = 1 << 16  # weights
_BLOCK = 1 << 24  # weights that the floor reads at a time
_PIECE = 1 << 16  # and rounds at a time, in the processor's cache
_ROOT = Path(__file__).resolve().parents[1]  # where this package is found
_WAIT = 0.02  # seconds between samples


@dataclass(frozen=True)
class Run:
    """One compilation: weights of the model, seconds in all, of the processors and by stage, the most bytes resident.

    `mapped_bytes` is the most that files took of it; the two need not have been at one time.
    """

    weights: int
    seconds: float
    cpu_seconds: float
    stages: dict[str, float]
    peak_bytes: int
    mapped_bytes: int
    output_bytes: int

    @property
    def speed(self) -> float:
        """Weights per second."""
        return self.weights / self.seconds

    @property
    def held(self) -> bool:
        """Whether both bounds were held."""
        return self.peak_bytes < MOST_BYTES and self.speed >= LEAST_SPEED


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a model or measure with one, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL")
    parser.add_argument("--make", type=Path, metavar="DIR", help="write DIR/model.onnx and its weights")
    parser.add_argument("--gigabytes", type=float, default=12.0, help="size of the weights that --make writes [12]")
    parser.add_argument("--scheme", default="w4a16", help="the scheme to compile with [w4a16]")
    parser.add_argument("--max-memory", default="2GB", help="what the compiler is told to keep within [2GB]")
    parser.add_argument("--floor", action="store_true", help="round to 4 bits and write, no more")
    parser.add_argument("--cold", action="store_true", help="have the weights read from the disk")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, too")
    parser.add_argument("--write-floor", type=Path, metavar="OUT", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.make is not None:
        shape = decoder.of_size(options.gigabytes)
        print(f"{decoder.write(options.make, shape)}: {shape.count() / 1e6:.0f} M weights, {shape}")
        return 0
    if options.model is None:
        parser.error("name a MODEL, or --make one")
    if options.write_floor is not None:
        print(json.dumps(write_floor(options.model, options.write_floor)))
        return 0
    with TemporaryDirectory(prefix=".onnxq-large-", dir=options.model.absolute().parent) as scratch:
        if options.cold:
            forget_pages(options.model)
        how = None if options.floor else ["--scheme", options.scheme, "--max-memory", options.max_memory]
        found = measure(options.model, Path(scratch) / "out.onnx", how)
    if options.json is not None:
        options.json.write_text(json.dumps({**vars(found), "held": found.held}, indent=1) + "\n")
    print(described(found))
    print(", ".join(f"{k} {v}" for k, v in environment().items()))
    return 0 if found.held else 1


def described(found: Run) -> str:
    """The figures in lines of text."""
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found.stages.items())
    return (f"{found.weights / 1e6:.0f} M weights in {found.seconds:.1f} s: {found.speed / 1e6:.0f} M weights/s; "
            f"{found.cpu_seconds:.1f} s on the processors\n"
            f"peak {found.peak_bytes / 1e6:.0f} MB, of it mapped {found.mapped_bytes / 1e6:.0f} MB; "
            f"written {found.output_bytes / 1e6:.0f} MB\nseconds by stage: {stages}\n"
            f"bounds {'held' if found.held else 'MISSED'}: {LEAST_SPEED / 1e6:.0f} M weights/s, "
            f"{MOST_BYTES / 1e6:.0f} MB")


# ------------------------------------------------------------------ a process and its memory


def measure(model: Path, output: Path, options: Sequence[str] | None) -> Run:
    """Compile with these options, or with None only round to 4 bits, in a process of its own.

    Raises RuntimeError with what the process said when it failed.
    """
    model, output, weights = model.absolute(), output.absolute(), count_weights(model)
    if options is None:
        call = ["-m", "benchmarks.large", str(model), "--write-floor", str(output)]
    else:
        call = ["-m", "onnxq", "compile", str(model), "-o", str(output), "--json", "--quiet", *options]
    start, before = time.perf_counter(), _children_seconds()
    with TemporaryDirectory() as folder, (Path(folder) / "said").open("w+") as said:
        with subprocess.Popen([sys.executable, *call], stdout=said, stderr=subprocess.STDOUT, cwd=_ROOT) as process:
            peak, mapped = watch(process)
        seconds = time.perf_counter() - start
        said.seek(0)
        text = said.read()
    if process.returncode not in (0, 1) or not output.exists():
        raise RuntimeError(f"{' '.join(call)} failed: {text[-2000:]}")
    told = json.loads(text[text.index("{"):])
    stages = told if options is None else {s["name"]: s["seconds"] for s in told["stages"]}
    return Run(weights, seconds, _children_seconds() - before, stages, peak, mapped, stored_bytes(output))


def _children_seconds() -> float:
    """Processor time of the processes that this one started and that have ended."""
    told = os.times()
    return told.children_user + told.children_system


def watch(process: subprocess.Popen[Any]) -> tuple[int, int]:
    """(most bytes resident, most bytes of them in mapped files) of a process until it ends; 0 where /proc is not."""
    peak = mapped = 0
    while process.poll() is None:
        try:
            told = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            told = ""
        sizes = {name: 1024 * int(size) for name, size in re.findall(r"^(VmHWM|RssFile):\s+(\d+) kB", told, re.M)}
        peak, mapped = max(peak, sizes.get("VmHWM", 0)), max(mapped, sizes.get("RssFile", 0))
        time.sleep(_WAIT)
    return peak, mapped


def count_weights(model: Path) -> int:
    """Elements of the float weights that nodes read."""
    return sum(int(np.prod(_sizes(t))) for t in _large(load(model)))


def forget_pages(model: Path) -> None:
    """Have the system drop what it still holds in memory of the model's files."""
    if not hasattr(os, "posix_fadvise"):
        raise SystemExit("--cold needs a system with posix_fadvise; leave it out")
    for path in model.parent.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ------------------------------------------------------------------ the floor


def write_floor(model: Path, output: Path) -> dict[str, float]:
    """Round every large weight to int4 by a scale that its shape gives, and write; seconds by stage."""
    clock = [time.perf_counter()]
    graph = raise_opset(load(model), 21)
    clock.append(time.perf_counter())
    for tensor in _large(graph):
        sizes = _sizes(tensor)
        deviation = sizes[0] ** -0.5
        codes = graph.computed(f"{tensor.name}.q", ml_dtypes.int4, sizes, _rounded(graph, tensor, 2 / deviation))
        decoded = graph.variable(f"{tensor.name}.f", np.float32, sizes)
        scaled = graph.like(decoded, f"{tensor.name}.scaled")
        graph.redirect(tensor, scaled)
        graph.add_cast(f"{tensor.name}.cast", codes, decoded)
        scale = graph.constant(f"{tensor.name}.scale", np.asarray(deviation / 2, np.float32))
        graph.add_node("Mul", f"{tensor.name}.mul", [decoded, scale], [scaled])
    clock.append(time.perf_counter())
    save(graph, output)
    clock.append(time.perf_counter())
    return {name: after - before for name, before, after in zip(("load", "edit", "save"), clock, clock[1:],
                                                                strict=False)}


def _rounded(graph: Graph, tensor: Tensor, factor: float) -> Callable[[], npt.NDArray[Any]]:
    sizes = _sizes(tensor)
    step = max(1, _BLOCK // int(np.prod(sizes[1:])))

    def compute() -> npt.NDArray[Any]:
        codes = np.empty(sizes, np.int8)
        buffer = np.empty(_PIECE, np.float32)
        for start in range(0, sizes[0], step):
            rows = graph.read_rows(tensor, start, start + step).reshape(-1)
            target = codes[start:start + step].reshape(-1)
            for at in range(0, len(rows), _PIECE):
                piece = np.multiply(rows[at:at + _PIECE], np.float32(factor), out=buffer[:len(rows) - at])
                np.clip(np.rint(piece, out=piece), -8, 7, out=piece)
                target[at:at + _PIECE] = piece
        return codes.view(ml_dtypes.int4)

    return compute


def _large(graph: Graph) -> list[Tensor]:
    found = {t.name: t for n, _ in graph.walk() for t in n.inputs if is_constant(t)}
    return [t for t in found.values() if dtype_of(t) == np.float32 and np.prod(_sizes(t)) >= _LARGE]


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    return tuple(int(d or 0) for d in shape_of(tensor) or ())


if __name__ == "__main__":
    sys.exit(main())
