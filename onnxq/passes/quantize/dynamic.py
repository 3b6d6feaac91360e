"""MatMul(x, W) -> DynamicQuantizeLinear, MatMulInteger, Cast, Mul."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Node, Tensor
from onnxq.passes.manager import Context, Pass
from onnxq.passes.quantize.weights import store_weight
from onnxq.plan import TENSOR


@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """MatMul(x, W) -> Cast(MatMulInteger(xq, Wq, x_zero_point)) * (x_scale * w_scale), for dynamic schemes.

    x is float32 [..., K]; xq uint8, x_scale and x_zero_point scalars computed at run time from the whole tensor; Wq is
    int8 [K, N], w_scale float32 [N]; products accumulate in int32. A Gemm's bias becomes an Add of its own.
    Source: ONNX DynamicQuantizeLinear-11, MatMulInteger-10.
    """

    name: ClassVar[str] = "quantize-dynamic"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Rewrite one linear node."""
        verdict = context.plan.node(node.name)
        if verdict is None or verdict.activation != TENSOR or node.op not in ("MatMul", "Gemm"):
            return False
        assert verdict.weight is not None
        x, result = node.inputs[0], node.outputs[0]
        codes, scale, zero_point = self._quantized(graph, x)
        w_codes, w_scale, _ = store_weight(graph, node.inputs[1], context.plan)
        name = node.name
        bias = graph.optional_input(node, 2)  # of a Gemm; a MatMul has two inputs
        graph.remove(node)
        sums = graph.like(result, f"{name}.sums", "int32")
        graph.add_node("MatMulInteger", name, [codes, w_codes, zero_point], [sums])
        floats = graph.like(result, f"{name}.floats", "float32")
        graph.add_node("Cast", f"{name}/cast", [sums], [floats], {"to": 1})
        factor = graph.variable(f"{name}.factor", "float32")
        graph.add_node("Mul", f"{name}/factor", [scale, w_scale], [factor])
        scaled = graph.like(result, f"{name}.scaled", "float32") if bias is not None else result
        graph.add_node("Mul", f"{name}/scale", [floats, factor], [scaled])
        if bias is not None:
            graph.add_node("Add", f"{name}/bias", [scaled, bias], [result])
        return True

    @staticmethod
    def _quantized(graph: Graph, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        names = [f"{x.name}.{part}" for part in ("q", "scale", "zero_point")]
        if not graph.has(names[0]):
            codes = graph.like(x, names[0], "uint8")
            scale = graph.variable(names[1], "float32", ())
            zero_point = graph.variable(names[2], "uint8", ())
            graph.add_node("DynamicQuantizeLinear", f"{x.name}/quantize", [x], [codes, scale, zero_point])
        return graph.made(names[0]), graph.made(names[1]), graph.made(names[2])
