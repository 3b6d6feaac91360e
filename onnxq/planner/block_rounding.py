"""Scales and codes of weights in blocks, one weight after the other: by the weights alone, or by what layers read."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.calibration import observer
from onnxq.graph import Graph, Node, Tensor, identity, is_constant, shape_of, up_to
from onnxq.numerics import blocks, rounding
from onnxq.numerics.affine import QuantParams
from onnxq.numerics.compensation import Drift
from onnxq.numerics.sampling import View
from onnxq.passes.blocks import by_formula as formula
from onnxq.passes.blocks import inputs_first, matrix, matrix_shape, transposed
from onnxq.passes.manager import Context
from onnxq.passes.quantize.blocks import StoreBlocks
from onnxq.plain import plain
from onnxq.plan import Blocks, Plan
from onnxq.planner.hessians import Halves, Rows, chunks
from onnxq.planner.readers import groups
from onnxq.planner.smoothing import Searching
from onnxq.planner.weight_only import LINEAR, weight_of
from onnxq.spool import Spool, digest
from onnxq.version import VERSION

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Aim = tuple[Floats, npt.NDArray[np.float64]]  # what codes shall stand for [K, N], and the hessian of its errors [K, K]

_WIDEST = 16384  # inputs of a layer: the work grows with the cube
_DAMPING = 0.01
_WORK = 6e12  # products of weights and rows, for all runs of the model together: a minute on two cores


def by_formula(graph: Graph, plan: Plan, progress: Callable[[int], None] | None = None,
               spared: Collection[str] = ()) -> None:
    """Find the parameters and codes of all weights in blocks but those `spared`, and note them in the Plan."""
    wanted = [(name, weight) for name, weight in _weights(graph, plan).items() if name not in spared]
    for done, (name, weight) in enumerate(wanted):
        how = plan.blocks[name]
        _note(plan, name, *formula(_values(graph, weight, how), how))
        if progress is not None:
            progress(done + 1)


def by_data(graph: Graph, plan: Plan, by: Searching, spool: Spool | None = None) -> None:
    """Find those of layers by GPTQ, where they keep results better on data that they were not found on.

    Where the model and the data are small, one tensor that layers read after the other, from the first to the last: its
    layers are observed with all before them quantized, and their codes make up for what those are off by. A larger
    model would run too often for that: all layers are observed in float at once. Other weights are noted by their
    formula, and first. What is done goes into the `spool`, where an interrupted run goes on.
    """
    tasks = _tasks(graph, plan)
    _convs(graph, plan, by)
    by_formula(graph, plan, spared={weight_of(node).name for layers in tasks.values() for node in layers})
    in_turn = bool(tasks) and _affordable(graph, plan, list(tasks), by)
    steps = [[name] for name in tasks] if in_turn else chunks({name: _inputs(tasks[name][0]) for name in tasks})
    key = _beginning(graph, plan, by) if spool is not None else ""
    for names in steps:
        step, key = {name: tasks[name] for name in names}, digest(key, names)
        if not _known(plan, step, spool, key):
            _step(graph, plan, step, by, in_turn)
            _keep(plan, step, spool, key)


def _affordable(graph: Graph, plan: Plan, names: list[str], by: Searching) -> bool:
    """Whether the model may run once for each of the tensors, half of it on average, and in two forms."""
    weights = sum(int(np.prod([int(d or 0) for d in shape_of(t) or ()])) for t in _weights(graph, plan).values())
    counted = Rows(View())
    observer.fold(up_to(graph, names[:1]), {names[0]: counted}, by.data, by.how, by.options)
    return 2.0 * len(names) * weights * counted.rows <= _WORK


def _beginning(graph: Graph, plan: Plan, by: Searching) -> str:
    """What results depend on: the first rows of the data stand for all, samples of weights for these."""
    weights = [(name, identity(graph, t), vars(plan.blocks[name]) | {"dtype": plan.blocks[name].dtype.name})
               for name, t in _weights(graph, plan).items()]
    first = next(iter(by.data.batches(1)), None)
    return digest(VERSION, by.data.name, by.data.rows or 0, dict(first.feed) if first is not None else {},
                  plain(by.how), weights, *plan.rounded.values())


def _known(plan: Plan, tasks: dict[str, list[Node]], spool: Spool | None, key: str) -> bool:
    """Note what an earlier run found in this step; whether there was one."""
    kept = spool.get(key) if spool is not None else None
    if kept is None:
        return False
    for node in (node for layers in tasks.values() for node in layers):
        name = weight_of(node).name
        how = plan.blocks[name]
        params = QuantParams(np.asarray(kept[f"{name}/scale"]), np.asarray(kept[f"{name}/zero_point"]), how.dtype, 0,
                             how.block_size)
        _note(plan, name, np.asarray(kept[f"{name}/codes"]), params)
    return True


def _keep(plan: Plan, tasks: dict[str, list[Node]], spool: Spool | None, key: str) -> None:
    if spool is None:
        return
    arrays: dict[str, Array] = {}
    for name in (weight_of(node).name for layers in tasks.values() for node in layers):
        params = plan.weights[name]
        arrays |= {f"{name}/codes": plan.rounded[name], f"{name}/scale": params.scale,
                   f"{name}/zero_point": params.zero_point}
    spool.put(key, arrays)


def _step(graph: Graph, plan: Plan, tasks: dict[str, list[Node]], by: Searching, in_turn: bool) -> None:
    """Round the layers that read some tensors; `in_turn`: with what is rounded before them quantized."""
    running = {name: _Halves(in_turn) for name in tasks}
    whole = up_to(graph, list(tasks))
    observer.fold(whole, {}, by.data, by.how, by.options, by.progress, [running],
                  _quantized(whole, plan) if in_turn else None)
    for name, layers in tasks.items():
        seen, unseen = (half.drift for half in running.pop(name).halves)
        for node in layers if seen.count and unseen.count else ():
            weight = weight_of(node)
            how = plan.blocks[weight.name]
            _note(plan, weight.name, *_rounded(_values(graph, weight, how), how, seen, unseen))
    done = {weight_of(node).name for layers in tasks.values() for node in layers}
    by_formula(graph, plan, spared=plan.blocks.keys() - done)  # of what no rows were seen


def _convs(graph: Graph, plan: Plan, by: Searching) -> None:
    """Round the filters of Convs by the patches that they read in float."""
    tasks = {(group.name, view): [node for node, seen in zip(group.layers, group.views, strict=True) if seen == view]
             for group in groups(graph, plan.nodes) for view in group.views
             if all(n.op == "Conv" and weight_of(n).name in plan.blocks for n in group.layers)}
    for chunk in chunks({key: matrix_shape(weight_of(layers[0]))[1] for key, layers in tasks.items()}):
        running = {key: Halves(key[1], lambda x: x, by.alike) for key in chunk}
        observer.fold(graph, {}, by.data, by.how, by.options, by.progress,
                      [{name: one} for (name, _), one in running.items()])
        for key in chunk:
            seen, unseen = (half.hessian for half in running.pop(key).halves)
            for node in tasks[key] if seen.count and unseen.count else ():
                weight = weight_of(node)
                how = plan.blocks[weight.name]
                values = _values(graph, weight, how)
                _note(plan, weight.name, *_better(values, how, (values, seen.result()), (values, unseen.result()),
                                                  (values, seen.result() + unseen.result())))


def _quantized(graph: Graph, plan: Plan) -> Graph:
    """A copy with the weights that are known by now as their codes say."""
    copy = graph.copy()
    known = {name: v for name, v in plan.nodes.items() if v.weight in plan.rounded}
    StoreBlocks().run(copy, Context(plan=replace(plan, nodes=known)))
    return copy


class _Half:
    """What layers read of one half of the data: in float, or `paired`: quantized so far, and then in float."""

    def __init__(self, paired: bool) -> None:
        self.paired, self.drift = paired, Drift()

    def update(self, x: Floats) -> None:
        """Fold in one batch [.., K], or [.., 2 K] where they are paired."""
        rows, inputs = x.reshape(-1, x.shape[-1]), x.shape[-1] // 2
        if len(rows) and self.paired:
            self.drift.update(rows[:, :inputs], rows[:, inputs:])
        elif len(rows):
            self.drift.update(rows)


class _Halves:
    def __init__(self, paired: bool) -> None:
        self.halves = _Half(paired), _Half(paired)


def _tasks(graph: Graph, plan: Plan) -> dict[str, list[Node]]:
    """Computed tensor -> the layers that read it and have weights in blocks for themselves, in execution order."""
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op not in LINEAR or node.domain or weight_of(node).name not in plan.blocks:
            continue
        alone = {n.name for n in graph.consumers(weight_of(node))} == {node.name}
        computed = graph.producer(node.inputs[0]) is not None
        if alone and computed and _inputs(node) <= _WIDEST:
            found.setdefault(node.inputs[0].name, []).append(node)
    return found


def _inputs(node: Node) -> int:
    return int((shape_of(weight_of(node)) or (0,))[0] or 0)


def _rounded(values: Floats, how: Blocks, seen: Drift, unseen: Drift) -> tuple[Array, QuantParams]:
    """(codes, parameters) by what the layer reads, or by the formula where that does as well on what was not seen."""
    both = Drift()
    both.merge(seen)
    both.merge(unseen)
    return _better(values, how, *((drift.target(values, _DAMPING), drift.hessian()) for drift in (seen, unseen, both)))


def _better(values: Floats, how: Blocks, seen: Aim, unseen: Aim, both: Aim) -> tuple[Array, QuantParams]:
    """Codes by the formula, or those found on `both` halves where what is found on one is better on the other."""
    plainly, tried = formula(values, how), _searched(how, *seen)
    aim, hessian = unseen
    before, after = (rounding.output_error(aim, codes, params, hessian).sum() for codes, params in (plainly, tried))
    return _searched(how, *both) if after < before else plainly


def _searched(how: Blocks, aim: Floats, hessian: npt.NDArray[np.float64]) -> tuple[Array, QuantParams]:
    start: blocks.Search = "absmax" if how.dtype.bits == 2 and how.symmetric else "mse"
    params = blocks.choose(aim, how.dtype, how.block_size, how.symmetric, start)
    return rounding.gptq_refit(aim, hessian, params, _DAMPING)


def _weights(graph: Graph, plan: Plan) -> dict[str, Tensor]:
    return {t.name: t for node, _ in graph.walk() for t in node.inputs if is_constant(t) and t.name in plan.blocks}


def _values(graph: Graph, weight: Tensor, how: Blocks) -> Floats:
    return inputs_first(np.asarray(matrix(graph, weight), np.float32), how.axis)


def _note(plan: Plan, name: str, codes: Array, params: QuantParams) -> None:
    how = plan.blocks.pop(name)
    if how.axis:
        codes, params = np.ascontiguousarray(codes.T), transposed(params)
    plan.weights[name], plan.rounded[name] = params, codes
