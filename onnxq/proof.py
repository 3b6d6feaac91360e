"""What is checked of a compiled model on this machine: what ran, what it computes, and how accurate it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxq import notices, verification
from onnxq.calibration.readers import Dataset, open_data
from onnxq.calibration.shapes import resized
from onnxq.errors import DataError, ModelError
from onnxq.plan import Plan
from onnxq.ports import Port
from onnxq.progress import Progress
from onnxq.report.report import Report
from onnxq.request import Request
from onnxq.runtime.machine import checking
from onnxq.runtime.session import Session

Feeds = list[dict[str, Any]]

_AGREEMENT_ROWS = 64  # enough to tell agreement; a metric is measured on all of the evaluation data


@dataclass(frozen=True)
class Files:
    """The float model that figures are told against, the compiled one, and its form of Q and DQ."""

    reference: Path
    compiled: Path
    twin: Path


class Proof:
    """Fills a report with what running the compiled model shows, as far as the target's models run here."""

    def __init__(self, request: Request, report: Report, progress: Progress) -> None:
        self.request, self.report, self.progress = request, report, progress
        self.how = checking(request.target, request.options.threads)

    def feeds(self, ports: list[Port], data: Dataset | None) -> tuple[Feeds, str]:
        """One batch to time and read back on; without data a random one, which is said wherever it is used."""
        batch = self.request.recipe.calibration.batch
        shapes = {} if self.request.target.static else self.request.shapes  # there the model has them
        if data is not None:
            return resized(verification.first_feeds(data, batch, 1)[0], ports, shapes), data.name
        try:
            return (resized(verification.first_feeds(open_data("random", ports), batch, 1)[0], ports, shapes),
                    "random inputs")
        except DataError:
            return [], ""

    def runnable(self, reference: Path, feeds: Feeds) -> Feeds:
        """Random feeds, where the model runs on them."""
        try:
            Session(reference, self.request.options).run(feeds[0] if feeds else {})
        except (DataError, ModelError):
            self.report.verdict.notices.append("no data were given and the model does not run on random inputs: "
                                               "nothing was timed or read back; give --calib or --eval")
            return []
        self.report.verdict.notices.append("no data were given: timed on random inputs, accuracy was not measured; "
                                           "give --eval DATA")
        return feeds

    def verify(self, plan: Plan, files: Files, feeds: Feeds, made: Mapping[str, tuple[str, ...]]) -> None:
        """Read back what ran, and compare the compiled graph with its form of Q and DQ; `made` is that of what_ran."""
        options, report = self.request.options, self.report
        report.verdict.notices += [self.how.note] * bool(self.how.note)
        if not feeds or not self.how.reads_back:
            report.nodes = [verification.row(n) for n in plan.nodes.values()]
            return
        with verification.stage(report, self.progress, "verify"):
            report.nodes = verification.what_ran(plan, files.compiled, feeds, options, report.verdict, made)
            if plan.changes and self.request.target.floats == "float32":  # else its form of Q and DQ is of another type
                report.semantic = verification.semantic(files.reference, files.compiled, files.twin, feeds, options,
                                                        report.verdict)

    def accuracy(self, plan: Plan, files: Files, calib: Dataset | None, evaluation: Dataset | None) -> None:
        """Compare with the float model over all of the evaluation data, or some of the calibration data."""
        request, data = self.request, evaluation or calib
        if data is None:
            return
        judged = files.twin if self.how.by_twin and plan.changes else files.compiled
        note = "" if evaluation is not None else "agreement with float on the calibration data; give --eval DATA"
        wanted = request.recipe.calibration.samples or _AGREEMENT_ROWS
        samples = None if evaluation is not None else min(_AGREEMENT_ROWS, wanted)
        with verification.stage(self.report, self.progress, "accuracy"):
            self.progress.total(data.rows if samples is None else min(samples, data.rows or samples))
            self.report.accuracy = verification.accuracy(
                files.reference, judged, data, request.goal, self.how.options, self.report.verdict,
                batch=request.recipe.calibration.batch, samples=samples, note=note, progress=self.progress.step)
        if evaluation is not None:
            self.report.verdict.notices += notices.of_data(evaluation, "evaluation")
