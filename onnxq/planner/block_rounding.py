"""Scales and codes of weights in blocks, one weight after the other: by the weights alone, or by what layers read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.calibration import observer
from onnxq.graph import Graph, Node, Tensor, is_constant, shape_of
from onnxq.numerics import affine, blocks, rounding
from onnxq.numerics.affine import QuantParams
from onnxq.numerics.sampling import View
from onnxq.plan import Blocks, Plan
from onnxq.planner.hessians import Halves, chunks
from onnxq.planner.smoothing import Searching
from onnxq.planner.weight_only import LINEAR, weight_of

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Hessian = npt.NDArray[np.float64]

_WIDEST = 16384  # inputs of a layer: the work grows with the cube
_BETTER = 1.0  # times the output error of the formula's codes, on the other half of the data
_DAMPING = 0.01


def by_formula(graph: Graph, plan: Plan, progress: Callable[[int], None]) -> None:
    """Find the parameters and codes of all weights in blocks by their formula, and note them in the Plan."""
    for done, (name, weight) in enumerate(_weights(graph, plan).items()):
        how = plan.blocks[name]
        _note(plan, name, *_formula(_inputs_first(graph, weight, how), how))
        progress(done + 1)


def by_data(graph: Graph, plan: Plan, by: Searching) -> None:
    """Find those of layers by GPTQ, where they keep results better on data that they were not found on, and note them
    in the Plan.

    Layers that share what they read share a Hessian. What no Hessian is known of is left to the formula.
    """
    tasks = _tasks(graph, plan)
    for chunk in chunks({name: _inputs(layers[0]) for name, layers in tasks.items()}):
        running = {name: Halves(View(), _as_it_is, by.alike) for name in chunk}
        observer.fold(graph, {}, by.data, by.how, by.options, by.progress, [running])
        for name in chunk:
            seen, unseen = (half.hessian.result() for half in running.pop(name).halves)
            for node in tasks[name] if len(seen) and len(unseen) else ():
                weight = weight_of(node)
                how = plan.blocks[weight.name]
                found = _rounded(_inputs_first(graph, weight, how), how, seen, unseen)
                if found is not None:
                    _note(plan, weight.name, *found)


def _as_it_is(x: Floats) -> Floats:
    return x


def _tasks(graph: Graph, plan: Plan) -> dict[str, list[Node]]:
    """Computed tensor -> the layers that read it and have weights in blocks for themselves."""
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op not in LINEAR or node.domain or weight_of(node).name not in plan.blocks:
            continue
        alone = {n.name for n in graph.consumers(weight_of(node))} == {node.name}
        if alone and _inputs(node) <= _WIDEST and not is_constant(node.inputs[0]):
            found.setdefault(node.inputs[0].name, []).append(node)
    return found


def _inputs(node: Node) -> int:
    return int((shape_of(weight_of(node)) or (0,))[0] or 0)


def _rounded(values: Floats, how: Blocks, seen: Hessian, unseen: Hessian) -> tuple[Array, QuantParams] | None:
    """(codes, parameters) by what the layer reads; None where the formula's do as well on what was not seen."""
    plain, tried = _formula(values, how), _searched(values, how, seen)
    before, after = (rounding.output_error(values, codes, params, unseen).sum() for codes, params in (plain, tried))
    return _searched(values, how, seen + unseen) if after < _BETTER * before else None


def _searched(values: Floats, how: Blocks, hessian: Hessian) -> tuple[Array, QuantParams]:
    start: blocks.Search = "absmax" if how.dtype.bits == 2 and how.symmetric else "mse"  # measured: see README
    params = blocks.choose(values, how.dtype, how.block_size, how.symmetric, start)
    return rounding.gptq_refit(values, hessian, params, _DAMPING)


def _weights(graph: Graph, plan: Plan) -> dict[str, Tensor]:
    return {t.name: t for node, _ in graph.walk() for t in node.inputs if is_constant(t) and t.name in plan.blocks}


def _inputs_first(graph: Graph, weight: Tensor, how: Blocks) -> Floats:
    values = np.asarray(graph.read(weight), np.float32)
    return values.T if how.axis else values


def _formula(values: Floats, how: Blocks) -> tuple[Array, QuantParams]:
    params = blocks.choose(values, how.dtype, how.block_size, how.symmetric, how.search)
    return affine.quantize(values, params), params


def _note(plan: Plan, name: str, codes: Array, params: QuantParams) -> None:
    how = plan.blocks.pop(name)
    if how.axis:
        codes = np.ascontiguousarray(codes.T)
        params = QuantParams(np.ascontiguousarray(params.scale.T), np.ascontiguousarray(params.zero_point.T),
                             params.dtype, 1, params.block_size)
    plan.weights[name], plan.rounded[name] = params, codes
