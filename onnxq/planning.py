"""Plans of one graph under one recipe: from what may run in integers to ranges, scales and corrected biases."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager

from onnxq.calibration import observer
from onnxq.calibration.readers import Dataset
from onnxq.graph import Graph
from onnxq.passes.transform.add_masks import AddMasks
from onnxq.passes.transform.normal_masks import NormalMasks
from onnxq.plan import Plan
from onnxq.planner import correction, masks
from onnxq.planner.masks import Masks
from onnxq.planner.outline import Measured, outline
from onnxq.planner.scales import finish
from onnxq.progress import Progress
from onnxq.recipe import Recipe
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
        self.used_data = False
        self.dropped = set(dropped)  # rewrites that don't pay, by the name of their pass
        self.floors = False  # whether floors under masked scores pay

    def plan(self, measured: Measured = NOTHING) -> Plan:
        """The Plan that the tables and `measured` make, with scales; biases are not corrected yet."""
        with self.stage("plan"):
            found = outline(self.graph, self.recipe, self.target, measured)
            first, self.hiding = self.hiding is None, self.hiding or masks.find(self.graph)
        unknown = [name for name in found.ranges_of if name not in self.ranges]
        beside = self.hiding.statistics if first else {}
        if self.calib is not None and (unknown or beside):
            with self.stage("calibrate"):
                self.used_data = True
                self._start(self.recipe.calibration.samples)
                self.ranges |= observer.observe(
                    self.hiding.graph, unknown, self.calib, self.recipe.calibration, self.options, self.progress.step,
                    self.recipe.scheme.activations, beside)
        with self.stage("scales"):
            plan = finish(found, self.graph, self.ranges, self.recipe, self.target)
        masks.decide(self.hiding, plan)
        for name in self.hiding.floors if self.floors else ():
            masks.use_floor(self.hiding, plan, name)
        return self._without_dropped(plan)

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

    def _start(self, samples: int | None) -> None:
        assert self.calib is not None
        known = [n for n in (self.calib.rows, samples) if n is not None]
        self.progress.total(min(known) if known else None)
