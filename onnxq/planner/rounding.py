"""Codes of weights that keep layers' results, from calibrated rows; where they do so on rows not searched on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnxq.calibration import observer
from onnxq.graph import Graph, Node
from onnxq.numerics import affine, outliers, rounding
from onnxq.numerics.affine import QuantParams
from onnxq.numerics.filters import by_place, from_matrix, restored, to_matrix
from onnxq.numerics.rounding import Hessian
from onnxq.numerics.sampling import View
from onnxq.plan import STATIC, Plan
from onnxq.planner import two_levels
from onnxq.planner.hessians import Decoder, Halves, chunks
from onnxq.planner.readers import Group, activation, groups
from onnxq.planner.smoothing import Searching

Codes = npt.NDArray[np.int8]

_WIDEST = 6144  # inputs of a layer: the work grows with the cube
_BETTER = 0.95  # times the squared error of rounding to nearest, on the other half of the data
_DAMPING = 0.05


@dataclass(frozen=True)
class _Task:
    """One layer to round."""

    node: Node
    group: Group
    view: View

    @property
    def inputs(self) -> int:
        """K, the length of a row."""
        return self.group.channels * self.view.repeat


def round_weights(graph: Graph, plan: Plan, by: Searching) -> None:
    """Note codes in the Plan for layers whose results these keep better than rounding to nearest does.

    `graph` is the one that the Plan is for. Layers that share what they read, and how, share a Hessian. In a pruned
    model weights of 0 keep the code of 0.
    """
    tasks: dict[tuple[str, View], list[_Task]] = {}
    for group in groups(graph, plan.nodes):
        for node, view in zip(group.layers, group.views, strict=True):
            task = _Task(node, group, view)
            if task.inputs <= _WIDEST and not plan.nodes[node.name].extra_channels:
                tasks.setdefault((group.name, view), []).append(task)
    for chunk in chunks({key: members[0].inputs for key, members in tasks.items()}):
        running = {key: Halves(key[1], _decoder(plan, tasks[key][0], by), by.alike) for key in chunk}
        observer.fold(graph, {}, by.data, by.how, by.options, by.progress,
                      [{name: one} for (name, _), one in running.items()])
        for key in chunk:
            seen, unseen = (half.hessian for half in running[key].halves)
            for task in tasks[key]:
                name = task.node.inputs[1].name
                if name in plan.multiples and seen.count and unseen.count:
                    values = np.asarray(graph.read(task.node.inputs[1]), np.float32)
                    two_levels.by_data(plan, name, values, seen.result(), unseen.result())
                    continue
                codes = _rounded(graph, plan, task, seen, unseen, by.target.saturates)
                if codes is not None:
                    plan.rounded[name] = codes


def _decoder(plan: Plan, task: _Task, by: Searching) -> Decoder:
    """What the layer's kernel reads for rows of its input."""
    if plan.nodes[task.node.name].activation != STATIC:
        spec = replace(activation(by.scheme), per_row=True)  # of layers of a static scheme, too
        return lambda x: spec.decoded(x, 0.0, 0.0)
    params = plan.activations[task.group.name]
    return lambda x: affine.dequantize(affine.quantize(x, params), params)


def _rounded(graph: Graph, plan: Plan, task: _Task, seen: Hessian, unseen: Hessian, pairs: bool) -> Codes | None:
    """The layer's codes, in the shape of its weight; None where nearest ones do as well."""
    if not seen.count or not unseen.count:
        return None
    weight = task.node.inputs[1]
    values = np.asarray(graph.read(weight), np.float32)
    params = plan.weights[weight.name]
    conv = task.node.op == "Conv"
    order = by_place(task.inputs, task.view.kernel)  # kernels multiply the channels of a filter's place side by side
    if conv:
        values = to_matrix(values, filters=True)[order]
        params = QuantParams(params.scale, params.zero_point, params.dtype, None if params.axis is None else 1)
    first, second = (half.result()[np.ix_(order, order)] for half in (seen, unseen))
    nearest = affine.quantize(values, params)
    limits = _limits(values, params, plan.widths.get(weight.name), bool(plan.pruned))
    tried = _search(values, first, params, pairs, limits)
    before, after = (rounding.output_error(values, codes, params, second).sum() for codes in (nearest, tried))
    if not after < _BETTER * before:
        return None
    codes = _search(values, first + second, params, pairs, limits)
    return from_matrix(restored(codes, order), task.view.kernel, conv)


def _search(values: npt.NDArray[np.float32], hessian: npt.NDArray[np.float64], params: QuantParams,
            pairs: bool, limits: Codes | None) -> Codes:
    return np.asarray(rounding.gptq(values, hessian, params, _DAMPING, pairs=pairs, limits=limits), np.int8)


def _limits(values: npt.NDArray[np.float32], params: QuantParams, bits: int | None, pruned: bool) -> Codes | None:
    """How large codes may be: what was pruned stays 0, and but for what is protected all fit `bits`."""
    if bits is None and not pruned:
        return None
    limits = np.full(values.shape, 127, np.int8) if bits is None else outliers.limits(values, params, bits)
    return np.where(values == 0, np.int8(0), limits) if pruned else limits
