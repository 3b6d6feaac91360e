"""Peak resident memory of a compilation in a process of its own, at some calibration rows and at ten times as many.

Rows are those of calib.npz over and over, from a generator, so that no one can hold on to what is a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxq
from benchmarks.models import Array, Case, read
from onnxq.recipe import Calibration, Recipe
from onnxq.runtime.measure import peak_memory_bytes
from onnxq.schemes import scheme

GROWTH = 10
_BATCH = 8


def repeated(case: Case, rows: int) -> Callable[[], Iterator[dict[str, Array]]]:
    """DATA: feeds of 8 rows, or what the model fixes, from calib.npz over and over until `rows` are given."""
    data = read(case.calib)
    stored, step = len(data[next(iter(case.stored))]), case.batch(_BATCH)
    starts = range(0, stored - step + 1, step)

    def feeds() -> Iterator[dict[str, Array]]:
        for number in range(rows // step):
            start = starts[number % len(starts)]
            yield case.feed(data, start, start + step)

    return feeds


def compile_percentile(case: Case, output: Path, rows: int, threads: int) -> dict[str, Any]:
    """Compile with percentile ranges over `rows` rows; the peak is that of the process, so call it in a fresh one."""
    how = replace(Calibration(), samples=rows, ranges="percentile")
    report = onnxq.compile(case.model, output, recipe=Recipe(scheme("w8a8"), calibration=how),
                           calib=repeated(case, rows), threads=threads, force=True)
    return {"rows": rows, "peak_bytes": peak_memory_bytes(), "seconds": sum(s.seconds for s in report.stages)}
