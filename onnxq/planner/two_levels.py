"""4-bit weights that integer kernels read as int8: scales and codes by the weights alone, or by what layers read."""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

from onnxq.graph import Graph, is_constant
from onnxq.numerics import blocks, rounding, two_level
from onnxq.numerics.two_level import TwoLevel
from onnxq.plan import Multiples, Plan
from onnxq.schemes import TensorSpec

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]

_DAMPING = 0.01


def begin(plan: Plan, name: str, values: Floats, spec: TensorSpec) -> None:
    """Note scales of a weight [K, N] that are found quickly; better ones come with its codes."""
    assert spec.block_size is not None
    _note(plan, name, two_level.choose(values, spec.block_size, "absmax"))


def by_formula(graph: Graph, plan: Plan, spec: TensorSpec) -> None:
    """Find scales and codes of all such weights that have no codes yet."""
    search = cast(blocks.Search, "mse" if spec.search == "auto" else spec.search)
    for weight in {t.name: t for n, _ in graph.walk() for t in n.inputs if t.name and is_constant(t)}.values():
        if weight.name in plan.multiples and weight.name not in plan.rounded:
            values = np.asarray(graph.read(weight), np.float32)
            found = two_level.choose(values, plan.multiples[weight.name].block_size, search)
            _note(plan, weight.name, found, two_level.nearest(values, found))


def by_data(plan: Plan, name: str, values: Floats, seen: npt.NDArray[np.float64],
            unseen: npt.NDArray[np.float64]) -> None:
    """Find those of one weight [K, N] by GPTQ, from the hessians [K, K] of two halves of the data.

    Where levels rounded to nearest do as well on the half that was not searched on, nothing is noted.
    """
    size = plan.multiples[name].block_size
    plainly = two_level.choose(values, size)
    tried, fitted = _searched(values, size, seen)
    before, after = (rounding.output_error(values, codes, found.channels, unseen).sum()
                     for codes, found in ((two_level.nearest(values, plainly), plainly), (tried, fitted)))
    if after < before:
        codes, found = _searched(values, size, seen + unseen)
        _note(plan, name, found, codes)


def _searched(values: Floats, size: int, hessian: npt.NDArray[np.float64]) -> tuple[Codes, TwoLevel]:
    return two_level.gptq(values, hessian, two_level.choose(values, size, "mse", hessian), _DAMPING)


def _note(plan: Plan, name: str, found: TwoLevel, codes: Codes | None = None) -> None:
    plan.weights[name], plan.multiples[name] = found.channels, Multiples(found.block_size, found.multiples)
    if codes is not None:
        plan.rounded[name] = codes
