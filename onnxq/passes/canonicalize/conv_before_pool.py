"""AveragePool -> Conv 1x1  =>  Conv 1x1 -> AveragePool, where that leaves the pool fewer channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Node, is_constant, shape_of
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class ConvBeforePool(Pass):
    """Conv(AveragePool(x), W, b) -> AveragePool(Conv(x, W, b)) with W [M, C, 1, 1], M < C, and a pool of stride 1.

    Both are linear and the one works along channels, the other along positions, so they commute; the mean of b is b
    where padding is not counted. The pool then computes M channels instead of C (Inception: 32 of 192, 128 of 576). A
    pool of a greater stride stays in front, where it spares the Conv work.
    Source: ONNX AveragePool-7 to -22 (count_include_pad 0), Conv-1 to -22.
    """

    name: ClassVar[str] = "conv-before-pool"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Swap one AveragePool and the Conv behind it."""
        if node.op != "AveragePool" or node.domain:
            return False
        conv = graph.only_consumer(node.outputs[0])
        if conv is None or conv.op != "Conv" or conv.domain or conv.inputs[0] is not node.outputs[0]:
            return False
        dims = shape_of(conv.inputs[1]) or ()
        if not is_constant(conv.inputs[1]) or any(d != 1 for d in dims[2:]) or conv.attrs.get("group", 1) != 1:
            return context.skip(node, f"{conv.name} is no Conv of 1x1 whose weights are stored")
        moves = [*conv.attrs.get("strides", ()), *(p + 1 for p in conv.attrs.get("pads", ()))]
        if any(m != 1 for m in moves) or conv.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return context.skip(node, f"{conv.name} has strides or pads")
        if any(s != 1 for s in node.attrs.get("strides", ())):
            return context.skip(node, f"its stride spares {conv.name} work")
        if not int(dims[0] or 0) < int(dims[1] or 0):
            return context.skip(node, f"{conv.name} makes more channels than it reads")
        padded = any(node.attrs.get("pads", ())) or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        if padded and node.attrs.get("count_include_pad", 0) and graph.optional_input(conv, 2) is not None:
            return context.skip(node, f"it counts padding, to which {conv.name} adds no bias")
        self._swap(node, conv, graph)
        return True

    @staticmethod
    def _swap(pool: Node, conv: Node, graph: Graph) -> None:
        source, between, result = pool.inputs[0], pool.outputs[0], conv.outputs[0]
        dims, pooled = shape_of(source), shape_of(result)
        graph.replace_input(conv, 0, source)
        made = graph.variable(f"{between.name}.{conv.name}", "float32", None if dims is None or pooled is None else [
            dims[0], pooled[1], *dims[2:]])
        graph.set_output(conv, 0, made)
        graph.replace_input(pool, 0, made)
        graph.set_output(pool, 0, result)
