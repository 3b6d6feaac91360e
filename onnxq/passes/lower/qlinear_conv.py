"""DQ -> Conv -> (Relu, Clip) -> Q  =>  QLinearConv."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Node, Tensor
from onnxq.passes import pattern
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class LowerConv(Pass):
    """QLinearConv(xq, Wq, bias int32) with the codes around the Conv; an absorbed Relu or Clip is the saturation.

    Source: ONNX QLinearConv-10.
    """

    name: ClassVar[str] = "lower-conv"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Lower one Conv."""
        verdict = context.plan.node(node.name)
        if verdict is None or verdict.lowering != "QLinearConv" or node.op != "Conv":
            return False
        x, w = pattern.read(graph, node.inputs[0]), pattern.read(graph, node.inputs[1])
        found = pattern.stored(graph, node.outputs[0], context.absorbed)
        if x is None or w is None or not pattern.activation(x) or not pattern.weight(w, axis=0):
            return context.skip(node, "its input or weight is not behind a DequantizeLinear the kernel can take")
        if found is None or not pattern.activation(found.codes):
            return context.skip(node, "its result is not quantized to uint8 right behind it")
        bias: list[Tensor | None] = []
        given = graph.optional_input(node, 2)
        if given is not None:
            codes = pattern.bias(graph, given, x, w)
            if codes is None:
                return context.skip(node, "its bias is not int32 of the products' scale")
            bias = [codes]
        pattern.finish(graph, node, found, "QLinearConv",
                       [*x.inputs, *w.inputs, found.codes.scale, found.codes.zero_point, *bias], dict(node.attrs), None)
        return True
