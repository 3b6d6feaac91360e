"""AscendQuant and AscendDequant in operators of ONNX: what the device computes, where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, Tensor, dtype_of, shape_of
from onnxq.passes.ascend.ascend_operators import DEQUANT, QUANT
from onnxq.passes.manager import Context, Pass

_INTEGER = {"Conv": "ConvInteger", "Gemm": "MatMulInteger", "MatMul": "MatMulInteger"}


@dataclass(frozen=True)
class StandardOperators(Pass):
    """AscendQuant => Cast(Clip(Round(x * scale))) int8; Conv, MatMul and Gemm of int8 => ConvInteger and MatMulInteger
    with an Add of the bias int32; AscendDequant => Cast(sums) * the float32 that its uint64 holds.

    Written from the operators' contracts alone, and from nothing that made them: it is what a deploy graph is checked
    by. Rounds half to even. Source: CANN's AscendQuant and AscendDequant; ONNX ConvInteger-10, MatMulInteger-10.
    """

    name: ClassVar[str] = "standard-operators"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Rewrite one node."""
        if node.domain:
            return False
        if node.op == QUANT:
            return self._quantize(node, graph)
        if node.op == DEQUANT:
            return self._dequantize(node, graph)
        if node.op in _INTEGER and dtype_of(node.inputs[1]) == np.int8:
            return self._layer(node, graph)
        return False

    @staticmethod
    def _quantize(node: Node, graph: Graph) -> bool:
        x, codes = node.inputs[0], node.outputs[0]
        stored = {"scale": node.attrs["scale"], "offset": node.attrs["offset"], "low": -128.0, "high": 127.0}
        parts = {what: graph.constant(f"{codes.name}.{what}", np.asarray(value, np.float32))
                 for what, value in stored.items()}
        made = {what: graph.like(x, f"{codes.name}.{what}", "float32")
                for what in ("scaled", "shifted", "whole", "cut")}
        graph.remove(node)
        graph.add_node("Mul", f"{node.name}/scale", [x, parts["scale"]], [made["scaled"]])
        graph.add_node("Add", f"{node.name}/shift", [made["scaled"], parts["offset"]], [made["shifted"]])
        graph.add_node("Round", f"{node.name}/round", [made["shifted"]], [made["whole"]])
        graph.add_node("Clip", f"{node.name}/clip", [made["whole"], parts["low"], parts["high"]], [made["cut"]])
        codes.dtype = np.dtype(np.int8)
        graph.add_cast(f"{node.name}/cast", made["cut"], codes)
        return True

    @staticmethod
    def _dequantize(node: Node, graph: Graph) -> bool:
        sums, result = node.inputs[0], node.outputs[0]
        bits = np.asarray(graph.read(node.inputs[1]), np.uint64).astype(np.uint32)
        scale = bits.view(np.float32)
        conv = _conv_of(graph, sums)
        if conv is not None:
            scale = scale.reshape(_by_channel(conv.inputs[1]))
        factor = graph.constant(f"{result.name}.factor", scale)
        floats = graph.like(result, f"{result.name}.floats", "float32")
        graph.remove(node)
        graph.add_cast(f"{node.name}/cast", sums, floats)
        graph.add_node("Mul", f"{node.name}/scale", [floats, factor], [result])
        return True

    @staticmethod
    def _layer(node: Node, graph: Graph) -> bool:
        bias, result = graph.optional_input(node, 2), node.outputs[0]
        attrs = dict(node.attrs) if node.op == "Conv" else {}
        op, inputs = _INTEGER[node.op], list(node.inputs[:2])
        shape = _by_channel(inputs[1]) if op == "ConvInteger" else (-1,)
        graph.remove(node)
        product: Tensor = result if bias is None else graph.like(result, f"{result.name}.product", "int32")
        graph.add_node(op, f"{node.name}/{op.lower()}", inputs, [product], attrs)
        if bias is not None:
            values = np.asarray(graph.read(bias), np.int32).reshape(shape)
            added = graph.constant(f"{result.name}.bias_codes", values)
            graph.add_node("Add", f"{node.name}/bias_of_{op.lower()}", [product, added], [result])
        return True


def _by_channel(weight: Tensor) -> tuple[int, ...]:
    """The shape of numbers for each output channel of a Conv, [M, 1, ..], beside its weight [M, C, ..]."""
    return (-1, *([1] * (len(shape_of(weight) or ()) - 2)))


def _conv_of(graph: Graph, sums: Tensor) -> Node | None:
    """The Conv that makes sums [N, M, ..], with its bias or without, if one does."""
    maker = graph.producer(sums)
    makers = [maker, *(graph.producer(t) for t in maker.inputs)] if maker is not None and maker.op == "Add" else [maker]
    return next((m for m in makers if m is not None and m.op in ("Conv", "ConvInteger")), None)
