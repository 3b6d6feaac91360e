"""bias -> DequantizeLinear(int32)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, Tensor
from onnxq.numerics import affine
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class QuantizeBiases(Pass):
    """b -> DequantizeLinear(round(b / (x_scale * w_scale)), x_scale * w_scale), float32 [N] and int32 [N].

    Also the constant of an Add behind a MatMul: with a float bias the runtime makes a Gemm of the two and then
    dequantizes the weights at every run. A bias that would leave no room in int32 for the sum of products stays float
    there (for Conv and Gemm the Plan's weight scales rule it out); on targets with float biases all do. Rounds half to
    even. Source: ONNX QLinearConv-10 (bias scale), onnxruntime's QDQ selectors.
    """

    name: ClassVar[str] = "quantize-biases"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Quantize the bias of one node with int8 weights."""
        verdict = context.plan.node(node.name)
        if context.target is not None and context.target.float_bias:
            return False
        if verdict is None or verdict.weight is None or node.inputs[0].name not in context.plan.activations:
            return False
        owner, index = _bias_of(graph, node, verdict.bias_add)
        if owner is None or graph.producer(owner.inputs[index]) is not None:
            return False
        bias = owner.inputs[index]
        values = np.asarray(graph.read(bias), np.float32)
        x_scale = context.plan.activations[node.inputs[0].name].scale
        scale = np.asarray(x_scale * context.plan.weights[verdict.weight].scale, np.float32)
        codes = np.rint(values.astype(np.float64) / np.maximum(scale, affine.SMALLEST_SCALE))
        if np.abs(codes).max(initial=0) > affine.BIAS_LIMIT or (scale < affine.SMALLEST_SCALE).any():
            return context.skip(node, "its bias does not fit into int32 at this scale and stays float")
        inputs = [graph.constant(f"{node.name}.bias.q", codes.astype(np.int32)),
                  graph.constant(f"{node.name}.bias.scale", scale)]
        attrs = {}
        if scale.ndim:
            attrs["axis"] = values.ndim - 1
        result = graph.variable(f"{node.name}.bias.dq", "float32", values.shape)
        graph.add_node("DequantizeLinear", f"{node.name}/dequantize_bias", inputs, [result], attrs)
        graph.replace_input(owner, index, result)
        return True


def _bias_of(graph: Graph, node: Node, bias_add: str | None) -> tuple[Node | None, int]:
    """The node and input position where the bias is read."""
    if bias_add is not None:
        add = next(n for n in graph.consumers(node.outputs[0]) if n.name == bias_add)
        other: list[Tensor] = list(add.inputs)
        return add, 1 if other[0] is node.outputs[0] else 0
    if node.op in ("Conv", "Gemm") and graph.optional_input(node, 2) is not None:
        return node, 2
    return None, 0
