"""verify(): any compiled model against its float original, whoever compiled it."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import verification
from onnxq.calibration.readers import Dataset, open_data
from onnxq.errors import ModelError, UsageError
from onnxq.graph import Graph, dtype_of, is_constant, load, save, stored_bytes
from onnxq.numerics.comparison import Comparison
from onnxq.passes.canonicalize.widen_half import WidenHalf
from onnxq.passes.manager import Context, PassManager
from onnxq.passes.transform.smooth import scaled_tensors
from onnxq.progress import Progress, Silent
from onnxq.recipe import Preprocessing, parse
from onnxq.report.report import LayerRow, Report, Size
from onnxq.runtime.machine import elsewhere, session_options, target_here
from onnxq.runtime.measure import environment
from onnxq.runtime.session import Session, SessionOptions
from onnxq.targets import Target
from onnxq.verification import Goal
from onnxq.version import VERSION

LAYER_BATCHES = 4  # batches on which layers are compared


def verify(float_model: str | Path, compiled: str | Path, *, data: Any = None, metric: str | None = None,
           max_drop: str | None = None, min_sqnr: float | None = None, layers: bool = False, batch: int | None = None,
           samples: int | None = None, threads: int = 0, target: str = "cpu",
           progress: Progress | None = None) -> Report:
    """Compare two models that take the same inputs: size, latency, accuracy on `data`, what ran, and layer by layer.

    Without data the two are timed and read back on random inputs and accuracy is not measured. Raises UsageError for
    checks that need data, ModelError when a file can't be used or the two don't fit one another.
    """
    goal = Goal(metric, max_drop, min_sqnr)
    goal.check()
    if data is None and (max_drop is not None or min_sqnr is not None or metric is not None or layers):
        raise UsageError("--metric, --max-drop, --min-sqnr and --layers compare on data; give --data DATA")
    here = target_here(target)
    options = session_options(here, threads, must=True)
    report = Report(str(float_model), str(compiled), "")
    report.verdict.notices += [elsewhere(here)] * bool(elsewhere(here))
    bar, paths = progress or Silent(), (Path(float_model), Path(compiled))
    with verification.stage(report, bar, "load"):
        graphs = (load(paths[0]), load(paths[1]))
        _check_ports(*graphs)
        report.scheme = _scheme(graphs[1], report)
        given = open_data(data if data is not None else "random", graphs[0].ports(), how=_preprocessing(graphs[1]))
        if data is not None:
            verification.check_labels(goal, given)
    feeds = verification.first_feeds(given, batch, 1)
    if data is None:
        report.verdict.notices.append("no data were given: timed on random inputs, accuracy was not measured; "
                                      "give --data DATA")
    with _reference(paths[0], graphs[0], here, options, report) as reference:
        with verification.stage(report, bar, "measure"):
            report.latency = verification.latency(reference, paths[1], feeds, options, given.name, progress=bar)
        with verification.stage(report, bar, "read back"):
            report.nodes = verification.ran_rows(paths[1], feeds, options)
        if verification.slower(report.latency):
            report.verdict.notices.append(f"the compiled model is slower than float: {report.latency.speedup:.2f}x")
        if data is not None:
            with verification.stage(report, bar, "accuracy"):
                bar.total(given.rows)
                report.accuracy = verification.accuracy(reference, paths[1], given, goal, options, report.verdict,
                                                        batch=batch, samples=samples, progress=bar.step)
        if layers:
            with verification.stage(report, bar, "layers"):
                report.layers = layer_errors(*graphs, given, batch, options)
    report.size = Size(stored_bytes(paths[0]), stored_bytes(paths[1]))
    report.environment = {"onnxq": VERSION, "target": target, **environment()}
    return report


@contextlib.contextmanager
def _reference(model: Path, graph: Graph, target: Target, options: SessionOptions, report: Report) -> Iterator[Path]:
    """The file to compare with: the float model's, or that of its float32 form where it is half and does not run.

    A half graph is widened, in place: its layers are compared in float32.
    """
    PassManager([WidenHalf()]).run(graph, Context(target))
    if not graph.half or verification.runs(model, options):
        yield model
        return
    report.verdict.notices.append(verification.told_against_float32(graph.half))
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        save(graph, Path(folder) / "float.onnx")
        yield Path(folder) / "float.onnx"


def _check_ports(a: Graph, b: Graph) -> None:
    for kind, left, right in (("inputs", a.inputs, b.inputs), ("outputs", a.outputs, b.outputs)):
        names = [t.name for t in left], [t.name for t in right]
        if names[0] != names[1]:
            raise ModelError(f"the models have different {kind} ({', '.join(names[0])} and {', '.join(names[1])}); "
                             "name a float model and its own compiled form")


def _scheme(graph: Graph, report: Report) -> str:
    recipe = graph.metadata.get("onnxq.recipe")
    if recipe is None:
        report.verdict.notices.append("the compiled model was not made by onnxq: its plan is not known")
        return ""
    report.recipe = json.loads(recipe)
    return str(report.recipe["scheme"]["name"])


def _preprocessing(compiled: Graph) -> Preprocessing:
    """How the compilation's recipe read images or text, so that verification reads them likewise."""
    text = compiled.metadata.get("onnxq.recipe")
    return parse(text).data if text is not None else Preprocessing()


