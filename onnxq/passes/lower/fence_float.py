"""A node that shall stay float between DQ and Q is kept float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Node, Tensor, is_constant
from onnxq.passes import pattern
from onnxq.passes.manager import Context, Pass
from onnxq.passes.pattern import DEQUANTIZE, QUANTIZE
from onnxq.plan import FLOAT, STORED

# data movement that the runtime moves Q and DQ across
_CROSSED = frozenset({"MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class FenceFloat(Pass):
    """DQ -> op -> Q  =>  DQ -> op -> Sum -> Q, where the Plan keeps op float; MatMul and Gemm get DQ -> Sum -> op.

    The runtime rewrites DQ -> op -> Q to an integer kernel whatever the Plan says, and even quantizes a Conv's float
    weights; MatMul and Gemm of two DQ it rewrites without a Q, too. Before that it moves Q and DQ through data movement
    (its QDQPropagation). A Sum of one tensor is the identity, no rewrite of the runtime matches it, and it costs one
    copy. A Resize it rewrites only where DQ and Q have the same scale and zero point.
    """

    name: ClassVar[str] = "fence-float"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Fence one node."""
        verdict, target = context.plan.node(node.name), context.target
        if verdict is None or verdict.scheme not in (FLOAT, STORED):
            return False
        if target is None or node.op not in target.pairs_with_q or node.domain:
            return False
        data = [k for k, t in enumerate(node.inputs) if t.name and not self._is_weight(graph, t)]
        data = [k for k in data if (node.op, k) != ("Where", 0) and (node.op != "Resize" or k == 0)]
        if not data or not all(self._from_dq(graph, node.inputs[k]) for k in data):
            return False
        last = self._before_q(graph, node)
        if last is None and (node.op not in ("Gemm", "MatMul") or len(data) < 2):
            return False
        if node.op in ("Gemm", "MatMul"):
            source = node.inputs[data[0]]
            fenced = graph.like(source, f"{node.name}.fenced", "float32")
            graph.add_node("Sum", f"{node.name}/fence", [source], [fenced])
            graph.replace_input(node, data[0], fenced)
            return True
        assert last is not None
        if node.op == "Resize" and self._rescales(graph, node):
            return False
        result = last.outputs[0]
        before = graph.like(result, f"{result.name}.unfenced", "float32")
        graph.set_output(last, 0, before)
        graph.add_node("Sum", f"{node.name}/fence", [before], [result])
        return True

    def _is_weight(self, graph: Graph, tensor: Tensor) -> bool:
        """Whether a tensor is stored, or decoded from what is."""
        maker = graph.producer(tensor)
        if maker is None:
            return bool(is_constant(tensor))
        return maker.op in ("Cast", "Mul") and all(self._is_weight(graph, t) for t in maker.inputs)

    @staticmethod
    def _from_dq(graph: Graph, tensor: Tensor) -> bool:
        maker = graph.producer(tensor)
        while maker is not None and maker.op in _CROSSED:
            maker = graph.producer(maker.inputs[0])
        return maker is not None and maker.op == DEQUANTIZE

    @staticmethod
    def _rescales(graph: Graph, node: Node) -> bool:
        """Whether the DQ right before a node and the Q right behind it have other scales or zero points."""
        read, made = pattern.read(graph, node.inputs[0]), pattern.stored(graph, node.outputs[0], frozenset())
        if read is None or made is None or not pattern.per_tensor(read) or not pattern.per_tensor(made.codes):
            return False
        return not pattern.same_scale(graph, read, made.codes)

    def _before_q(self, graph: Graph, node: Node) -> Node | None:
        """The last node before Q: the node itself, or what the runtime would absorb (a bias Add, a Relu or Clip)."""
        last = self._past(graph, node, ("Add",)) if node.op == "MatMul" else node
        last = self._past(graph, last, ("Clip", "Relu"))
        return last if self._reaches_q(graph, last.outputs[0]) else None

    @staticmethod
    def _past(graph: Graph, node: Node, ops: tuple[str, ...]) -> Node:
        users = graph.consumers(node.outputs[0])
        return users[0] if len(users) == 1 and users[0].op in ops else node

    def _reaches_q(self, graph: Graph, tensor: Tensor) -> bool:
        users = graph.consumers(tensor)
        return bool(users) and all(
            u.op == QUANTIZE or (u.op in _CROSSED and self._reaches_q(graph, u.outputs[0])) for u in users)
