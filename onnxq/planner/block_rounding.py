"""Scales and codes of weights in blocks, one weight after the other: by the weights alone, or by what layers read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxq.graph import Graph, Tensor, is_constant
from onnxq.numerics import affine, blocks
from onnxq.numerics.affine import QuantParams
from onnxq.plan import Blocks, Plan


def settle(graph: Graph, plan: Plan, progress: Callable[[int], None]) -> None:
    """Find the parameters and codes of all weights in blocks by their formula, and note them in the Plan."""
    for done, (name, weight) in enumerate(_weights(graph, plan).items()):
        _note(plan, name, *_by_formula(np.asarray(graph.read(weight), np.float32), plan.blocks[name]))
        progress(done + 1)


def _weights(graph: Graph, plan: Plan) -> dict[str, Tensor]:
    return {t.name: t for node, _ in graph.walk() for t in node.inputs if is_constant(t) and t.name in plan.blocks}


def _by_formula(values: np.ndarray, how: Blocks) -> tuple[np.ndarray, QuantParams]:
    """(codes, parameters) along the axis of inputs."""
    first = values.T if how.axis else values
    params = blocks.choose(first, how.dtype, how.block_size, how.symmetric, how.search)
    return affine.quantize(first, params), params


def _note(plan: Plan, name: str, codes: np.ndarray, params: QuantParams) -> None:
    how = plan.blocks.pop(name)
    if how.axis:
        codes = np.ascontiguousarray(codes.T)
        params = QuantParams(np.ascontiguousarray(params.scale.T), np.ascontiguousarray(params.zero_point.T),
                             params.dtype, 1, params.block_size)
    plan.weights[name], plan.rounded[name] = params, codes
