"""compile(): the stages in their order. The only place that knows the order."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxq import verification
from onnxq.calibration import observer
from onnxq.calibration.readers import Dataset, open_data
from onnxq.errors import OnnxqError, OutputError, UsageError
from onnxq.explanation import codes
from onnxq.graph import Graph, Node, load, save, stored_bytes
from onnxq.passes.canonicalize import canonicalize
from onnxq.passes.lower import lower
from onnxq.passes.manager import Context, Hook, Pass, PassManager, Removals
from onnxq.passes.quantize import quantize
from onnxq.passes.transform import transform
from onnxq.plan import GIVEN, Plan
from onnxq.planner import correction, masks
from onnxq.planner.outline import outline
from onnxq.planner.replay import replayed
from onnxq.planner.retreat import all_float, without_int8, without_masks
from onnxq.planner.scales import finish
from onnxq.progress import Progress, Silent
from onnxq.recipe import Calibration, Recipe
from onnxq.recipe import scheme as named_scheme
from onnxq.report.report import Latency, NodeRow, Report, Size
from onnxq.request import AUTO, FORMATS, Request, check, resolve
from onnxq.runtime.measure import environment
from onnxq.runtime.session import Session, SessionOptions
from onnxq.targets import TARGETS
from onnxq.verification import Goal
from onnxq.version import VERSION

_AGREEMENT_ROWS = 64  # enough to tell agreement; a metric is measured on all of the evaluation data
_CLEARLY = 1.5  # times as fast: what the more accurate of two dynamic schemes may cost where nobody measures accuracy


def compile(model: str | Path, output: str | Path | None = None, *, scheme: str = AUTO,
            recipe: Recipe | str | Path | None = None, calib: Any = None, samples: int | None = None,
            batch: int | None = None, ranges: str | None = None, eval: Any = None, metric: str | None = None,
            max_drop: str | None = None, target: str = "cpu", threads: int = 0, format: str = AUTO,
            keep_float: Sequence[str] = (), force: bool = False, measure: bool = True,
            plan: Plan | str | Path | None = None, save_plan: str | Path | None = None,
            dump: str | Path | None = None, dump_after: str | None = None,
            progress: Progress | None = None) -> Report:
    """Compile an ONNX file and return what was measured; the result is written to `output`.

    Scheme `auto` without calibration data times both dynamic schemes and takes the more accurate one, w8a8-dynamic,
    unless w8a8-dynamic-tensor is more than one and a half times as fast.
    `calib` and `eval` are DATA (see onnxq.calibration.readers.open_data). The result is written even when a check
    fails: look at `Report.ok`. `save_plan` names a folder for all that was decided; given as `plan`, it is replayed:
    the same Plan on the same model gives the same bytes, without data, on any machine. Raises UsageError for a wrong
    call and the other OnnxqErrors for unusable input.
    """
    saved = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
    if saved is not None and scheme == AUTO and recipe is None:
        scheme = saved.scheme
    chosen = resolve(scheme=scheme, recipe=recipe, calib=calib, samples=samples, batch=batch, ranges=ranges,
                     metric=metric, max_drop=max_drop, keep_float=keep_float)
    model = Path(model)
    destination = Path(output) if output is not None else model.with_name(f"{model.stem}.{chosen.scheme.name}.onnx")
    if target not in TARGETS:
        raise UsageError(f"there is no target {target!r}; known: {', '.join(TARGETS)}")
    if format not in FORMATS:
        raise UsageError(f"there is no format {format!r}; use one of {', '.join(FORMATS)}")
    coarser = scheme == AUTO and recipe is None and calib is None and measure
    request = Request(
        model, destination, chosen, TARGETS[target], SessionOptions(TARGETS[target].provider, threads),
        Goal(chosen.budget.metric, chosen.budget.max_drop), calib, eval,
        TARGETS[target].format if format == AUTO else format, measure,
        Path(dump) if dump is not None else None, dump_after,
        replace(chosen, scheme=named_scheme("w8a8-dynamic-tensor")) if coarser else None, saved,
        Path(save_plan) if save_plan is not None else None)
    check(request, force)
    return _Compilation(request, progress or Silent()).run()


class _Compilation:
    def __init__(self, request: Request, progress: Progress) -> None:
        self.request, self.progress, self.recipe = request, progress, request.recipe
        self.report = Report(str(request.model), str(request.output), request.recipe.scheme.name,
                             recipe=request.recipe.to_dict())
        self.context = Context(request.target)
        self.dumped = 0
        self.removed: list[NodeRow] = []
        self.reference = self.rival = request.model  # what figures are told against, what int8 has to beat
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
            if canonical.half or self.removed:
                self._float_form(canonical, Path(folder) / "float.onnx")
            with self.stage("rewrite"):
                self._write(graph, compiled, twin)
            graph = self._verify(graph, canonical, compiled, twin, calib, evaluation)
        with self.stage("save"):
            save(graph, request.output)
            if request.save_plan is not None:
                self.context.plan.save(request.save_plan)
        self.report.size = Size(stored_bytes(request.model), stored_bytes(request.output))
        self.report.environment = {"onnxq": VERSION, "target": request.target.name, **environment()}
        codes.connect(self.report.nodes, self.context.plan.nodes, canonical)
        self.report.tensors = codes.planned(self.context.plan, canonical)
        self.report.nodes += self.removed
        return self.report

    def stage(self, name: str) -> AbstractContextManager[None]:
        return verification.stage(self.report, self.progress, name)

    def _float_form(self, canonical: Graph, path: Path) -> None:
        """What int8 has to beat is the canonical float graph, which may be much faster than the model as it came (its
        BatchNormalizations folded, in float32 where it was half); figures are told against the model where it runs."""
        options = self.request.options
        runs = verification.runs(self.request.model, options)
        if runs and not self.request.measure:
            return
        save(canonical, path)
        self.rival = path
        if canonical.half and not runs and verification.runs(path, options):
            self.reference = path
            self.report.verdict.notices.append(verification.told_against_float32(canonical.half))

    # -------------------------------------------------------------- plan

    def _canonicalize(self, graph: Graph) -> None:
        removals = Removals(graph)
        self._passes(canonicalize(), graph, removals)
        if graph.half:
            self.report.verdict.notices.append(
                f"the model is {' and '.join(graph.half)}, which {self.request.target.name} does not compute in: what "
                "is not int8 runs in float32")
        self.made = {n.name: _results(graph, n) for n in graph.nodes}
        self.removed = verification.removed_rows(removals)

    def _plan(self, graph: Graph, calib: Dataset | None) -> Plan:
        recipe, target = self.recipe, self.request.target
        with self.stage("plan"):
            if self.request.plan is not None:
                return replayed(self.request.plan, graph)
            found, hiding = outline(graph, recipe, target), masks.find(graph)
        ranges = {}
        if calib is not None and (found.ranges_of or hiding.statistics):
            with self.stage("calibrate"):
                self.progress.total(_rows(calib, recipe.calibration))
                ranges = observer.observe(hiding.graph, found.ranges_of, calib, recipe.calibration,
                                          self.request.options, self.progress.step, recipe.scheme.activations,
                                          hiding.statistics)
        with self.stage("scales"):
            plan = finish(found, graph, ranges, recipe, target)
            masks.decide(hiding, plan)
        if calib is not None and plan.quantizes and recipe.bias_correction:
            with self.stage("correct"):
                self.progress.total(correction.ROWS)
                plan.bias_shifts = correction.mean_errors(graph, plan, calib, recipe.calibration, self.request.options,
                                                          self.progress.step)
        if calib is not None and (ranges or hiding.statistics or plan.bias_shifts):
            self._data_notices(calib, "calibration")
        return plan

    def _plan_notices(self) -> None:
        plan, notices = self.context.plan, self.report.verdict.notices
        given = sum(1 for n in plan.nodes.values() if n.scheme == GIVEN)
        if given:
            notices.append(f"{given} nodes were quantized already and are kept")
        if not plan.quantizes:
            notices.append(f"nothing {'more ' if given else ''}in this model can be quantized under this scheme; "
                           "each node's reason is in the report")
        hiding = masks.notice(plan)
        if hiding is not None:
            notices.append(hiding)
        if not self.recipe.scheme.is_dynamic:
            return
        convs = sum(1 for n in plan.nodes.values() if n.op == "Conv" and not n.is_int and n.scheme != GIVEN)
        operators = ", ".join(self.recipe.scheme.operators)
        left = f", {convs} Conv compute in float" if convs else ""
        hint = "; --calib DATA brings static int8, faster and for Conv, too" if self.request.calib is None else ""
        notices.append(f"scheme {plan.scheme}: {operators} only{left}{hint}")

    def _data_notices(self, data: Dataset, use: str) -> None:
        if data.random:
            self.report.verdict.notices.append(f"{use} ran on random data, as asked: its figures tell nothing about "
                                               "accuracy")
        self.report.verdict.notices += [f"{use} data: {note}" for note in data.notes]

    # -------------------------------------------------------------- rewrite

    def _write(self, graph: Graph, compiled: Path, twin: Path) -> None:
        self._rewrite(graph, twin)
        self._sign(graph)
        save(graph, compiled)

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
            "onnxq.version": VERSION, "onnxq.recipe": json.dumps(self.recipe.to_dict()),
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
                graph = self._choose(graph, canonical, compiled, twin, feeds, source)
                self._plan_notices()
                graph = self._settle(graph, canonical, compiled, twin, feeds, source)
        else:
            self._plan_notices()
        if feeds:
            with self.stage("verify"):
                report.nodes = verification.what_ran(self.context.plan, compiled, feeds, request.options,
                                                     report.verdict, self.made)
                if self.context.plan.changes:
                    report.semantic = verification.semantic(self.reference, compiled, twin, feeds, request.options,
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
            Session(self.reference, self.request.options).run(feeds[0])
        except OnnxqError:
            self.report.verdict.notices.append("no data were given and the model does not run on random inputs: "
                                               "nothing was timed or read back; give --calib or --eval")
            return [], ""
        self.report.verdict.notices.append("no data were given: timed on random inputs, accuracy was not measured; "
                                           "give --eval DATA")
        return feeds, "random inputs"

    def _choose(self, graph: Graph, canonical: Graph, compiled: Path, twin: Path, feeds: list[dict[str, Any]],
                source: str) -> Graph:
        """Time the result, and that of the request's second recipe: it is taken where it is clearly faster."""
        first = self.report.latency = self._time(compiled, feeds, source)
        if self.request.alternative is None:
            return graph
        before, self.recipe = (self.recipe, self.context.plan), self.request.alternative
        self.context.plan = self._plan(canonical, None)
        with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
            self._write(canonical.copy(), Path(folder) / "compiled.onnx", Path(folder) / "twin.onnx")
            second = self._time(Path(folder) / "compiled.onnx", feeds, source)
        better = verification.slower(first) and not verification.slower(second)
        if not better and second.speedup <= _CLEARLY * first.speedup:
            self.recipe, self.context.plan = before
            return graph
        self.report.verdict.notices.append(
            f"{self.recipe.scheme.name} was chosen: {second.speedup:.2f}x as fast as float, where "
            f"{before[0].scheme.name}, more accurate, reached {first.speedup:.2f}x; --scheme decides otherwise")
        other = canonical.copy()
        self._write(other, compiled, twin)
        self.report.scheme, self.report.recipe, self.report.latency = (
            self.recipe.scheme.name, self.recipe.to_dict(), second)
        return other

    def _settle(self, graph: Graph, canonical: Graph, compiled: Path, twin: Path, feeds: list[dict[str, Any]],
                source: str) -> Graph:
        """Time the result; what is slower than float gives way to float kernels, then to the float graph as it came."""
        while True:
            found = self.report.latency or self._time(compiled, feeds, source)
            self.report.latency = found
            if self.request.plan is not None or not self.context.plan.changes or not verification.slower(found):
                break
            self.context.plan = self._retreat(canonical, found)
            self.report.latency = None
            graph = canonical.copy()
            self._write(graph, compiled, twin)
        if self.reference != self.rival:
            self.report.latency = self._time(compiled, feeds, source, self.reference)
        return graph

    def _time(self, compiled: Path, feeds: list[dict[str, Any]], source: str, against: Path | None = None) -> Latency:
        return verification.latency(against or self.rival, compiled, feeds, self.request.options, source,
                                    progress=self.progress)

    def _retreat(self, canonical: Graph, found: Latency) -> Plan:
        plan, notices = self.context.plan, self.report.verdict.notices
        took = f"{found.compiled_ms:.3g} against {found.float_ms:.3g} ms"
        if plan.quantized():
            notices.append(f"nothing pays, left float: int8 ran at {found.speedup:.2f}x float here ({took}); "
                           "--no-measure keeps it all the same")
            return without_int8(plan, canonical, self.recipe, f"int8 does not pay here: {took} in float")
        if not plan.quantizes:
            notices.append(f"the masks of Softmax stay as they are: to rewrite them does not pay here ({took})")
            return without_masks(plan)
        notices.append(f"decoding the stored weights takes time here ({took}), so they stay float")
        return all_float(plan, f"decoding stored weights does not pay here: {took} in float")

    def _accuracy(self, compiled: Path, data: Dataset | None, evaluation: Dataset | None) -> None:
        request = self.request
        if data is None:
            return
        note = "" if evaluation is not None else "agreement with float on the calibration data; give --eval DATA"
        wanted = request.recipe.calibration.samples or _AGREEMENT_ROWS
        samples = None if evaluation is not None else min(_AGREEMENT_ROWS, wanted)
        with self.stage("accuracy"):
            self.progress.total(data.rows if samples is None else min(samples, data.rows or samples))
            self.report.accuracy = verification.accuracy(
                self.reference, compiled, data, request.goal, request.options, self.report.verdict,
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


