"""Bits of each int8 weight, but for a few of its codes, so that the packed file fits a size at the least damage."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from onnxq import sizes
from onnxq.errors import UsageError
from onnxq.graph import Graph
from onnxq.numerics.allocation import Option, allocate, least
from onnxq.numerics.outliers import BITS
from onnxq.planner import bit_costs, weight_only
from onnxq.planner.bit_costs import Seeing, Weight
from onnxq.planner.outline import Outline
from onnxq.progress import Progress
from onnxq.recipe import Recipe
from onnxq.schemes import TensorSpec

_OPERATORS = frozenset({"Conv", "Gather", "Gemm", "MatMul"})
_EXCEPTION = 2.0  # bytes of a protected code in a packed file: itself, and how far it is from the one before
_DECODER = 700  # bytes that name and describe what decodes one weight
_FUNCTIONS = 4000  # bytes of the decoders themselves


def choose(graph: Graph, found: Outline, recipe: Recipe, file_bytes: int, by: Seeing | None,
           progress: Progress) -> tuple[dict[str, TensorSpec], str]:
    """(weight -> its format, what to say of it), for the weights that `found` gives int8 codes.

    `file_bytes` are those of the file with int8 weights as they are. Raises UsageError for a budget that can't be met.
    """
    own = recipe.scheme.weights
    assert own is not None
    formats = tuple(replace(own, bits=bits) for bits in (*BITS, None))
    weights = [Weight(name, tuple(reading), formats) for name, reading in weight_only.readers(graph).items()
               if _coded(found, name, [node.name for _, node in reading])
               and {node.op for _, node in reading} <= _OPERATORS]
    costs = bit_costs.measure(graph, weights, by, progress)
    items = [[Option(_bytes(one, spec), damage) for spec, damage in
              zip(formats, costs.damages[one.name], strict=True)] for one in weights]
    budget = _budget(recipe, weights, items, file_bytes)
    taken = allocate(items, budget)
    counts = Counter("8" if formats[k].bits is None else str(formats[k].bits) for k in taken)
    words = ", ".join(f"{count} of {bits}" for bits, count in sorted(counts.items()))
    damage = sum(options[k].damage for options, k in zip(items, taken, strict=True))
    said = f"bits of weights were chosen within the size: {words}, which cost {damage:.2g} {costs.unit} by estimate"
    return {one.name: formats[k] for one, k in zip(weights, taken, strict=True)}, said


def _coded(found: Outline, name: str, readers: list[str]) -> bool:
    """Whether all that reads a weight reads its codes."""
    verdicts = [found.nodes.get(reader) for reader in readers]
    return all(v is not None and (v.weight == name or name in v.stored) for v in verdicts)


def _bytes(weight: Weight, spec: TensorSpec) -> int:
    """Of codes and scales."""
    rows, columns = weight.shape
    count, channels = rows * columns, weight.shape[1 - weight.axis]
    if spec.bits is None:
        return count + 4 * channels
    return -(-count * spec.bits // 8) + int(_EXCEPTION * spec.fraction * count) + 4 * channels + _DECODER


def _budget(recipe: Recipe, weights: list[Weight], items: list[list[Option]], file_bytes: int) -> int:
    bits, lowest = recipe.bits, least(items)
    dense = sum(options[-1].size for options in items)
    budgets = []
    if bits.target is not None:
        budgets.append((int(bits.target * sum(one.shape[0] * one.shape[1] for one in weights) / 8), "--target-bits"))
    if bits.most_bytes is not None:
        budgets.append((bits.most_bytes - _FUNCTIONS - (file_bytes - dense), "--max-size"))
    budget, asked = min(budgets)
    if budget < lowest:
        raise UsageError(f"{asked} can't be met: with {min(BITS)} bits for all weights the file takes "
                         f"{sizes.text(file_bytes - dense + lowest)}; allow that, or store fewer nodes as they are")
    return budget
