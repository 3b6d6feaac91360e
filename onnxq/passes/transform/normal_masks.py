"""Hidden attention scores raised to where exponentials stay normal numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, Tensor, shape_of
from onnxq.passes import masks
from onnxq.passes.manager import Context, Pass
from onnxq.plan import BOUNDED, FLOORED, Masking


@dataclass(frozen=True)
class NormalMasks(Pass):
    """Softmax(s + b) with a mask b of large negative numbers -> the same without denormals, as the Plan says.

    s float32 [..., Q, K], b float32 broadcast to it, of one or several Adds, p = ReduceMax(b) over the last axis:
    0 for a row that sees something, below the scores for one that sees nothing.
    "bounded mask": Softmax(s + max(b, p + min(p, fill))). Computed on the mask alone, so all layers share it; where p
    absorbs the scores, the row keeps its very numbers.
    "floor": Softmax(max(s + ((b - p) - p), fill)), one more pass over the scores (Clip). A row that sees nothing is
    lifted above the floor by -p, so that it keeps its weights, which p has rounded.
    "floor per row": x = s + b, or whatever is in front; Softmax(max(x, p + min(p, fill))) with
    p = ReduceMax(x), two more passes.
    exp(x) below 2^-126 is denormal and takes many times as long on some processors; the bounds on `fill` are those of
    onnxq.numerics.masking. NaN of a row that sees nothing at all (-inf everywhere) stays but for "floor".
    """

    name: ClassVar[str] = "normal-masks"
    weighed: ClassVar[bool] = True

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Rewrite what one Softmax reads."""
        plan = context.plan.maskings.get(node.name)
        if plan is None or graph.has(f"{node.name}.normal") or node.op != "Softmax":
            return False
        found = masks.added(graph, node)
        if plan.form in (BOUNDED, FLOORED) and found is None:
            return context.skip(node, "no mask is added to what it reads")
        if found is None or plan.form not in (BOUNDED, FLOORED):
            _floor_rows(graph, node, plan)
            return True
        mask = _sum(graph, found.masks)
        if plan.form == BOUNDED and masks.bounded(graph, mask):
            return False
        for add in found.adds[1:]:
            graph.remove(add)
        last = found.adds[0]
        last.inputs.clear()
        last.inputs.extend([found.scores, _bounded(graph, mask, plan.fill) if plan.form == BOUNDED else
                            _lifted(graph, mask)])
        if plan.form == FLOORED:
            _floor(graph, node, plan)
        return True


def _sum(graph: Graph, parts: list[Tensor]) -> Tensor:
    """The sum of masks, made once for all layers."""
    total = parts[-1]  # the one nearest to the scores: sums are rounded as they were
    for part in reversed(parts[:-1]):
        name = f"{total.name}.and.{part.name}"
        if not graph.has(name):
            graph.add_node("Add", name, [total, part], [graph.variable(name, np.float32, _broadcast(total, part))])
        total = graph.made(name)
    return total


def _broadcast(a: Tensor, b: Tensor) -> list[int | str | None]:
    """The shape of a sum, None for axes of which only the runtime knows."""
    left, right = list(shape_of(a) or ()), list(shape_of(b) or ())
    rank = max(len(left), len(right))
    pairs = zip([1] * (rank - len(left)) + left, [1] * (rank - len(right)) + right, strict=True)
    return [y if x == 1 else x if y in (1, x) else None for x, y in pairs]


def _peak(graph: Graph, x: Tensor, name: str) -> Tensor:
    """The greatest of each row, made once for each name."""
    if not graph.has(name):
        shape = shape_of(x)
        peak = graph.variable(name, np.float32, [*shape[:-1], 1] if shape else None)
        graph.add_reduction("ReduceMax", name, x, peak, [-1], keepdims=True)
    return graph.made(name)


def _least(graph: Graph, x: Tensor, fill: float, name: str) -> Tensor:
    """p + min(p, fill) for the greatest p of each row: `fill` below it, or twice a p that would absorb the fill."""
    peak = _peak(graph, x, f"{x.name}.peak")
    number = graph.constant(f"{name}.fill", np.asarray(fill, np.float32))
    lower, least = graph.like(peak, f"{name}.lower"), graph.like(peak, f"{name}.least")
    graph.add_node("Min", f"{name}.lower", [peak, number], [lower])
    graph.add_node("Add", f"{name}.least", [peak, lower], [least])
    return least


def _bounded(graph: Graph, mask: Tensor, fill: float) -> Tensor:
    name = f"{mask.name}.from{fill:g}"
    if not graph.has(name):
        least = _least(graph, mask, fill, name)
        graph.add_node("Max", name, [mask, least], [graph.like(mask, name, np.float32)])
    return graph.made(name)


def _lifted(graph: Graph, mask: Tensor) -> Tensor:
    name = f"{mask.name}.lifted"
    if not graph.has(name):
        peak, level = _peak(graph, mask, f"{mask.name}.peak"), graph.like(mask, f"{mask.name}.level", np.float32)
        graph.add_node("Sub", f"{mask.name}.level", [mask, peak], [level])
        graph.add_node("Sub", name, [level, peak], [graph.like(mask, name, np.float32)])
    return graph.made(name)


def _floor(graph: Graph, softmax: Node, plan: Masking) -> None:
    x, name = softmax.inputs[0], f"{softmax.name}.normal"
    number = graph.constant(f"{name}.floor", np.asarray(plan.fill, np.float32))
    graph.add_node("Clip", name, [x, number], [graph.like(x, name)])
    graph.replace_input(softmax, 0, graph.made(name))


def _floor_rows(graph: Graph, softmax: Node, plan: Masking) -> None:
    x, name = softmax.inputs[0], f"{softmax.name}.normal"
    graph.add_node("Max", name, [x, _least(graph, x, plan.fill, name)], [graph.like(x, name)])
    graph.replace_input(softmax, 0, graph.made(name))
