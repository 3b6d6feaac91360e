"""Plans of one graph under one recipe: from what may run in integers to ranges, scales and corrected biases."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import MappingProxyType

from onnxq.calibration import observer
from onnxq.calibration.observer import AUTO
from onnxq.calibration.readers import Dataset
from onnxq.errors import GraphError, UsageError
from onnxq.graph import Graph, file_bytes, raise_opset
from onnxq.numerics.comparison import Comparison
from onnxq.numerics.moments import Moments
from onnxq.passes.lower import lower
from onnxq.passes.manager import Context, PassManager
from onnxq.passes.pack import pack
from onnxq.passes.pack.codes import opset_for_codes
from onnxq.passes.quantize import quantize
from onnxq.passes.transform import transform
from onnxq.passes.transform.add_masks import AddMasks
from onnxq.passes.transform.normal_masks import NormalMasks
from onnxq.passes.transform.prune import Prune
from onnxq.passes.transform.remove_channels import RemoveChannels
from onnxq.passes.transform.smooth import Smooth
from onnxq.plan import Plan, Smoothing
from onnxq.planner import (
    alone,
    block_rounding,
    correction,
    halving,
    masks,
    narrowing,
    pruning,
    ranging,
    rounding,
    sensitivity,
    smoothing,
    ties,
    two_levels,
    widths,
)
from onnxq.planner.bit_costs import Seeing
from onnxq.planner.composites import normalises_rows
from onnxq.planner.masks import Masks
from onnxq.planner.mixed_bits import MixedBits
from onnxq.planner.narrowing import Narrowing
from onnxq.planner.outline import Chosen, Measured, Outline, outline
from onnxq.planner.pruning import Calibrated, Pruning
from onnxq.planner.ranging import escaped
from onnxq.planner.readers import groups
from onnxq.planner.replay import check_smoothings, replayed
from onnxq.planner.rules import verdicts
from onnxq.planner.scales import finish
from onnxq.planner.sensitivity import Layer
from onnxq.planner.smoothing import Searching, Smoothed
from onnxq.progress import Progress
from onnxq.recipe import SQNR, Fallback, Recipe
from onnxq.runtime.session import SessionOptions
from onnxq.schemes import TensorSpec
from onnxq.spool import Spool
from onnxq.targets import Target

NOTHING = Measured()
_NOTED = 512  # bytes of a model's metadata beside its recipe
Stages = Callable[[str], AbstractContextManager[None]]


class Planning:
    """Makes Plans of a canonical graph; what one of them needed of the data is known to the next."""

    def __init__(self, graph: Graph, recipe: Recipe, target: Target, calib: Dataset | None, options: SessionOptions,
                 progress: Progress, stage: Stages, dropped: Collection[str] = (), output_format: str = "") -> None:
        self.base = self.graph = graph  # `graph` is what is planned on: narrowed, pruned, scaled
        self.recipe, self.target, self.calib = recipe, target, calib
        self.options, self.progress, self.stage = options, progress, stage
        self.ranges: dict[str, tuple[float, float]] = {}
        self.escaped: dict[str, str] = {}  # layers with a scale for each row, with the reason
        self.taken: Narrowing | None = None  # channels that are taken out
        self.pruning: Pruning | None = None
        self.smoothed: dict[str, Smoothed] | None = None
        self.hiding: Masks | None = None
        self.used_data = self.seen_masks = False
        self.dropped = set(dropped)  # rewrites that don't pay, by the name of their pass
        self.floors = False  # whether floors under masked scores pay
        self.sensitive: dict[str, str] | None = None  # layers that stay float, with the reason; once they are ranked
        self.output_format = output_format or target.format
        self.tied: Mapping[str, str] | None = None  # tables and the layers' weights that are their transposes
        self.widths: dict[str, TensorSpec] | None = None  # weights whose codes fit other bits than the recipe's
        self.mixed: MixedBits | None = None
        self.chosen: Mapping[str, Chosen] = {}  # layers whose weights have other formats than the recipe's
        self.notices: list[str] = []
        self.spool: Spool | None = None  # of results of long work

    def plan(self, measured: Measured = NOTHING) -> Plan:
        """The Plan that the tables and `measured` make, with scales; biases are not corrected yet."""
        if self.taken is None:
            self._narrow()
        if self.pruning is None:
            self._prune()
        if self.smoothed is None:
            self._smooth()
        if self.recipe.scheme.is_weight_only and not self.recipe.bits.are_chosen:  # a budget counts each by itself
            self.tied = ties.find(self.graph) if self.tied is None else self.tied
        if self.sensitive is None:
            self.sensitive = self._rank()
        known, found = dict(self.escaped), self._outlined(measured)
        self._observe(found)
        if self.recipe.bits.are_chosen and not self.recipe.scheme.is_weight_only:
            self._choose_widths(found)
        elif self.recipe.bits.are_chosen:
            measured = self._choose_bits(measured)
            found = self._outlined(measured)
        return self._finished(found if self.escaped == known else self._outlined(measured))

    def _outlined(self, measured: Measured = NOTHING) -> Outline:
        measured = replace(measured, per_token={n: why for n, why in self.escaped.items() if n not in measured.refused})
        with self.stage("plan"):
            return outline(self.graph, self.recipe, self.target, measured, self.sensitive or {}, self.chosen,
                           self.tied or {})

    def _choose_bits(self, measured: Measured) -> Measured:
        """Choose the format of each weight; gives `measured`, without the refusals where weights have to be packed."""
        self.chosen = {}
        own = self._outlined(measured)
        if self.mixed is None:
            self.mixed = MixedBits(self.graph, own, self.recipe, self.target, self.output_format == "qoperator")
            self.mixed.check(measured.refused, self._file_bytes(self._finished(own)))
            with self.stage("choose bits"):
                by = Seeing(self.calib, self.recipe.calibration, self.options) if self.calib is not None else None
                self.used_data |= by is not None
                self.mixed.measure(by, self.progress)
        self.notices = [said for said in self.notices if said != self.mixed.notice]
        try:
            self.chosen = self.mixed.choose(measured.refused, self._file_bytes(self._finished(own)))
        except UsageError:
            if not measured.refused:
                raise
            measured = replace(measured, refused={})  # small enough comes before fast enough
            self.chosen = self.mixed.choose({}, self._file_bytes(self._finished(self._outlined(measured))))
        self.notices.append(self.mixed.notice)
        return measured

    def _choose_widths(self, found: Outline) -> None:
        """Choose, once, how many bits the codes of each int8 weight fit."""
        if self.widths is not None:
            return
        self.widths = {}
        dense = self._file_bytes(self._finished(found))
        with self.stage("choose bits"):
            by = Seeing(self.calib, self.recipe.calibration, self.options) if self.calib is not None else None
            self.used_data |= by is not None
            self.widths, said = widths.choose(self.graph, found, self.recipe, dense, by, self.progress)
        self.notices.append(said)

    def _file_bytes(self, plan: Plan) -> int:
        """What the model that a Plan makes takes on disk, with what is noted in it."""
        graph = self._lowered(plan)
        with contextlib.suppress(GraphError):  # as the compiler does; codes then take a byte each
            graph = raise_opset(graph, opset_for_codes(plan, self.target))
        PassManager(pack(weights=False)).run(graph, Context(self.target, plan))
        return file_bytes(graph) + len(json.dumps(self.recipe.to_dict())) + _NOTED

    def _finished(self, found: Outline) -> Plan:
        assert self.hiding is not None
        with self.stage("scales"):
            plan = finish(found, self.graph, self.ranges, self.recipe, self.target, self.widths or {})
        smoothing.use(plan, self.smoothed or {})
        before = self._before_scaling()
        plan.narrowed, plan.pruned = before.narrowed, before.pruned
        if self.taken is not None:
            self.taken.say(plan)
        masks.decide(self.hiding, plan)
        for name in self.hiding.floors if self.floors else ():
            masks.use_floor(self.hiding, plan, name)
        return self._without_dropped(plan)

    def _lowered(self, plan: Plan) -> Graph:
        """The graph that a Plan makes, but for what makes float16 and fewer bytes of it."""
        graph = self.graph_for(plan)
        steps = [*transform(plan.dropped), *quantize(), *lower(self.output_format)]
        PassManager(steps).run(graph, Context(self.target, plan))
        return graph

    def halve(self, plan: Plan) -> None:
        """Decide what stays float32 on a target that computes in float16."""
        if self.target.floats != "float16":
            return
        with self.stage("float16"):
            small = halving.small_scales(self.graph_for(plan), plan)
            plan.wide, plan.limits = halving.decide(self._lowered(plan))
            plan.wide |= {name: why for name, why in small.items() if name not in plan.wide}
        for name, why in plan.wide.items():
            if name in plan.nodes:
                plan.nodes[name] = replace(plan.nodes[name], reason=f"{plan.nodes[name].reason}; float32: {why}")
        self.notices.append(f"float parts compute in float16, {len(plan.wide)} nodes of them in float32: what passes "
                            "float16's range or needs more digits")

    def graph_for(self, plan: Plan) -> Graph:
        """A graph of its own to rewrite as a Plan says: the canonical one, narrowed, pruned, with channels scaled."""
        graph = self.base.copy()
        PassManager([RemoveChannels(), Prune(), Smooth()]).run(graph, Context(self.target, plan))
        return graph

    def replay(self, plan: Plan) -> Plan:
        """A saved Plan, for the graph that it was made for. Raises UsageError for another."""
        narrowing.check(plan, self.base)
        pruning.check_pruned(plan, self.graph_for(Plan("", "", narrowed=plan.narrowed)))
        check_smoothings(plan, self.base)
        self.graph = self.graph_for(plan)
        ties.check(plan, self.graph)
        return replayed(plan, self.graph, self.target)

    def _before_scaling(self, smoothings: Mapping[str, Smoothing] = MappingProxyType({})) -> Plan:
        """A Plan of what is decided before scales are."""
        return Plan("", "", smoothings=dict(smoothings), narrowed=self.taken.rewrites if self.taken is not None else {},
                    pruned=dict(self.pruning.values) if self.pruning is not None else {})

    def _narrow(self) -> None:
        """Find channels to take out, and plan on the graph without them from now on."""
        self.taken = Narrowing()
        asked = self.recipe.sparsity
        if not (asked.channels_share or asked.heads_share) or self.calib is None:
            return
        with self.stage("narrow"):
            self._start(self.recipe.calibration.samples)
            self.used_data = True
            by = Calibrated(self.calib, self.options, self.progress.step)
            self.taken = narrowing.narrow(self.graph, asked, verdicts(self.graph, self.recipe), by,
                                          self.recipe.calibration)
            self.graph = self.graph_for(self._before_scaling())
        self.notices.append(self.taken.notice())

    def _prune(self) -> None:
        """Find which weights become 0, and plan on the graph that has them from now on."""
        self.pruning = Pruning()
        asked = self.recipe.sparsity
        if asked.wanted is None:
            return
        with self.stage("prune"):
            by = Calibrated(self.calib, self.options, self.progress.step) if self.calib is not None else None
            if by is not None:
                self._start(self.recipe.calibration.samples)
                self.used_data = True
            self.pruning = pruning.prune(self.graph, self.recipe, by, self.spool)
            self.graph = self.graph_for(self._before_scaling())

    def _smooth(self) -> None:
        """Search what scales the channels of layers' inputs, and plan on the graph that this makes from now on."""
        self.smoothed = {}
        scheme = self.recipe.scheme
        if self.calib is None or scheme.is_float or self.recipe.outliers.method == "none":
            return
        if scheme.is_weight_only and self.recipe.rounding != "nearest":  # on top of GPTQ it was measured to do harm
            return
        found = self._outlined()
        codes = frozenset(t for v in found.nodes.values() if v.int_output for t in (v.result, *v.more_results) if t)
        with self.stage("smooth"):
            self._start(self.recipe.calibration.samples)
            self.used_data = True
            self._rewrite({s.rewrite.tensor: s for s in smoothing.find(self.graph, found.nodes, codes, self._by())})

    def _rewrite(self, smoothed: dict[str, Smoothed]) -> None:
        """Plan on the graph with channels scaled, once it is known to compute the same."""
        if not smoothed:
            return
        assert self.calib is not None
        graph = self.graph_for(self._before_scaling({name: one.rewrite for name, one in smoothed.items()}))
        if smoothing.same(self.graph, graph, next(self.calib.batches(1)).feed, self.options):
            self.smoothed, self.graph = smoothed, graph
        else:
            self.notices.append("channels of layers' inputs are not scaled: the rewritten float model computes "
                               "something else; please report this")

    def _by(self) -> Searching:
        assert self.calib is not None
        return Searching(self.recipe.scheme, self.target, self.recipe.outliers, self.calib, self.recipe.calibration,
                         self.options, self.progress.step, normalises_rows(self.base))

    def _observe(self, found: Outline, moments: Mapping[str, Moments] = MappingProxyType({})) -> None:
        """Find the ranges that are not known yet, with `moments` of tensors in the same run over the data."""
        self.hiding = self.hiding or masks.find(self.graph)
        unknown = [name for name in found.ranges_of if name not in self.ranges]
        beside = {**({} if self.seen_masks else self.hiding.statistics), **moments}
        if self.calib is None or not (unknown or beside):
            return
        how = self.recipe.calibration
        with self.stage("calibrate"):
            self.used_data = self.seen_masks = True
            self._start(how.samples)
            auto = how.ranges == AUTO
            read = [g for g in groups(self.graph, found.nodes) if g.name in unknown] if auto else []
            others = [name for name in unknown if name not in {g.name for g in read}]
            running = {} if auto else observer.make(others, how, self.recipe.scheme.activations)
            chosen = ranging.choose(self.hiding.graph, found.nodes, read, self._by(), [running, beside],
                                    others if auto else ())
            for group in read:
                self.escaped |= escaped(group, chosen[group.name], self.recipe, self.target)
            self.ranges |= {name: one.bounds for name, one in chosen.items()}
            self.ranges |= {name: one.result() for name, one in running.items()}

    def _rank(self) -> dict[str, str]:
        """Node -> why it stays float: the layers that are the most sensitive, as many as the recipe says."""
        asked, kept = self.recipe.fallback, dict[str, str]()
        if self.recipe.scheme.is_float or not (asked.level or asked.keep_float):
            return kept
        with self.stage("plan"):
            whole = outline(self.graph, replace(self.recipe, fallback=Fallback()), self.target)
        found = self._outlined()
        layers, every = (sensitivity.layers(o.nodes, self.graph) for o in (found, whole))
        if asked.level and self.calib is not None:
            moments = {layer.reads: Moments() for layer in layers} if asked.rank != SQNR else {}
            self._observe(found, moments)
            errors = self._alone(found, layers) if asked.rank == SQNR else {}
            kept = sensitivity.most_sensitive(sensitivity.figures(asked.rank, layers, moments, errors), asked.rank,
                                              asked.level)
        named = {layer.node for layer in every} - {layer.node for layer in layers}
        self.notices += sensitivity.notices(asked.level, named | kept.keys(), len(layers), len(every))
        return kept

    def _alone(self, found: Outline, layers: Sequence[Layer]) -> dict[str, Comparison]:
        assert self.calib is not None
        plan = self._finished(found)
        self.correct(plan)
        with self.stage("rank"):
            self._start(self.recipe.calibration.samples, alone.runs(len(layers)))
            return alone.errors(self.graph, plan, layers, self.calib, self.recipe.calibration, self.options,
                                self.progress.step).alone

    def _without_dropped(self, plan: Plan) -> Plan:
        plan.dropped = tuple(sorted(self.dropped))
        for step, names in ((AddMasks, plan.added), (NormalMasks, plan.maskings)):
            for name in list(names) if step.name in self.dropped else ():
                masks.drop(plan, name, "stays as it is: to rewrite it was measured to gain nothing")
        return plan

    def round(self, plan: Plan) -> None:
        """Find codes of weights that keep layers' results better than the nearest ones do."""
        if self.recipe.scheme.is_weight_only:
            self._round_blocks(plan)
            return
        if self.calib is not None and plan.quantized() and self.recipe.rounding != "nearest":
            with self.stage("round"):
                self._start(self.recipe.calibration.samples)
                self.used_data = True
                rounding.round_weights(self.graph_for(plan), plan, self._by())
        if plan.multiples or plan.blocks:
            assert self.recipe.scheme.weights is not None
            with self.stage("round"):
                graph = self.graph_for(plan)
                two_levels.by_formula(graph, plan, self.recipe.scheme.weights)
                block_rounding.by_formula(graph, plan)

    def _round_blocks(self, plan: Plan) -> None:
        graph = self.graph_for(plan)
        with self.stage("round"):
            if self.calib is not None and self.recipe.rounding != "nearest":
                self._start(self.recipe.calibration.samples)
                self.used_data = True
                block_rounding.by_data(graph, plan, self._by(), self.spool)
            self.progress.total(len(plan.blocks))
            block_rounding.by_formula(graph, plan, self.progress.step)

    def correct(self, plan: Plan) -> None:
        """Find by how much each layer's bias has to make up for the error of its weights and input."""
        active = self.recipe.bias_correction and not self.recipe.scheme.is_weight_only
        if self.calib is not None and plan.quantizes and active:
            with self.stage("correct"):
                self._start(correction.ROWS)
                plan.bias_shifts = correction.mean_errors(self.graph, plan, self.calib, self.recipe.calibration,
                                                          self.options, self.progress.step)

    def _start(self, samples: int | None, runs: int = 1) -> None:
        assert self.calib is not None
        known = [n for n in (self.calib.rows, samples) if n is not None]
        self.progress.total(min(known) * runs if known else None)
