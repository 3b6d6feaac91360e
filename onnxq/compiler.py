"""compile(): the stages in their order. The only place that knows the order."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from onnxq import notices, sizes, streaming, verification
from onnxq.aiming import coarser, foreign, lower, sized, spelled_out, target_for
from onnxq.calibration.readers import Dataset, open_data
from onnxq.errors import GraphError, OutputError
from onnxq.explanation import codes
from onnxq.graph import Graph, Node, limit_ir_version, load, raise_opset, save, stored_bytes
from onnxq.passes.canonicalize import canonicalize
from onnxq.passes.lower import EMITTER_VERSION, written
from onnxq.passes.manager import Context, Hook, Pass, PassManager, Removals
from onnxq.passes.pack import pack as pack_passes
from onnxq.passes.pack.codes import opset_for_codes
from onnxq.passes.pack.weights import OPSET
from onnxq.passes.quantize import quantize
from onnxq.passes.static_shapes import settled
from onnxq.passes.transform import transform
from onnxq.passes.transform.prune import Prune
from onnxq.passes.transform.remove_channels import RemoveChannels
from onnxq.passes.transform.smooth import Smooth
from onnxq.plan import Plan
from onnxq.planner import rules, weight_only
from onnxq.planner.pricing import Prices
from onnxq.planner.rewriting import keep_faster
from onnxq.planning import Planning
from onnxq.progress import Progress, Silent
from onnxq.proof import Files, Proof
from onnxq.recipe import Recipe
from onnxq.report.report import NodeRow, Report, Size
from onnxq.request import AUTO, Request, check, default_output, resolve, several
from onnxq.runtime.machine import is_here, session_options
from onnxq.runtime.measure import environment, kernel_environment
from onnxq.runtime.timings import TimingCache
from onnxq.settling import Settling
from onnxq.spool import Spool
from onnxq.verification import Goal
from onnxq.version import VERSION


def compile(model: str | Path, output: str | Path | None = None, *, scheme: str = AUTO,
            recipe: Recipe | str | Path | None = None, calib: Any = None, samples: int | None = None,
            batch: int | None = None, ranges: str | None = None, outliers: str | None = None,
            rounding: str | None = None, group_size: int | None = None, symmetric: bool | None = None,
            target_bits: float | None = None, max_size: str | None = None, sparsity: str | None = None,
            prune: str | None = None, pattern: str | None = None, prune_channels: str | None = None,
            prune_heads: str | None = None, pack: bool | None = None, load_memory: str | None = None, eval: Any = None,
            metric: str | None = None, max_drop: str | None = None, target: str = "cpu", runtime: str | None = None,
            threads: int = 0, format: str = AUTO, keep_float: Sequence[str] = (), fallback: int | None = None,
            force: bool = False, measure: bool = True, plan: Plan | str | Path | None = None,
            save_plan: str | Path | None = None, objective: str = "balanced",
            shapes: Mapping[str, int | Sequence[int]] | None = None, dump: str | Path | None = None,
            dump_after: str | None = None, max_memory: int | str | None = None,
            progress: Progress | None = None) -> Report:
    """Compile an ONNX file and return what was measured; the result is written to `output`.

    Scheme `auto` without calibration data times both dynamic schemes and takes the more accurate one, w8a8-dynamic,
    unless w8a8-dynamic-tensor is more than one and a half times as fast. `ranges`, `outliers` and `rounding` are
    those of a recipe; `group_size` and `symmetric` replace those of a weight-only scheme, in which `target_bits`
    (per weight) and `max_size` (of the file, such as 40MB) have formats chosen for each weight. `sparsity` is the
    share of zeros that layers' weights get (such as 50%), `pattern` that of every M inputs N stay (such as 2:4),
    and `prune` the method; `prune_channels` and `prune_heads` the shares that are taken out. `pack` stores weights in
    fewer bytes, which the runtime decodes as it loads it, in about `load_memory` ("500MB"). `calib` and `eval` are
    DATA (see onnxq.calibration.readers.open_data). The result is written even when a check fails: look at `Report.ok`.
    `save_plan` names a folder for all that was decided; given as `plan`, it is replayed: the same Plan on the same
    model gives the same bytes, without data, on any machine. Nodes run in integers where the target was measured to be
    faster then, on the shapes of the data or those of `shapes` (free axis -> size or sizes); `objective` balanced,
    latency or size says what 2 % of a node's time are worth: the smaller change, nothing, or integers. `measure` False
    takes the target's tables instead, as does a machine that is not the target: the CPU provider checks the result
    there. `runtime` ("1.20") is the onnxruntime that has to run it. `fallback` is how many layers stay float, those
    that are the most sensitive. `max_memory` ("2GB", or bytes) is what a weight-only scheme may use: larger models are
    not run. Raises UsageError for a wrong call, other OnnxqErrors for unusable input.
    """
    saved = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
    scheme = saved.scheme if saved is not None and scheme == AUTO and recipe is None else scheme
    here = target_for(target, format, runtime)
    chosen = resolve(target=here, scheme=scheme, recipe=recipe, calib=calib, samples=samples, batch=batch,
                     ranges=ranges, metric=metric, max_drop=max_drop, keep_float=keep_float, fallback=fallback,
                     outliers=outliers, rounding=rounding, group_size=group_size, symmetric=symmetric,
                     target_bits=target_bits, max_size=max_size, sparsity=sparsity, prune=prune, pattern=pattern,
                     prune_channels=prune_channels, prune_heads=prune_heads, pack=pack, load_memory=load_memory)
    request = Request(
        Path(model), Path(output or default_output(model, chosen)), chosen, here, session_options(here, threads),
        Goal(chosen.budget.metric, chosen.budget.max_drop), calib, eval,
        here.format if format == AUTO else format, measure and is_here(here), _path(dump), dump_after,
        coarser(chosen) if scheme == AUTO and recipe is None and measure else None, saved, _path(save_plan), objective,
        several(shapes or {}), sizes.parse(max_memory) if isinstance(max_memory, str) else max_memory)
    check(request, format, force)
    with threadpool_limits(1, "blas"):  # its threads and the runtime's would spin against each other: up to 10x slower
        return _Compilation(request, progress or Silent()).run()


def _path(given: str | Path | None) -> Path | None:
    return Path(given) if given is not None else None


class _Compilation:
    def __init__(self, request: Request, progress: Progress) -> None:
        self.request, self.progress, self.recipe = request, progress, request.recipe
        self.report = Report(str(request.model), str(request.output), request.recipe.scheme.name,
                             recipe=request.recipe.to_dict())
        self.context = Context(request.target)
        self.proof = Proof(request, self.report, progress)
        self.dumped = 0
        self.removed: list[NodeRow] = []
        self.reference = self.rival = request.model  # what figures are told against, what int8 has to beat
        self.made: dict[str, tuple[str, ...]] = {}
        self.prices: Prices | None = None
        self.dropped: set[str] = set()
        self.cache = TimingCache(kernel_environment(request.options, EMITTER_VERSION))

    def run(self) -> Report:
        request = self.request
        with self.stage("load"):
            graph = load(request.model)
            graph = sized(graph, request.target, request.shapes)
            how, ports = request.recipe.data, graph.ports()
            calib = open_data(request.calib, ports, how=how) if request.calib is not None else None
            evaluation = open_data(request.evaluation, ports, how=how) if request.evaluation is not None else None
            scored = evaluation or calib
            if scored is not None:
                verification.check_labels(request.goal, scored)
        if streaming.too_large(request, graph):
            self._stream(graph)
            return self.report
        feeds, source = self._canonicalize(graph, evaluation or calib)
        graph = self._legal(graph)
        self.made = {n.name: _results(graph, n) for n in graph.nodes}
        self.planning = self._planning(graph, calib, self.recipe)
        spool = self.planning.spool = Spool(request.output.with_name(f"{request.output.name}.partial"))
        with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
            compiled, twin = Path(folder) / "compiled.onnx", Path(folder) / "twin.onnx"
            if graph.half or self.removed:
                self._float_form(Path(folder) / "float.onnx")
            if (evaluation or calib) is None:
                feeds = self.proof.runnable(self.reference, feeds)
            self._decide(feeds, source, compiled)
            with self.stage("rewrite"):
                graph = self._write(compiled, twin)
            files = Files(self.reference, compiled, twin)
            self.proof.verify(self.context.plan, files, feeds, self.made)
            self.proof.accuracy(self.context.plan, files, calib, evaluation)
        with self.stage("save"):
            save(graph, request.output)
        spool.remove()
        self._finish()
        return self.report

    def _stream(self, graph: Graph) -> None:
        """Compile a model that is too large to run, with no more than one of its weights in memory."""
        removals = Removals(graph)
        with self.stage("canonicalize"):
            self._passes(canonicalize(), graph, removals)
            graph = self._legal(graph)
        self.removed = verification.removed_rows(removals)
        self.planning = self._planning(graph, None, self.recipe)
        self.context.plan = self.planning.plan() if self.request.plan is None else self.planning.replay(
            self.request.plan)
        if self.request.plan is None:
            self.planning.halve(self.context.plan)
        with self.stage("rewrite"):
            compiled = self._write(None, None)
        with self.stage("save"):
            streaming.saved(compiled, self.request, self.progress)
        with self.stage("verify"):
            self.report.nodes = [verification.row(node) for node in self.context.plan.nodes.values()]
            streaming.verified(graph, self.context.plan, self.request, self.report.verdict)
        self._finish()

    def _finish(self) -> None:
        """What a report says once the result is written."""
        request = self.request
        if request.save_plan is not None:
            self.context.plan.save(request.save_plan)
        self.report.size = Size(stored_bytes(request.model), stored_bytes(request.output))
        verification.check_size(self.report.size, request.recipe.bits.most_bytes, self.report.verdict)
        self.report.environment = {"onnxq": VERSION, "target": request.target.name, **environment()}
        planned = self.planning.graph_for(self.context.plan)
        codes.connect(self.report.nodes, self.context.plan.nodes, planned)
        self.report.tensors = codes.planned(self.context.plan, planned)
        self.report.pruned = notices.pruned(self.context.plan, self.planning)
        for row in self.report.nodes:
            row.times = self.prices.of(row.name) if self.prices is not None else {}
        self.report.nodes += self.removed

    def stage(self, name: str) -> AbstractContextManager[None]:
        return verification.stage(self.report, self.progress, name)

    def _float_form(self, path: Path) -> None:
        """What int8 has to beat is the canonical float graph, which may be much faster than the model as it came (its
        BatchNormalizations folded, in float32 where it was half); figures are told against the model where it runs."""
        options, canonical = self.request.options, self.planning.graph
        runs = verification.runs(self.request.model, options)
        if runs and not self.request.measure:
            return
        save(canonical, path)
        self.rival = path
        if canonical.half and not runs and verification.runs(path, options):
            self.reference = path
            self.report.verdict.notices.append(verification.told_against_float32(canonical.half))

    # -------------------------------------------------------------- plan

    def _canonicalize(self, graph: Graph, data: Dataset | None) -> tuple[list[dict[str, Any]], str]:
        """Bring the graph into the form that is planned on; gives what to time it on, and the name of that."""
        removals, saved = Removals(graph), self.request.plan
        feeds, source = self.proof.feeds(graph.ports(), data)
        with self.stage("canonicalize"):
            self._passes([step for step in canonicalize() if not step.weighed], graph, removals)
        left_out = saved.dropped if saved is not None else ()
        weighed = [step for step in canonicalize() if step.weighed and step.name not in left_out]
        known = data is not None or verification.runs(self.request.model, self.request.options)
        if feeds and known and self.request.measure and saved is None:
            with self.stage("time rewrites"):
                kept = keep_faster(graph, weighed, self.context, feeds, self.request.options, self.cache, [removals])
            self.dropped = kept.dropped
            self.report.verdict.notices += kept.faults
        else:
            self._passes(weighed, graph, removals)
        if graph.half and self.request.target.floats == "float32":
            self.report.verdict.notices.append(
                f"the model is {' and '.join(graph.half)}, which {self.request.target.name} does not compute in: what "
                "is not int8 runs in float32")
        self.removed = verification.removed_rows(removals)
        return feeds, source

    def _legal(self, graph: Graph) -> Graph:
        """The graph in operators and an opset that the target has, with all sizes known, where it has them fixed, and
        in a version of ONNX whose DequantizeLinear takes blocks, where such are to be written."""
        self._passes(spelled_out(self.request.target), graph)
        lower(graph, self.request.target)
        if self.request.target.static:
            graph = settled(graph, self.context)
        said = foreign(graph, self.request.target)
        self.report.verdict.notices += [said] * bool(said)
        if not (self.request.target.portable and self.recipe.scheme.is_weight_only):
            return graph
        wanted, most = weight_only.opset(graph, rules.schemes(graph, self.recipe)), self.request.target.opset
        if most is not None and wanted > most:
            return graph  # what it holds is decoded at load, and says so
        try:
            return raise_opset(graph, wanted)
        except GraphError as e:
            self.report.verdict.notices.append(f"weights in blocks are decoded as the model is loaded: {e}")
            return graph

    def _planning(self, graph: Graph, calib: Dataset | None, recipe: Recipe) -> Planning:
        request = self.request
        return Planning(graph, recipe, request.target, calib, request.options, self.progress, self.stage, self.dropped,
                        request.format)

    def _decide(self, feeds: list[dict[str, Any]], source: str, compiled: Path) -> None:
        """Find the Plan: a saved one, the table's, or what measuring makes of that."""
        request, planning, able = self.request, self.planning, None
        if request.plan is not None:
            with self.stage("plan"):
                self.context.plan = planning.replay(request.plan)
        elif not feeds or not request.measure:
            self.context.plan = planning.plan()
        else:
            other = (self._planning(planning.graph, None, request.alternative) if request.alternative is not None
                     else None)
            found = Settling(request, self.report, self.progress, self._build, self.rival, self.reference, feeds,
                             source, self.cache).settle(planning, other)
            self.planning, self.recipe, self.context.plan = found.planning, found.planning.recipe, found.plan
            self.report.latency, self.prices, able = found.latency, found.prices, found.able
        if request.plan is None:
            self.planning.round(self.context.plan)
            self.planning.correct(self.context.plan)
            self.planning.halve(self.context.plan)
        plan, said = self.context.plan, self.report.verdict.notices
        said += notices.of_plan(plan, self.planning, plan.quantizes or plan.shrinks if able is None else able)
        if self.planning.calib is not None and (self.planning.used_data or plan.bias_shifts):
            said += notices.of_data(self.planning.calib, "calibration")
        if feeds and request.measure and self.report.latency is None:  # a saved Plan is replayed, not measured again
            with self.stage("measure"):
                self._build(self.context.plan, compiled)
                self.report.latency = verification.latency(self.reference, compiled, feeds, request.options, source,
                                                           progress=self.progress)

    # -------------------------------------------------------------- rewrite

    def _write(self, compiled: Path | None, twin: Path | None) -> Graph:
        """The model that the Plan makes, written beside its QDQ form where there are paths for them."""
        graph = self.planning.base.copy()
        self._passes([RemoveChannels(), Prune(), Smooth()], graph)
        self.made |= {n.name: _results(graph, n) for n in graph.nodes}
        self._passes(transform(self.context.plan.dropped), graph)
        if self.context.plan.changes:
            self._passes(quantize(), graph)
            if twin is not None:
                save(graph, twin)
        self._passes(written(self.request.format, self.request.target), graph)
        graph = self._packed(graph)
        graph.metadata.update({
            "onnxq.version": VERSION, "onnxq.recipe": json.dumps(self.recipe.to_dict()),
            "onnxq.plan": self.context.plan.digest()})
        if compiled is not None:
            save(graph, compiled)
        return graph

    def _packed(self, graph: Graph) -> Graph:
        """Codes below 8 bits in as many bits, and weights in fewer bytes, which operators take from some opset on."""
        request, wanted = self.request, self.recipe.pack
        try:
            graph = raise_opset(graph, max(opset_for_codes(self.context.plan, request.target), OPSET if wanted else 0))
        except GraphError as e:
            what = "weights are not packed" if wanted else "codes of weights that are decoded at load take 8 bits each"
            self.report.verdict.notices.append(f"{what}: {e}")
        self._passes(pack_passes(wanted, self.recipe.load_bytes), graph)
        self.report.packing = asdict(self.context.packing) if wanted else None
        limit_ir_version(graph, request.target.ir_version)
        return graph

    def _build(self, plan: Plan, path: Path) -> None:
        """Write what a Plan that is not decided on yet would make, to be timed."""
        graph, context = self.planning.graph_for(plan), Context(self.request.target, plan.to_time())
        PassManager([*transform(plan.dropped), *quantize()]).run(graph, context)
        PassManager(written(self.request.format, self.request.target)).run(graph, context)
        save(graph, path)

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


def _results(graph: Graph, node: Node) -> tuple[str, ...]:
    """What a node makes, and what a bias or activation behind it does: the runtime fuses them and leaves the latter."""
    reader = graph.only_consumer(node.outputs[0]) if len(node.outputs) else None
    behind = verification.ACTIVATIONS | ({"Add"} if node.op == "MatMul" else set())
    fused = reader.outputs if reader is not None and reader.op in behind else []
    return tuple(t.name for t in [*node.outputs, *fused])
