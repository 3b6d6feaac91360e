"""Channels that are taken out of a network, with the layers that make them: fewer products, and not only zeros."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq.calibration import observer
from onnxq.calibration.readers import Dataset
from onnxq.graph import Graph, Node
from onnxq.numerics.channel_pruning import remove
from onnxq.numerics.sampling import View
from onnxq.passes.widening import region
from onnxq.plan import Narrowed
from onnxq.planner.hessians import Half, chunks
from onnxq.planner.readers import Group, every_group
from onnxq.planner.scales import finite
from onnxq.recipe import Calibration
from onnxq.runtime.session import SessionOptions

Floats = npt.NDArray[np.float32]

WIDEST = 8192  # inputs of a layer: the work grows with the cube
LANES = 16  # channels that stay are a multiple of it where there are more: kernels multiply as many side by side


@dataclass(frozen=True)
class Taken:
    """What one tensor lost: channels of how many, and the squared change of what is made of it, over its squares."""

    tensor: str
    layers: tuple[str, ...]
    channels: int
    left: int
    error: float


def candidates(graph: Graph, spared: frozenset[str]) -> list[Group]:
    """Tensors whose channels can go: all that reads them are layers alike, what makes them is narrowed, too."""
    found = []
    for group in every_group(graph):
        names = frozenset(n.name for n in group.layers)
        views = set(group.views)
        if names & spared or len(views) > 1 or group.channels * group.views[0].repeat > WIDEST:
            continue
        above = region(graph, group.tensor, names, group.channels, group.axis)
        if above is not None and not {c.node for c in above.constants} & spared:
            found.append(group)
    return found


def narrow(graph: Graph, share: float, spared: frozenset[str], data: Dataset, how: Calibration,
           options: SessionOptions, progress: Callable[[int], None] | None = None) -> list[tuple[Narrowed, Taken]]:
    """Take `share` of the channels out of each candidate, those that the others can make up for best.

    All are observed in float at once. Tensors of which no rows are seen stay as they are. Raises ModelError for weights
    with NaN or infinities.
    """
    wanted = {group.name: group for group in candidates(graph, spared)}
    made: list[tuple[Narrowed, Taken]] = []
    for chunk in chunks({name: group.channels * group.views[0].repeat for name, group in wanted.items()}):
        running = {name: Half(wanted[name].views[0], lambda x: x, alike=True) for name in chunk}
        observer.fold(graph, {}, data, how, options, progress, [running])
        for name in chunk:
            group, hessian = wanted[name], running.pop(name).hessian
            count = _count(group.channels, share)
            if hessian.count and count:
                rewrite, error = _removed(graph, group, hessian.result(), count)
                made.append((rewrite, Taken(name, rewrite.layers, group.channels, len(rewrite.kept), error)))
    return made


def _count(channels: int, share: float) -> int:
    """How many of the channels go: so many that what stays fills lanes."""
    left = max(math.ceil(channels * (1 - share) - 1e-9), 1)
    if left > LANES:
        left = min(-(-left // LANES) * LANES, channels)
    return channels - left


def _removed(graph: Graph, group: Group, hessian: npt.NDArray[np.float64], count: int) -> tuple[Narrowed, float]:
    view = group.views[0]
    weights = [_matrix(node, finite(graph, node.inputs[1], node)) for node in group.layers]
    found = remove(np.concatenate(weights, axis=1), hessian, count, view.repeat)
    parts = np.split(found.weight, np.cumsum([w.shape[1] for w in weights])[:-1], axis=1)
    shaped = tuple(_shaped(part, node, view) for part, node in zip(parts, group.layers, strict=True))
    names = tuple(n.name for n in group.layers)
    return Narrowed(group.name, names, group.axis, group.channels, found.kept, shaped), found.error


def _matrix(node: Node, weight: Floats) -> Floats:
    """[K, N] of a layer's weight, of a Conv's [M, C, ..] with a filter's weights by channels."""
    return weight if node.op != "Conv" else weight.reshape(len(weight), -1).T


def _shaped(matrix: Floats, node: Node, view: View) -> Floats:
    if node.op != "Conv":
        return np.ascontiguousarray(matrix)
    return np.ascontiguousarray(matrix.T).reshape(matrix.shape[1], -1, *view.kernel)
