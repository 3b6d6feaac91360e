"""Weights of narrowed layers, fitted once more where more was taken out before them than they were fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnxq.calibration import observer
from onnxq.graph import Graph, Node, up_to
from onnxq.numerics.channel_pruning import damping
from onnxq.numerics.filters import from_matrix, to_matrix
from onnxq.numerics.sampling import View
from onnxq.passes.transform.remove_channels import give
from onnxq.plan import Narrowed
from onnxq.planner.pruning import Calibrated, Seen
from onnxq.planner.readers import view_of
from onnxq.planner.scales import finite
from onnxq.recipe import Calibration

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Columns:
    """Of a layer's outputs those that it has when its inputs go (`then`), and those that stay (`last`), int64."""

    then: Ids
    last: Ids


class _Seen:
    """What layers read by one view: in float, and as all that is narrowed before makes it; with a 1 behind each row."""

    def __init__(self, view: View) -> None:
        self._seen = Seen(view, paired=True, constant=True)
        self.view, self.drift = view, self._seen.drift

    def update(self, reference: Floats, result: Floats) -> None:
        """Fold in one batch of both."""
        self._seen.fold(result, reference)


def refit(graph: Graph, current: Graph, rewrites: Sequence[Narrowed], columns: dict[str, Columns], by: Calibrated,
          how: Calibration) -> list[Narrowed]:
    """Fit weights and biases of narrowed layers to their outputs in `graph`, one tensor that they read after the other.

    `current` is the narrowed graph, which gets them, and rewrites come in the order in which they were made: a layer
    knows of those before its own. Where others changed what it reads, in its own family, too, it makes up for them.
    """
    made = {name: (weight, shift) for one in rewrites
            for name, weight, shift in zip(one.layers, one.weights, one.shifts, strict=True)}
    place = {name: k for k, one in enumerate(rewrites) for name in one.layers}
    read: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.name in made:
            read.setdefault(node.inputs[0].name, []).append(node)
    changed: set[str] = set()
    for tensor, layers in read.items():
        whole = up_to(graph, [tensor])
        above = {n.name for n in whole.nodes} & set(made)
        if not (above & changed or any(place[name] >= place[layers[0].name] for name in above)):
            continue
        views = {node.name: view for node in layers if (view := view_of(node)) is not None}
        running = {view: _Seen(view) for view in views.values()}
        pairs = dict.fromkeys(running, (tensor, 1, tensor))
        observer.fold_pairs([whole, up_to(current, [tensor])], pairs, running, by.data, how, by.options, by.progress)
        for node in layers:
            seen = running[views[node.name]]
            if seen.drift.count:
                made[node.name] = _fitted(graph, current, node, seen, columns[node.name], made[node.name][1])
                changed.add(node.name)
    return [replace(one, weights=tuple(made[name][0] for name in one.layers),
                    shifts=tuple(made[name][1] for name in one.layers)) for one in rewrites]


def _fitted(graph: Graph, current: Graph, node: Node, seen: _Seen, columns: Columns,
            old: Floats) -> tuple[Floats, Floats]:
    """(weight, shift) for the Plan, of a layer whose shift was `old`; `current` gets them, too."""
    conv, kernel, drift = node.op == "Conv", seen.view.kernel, seen.drift
    [now] = [n for n in current.nodes if n.name == node.name]
    w = to_matrix(finite(graph, node.inputs[1], node), conv)
    sums = drift.centred() if old.size else drift.sums().without_last()
    start = np.zeros((len(sums.own), w.shape[1]), np.float32)
    start[:, columns.last] = to_matrix(np.asarray(current.read(now.inputs[1]), np.float32), conv)
    found = sums.fitted(w, start, damping(len(start), drift.count))
    shift = sums.shift(w, np.arange(len(found)), found) if old.size else old
    weight, last = (from_matrix(found[:, some], kernel, conv) for some in (columns.then, columns.last))
    if not old.size:
        give(current, now, last, old)
        return weight, old
    before = np.zeros(w.shape[1], np.float32)
    before[columns.then] = old
    give(current, now, last, (shift - before)[columns.last])
    return weight, shift[columns.then]
