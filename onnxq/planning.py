"""Plans of one graph under one recipe: from what may run in integers to ranges, scales and corrected biases."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import MappingProxyType

from onnxq.calibration import observer
from onnxq.calibration.readers import Dataset
from onnxq.graph import Graph
from onnxq.numerics.comparison import Comparison
from onnxq.numerics.moments import Moments
from onnxq.passes.transform.add_masks import AddMasks
from onnxq.passes.transform.normal_masks import NormalMasks
from onnxq.plan import Plan
from onnxq.planner import alone, correction, masks, sensitivity
from onnxq.planner.masks import Masks
from onnxq.planner.outline import Measured, Outline, outline
from onnxq.planner.scales import finish
from onnxq.planner.sensitivity import Layer
from onnxq.progress import Progress
from onnxq.recipe import SQNR, Fallback, Recipe
from onnxq.runtime.session import SessionOptions
from onnxq.targets import Target

NOTHING = Measured()
Stages = Callable[[str], AbstractContextManager[None]]


class Planning:
    """Makes Plans of a canonical graph; what one of them needed of the data is known to the next."""

    def __init__(self, graph: Graph, recipe: Recipe, target: Target, calib: Dataset | None, options: SessionOptions,
                 progress: Progress, stage: Stages, dropped: Collection[str] = ()) -> None:
        self.graph, self.recipe, self.target, self.calib = graph, recipe, target, calib
        self.options, self.progress, self.stage = options, progress, stage
        self.ranges: dict[str, tuple[float, float]] = {}
        self.hiding: Masks | None = None
        self.used_data = self.seen_masks = False
        self.dropped = set(dropped)  # rewrites that don't pay, by the name of their pass
        self.floors = False  # whether floors under masked scores pay
        self.sensitive: dict[str, str] | None = None  # layers that stay float, with the reason; once they are ranked
        self.notices: list[str] = []

    def plan(self, measured: Measured = NOTHING) -> Plan:
        """The Plan that the tables and `measured` make, with scales; biases are not corrected yet."""
        if self.sensitive is None:
            self.sensitive = self._rank()
        found = self._outlined(measured)
        self._observe(found)
        return self._finished(found)

    def _outlined(self, measured: Measured = NOTHING) -> Outline:
        with self.stage("plan"):
            self.hiding = self.hiding or masks.find(self.graph)
            return outline(self.graph, self.recipe, self.target, measured, self.sensitive or {})

    def _observe(self, found: Outline, moments: Mapping[str, Moments] = MappingProxyType({})) -> None:
        """One run over the data for what is not known yet, with `moments` of tensors besides."""
        assert self.hiding is not None
        unknown = [name for name in found.ranges_of if name not in self.ranges]
        beside = {**({} if self.seen_masks else self.hiding.statistics), **moments}
        if self.calib is not None and (unknown or beside):
            with self.stage("calibrate"):
                self.used_data = self.seen_masks = True
                self._start(self.recipe.calibration.samples)
                self.ranges |= observer.observe(
                    self.hiding.graph, unknown, self.calib, self.recipe.calibration, self.options, self.progress.step,
                    self.recipe.scheme.activations, beside)

    def _finished(self, found: Outline) -> Plan:
        assert self.hiding is not None
        with self.stage("scales"):
            plan = finish(found, self.graph, self.ranges, self.recipe, self.target)
        masks.decide(self.hiding, plan)
        for name in self.hiding.floors if self.floors else ():
            masks.use_floor(self.hiding, plan, name)
        return self._without_dropped(plan)

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

    def correct(self, plan: Plan) -> None:
        """Find by how much each layer's bias has to make up for the error of its weights and input."""
        if self.calib is not None and plan.quantizes and self.recipe.bias_correction:
            with self.stage("correct"):
                self._start(correction.ROWS)
                plan.bias_shifts = correction.mean_errors(self.graph, plan, self.calib, self.recipe.calibration,
                                                          self.options, self.progress.step)

    def _start(self, samples: int | None, runs: int = 1) -> None:
        assert self.calib is not None
        known = [n for n in (self.calib.rows, samples) if n is not None]
        self.progress.total(min(known) * runs if known else None)
