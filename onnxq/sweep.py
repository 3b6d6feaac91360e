"""sweep(): a weight-only scheme with other blocks, bits and searches, and what each of them takes, costs and gains."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import presets, verification
from onnxq.calibration.readers import open_data
from onnxq.calibration.shapes import resized
from onnxq.compiler import compile
from onnxq.errors import ModelError, UsageError
from onnxq.graph import Graph, load, stored_bytes
from onnxq.numerics import affine
from onnxq.passes.blocks import coded, inputs_first, layout
from onnxq.passes.canonicalize import canonicalize
from onnxq.passes.manager import Context, PassManager
from onnxq.passes.transform.smooth import Smooth
from onnxq.plan import Plan
from onnxq.planner.weight_only import readers, weight_of
from onnxq.progress import Progress, Silent
from onnxq.recipe import Recipe
from onnxq.report.report import Report
from onnxq.request import several
from onnxq.runtime.machine import elsewhere, session_options, target_here
from onnxq.runtime.measure import compare_models, environment
from onnxq.runtime.session import Session, SessionOptions
from onnxq.schemes import BLOCK_SIZES, SEARCHES, Scheme, in_blocks
from onnxq.targets import Target
from onnxq.version import VERSION

GROUP_SIZE, BITS, SYMMETRIC, SEARCH = "group_size", "bits", "symmetric", "search"
VALUES: dict[str, tuple[Any, ...]] = {GROUP_SIZE: BLOCK_SIZES, BITS: (2, 4, 8), SYMMETRIC: (True, False),
                                      SEARCH: SEARCHES}
BLOCK_SECONDS, ROUNDS = 0.3, 5

Row = dict[str, Any]
Feed = Mapping[str, "np.ndarray[Any, Any]"]


def sweep(model: str | Path, *, scheme: str = "w4a16", vary: Mapping[str, Sequence[Any]] | None = None,
          calib: Any = None, samples: int | None = None, batch: int | None = None, eval: Any = None,
          metric: str | None = None, shapes: Mapping[str, int | Sequence[int]] | None = None, target: str = "cpu",
          threads: int = 0, heard: Callable[[Row], None] | None = None, progress: Progress | None = None) -> Row:
    """Compile a model once for each combination of `vary`, by the target's kernels, and return figures as plain data.

    `vary` maps group_size, bits, symmetric or search to values (None: all group sizes). `rows` holds for each
    combination its values, `bytes` of the file, `weight_error` (of all weights in blocks, the norm of the error
    relative to theirs), `sqnr_db` of the first output and `metric` on `eval` (else on `calib`; None without data), and
    `latency` on each combination of `shapes` (free axis -> size or sizes; without any, one batch of the data): the
    float model and the compiled one in alternating blocks of this process; sizes that the model does not run on are
    left out. `heard` gets each row as it is known.
    Raises UsageError for a scheme without blocks or what can't vary, and all that compile() raises.
    """
    base = presets.named(scheme)
    combinations = _combinations(base.scheme, vary or {GROUP_SIZE: BLOCK_SIZES})
    if metric is not None and calib is None and eval is None:
        raise UsageError("--metric needs data to measure on; give --eval DATA")
    given = {"calib": calib, "samples": samples, "batch": batch, "eval": eval, "metric": metric, "target": target,
             "threads": threads}
    run = _Sweep(Path(model), base, given, several(shapes or {}), progress or Silent())
    rows = []
    for number, (values, varied) in enumerate(combinations, 1):
        run.bar.stage(f"{described(values)} ({number} of {len(combinations)})")
        rows.append({**values, **run.row(varied, values)})
        if heard is not None:
            heard(rows[-1])
    return {"model": str(model), "scheme": scheme, "target": target, "metric": metric, "data": run.data,
            "vary": list(combinations[0][0]), "float": {"bytes": stored_bytes(model), "metric": run.metric},
            "feeds": [{k: list(v.shape) for k, v in feed.items()} for feed in run.feeds], "threads": threads,
            "rows": rows, "notices": run.notices, "environment": {"onnxq": VERSION, **environment()}}


class _Sweep:
    """What all combinations share: the float model and what it is fed."""

    def __init__(self, model: Path, base: Recipe, given: Row, shapes: Mapping[str, Sequence[int]],
                 bar: Progress) -> None:
        self.model, self.base, self.given, self.shapes, self.bar = model, base, given, shapes, bar
        self.metric: float | None = None  # of the float model
        bar.stage("load")
        self.graph = load(model)
        ports, named = self.graph.ports(), given["calib"] if given["eval"] is None else given["eval"]
        data = open_data("random" if named is None else named, ports)
        self.data = data.name
        self.notices = [] if named is not None else [
            "no data were given: timed on random inputs, and the error at the output is not known; give --eval DATA"]
        self.target = target_here(given["target"])
        self.notices += [elsewhere(self.target)] * bool(elsewhere(self.target))
        PassManager(canonicalize()).run(self.graph, Context(self.target))
        self.reference = Session(model, SessionOptions(threads=given["threads"]))
        self.feeds = self._running(resized(verification.first_feeds(data, given["batch"], 1)[0], ports, shapes))

    def _running(self, feeds: Sequence[Feed]) -> list[Feed]:
        """Those that the float model runs on: sizes that have to agree are combined in all ways. Raises ModelError."""
        found: list[Feed] = []
        for feed in feeds:
            try:
                self.reference.run(feed)
            except ModelError:
                if not found and feed is feeds[-1]:
                    raise
                continue
            found.append(feed)
        if len(found) < len(feeds):
            self.notices.append(f"{len(feeds) - len(found)} of {len(feeds)} combinations of sizes are left out, as the "
                                "model does not run on them")
        return found

    def row(self, scheme: Scheme, values: Row) -> Row:
        """The figures of one combination."""
        with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
            path, plan = Path(folder) / "compiled.onnx", Path(folder) / "plan"
            report = compile(self.model, path, recipe=replace(self.base, scheme=scheme), measure=False, save_plan=plan,
                             shapes=self.shapes if self.target.static else {}, progress=_Within(self.bar), **self.given)
            compiled = Session(path, session_options(self.target, self.given["threads"]))
            found = {**_figures(report, self.given["metric"]),
                     "weight_error": _weight_error(self.graph, Plan.load(plan), self.target),
                     "latency": _latencies(self.reference, compiled, self.feeds, self.bar)}
        if report.accuracy is not None and self.given["metric"] is not None:
            self.metric = report.accuracy.float
        self.notices += [f"{described(values)}: {failure}" for failure in report.verdict.failures]
        return found


def described(values: Mapping[str, Any]) -> str:
    """'group size 32, 4 bits, asymmetric, by mse'."""
    found = {name: {GROUP_SIZE: f"group size {value}", BITS: f"{value} bits", SEARCH: f"by {value}",
                    SYMMETRIC: "symmetric" if value else "asymmetric"}[name] for name, value in values.items()}
    return ", ".join(found.values())


def read(vary: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
    """Texts of a command line as values; what is no value of any kind stays text, for `sweep` to refuse."""
    words = {"true": True, "false": False}
    return {name: [int(v) if v.isdecimal() else words.get(v.lower(), v) for v in values]
            for name, values in vary.items()}


class _Within:
    """The progress of one compilation inside the one stage of a combination."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def stage(self, name: str) -> None:
        self.progress.total(None)

    def total(self, steps: int | None) -> None:
        self.progress.total(steps)

    def step(self, done: int) -> None:
        self.progress.step(done)


