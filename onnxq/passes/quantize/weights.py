"""W -> DequantizeLinear(Wq, scale, zero_point)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy.typing as npt

from onnxq.graph import Graph, Node, Tensor, shape_of
from onnxq.numerics import affine, two_level
from onnxq.passes.manager import Context, Pass
from onnxq.plan import UNTOUCHED, Plan


def store_weight(graph: Graph, weight: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero_point) as constants `w.q`, `w.scale`, `w.zero_point`; made once for a shared weight.

    The codes are those of the Plan, where it has some, else the nearest.
    """
    codes, params = f"{weight.name}.q", plan.weights[weight.name]
    if not graph.has(codes):
        graph.constant(codes, _codes(graph, weight, plan))
        graph.constant(f"{weight.name}.scale", params.scale)
        graph.constant(f"{weight.name}.zero_point", params.zero_point)
    return graph.made(codes), graph.made(f"{weight.name}.scale"), graph.made(f"{weight.name}.zero_point")


def _codes(graph: Graph, weight: Tensor, plan: Plan) -> npt.NDArray[Any]:
    two = plan.two_level(weight.name)
    if weight.name in plan.rounded:
        return plan.rounded[weight.name]
    values = graph.read(weight)
    return affine.quantize(values, plan.weights[weight.name]) if two is None else two_level.nearest(values, two)


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """op(x, W) -> op(x, DequantizeLinear(Wq, scale, zero_point, axis)).

    W is float32 [M, C, ...] (Conv, axis 0) or [K, N] (MatMul and Gemm, axis 1); Wq is int8 of the same shape, scale
    float32 and zero_point int8 are [M] or [N]. A weight that several nodes share is quantized once.
    Source: ONNX DequantizeLinear-13.
    """

    name: ClassVar[str] = "quantize-weights"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Quantize one node's weight."""
        verdict = context.plan.node(node.name)
        if verdict is None or verdict.weight is None or verdict.activation == UNTOUCHED:
            return False
        if node.inputs[1].name != verdict.weight:
            return False
        weight, params = node.inputs[1], context.plan.weights[verdict.weight]
        name = f"{weight.name}.dq"
        if not graph.has(name):
            codes, scale, zero_point = store_weight(graph, weight, context.plan)
            result = graph.variable(name, "float32", shape_of(weight))
            attrs = {"axis": params.axis} if params.axis is not None else {}
            graph.add_node("DequantizeLinear", f"{weight.name}/dequantize", [codes, scale, zero_point], [result], attrs)
        graph.replace_input(node, 1, graph.made(name))
        return True
