"""Which Plan is written: the fastest on the target by measurement, and none that is slower than float."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxq import verification
from onnxq.graph import Graph
from onnxq.passes.manager import Context
from onnxq.passes.transform import transform
from onnxq.passes.transform.normal_masks import NormalMasks
from onnxq.plan import Plan
from onnxq.planner import masks
from onnxq.planner.choice import by_gain, choose
from onnxq.planner.outline import Measured
from onnxq.planner.pricing import Prices, price
from onnxq.planner.retreat import all_float, without_masks
from onnxq.planner.rewriting import keep_faster, weigh
from onnxq.planning import NOTHING, Planning
from onnxq.progress import Progress
from onnxq.report.report import Latency, Report
from onnxq.request import Request
from onnxq.runtime.measure import compare_models
from onnxq.runtime.session import Session
from onnxq.runtime.timings import TimingCache

Feeds = Sequence[Mapping[str, Any]]
Build = Callable[[Plan, Path], None]  # writes a Plan's model to a path

MOST_CONFIRMATIONS = 5
_CLEARLY = 1.5  # times as fast: what the more accurate of two dynamic schemes may cost where nobody measures accuracy
# by what share of its float time a unit has to be faster in integers; the file is the same size either way
_TIES = {"balanced": 0.02, "latency": 0.0, "size": -0.02}
_DECODED = ("weights are decoded as the model is loaded: on these shapes kernels that read codes are no faster than "
            "float's; --shape tells of others, --no-measure keeps the kernels")
_CONFIRM_SECONDS, _CONFIRM_ROUNDS = 0.2, 5


@dataclass
class Settled:
    """What was decided: the Plan, by which Planning, its time beside float's, and the prices that it went by.

    `able` tells whether anything could be quantized or stored at all, before it was measured whether it pays;
    `rewritten` whether the float graph gained by rewrites, which int8 has to beat, too.
    """

    plan: Plan
    planning: Planning
    latency: Latency | None = None
    prices: Prices | None = None
    measured: Measured = NOTHING
    able: bool = True
    rewritten: bool = False


@dataclass
class Settling:
    """One compilation's search: `rival` is the float model to beat, `reference` the one that figures are told against;
    `source` says what the feeds are."""

    request: Request
    report: Report
    progress: Progress
    build: Build
    rival: Path
    reference: Path
    feeds: Feeds
    source: str
    cache: TimingCache
    confirmations: int = field(default=0, init=False)

    def settle(self, planning: Planning, alternative: Planning | None) -> Settled:
        """Choose the scheme where there are two, then each unit's kernel, then go back where the whole is slower."""
        with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
            self.folder = Path(folder)
            found = self._scheme(planning, alternative)
            found.able = found.plan.quantizes
            self._rewrites(found)
            if found.plan.quantized():
                self._kernels(found)
            self._whole(found)
            self._beside_the_file(found)
        return found

    # -------------------------------------------------------------- scheme

    def _scheme(self, planning: Planning, alternative: Planning | None) -> Settled:
        """The request's recipe, or its second one where that is clearly faster."""
        first = Settled(planning.plan(), planning)
        if alternative is None or not first.plan.changes:
            return first
        second = Settled(alternative.plan(), alternative)
        with self._stage("measure"):
            first.latency, second.latency = self._against_float(first.plan), self._against_float(second.plan)
        better = verification.slower(first.latency) and not verification.slower(second.latency)
        if not better and second.latency.speedup <= _CLEARLY * first.latency.speedup:
            return first
        self.report.verdict.notices.append(
            f"{alternative.recipe.scheme.name} was chosen: {second.latency.speedup:.2f}x as fast as float, where "
            f"{planning.recipe.scheme.name}, more accurate, reached {first.latency.speedup:.2f}x; --scheme decides "
            "otherwise")
        self.report.scheme, self.report.recipe = alternative.recipe.scheme.name, alternative.recipe.to_dict()
        return second

    # -------------------------------------------------------------- rewrites

    def _rewrites(self, found: Settled) -> None:
        """Keep the rewrites of the float graph that measure faster, and floors under masked scores where they do."""
        planning, options = found.planning, self.request.options
        with self._stage("time rewrites"):
            graph = planning.graph.copy()
            kept = keep_faster(graph, transform(), Context(self.request.target, found.plan), self.feeds, options,
                               self.cache)
            planning.floors = self._floors(planning, found.plan, graph)
        planning.dropped |= kept.dropped
        self.report.verdict.notices += kept.faults
        found.rewritten = kept.rewritten or planning.floors
        if kept.dropped or planning.floors:
            found.plan = planning.plan()
        if found.rewritten:
            found.latency, self.rival = None, self.folder / "float.onnx"
            self.build(all_float(found.plan, ""), self.rival)

    def _floors(self, planning: Planning, plan: Plan, graph: Graph) -> bool:
        if planning.hiding is None or not planning.hiding.floors:
            return False
        floored = copy.deepcopy(plan)
        floored.maskings = {}
        for name in planning.hiding.floors:
            masks.use_floor(planning.hiding, floored, name)
        gain = weigh(graph, NormalMasks(), Context(self.request.target, floored), self.feeds, self.request.options,
                     self.cache)
        return gain is not None and gain.pays

    # -------------------------------------------------------------- kernels

    def _kernels(self, found: Settled) -> None:
        """Time kernels, choose by their times, and keep the choice unless the table's is faster as a whole."""
        planning, options = found.planning, self.request.options
        with self._stage("time kernels"):
            found.prices = price(planning.graph, found.plan, self.request.target, self.feeds, options, self.cache,
                                 self.request.format, self._priced)
            choice = choose(planning.graph, found.prices, _TIES[self.request.objective])
        self.report.verdict.notices += [*found.prices.faults, *self.cache.notices]
        if not choice.refused:
            return
        measured = Measured(choice.refused, choice.at_run_time)
        chosen = planning.plan(measured)
        if not self._faster(chosen, found.plan):
            return
        found.plan, found.latency, found.measured = chosen, None, measured
        if not chosen.quantized() and self.request.recipe.scheme.is_weight_only:
            self.report.verdict.notices.append(_DECODED)
        elif not chosen.quantized():
            self.report.verdict.notices.append(
                "nothing pays, left float: each kernel was measured as fast or faster in float, or gains less than "
                "conversions cost; --no-measure keeps int8 all the same")

    def _priced(self, done: int, total: int) -> None:
        self.progress.total(total)
        self.progress.step(done)

    def _faster(self, chosen: Plan, table: Plan) -> bool:
        """Whether the choice by kernel times is no slower than the table's as a whole; ties go to the choice."""
        with self._stage("confirm"):
            self.confirmations += 1
            a, b = (self._session(plan, name) for name, plan in (("table", table), ("chosen", chosen)))
            timing = compare_models(a, b, self.feeds, block_seconds=_CONFIRM_SECONDS, rounds=_CONFIRM_ROUNDS)
        return timing.ratio > 1 - max(_TIES[self.request.objective], 0.0)

    # -------------------------------------------------------------- whole model

    def _whole(self, found: Settled) -> None:
        """Go back where the model as a whole gains nothing: to fewer regions, to float kernels, to float weights."""
        if found.latency is None:
            with self._stage("measure"):
                found.latency = self._against_float(found.plan)
        if found.plan.quantized() and not self._pays(found.latency) and not self._fewer(found):
            self._without_int8(found)
        decoded = found.plan.quantizes and not found.plan.quantized() and not self.request.recipe.scheme.is_weight_only
        if decoded and verification.slower(found.latency):
            took = _took(found.latency)
            self.report.verdict.notices.append(f"decoding the stored weights takes time here ({took}), so they stay "
                                               "float")
            self._retreat(found, all_float(found.plan, f"decoding stored weights does not pay here: {took} in float"))

    def _beside_the_file(self, found: Settled) -> None:
        """Time the result beside the file as it came; where that is faster after all, rewrites go, too."""
        if self.rival == self.reference:
            return
        self.rival = self.reference
        self._retreat(found, found.plan)
        assert found.latency is not None
        changes = found.rewritten or (found.plan.quantizes and not self.request.recipe.scheme.is_weight_only)
        if changes and verification.slower(found.latency):
            self.report.verdict.notices.append(f"the model is left as it came: rewritten it ran at "
                                               f"{found.latency.speedup:.2f}x ({_took(found.latency)})")
            plan = without_masks(all_float(found.plan, "the whole model was measured to be faster as it came"))
            plan.dropped = tuple(step.name for step in transform() if step.weighed)
            self._retreat(found, plan)

    def _pays(self, latency: Latency) -> bool:
        """Whether int8 gains anything beyond a tie, which goes to the smaller change: float kernels."""
        if self.request.objective == "size":
            return not verification.slower(latency)
        return latency.speedup > 1 + _TIES[self.request.objective]

    def _fewer(self, found: Settled) -> bool:
        """Look for a number of regions, those that gain most, with which int8 pays; by bisection."""
        groups = by_gain(found.prices, found.plan) if found.prices is not None else []
        pays, fails = 0, len(groups)
        best: tuple[Plan, Latency] | None = None
        while fails - pays > 1 and self.confirmations < MOST_CONFIRMATIONS - 1:  # one is left for float kernels
            middle = (pays + fails) // 2
            reason = "its region is faster by itself, but the whole model was not"
            dropped = {name: reason for group in groups[middle:] for name in group}
            plan = found.planning.plan(Measured({**found.measured.refused, **dropped},
                                                found.measured.at_run_time - dropped.keys()))
            with self._stage("confirm"):
                latency = self._against_float(plan)
            if not self._pays(latency):
                fails = middle
                continue
            pays = middle
            if best is None or latency.speedup > best[1].speedup:
                best = plan, latency
        if best is None:
            return False
        found.plan, found.latency = best
        return True

    def _without_int8(self, found: Settled) -> None:
        assert found.latency is not None
        took = _took(found.latency)
        self.report.verdict.notices.append(
            _DECODED if self.request.recipe.scheme.is_weight_only else
            f"nothing pays, left float: int8 ran at {found.latency.speedup:.2f}x float here ({took}); --no-measure "
            "keeps it all the same")
        reason = f"int8 does not pay here: {took} in float"
        found.measured = Measured({n.node: found.measured.refused.get(n.node, reason) for n in (
            *found.plan.quantized(), *(v for v in found.plan.nodes.values() if v.node in found.measured.refused))})
        self._retreat(found, found.planning.plan(found.measured))

    def _retreat(self, found: Settled, plan: Plan) -> None:
        found.plan = plan
        with self._stage("measure"):
            found.latency = self._against_float(plan)

    def _session(self, plan: Plan, name: str) -> Session:
        path = self.folder / f"{name}.onnx"
        self.build(plan, path)
        return Session(path, self.request.options)

    def _stage(self, name: str) -> AbstractContextManager[None]:
        return verification.stage(self.report, self.progress, name)

    def _against_float(self, plan: Plan) -> Latency:
        self.confirmations += 1
        path = self.folder / "compiled.onnx"
        self.build(plan, path)
        return verification.latency(self.rival, path, self.feeds, self.request.options, self.source,
                                    progress=self.progress)


def _took(latency: Latency) -> str:
    return f"{latency.compiled_ms:.3g} against {latency.float_ms:.3g} ms"
