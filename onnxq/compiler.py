"""compile(): the stages in their order. The only place that knows the order."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnxq import codes, verification
from onnxq.calibration import observer
from onnxq.calibration.readers import Dataset, open_data
from onnxq.errors import OnnxqError, OutputError, UsageError
from onnxq.graph import Graph, Node, load, save, stored_bytes
from onnxq.passes.canonicalize import canonicalize
from onnxq.passes.lower import lower
from onnxq.passes.manager import Context, Hook, Pass, PassManager, Removals
from onnxq.passes.quantize import quantize
from onnxq.passes.transform import transform
from onnxq.plan import GIVEN, Plan
from onnxq.planner import correction
from onnxq.planner.outline import outline
from onnxq.planner.retreat import all_float, without_int8
from onnxq.planner.scales import finish
from onnxq.progress import Progress, Silent
from onnxq.recipe import BudgetSpec, Calibration, Fallback, Recipe, read, scheme_names
from onnxq.recipe import scheme as named_scheme
from onnxq.report.report import Latency, NodeRow, Report, Size
from onnxq.runtime.measure import environment
from onnxq.runtime.session import Session, SessionOptions
from onnxq.targets import TARGETS, Target
from onnxq.verification import Goal
from onnxq.version import VERSION

AUTO = "auto"
FORMATS = (AUTO, "qdq", "qoperator")


@dataclass(frozen=True)
class Request:
    """One call of compile(), checked: what is to be made of which model, and how."""

    model: Path
    output: Path
    recipe: Recipe
    target: Target
    options: SessionOptions
    goal: Goal
    calib: Any
    evaluation: Any
    format: str
    measure: bool
    dump: Path | None
    dump_after: str | None


def resolve(*, scheme: str = AUTO, recipe: Recipe | str | Path | None = None, calib: Any = None,
            samples: int | None = None, batch: int | None = None, ranges: str | None = None,
            metric: str | None = None, max_drop: str | None = None, keep_float: Sequence[str] = ()) -> Recipe:
    """The recipe that a call stands for: a file or object, or a named scheme, with the options put in.

    Scheme `auto` is w8a8 with calibration data and w8a8-dynamic-tensor without. Raises UsageError and RecipeError.
    """
    if recipe is not None and scheme != AUTO:
        raise UsageError("a scheme and a recipe exclude one another; write the scheme into the recipe")
    if isinstance(recipe, Recipe):
        chosen = recipe
    elif recipe is not None:
        chosen = read(recipe)
    else:
        name = ("w8a8" if calib is not None else "w8a8-dynamic-tensor") if scheme == AUTO else scheme
        chosen = Recipe(named_scheme(name))
    calibration = replace(chosen.calibration,
                          samples=chosen.calibration.samples if samples is None else samples,
                          batch=chosen.calibration.batch if batch is None else batch,
                          ranges=chosen.calibration.ranges if ranges is None else ranges)
    observer.check(calibration)
    return replace(chosen, calibration=calibration,
                   fallback=Fallback((*chosen.fallback.keep_float, *keep_float)),
                   budget=BudgetSpec(metric or chosen.budget.metric, max_drop or chosen.budget.max_drop))


def compile(model: str | Path, output: str | Path | None = None, *, scheme: str = AUTO,
            recipe: Recipe | str | Path | None = None, calib: Any = None, samples: int | None = None,
            batch: int | None = None, ranges: str | None = None, eval: Any = None, metric: str | None = None,
            max_drop: str | None = None, target: str = "cpu", threads: int = 0, format: str = AUTO,
            keep_float: Sequence[str] = (), force: bool = False, measure: bool = True,
            dump: str | Path | None = None, dump_after: str | None = None,
            progress: Progress | None = None) -> Report:
    """Compile an ONNX file and return what was measured; the result is written to `output`.

    `calib` and `eval` are DATA (see onnxq.calibration.readers.open_data). The result is written even when a check
    fails: look at `Report.ok`. Raises UsageError for a wrong call and the other OnnxqErrors for unusable input.
    """
    chosen = resolve(scheme=scheme, recipe=recipe, calib=calib, samples=samples, batch=batch, ranges=ranges,
                     metric=metric, max_drop=max_drop, keep_float=keep_float)
    model = Path(model)
    destination = Path(output) if output is not None else model.with_name(f"{model.stem}.{chosen.scheme.name}.onnx")
    if target not in TARGETS:
        raise UsageError(f"there is no target {target!r}; known: {', '.join(TARGETS)}")
    if format not in FORMATS:
        raise UsageError(f"there is no format {format!r}; use one of {', '.join(FORMATS)}")
    request = Request(
        model, destination, chosen, TARGETS[target], SessionOptions(TARGETS[target].provider, threads),
        Goal(chosen.budget.metric, chosen.budget.max_drop), calib, eval,
        TARGETS[target].format if format == AUTO else format, measure,
        Path(dump) if dump is not None else None, dump_after)
    _check(request, force)
    return _Compilation(request, progress or Silent()).run()


def _check(request: Request, force: bool) -> None:
    request.goal.check()
    if request.calib is None and request.evaluation is None:
        for name, asked in (("--max-drop", request.goal.max_drop), ("--metric", request.goal.metric)):
            if asked is not None:
                raise UsageError(f"{name} needs data to measure on; give --eval DATA")
    chosen = request.recipe.scheme
    if chosen.activations is not None and not chosen.is_dynamic and request.calib is None:
        dynamic = ", ".join(n for n in scheme_names() if "dynamic" in n)
        raise UsageError(f"scheme {chosen.name} needs data to find ranges; give --calib DATA, or choose {dynamic}")
    if request.dump_after is not None and request.dump is None:
        raise UsageError("--dump-after names a pass, but no folder to write its graph to; give --dump DIR")
    if request.dump_after is not None and request.dump_after not in _pass_names(request.format):
        raise UsageError(f"there is no pass {request.dump_after!r}; known: {', '.join(_pass_names(request.format))}")
    if request.model.exists():  # loading says what is wrong with a model that does not
        _check_output(request, force)


def _check_output(request: Request, force: bool) -> None:
    output, folder = request.output, request.output.parent
    if output.is_dir():
        raise OutputError(f"{output} is a folder; name the file to write, e.g. -o {output / 'model.onnx'}")
    if output.exists() and output.samefile(request.model):
        raise UsageError("the result would replace the model itself; choose another -o")
    if output.exists() and not force:
        raise OutputError(f"{output} exists; give --force to replace it, or another -o")
    if not folder.is_dir():
        missing = "is not a folder" if folder.exists() else "does not exist; make it"
        raise OutputError(f"the folder of the result, {folder}, {missing}, or choose another -o")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"the folder {folder} can't be written; choose another -o")


def _pass_names(output_format: str) -> list[str]:
    return [p.name for p in (*canonicalize(), *transform(), *quantize(), *lower(output_format))]


class _Compilation:
    def __init__(self, request: Request, progress: Progress) -> None:
        self.request, self.progress = request, progress
        self.report = Report(str(request.model), str(request.output), request.recipe.scheme.name,
                             recipe=request.recipe.to_dict())
        self.context = Context(request.target)
        self.dumped = 0
        self.removed: list[NodeRow] = []
        self.made: dict[str, tuple[str, ...]] = {}

    def run(self) -> Report:
        request = self.request
        with self.stage("load"):
            graph = load(request.model)
            how, ports = request.recipe.data, graph.ports()
            calib = open_data(request.calib, ports, how=how) if request.calib is not None else None
            evaluation = open_data(request.evaluation, ports, how=how) if request.evaluation is not None else None
            scored = evaluation or calib
            if scored is not None:
                verification.check_labels(request.goal, scored)
        with self.stage("canonicalize"):
            self._canonicalize(graph)
        self.context.plan = self._plan(graph, calib)
        canonical = graph.copy()
        with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
            compiled, twin = Path(folder) / "compiled.onnx", Path(folder) / "twin.onnx"
            with self.stage("rewrite"):
                self._rewrite(graph, twin)
                self._sign(graph)
                save(graph, compiled)
            graph = self._verify(graph, canonical, compiled, twin, calib, evaluation)
        with self.stage("save"):
            save(graph, request.output)
        self.report.size = Size(stored_bytes(request.model), stored_bytes(request.output))
        self.report.environment = {"onnxq": VERSION, "target": request.target.name, **environment()}
        codes.connect(self.report.nodes, self.context.plan.nodes, canonical)
        self.report.tensors = codes.planned(self.context.plan, canonical)
        self.report.nodes += self.removed
        return self.report

    def stage(self, name: str) -> AbstractContextManager[None]:
        return verification.stage(self.report, self.progress, name)

    # -------------------------------------------------------------- plan

    def _canonicalize(self, graph: Graph) -> None:
        removals = Removals(graph)
        self._passes(canonicalize(), graph, removals)
        self.made = {n.name: _results(graph, n) for n in graph.nodes}
        self.removed = verification.removed_rows(removals)

    def _plan(self, graph: Graph, calib: Dataset | None) -> Plan:
        recipe, target = self.request.recipe, self.request.target
        with self.stage("plan"):
            found = outline(graph, recipe, target)
        ranges = {}
        if found.ranges_of and calib is not None:
            with self.stage("calibrate"):
                self.progress.total(_rows(calib, recipe.calibration))
                ranges = observer.observe(graph, found.ranges_of, calib, recipe.calibration, self.request.options,
                                          self.progress.step, recipe.scheme.activations)
        with self.stage("scales"):
            plan = finish(found, graph, ranges, recipe, target)
        if calib is not None and plan.changes and recipe.bias_correction:
            with self.stage("correct"):
                self.progress.total(correction.ROWS)
                plan.bias_shifts = correction.mean_errors(graph, plan, calib, recipe.calibration, self.request.options,
                                                          self.progress.step)
        if calib is not None and (ranges or plan.bias_shifts):
            self._data_notices(calib, "calibration")
        given = sum(1 for n in plan.nodes.values() if n.scheme == GIVEN)
        if given:
            self.report.verdict.notices.append(f"{given} nodes were quantized already and are kept")
        if not plan.changes:
            self.report.verdict.notices.append(f"nothing {'more ' if given else ''}in this model can be quantized "
                                               "under this scheme; each node's reason is in the report")
        if recipe.scheme.is_dynamic:
            self._dynamic_notice(plan)
        return plan

    def _dynamic_notice(self, plan: Plan) -> None:
        convs = sum(1 for n in plan.nodes.values() if n.op == "Conv" and not n.is_int and n.scheme != GIVEN)
        operators = ", ".join(self.request.recipe.scheme.operators)
        left = f", {convs} Conv compute in float" if convs else ""
        hint = "; --calib DATA brings static int8, faster and for Conv, too" if self.request.calib is None else ""
        self.report.verdict.notices.append(f"scheme {plan.scheme}: {operators} only{left}{hint}")

    def _data_notices(self, data: Dataset, use: str) -> None:
        if data.random:
            self.report.verdict.notices.append(f"{use} ran on random data, as asked: its figures tell nothing about "
                                               "accuracy")
        self.report.verdict.notices += [f"{use} data: {note}" for note in data.notes]

    # -------------------------------------------------------------- rewrite

    def _rewrite(self, graph: Graph, twin: Path) -> None:
        if self.context.plan.changes:
            self._passes(transform(), graph)
            self._passes(quantize(), graph)
            save(graph, twin)
        self._passes(lower(self.request.format), graph)

    def _passes(self, passes: Sequence[Pass], graph: Graph, *hooks: Hook) -> None:
        dump = [self._dump] if self.request.dump is not None else []
        PassManager(passes, [*hooks, *dump]).run(graph, self.context)

    def _dump(self, step: Pass, graph: Graph, seconds: float) -> None:
        folder = self.request.dump
        assert folder is not None
        self.dumped += 1
        if self.request.dump_after in (None, step.name):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise OutputError(f"{folder} can't be made ({e.strerror}); choose another --dump folder") from None
            save(graph, folder / f"{self.dumped:02d}-{step.name}.onnx")

    def _sign(self, graph: Graph) -> None:
        graph.metadata.update({
            "onnxq.version": VERSION, "onnxq.recipe": json.dumps(self.request.recipe.to_dict()),
            "onnxq.plan": self.context.plan.digest()})

    # -------------------------------------------------------------- verify

    def _verify(self, graph: Graph, canonical: Graph, compiled: Path, twin: Path, calib: Dataset | None,
                evaluation: Dataset | None) -> Graph:
        """Measure, perhaps go back to float, compare; gives the graph to be saved."""
        request, report = self.request, self.report
        data = evaluation or calib
        feeds, source = self._feeds(canonical, data)
        if feeds and request.measure and self.context.plan.changes:
            with self.stage("measure"):
                graph = self._settle(graph, canonical, compiled, twin, feeds, source)
        if feeds:
            with self.stage("verify"):
                report.nodes = verification.what_ran(self.context.plan, compiled, feeds, request.options,
                                                     report.verdict, self.made)
                if self.context.plan.changes:
                    report.semantic = verification.semantic(request.model, compiled, twin, feeds, request.options,
                                                            report.verdict)
        else:
            report.nodes = [verification.row(n) for n in self.context.plan.nodes.values()]
        self._accuracy(compiled, data, evaluation)
        return graph

    def _feeds(self, graph: Graph, data: Dataset | None) -> tuple[list[dict[str, Any]], str]:
        """One batch to time and read back on; without data a random one, which is said wherever it is used."""
        batch = self.request.recipe.calibration.batch
        if data is not None:
            return verification.first_feeds(data, batch, 1), data.name
        try:
            feeds = verification.first_feeds(open_data("random", graph.ports()), batch, 1)
            Session(self.request.model, self.request.options).run(feeds[0])
        except OnnxqError:
            self.report.verdict.notices.append("no data were given and the model does not run on random inputs: "
                                               "nothing was timed or read back; give --calib or --eval")
            return [], ""
        self.report.verdict.notices.append("no data were given: timed on random inputs, accuracy was not measured; "
                                           "give --eval DATA")
        return feeds, "random inputs"

    def _settle(self, graph: Graph, canonical: Graph, compiled: Path, twin: Path, feeds: list[dict[str, Any]],
                source: str) -> Graph:
        """Time the result; what is slower than float gives way to float kernels, then to the float graph as it came."""
        while True:
            found = verification.latency(self.request.model, compiled, feeds, self.request.options, source,
                                         progress=self.progress)
            self.report.latency = found
            if not self.context.plan.changes or not verification.slower(found):
                return graph
            self.context.plan = self._retreat(canonical, found)
            graph = canonical.copy()
            self._rewrite(graph, twin)
            self._sign(graph)
            save(graph, compiled)

    def _retreat(self, canonical: Graph, found: Latency) -> Plan:
        plan, notices = self.context.plan, self.report.verdict.notices
        took = f"{found.compiled_ms:.3g} against {found.float_ms:.3g} ms"
        if plan.quantized():
            notices.append(f"nothing pays, left float: int8 ran at {found.speedup:.2f}x float here ({took}); "
                           "--no-measure keeps it all the same")
            return without_int8(plan, canonical, self.request.recipe, f"int8 does not pay here: {took} in float")
        notices.append(f"decoding the stored weights takes time here ({took}), so they stay float")
        return all_float(plan, f"decoding stored weights does not pay here: {took} in float")

    def _accuracy(self, compiled: Path, data: Dataset | None, evaluation: Dataset | None) -> None:
        request = self.request
        if data is None:
            return
        note = "" if evaluation is not None else "agreement with float on the calibration data; give --eval DATA"
        samples = None if evaluation is not None else request.recipe.calibration.samples
        with self.stage("accuracy"):
            self.progress.total(data.rows if samples is None else min(samples, data.rows or samples))
            self.report.accuracy = verification.accuracy(
                request.model, compiled, data, request.goal, request.options, self.report.verdict,
                batch=request.recipe.calibration.batch, samples=samples, note=note, progress=self.progress.step)
        if evaluation is not None:
            self._data_notices(evaluation, "evaluation")


def _results(graph: Graph, node: Node) -> tuple[str, ...]:
    """What a node makes, and what a bias or activation behind it does: the runtime fuses them and leaves the latter."""
    reader = graph.only_consumer(node.outputs[0]) if len(node.outputs) else None
    behind = verification.ACTIVATIONS | ({"Add"} if node.op == "MatMul" else set())
    fused = reader.outputs if reader is not None and reader.op in behind else []
    return tuple(t.name for t in [*node.outputs, *fused])


def _rows(data: Dataset, how: Calibration) -> int | None:
    known = [n for n in (data.rows, how.samples) if n is not None]
    return min(known) if known else None


