"""DynamicQuantizeLinear, MatMulInteger, Cast, Mul (, Add)  =>  DynamicQuantizeMatMul."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import CONTRIB, Graph, Node, Tensor, is_constant
from onnxq.passes.manager import Context, Pass
from onnxq.plan import TENSOR


@dataclass(frozen=True)
class LowerDynamicMatMul(Pass):
    """One kernel that quantizes the activation and multiplies: x float32 [.., K], Wq int8 [K, N] -> float32 [.., N].

    Source: com.microsoft DynamicQuantizeMatMul-1.
    """

    name: ClassVar[str] = "lower-dynamic-matmul"

    def run(self, graph: Graph, context: Context) -> bool:
        """The quantizing nodes that nobody reads any more go at the end."""
        return super().run(graph, context) and (graph.prune() or True)

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Lower one MatMulInteger that the Plan made."""
        verdict = context.plan.node(node.name)
        if verdict is None or verdict.activation != TENSOR or node.op != "MatMulInteger":
            return False
        quantize = graph.producer(node.inputs[0])
        cast = graph.only_consumer(node.outputs[0])
        scale = graph.only_consumer(cast.outputs[0]) if cast is not None else None
        if quantize is None or quantize.op != "DynamicQuantizeLinear" or scale is None or scale.op != "Mul":
            return context.skip(node, "the operators around it are not those that onnxq wrote")
        factor = graph.producer(scale.inputs[1])
        assert cast is not None
        assert factor is not None
        result, bias, gone = scale.outputs[0], None, [scale, cast]
        add = graph.only_consumer(result)
        if add is not None and add.name in (verdict.bias_add, f"{node.name}/bias"):
            added = next(t for t in add.inputs if is_constant(t))
            bias = graph.constant(f"{node.name}.bias", np.asarray(graph.read(added), np.float32).reshape(-1))
            result, gone = add.outputs[0], [add, *gone]
        x, weight, w_scale = quantize.inputs[0], node.inputs[1], factor.inputs[1]
        zero_point: Tensor = graph.made(f"{verdict.weight}.zero_point")
        for old in [*gone, node]:
            graph.remove(old)
        graph.add_node("DynamicQuantizeMatMul", verdict.node, [x, weight, w_scale, zero_point, bias], [result], {},
                       CONTRIB)
        return True
