"""Which tensors' channels are scaled, by which factors: searched on calibrated rows for the least error of the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxq.calibration.readers import Dataset
from onnxq.graph import Graph
from onnxq.numerics import smoothing
from onnxq.numerics.sampling import Sample
from onnxq.passes.absorbing import Absorber, absorber
from onnxq.plan import NodePlan, Smoothing
from onnxq.planner.readers import Group, activation, groups, readers, sampled
from onnxq.recipe import Calibration, Outliers, Scheme
from onnxq.runtime.session import SessionOptions
from onnxq.targets import Target

# what it has to gain at the layers' results, in dB: a Mul takes time, and any change is one
_LEAST_GAIN, _LEAST_GAIN_OF_MUL = 0.3, 1.0


@dataclass(frozen=True)
class Smoothed:
    """A Smoothing with what it gained on rows that the search had not seen."""

    rewrite: Smoothing
    found: smoothing.Found

    def reason(self) -> str:
        """For the report."""
        how = "by the constants above" if self.rewrite.absorbed else "by a Mul"
        before, after = (-10 * float(np.log10(max(e, 1e-30))) for e in (self.found.plain, self.found.error))
        return (f"its input's outliers are moved into its weights {how} (alpha {self.found.alpha:g}, beta "
                f"{self.found.beta:g}): {before:.1f} to {after:.1f} dB on data not searched on")


@dataclass(frozen=True)
class Searching:
    """What a search needs besides the graph."""

    scheme: Scheme
    target: Target
    outliers: Outliers
    data: Dataset
    how: Calibration
    options: SessionOptions
    progress: Callable[[int], None] | None = None


def find(graph: Graph, nodes: dict[str, NodePlan], codes: frozenset[str], by: Searching) -> list[Smoothed]:
    """The Smoothings that gain, for the layers that `nodes` make integer. `codes` names tensors that integer kernels
    make as codes: no Mul can stand before their readers."""
    candidates: list[tuple[Group, Absorber | None]] = []
    for group in groups(graph, nodes):
        above = absorber(graph, group.tensor, frozenset(n.name for n in group.layers), group.channels, group.axis)
        if above is not None or (by.outliers.at_run_time and group.name not in codes and group.axis == -1):
            candidates.append((group, above))
    takers = {group.name: above for group, above in candidates}
    held = sampled(graph, [group for group, _ in candidates], by.data, by.how, by.options, by.progress)
    searched = (_search(graph, group, takers[group.name], halves.results(), by) for group, halves in held)
    return [found for found in searched if found is not None]


def _search(graph: Graph, group: Group, above: Absorber | None, halves: tuple[Sample, Sample] | None,
            by: Searching) -> Smoothed | None:
    if halves is None:
        return None
    seen, unseen = halves
    tie = above.tie if above is not None else None
    search = smoothing.Search(readers(graph, group, unseen, by.scheme, by.target), activation(by.scheme), seen.low,
                              seen.high, tie)
    found = search.run(by.outliers.alpha, by.outliers.beta)
    least = _LEAST_GAIN if above is not None else _LEAST_GAIN_OF_MUL
    if not (found.alpha or found.beta) or found.gain_db < least:
        return None
    s = search.factors(found.alpha, found.beta, np.minimum(seen.low, unseen.low), np.maximum(seen.high, unseen.high))
    return Smoothed(Smoothing(group.name, tuple(n.name for n in group.layers), s, group.axis, above is not None), found)
