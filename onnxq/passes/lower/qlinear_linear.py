"""DQ -> MatMul or Gemm  =>  MatMulIntegerToFloat, QLinearMatMul, QGemm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import CONTRIB, Graph, Node, Tensor, is_constant
from onnxq.passes import pattern
from onnxq.passes.manager import Context, Pass
from onnxq.passes.pattern import Codes, Stored
from onnxq.plan import STATIC


@dataclass(frozen=True)
class LowerLinear(Pass):
    """Linear layers with the codes before (and, for integer results, behind) them.

    MatMulIntegerToFloat(xq [.., K], Wq [K, N], scales, zero points, bias float32 [N]) -> float32 [.., N];
    QLinearMatMul -> uint8 [.., N]; QGemm (bias int32 [N]) -> either. Source: ONNX QLinearMatMul-10, com.microsoft
    MatMulIntegerToFloat-1 and QGemm-1.
    """

    name: ClassVar[str] = "lower-linear"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Lower one MatMul or Gemm."""
        verdict = context.plan.node(node.name)
        if verdict is None or node.op not in ("MatMul", "Gemm") or verdict.activation != STATIC:
            return False
        if verdict.lowering not in ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm"):
            return False
        x, w = pattern.read(graph, node.inputs[0]), pattern.read(graph, node.inputs[1])
        columns = 0 if node.attrs.get("transB", 0) else -1
        if x is None or w is None or not pattern.activation(x) or not pattern.weight(w, columns):
            return context.skip(node, "its input or weight is not behind a DequantizeLinear the kernel can take")
        if verdict.lowering == "MatMulIntegerToFloat":
            return self._to_float(node, graph, x, w, verdict.bias_add)
        found = pattern.stored(graph, node.outputs[0], context.absorbed) if verdict.int_output else None
        if verdict.int_output and (found is None or not pattern.activation(found.codes)):
            return context.skip(node, "its result is not quantized to uint8 right behind it")
        if verdict.lowering == "QLinearMatMul":
            assert found is not None
            behind = [found.codes.scale, found.codes.zero_point]
            pattern.finish(graph, node, found, "QLinearMatMul", [*x.inputs, *w.inputs, *behind], {}, None)
            return True
        return self._gemm(node, graph, context, x, w, found)

    @staticmethod
    def _gemm(node: Node, graph: Graph, context: Context, x: Codes, w: Codes, found: Stored | None) -> bool:
        attrs = dict(node.attrs)
        if attrs.pop("alpha", 1.0) != 1.0 or attrs.pop("beta", 1.0) != 1.0:
            return context.skip(node, "it scales its product or its bias")
        given = graph.optional_input(node, 2)
        bias = pattern.bias(graph, given, x, w) if given is not None else None
        if given is not None and bias is None:
            return context.skip(node, "its bias is not int32 of the products' scale")
        behind: list[Tensor | None] = [found.codes.scale, found.codes.zero_point] if found is not None else []
        pattern.finish(graph, node, found, "QGemm", [*x.inputs, *w.inputs, bias, *behind], attrs, CONTRIB)
        return True

    def _to_float(self, node: Node, graph: Graph, x: Codes, w: Codes, bias_add: str | None) -> bool:
        bias = None
        if bias_add is not None:
            add = graph.only_consumer(node.outputs[0])
            assert add is not None
            assert add.name == bias_add
            added = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
            bias = self._float_bias(graph, node, added)
            result = add.outputs[0]
            graph.remove(add)
            graph.set_output(node, 0, result)
        pattern.finish(graph, node, None, "MatMulIntegerToFloat",
                       [x.q, w.q, x.scale, w.scale, x.zero_point, w.zero_point, bias], {}, CONTRIB)
        return True

    @staticmethod
    def _float_bias(graph: Graph, node: Node, added: Tensor) -> Tensor:
        """The bias as a float32 [N] constant, decoded when the QDQ form holds it as int32."""
        if is_constant(added):
            return graph.constant(f"{node.name}.bias", np.asarray(graph.read(added), np.float32).reshape(-1))
        dequantize = graph.producer(added)
        assert dequantize is not None
        codes, scale = (np.asarray(graph.read(t), np.float32) for t in dequantize.inputs[:2])
        return graph.constant(f"{node.name}.bias", (codes * scale).reshape(-1))