def layer_errors(reference: Graph, compiled: Graph, data: Dataset, batch: int | None,
                 options: SessionOptions) -> list[LayerRow]:
    """Float tensors that both models compute, compared in the order of the float graph (accumulated error).

    In the compiled model a tensor x may live on as codes `x.q` with constants `x.scale` and `x.zero_point`. Tensors
    whose channels are scaled there are left out.
    """
    shared = _shared(reference, compiled)
    wanted = {name: stored for name, (_, stored, _) in shared.items()}
    folds = {name: Comparison() for name in shared}
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        sessions = []
        for k, (graph, names) in enumerate(((reference, list(wanted)), (compiled, list(wanted.values())))):
            path = Path(folder) / f"{k}.onnx"
            save(graph, path, extra_outputs=names)
            sessions.append(Session(path, options))
        for given in islice(data.batches(batch), LAYER_BATCHES):
            a = sessions[0].run(given.feed, list(wanted))
            b = sessions[1].run(given.feed, list(wanted.values()))
            for name, (_, stored, decode) in shared.items():
                values = b[stored]
                if decode is not None:
                    scale, zero_point = decode
                    values = (values.astype(np.float32) - zero_point) * scale
                folds[name].update(a[name], values)
    return [LayerRow(name, shared[name][0], f.sqnr_db, f.cosine, f.max_abs) for name, f in folds.items()]


Decode = tuple[np.float32, np.float32]


def _shared(reference: Graph, compiled: Graph) -> dict[str, tuple[str, str, Decode | None]]:
    """Tensor -> (operator that makes it in float, name in the compiled model, how to decode it there)."""
    there = {t.name: t for n in compiled.nodes for t in n.outputs}
    constants = {t.name: t for n in compiled.nodes for t in n.inputs if is_constant(t)}
    found: dict[str, tuple[str, str, Decode | None]] = {}
    scaled = scaled_tensors(compiled)
    for node in reference.nodes:
        for tensor in node.outputs:
            name = tensor.name
            if name in scaled or dtype_of(tensor) != np.float32:  # of unknown type: not to be told from integers
                continue
            if name in there:
                found[name] = (node.op, name, None)
            elif f"{name}.q" in there and f"{name}.scale" in constants:
                scale, zero_point = (compiled.read(constants[f"{name}.{p}"]) for p in ("scale", "zero_point"))
                found[name] = (node.op, f"{name}.q", (np.float32(scale), np.float32(zero_point)))
    return found
