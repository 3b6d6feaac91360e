"""An int8 MatMul kept apart from what would keep the runtime from fusing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Node, shape_of
from onnxq.passes.manager import Context, Pass
from onnxq.passes.pattern import DEQUANTIZE
from onnxq.plan import UNTOUCHED


@dataclass(frozen=True)
class SeparateLinear(Pass):
    """For the QDQ form: DQ -> MatMul or Gemm => DQ -> MatMul or Gemm -> Sum where its float result is an output and
    read besides, or is read by a Relu or Clip in front of another node; and MatMul -> Add => MatMul -> Sum where what
    is added is no int32 bias, and no bias [N] of a layer whose weights alone are codes.

    The runtime fuses neither a node whose result is read inside and outside of the graph, nor one in front of a Relu or
    Clip that is not quantized, nor a Gemm of a float bias, which it makes of MatMul and Add, of matrices; these
    dequantize the weights at every run. A Sum of one tensor is the
    identity, that of two is their Add (ONNX Sum-13), and no rewrite of the runtime matches it.
    """

    name: ClassVar[str] = "separate-linear"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Separate one node."""
        verdict = context.plan.node(node.name)
        if verdict is None or not verdict.is_int or verdict.int_output or node.op not in ("Gemm", "MatMul"):
            return False
        if context.target is not None and node.op not in context.target.pairs_with_q:
            return False  # its runtime fuses otherwise
        result = node.outputs[0]
        readers = graph.consumers(result)
        if (graph.is_output(result) and readers) or _is_clamped(graph, node):
            return _fence(graph, node)
        if node.op != "MatMul" or len(readers) != 1 or readers[0].op != "Add" or readers[0].domain:
            return False
        added = next((t for t in readers[0].inputs if t is not result), result)
        maker, blocks = graph.producer(added), verdict.activation == UNTOUCHED
        fused = len(shape_of(added) or ()) == 1 if blocks else maker is not None and maker.op == DEQUANTIZE
        if verdict.bias_add is not None and fused:
            as_gemm = len(shape_of(node.inputs[0]) or (0, 0)) == 2
            return as_gemm and _is_clamped(graph, readers[0]) and _fence(graph, readers[0])
        readers[0].op = "Sum"
        return True


def _is_clamped(graph: Graph, node: Node) -> bool:
    clamp = graph.only_consumer(node.outputs[0])
    return clamp is not None and clamp.op in ("Clip", "Relu") and not clamp.domain and bool(
        graph.consumers(clamp.outputs[0]))


def _fence(graph: Graph, node: Node) -> bool:
    """A Sum of one tensor behind a node; True."""
    result = node.outputs[0]
    before = graph.like(result, f"{result.name}.unfenced", "float32")
    graph.set_output(node, 0, before)
    graph.add_node("Sum", f"{node.name}/fence", [before], [result])
    return True