def _combinations(base: Scheme, vary: Mapping[str, Sequence[Any]]) -> list[tuple[Row, Scheme]]:
    """(values, the scheme with them) of all combinations, the last variable changing first."""
    in_blocks(base, BLOCK_SIZES[0])  # refuses what has none
    for name, values in vary.items():
        if name not in VALUES:
            raise UsageError(f"--vary {name} is not known; vary {', '.join(VALUES)}")
        wrong = next((v for v in values if v not in VALUES[name] or isinstance(v, bool) is not (name == SYMMETRIC)),
                     None)
        if wrong is not None or not values:
            known = ",".join(str(v).lower() for v in VALUES[name])
            raise UsageError(f"--vary {name}={'' if wrong is None else wrong} has no kernel here; use some of "
                             f"{name}={known}")
    found = []
    for chosen in itertools.product(*vary.values()):
        row = dict(zip(vary, chosen, strict=True))
        found.append((row, _varied(base, row)))
    return found


def _varied(base: Scheme, values: Mapping[str, Any]) -> Scheme:
    weights = base.weights
    assert weights is not None
    dtype = f"{weights.dtype.rstrip('248')}{values[BITS]}" if BITS in values else weights.dtype
    varied = replace(base, weights=replace(weights, dtype=dtype, search=values.get(SEARCH, weights.search)))
    return in_blocks(varied, values.get(GROUP_SIZE), values.get(SYMMETRIC))


def _figures(report: Report, metric: str | None) -> Row:
    """What a report tells of a file and its accuracy."""
    assert report.size is not None
    accuracy = report.accuracy
    first = next(iter(accuracy.outputs.values()), None) if accuracy is not None else None
    return {"bytes": report.size.compiled_bytes, "sqnr_db": first.sqnr_db if first is not None else None,
            "metric": accuracy.compiled if accuracy is not None and metric is not None else None}


def _weight_error(graph: Graph, plan: Plan, target: Target) -> float:
    """Norm of the error of all weights in blocks, relative to their norm."""
    scaled = graph.copy()
    PassManager([Smooth()]).run(scaled, Context(target, plan))
    error = power = 0.0
    for name, reading in readers(scaled).items():
        form = layout(plan, name)
        if form is None:
            continue
        weight = weight_of(reading[0][1])
        values = inputs_first(np.asarray(scaled.read(weight), np.float32), form.axis)
        codes, params = coded(scaled, weight, plan)()
        error += float(np.square(affine.dequantize(codes, params) - values, dtype=np.float64).sum())
        power += float(np.square(values, dtype=np.float64).sum())
    return float(np.sqrt(error / power)) if power > 0 else 0.0


def _latencies(reference: Session, compiled: Session, feeds: Sequence[Feed], bar: Progress) -> list[Row]:
    """Both models on each feed by itself."""
    found = []
    bar.total(len(feeds))
    for done, feed in enumerate(feeds, 1):
        timing = compare_models(reference, compiled, [feed], block_seconds=BLOCK_SECONDS, rounds=ROUNDS)
        found.append({"float_ms": timing.a_ms, "compiled_ms": timing.b_ms, "speedup": timing.ratio,
                      "low": timing.ratio_low, "high": timing.ratio_high})
        bar.step(done)
    return found
