"""DQ -> Conv, MatMul or Gemm  =>  AscendQuant -> Conv, MatMul or Gemm of int8 -> AscendDequant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant
from onnxq.passes import pattern
from onnxq.passes.manager import Context, Pass
from onnxq.passes.pattern import QUANTIZE, Codes

QUANT, DEQUANT = "AscendQuant", "AscendDequant"
LAYERS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class AscendOperators(Pass):
    """op(DQ(Q(x)), DQ(Wq), DQ(bias int32))  =>  AscendDequant(op(AscendQuant(x), Wq, bias int32), scales).

    AscendQuant(x){scale = 1 / x_scale, offset 0} is int8, one for all readers of x; the layer's result is int32, as is
    its bias [N], which a MatMul gets from an Add; scales uint64 [1] or [N] hold in their lower 32 bits the bits of
    float32 x_scale * w_scale. Zero points are 0: what others would add to the products is not added on the device.
    Source: CANN's operators AscendQuant and AscendDequant, and what msModelSlim's ONNX export writes of them.
    """

    name: ClassVar[str] = "ascend-operators"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Rewrite one layer."""
        if node.op not in LAYERS or node.domain:
            return False
        x, w = pattern.read(graph, node.inputs[0]), pattern.read(graph, node.inputs[1])
        if x is None or w is None:
            return False
        why = self._misfit(graph, node, x, w)
        if why is not None:
            return context.skip(node, why)
        given = graph.optional_input(node, 2)
        if given is not None:
            bias = pattern.bias(graph, given, x, w)
            assert bias is not None
            graph.replace_input(node, 2, bias)
        graph.replace_input(node, 0, self._quantized(graph, x))
        graph.replace_input(node, 1, w.q)
        self._dequantize(graph, node, x, w)
        graph.prune()
        return True

    @staticmethod
    def _misfit(graph: Graph, node: Node, x: Codes, w: Codes) -> str | None:
        maker = graph.producer(x.q)
        if maker is None or maker.op != QUANTIZE or not pattern.per_tensor(x):
            return "what it reads is not quantized at one stored scale"
        if not all(dtype_of(c.zero_point) == np.int8 and not graph.read(c.zero_point).any() for c in (x, w)):
            return "its codes are not int8 around 0"
        if any(node.attrs.get(name, 1.0) != 1.0 for name in ("alpha", "beta")) or node.attrs.get("transB", 0):
            return "it scales its product, or reads its weights transposed"
        if not pattern.weight(w, 0 if node.op == "Conv" else -1) or not is_constant(w.q):
            return "its weights are not stored with a scale for each output"
        given = graph.optional_input(node, 2)
        if given is not None and pattern.bias(graph, given, x, w) is None:
            return "its bias is not int32 of the products' scale"
        return None

    @staticmethod
    def _quantized(graph: Graph, x: Codes) -> Tensor:
        """The int8 codes, made by AscendQuant in the place of QuantizeLinear."""
        maker = graph.producer(x.q)
        assert maker is not None
        name = f"{x.q.name}.ascend"
        if not graph.has(name):
            scale = np.float32(1) / np.asarray(graph.read(x.scale), np.float32)
            attrs = {"scale": float(scale), "offset": 0.0, "round_mode": "Round", "sqrt_mode": 0, "dst_type": "INT8"}
            graph.add_node(QUANT, f"{maker.name}/ascend", [maker.inputs[0]], [graph.like(x.q, name, "int8")], attrs)
        return graph.made(name)

    @staticmethod
    def _dequantize(graph: Graph, node: Node, x: Codes, w: Codes) -> None:
        """The result [.., N] from int32 sums, a bias that a MatMul's Add holds among them."""
        last = node
        add = graph.only_consumer(node.outputs[0]) if node.op == "MatMul" else None
        if add is not None and add.op == "Add" and not add.domain:
            index = 1 if add.inputs[0] is node.outputs[0] else 0
            bias = pattern.bias(graph, add.inputs[index], x, w)
            if bias is not None:
                for k, tensor in enumerate((node.outputs[0], bias)):
                    graph.replace_input(add, k, tensor)
                node.outputs[0].dtype = np.dtype(np.int32)
                last = add
        result = last.outputs[0]
        sums = graph.like(result, f"{result.name}.sums", "int32")
        graph.set_output(last, 0, sums)
        scale = np.atleast_1d(np.asarray(graph.read(x.scale), np.float32) * np.asarray(graph.read(w.scale), np.float32))
        stored = graph.constant(f"{node.name}.deq_scale", scale.astype(np.float32).view(np.uint32).astype(np.uint64))
        graph.add_node(DEQUANT, f"{node.name}/ascend_dequant", [sums, stored], [result],
                       {"sqrt_mode": 0, "relu_flag": 0})
