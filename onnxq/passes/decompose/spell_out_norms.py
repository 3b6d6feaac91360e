"""LayerNormalization and its relatives in small operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Node, Tensor, shape_of
from onnxq.passes.decompose.parts import Decomposition, Parts, is_float32
from onnxq.passes.manager import Context

_SKIP = "com.microsoft.Skip"
_EPSILON = {True: 1e-12, False: 1e-5}  # where the attribute is omitted: of the forms with a skip, of the others


@dataclass(frozen=True)
class SpellOutNorms(Decomposition):
    """(x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + epsilon) * scale + B in small operators; RMSNormalization without
    the mean; the forms with a skip of x + skip (+ bias), which is also their fourth output.

    x float32 [..], means over the axes from `axis` on, which the shapes of scale and B end in. It is the form that
    onnxruntime fuses again where it has a kernel. Source: ONNX LayerNormalization-17 and RMSNormalization-23 (their
    function bodies), com.microsoft SkipLayerNormalization-1.
    """

    name: ClassVar[str] = "spell-out-norms"
    known: ClassVar[tuple[str, ...]] = (
        "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", f"{_SKIP}LayerNormalization",
        f"{_SKIP}SimplifiedLayerNormalization")

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Replace one normalisation."""
        skips = node.op.startswith("Skip")
        axes = _axes(node, skips)
        if axes is None or not is_float32(node):
            return context.skip(node, "what it normalises is not known to be float32, or its rank is not")
        total = node.outputs[3] if len(node.outputs) > 3 and node.outputs[3].name else None
        if any(t.name and (graph.is_output(t) or graph.consumers(t)) for t in node.outputs[1:3]):
            return context.skip(node, "its mean or deviation is read, too")
        centred = node.op in ("LayerNormalization", "SkipLayerNormalization")
        parts, x = Parts(graph, node), node.inputs[0]
        scale, shift, bias = _constants(graph, node, skips, centred)
        epsilon = parts.number("epsilon", float(node.attrs.get("epsilon", _EPSILON[skips])))
        if skips:
            x = self._sum(parts, x, node.inputs[1], bias, total)
        if centred:
            x = parts.make("Sub", "centred", [x, parts.mean("mean", x, axes)], x)
        variance = parts.mean("variance", parts.make("Pow", "squared", [x, parts.number("two", 2.0)], x), axes)
        safe = parts.make("Add", "safe", [variance, epsilon], variance)
        x = parts.make("Div", "normal", [x, parts.make("Sqrt", "deviation", [safe], safe)], x)
        if shift is None:
            parts.finish("Mul", [x, scale])
        else:
            parts.finish("Add", [parts.make("Mul", "scaled", [x, scale], x), shift])
        return True

    @staticmethod
    def _sum(parts: Parts, x: Tensor, skip: Tensor, bias: Tensor | None, total: Tensor | None) -> Tensor:
        """x + skip (+ bias), which is `total` where the node makes that, too."""
        if bias is not None:
            x = parts.make("Add", "biased", [x, bias], x)
        if total is None:
            return parts.make("Add", "sum", [x, skip], x)
        parts.graph.set_output(parts.node, 3, parts.graph.like(total, f"{parts.result.name}.unread"))
        parts.graph.add_node("Add", f"{parts.node.name}/sum", [x, skip], [total])
        return total


def _constants(graph: Graph, node: Node, skips: bool, centred: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(scale, what is added behind it, what is added to x)."""
    first = 2 if skips else 1
    shift = graph.optional_input(node, first + 1) if centred else None
    bias = graph.optional_input(node, first + 1 + centred) if skips else None
    return node.inputs[first], shift, bias


def _axes(node: Node, skips: bool) -> list[int] | None:
    """What a normalisation goes over, counted from the last axis, -1; None where the rank has to be known and isn't."""
    axis, dims = -1 if skips else int(node.attrs.get("axis", -1)), shape_of(node.inputs[0])
    if axis >= 0 and dims is None:
        return None
    return list(range(axis if axis < 0 else axis - len(dims or ()), 0))
