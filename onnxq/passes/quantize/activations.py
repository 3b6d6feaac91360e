"""x -> DequantizeLinear(QuantizeLinear(x)) where the Plan stores x as codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Node, Tensor, is_constant, shape_of
from onnxq.numerics import affine
from onnxq.passes.manager import Context, Pass
from onnxq.plan import NodePlan


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Insert Q/DQ pairs with rank-0 float32 scales and explicit zero points of the code type.

    The result y of an int8 node becomes `y.raw` -> Q -> `y.q` -> DQ -> `y`, so all its readers and the graph output of
    that name see the dequantized value. An absorbed Relu or Clip goes: Q saturates where it would clamp, and a Clip
    whose bounds are not exactly codes would keep the runtime from fusing. A float tensor x that an int8 node reads
    becomes `x.q` and `x.dq`, once, and float readers keep x; a constant k that one reads is stored as `k.u8` and
    decoded as `k.u8.dq`. Source: ONNX QuantizeLinear-13, DequantizeLinear-13.
    """

    name: ClassVar[str] = "quantize-activations"

    def run(self, graph: Graph, context: Context) -> bool:
        """Results first: what they store as codes needs no second pair at its readers."""
        nodes = {n.name: n for n in graph.nodes}
        verdicts = [v for v in context.plan.quantized() if v.node in nodes]
        tensors = {t.name: t for n in nodes.values() for t in n.outputs}
        changed = False
        for verdict in verdicts:
            for name in (verdict.result, *verdict.more_results) if verdict.int_output else ():
                if name in tensors:
                    changed |= self._store_result(graph, tensors[name], context)
        for verdict in verdicts:
            changed |= self._read_codes(graph, nodes[verdict.node], verdict, context)
        return changed

    def _store_result(self, graph: Graph, result: Tensor, context: Context) -> bool:
        if graph.has(f"{result.name}.q"):
            return False
        maker = graph.producer(result)
        assert maker is not None
        index = next(i for i, t in enumerate(maker.outputs) if t is result)
        if maker.op in ("Clip", "Relu") and maker.name in context.absorbed:
            clamp, maker = maker, graph.producer(maker.inputs[0])
            assert maker is not None
            graph.remove(clamp)
        raw = graph.like(result, f"{result.name}.raw", "float32")
        graph.set_output(maker, index, raw)
        _pair(graph, raw, result, result.name, context)
        return True

    def _read_codes(self, graph: Graph, node: Node, verdict: NodePlan, context: Context) -> bool:
        changed = False
        for index in verdict.int_inputs:
            tensor = node.inputs[index]
            maker = graph.producer(tensor)
            if (maker is not None and maker.op == "DequantizeLinear") or tensor.name not in context.plan.activations:
                continue
            if is_constant(tensor):
                decoded = _stored_constant(graph, tensor, context)
            else:
                if not graph.has(f"{tensor.name}.q"):
                    _pair(graph, tensor, graph.like(tensor, f"{tensor.name}.dq", "float32"), tensor.name, context)
                decoded = graph.made(f"{tensor.name}.dq")
            graph.replace_input(node, index, decoded)
            changed = True
        return changed


def _stored_constant(graph: Graph, tensor: Tensor, context: Context) -> Tensor:
    """A constant of any shape, decoded from codes that the file holds in its place."""
    name = f"{tensor.name}.u8"  # as a weight of another node it may be stored otherwise
    if not graph.has(name):
        params = context.plan.activations[tensor.name]
        parts = [graph.constant(name, affine.quantize(graph.read(tensor), params)),
                 graph.constant(f"{name}.scale", params.scale), graph.constant(f"{name}.zero_point", params.zero_point)]
        result = graph.variable(f"{name}.dq", "float32", shape_of(tensor))
        graph.add_node("DequantizeLinear", f"{tensor.name}/dequantize_constant", parts, [result])
    return graph.made(f"{name}.dq")


def _pair(graph: Graph, source: Tensor, result: Tensor, name: str, context: Context) -> None:
    params = context.plan.activations[name]
    scale = graph.constant(f"{name}.scale", params.scale)
    zero_point = graph.constant(f"{name}.zero_point", params.zero_point)
    codes = graph.like(source, f"{name}.q", params.dtype.storage)
    graph.add_node("QuantizeLinear", f"{name}/quantize", [source, scale, zero_point], [codes])
    graph.add_node("DequantizeLinear", f"{name}/dequantize", [codes, scale, zero_point], [result])
