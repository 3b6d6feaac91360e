"""MatMul and Gemm: DQ(Wq, a scale per column) => DQ(Wq, one scale); biases float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, shape_of
from onnxq.numerics import affine
from onnxq.numerics.dtypes import INT8
from onnxq.passes import pattern
from onnxq.passes.manager import Context, Pass
from onnxq.passes.pattern import DEQUANTIZE


@dataclass(frozen=True)
class OneScale(Pass):
    """op(x, DQ(Wq [K, N], scale [N]))  =>  op(x, DQ(Wq' [K, N], scale')), and DQ(bias int32) => bias float32.

    AMCT converts pairs of Q and DQ of a Conv with a scale per channel, of MatMul and Gemm with one alone, and of
    activations and weights alone. Wq' is what Wq stands for, rounded once more (half to even): off by half a step of
    either. Source: CANN's amct_onnx.convert_qat_model.
    """

    name: ClassVar[str] = "one-scale"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Rewrite the weight of one layer, or a bias."""
        if node.op == DEQUANTIZE and str(node.inputs[0].dtype) == "int32":
            return self._float_bias(node, graph)
        if node.op not in ("Gemm", "MatMul") or node.domain:
            return False
        w = pattern.read(graph, node.inputs[1])
        if w is None or not pattern.weight(w, -1) or not shape_of(w.scale):
            return False
        name = f"{w.q.name}.amct"
        if not graph.has(name):
            values = np.asarray(graph.read(w.q), np.float32) * np.asarray(graph.read(w.scale), np.float32)
            params = affine.weight_params(values, None, INT8)
            codes = graph.constant(name, affine.quantize(values, params))
            scale = graph.constant(f"{name}.scale", params.scale)
            zero = graph.constant(f"{name}.zero_point", params.zero_point)
            result = graph.variable(f"{name}.dq", "float32", values.shape)
            graph.add_node(DEQUANTIZE, f"{name}/dequantize", [codes, scale, zero], [result])
        graph.replace_input(node, 1, graph.made(f"{name}.dq"))
        graph.prune()
        return True

    @staticmethod
    def _float_bias(node: Node, graph: Graph) -> bool:
        codes, scale = (np.asarray(graph.read(t), np.float64) for t in node.inputs[:2])
        value = graph.constant(f"{node.outputs[0].name}.float", (codes * scale).astype(np.float32))
        graph.redirect(node.outputs[0], value)
        graph.remove(node)
        return True
