"""Spelled-out hard sigmoids, and HardSwish -> Mul by a HardSigmoid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class HardSwish(Pass):
    """HardSwish(x) -> x * HardSigmoid(x), and clip(x + b, 0, k) / k -> HardSigmoid(x) with alpha = 1/k, beta = b/k.

    The division may also be a Mul by 1/k, and stand behind a product with the Clip, as in x * clip(x + 3, 0, 6) / 6.
    onnxruntime computes HardSwish as that very product, and fuses a HardSigmoid into the Conv in front of it.
    Source: ONNX HardSwish-14 (its function body), HardSigmoid-6.
    """

    name: ClassVar[str] = "hard-swish"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Rewrite one HardSwish or one Clip."""
        if node.domain or dtype_of(node.outputs[0]) != "float32":
            return False
        if node.op == "HardSwish":
            x, result = node.inputs[0], node.outputs[0]
            gate = graph.like(result, f"{node.name}.gate", "float32")
            graph.add_node("HardSigmoid", f"{node.name}/gate", [x], [gate], {"alpha": 1 / 6, "beta": 0.5})
            node.op = "Mul"
            graph.replace_input(node, 1, gate)
            return True
        return node.op == "Clip" and self._spelled_out(node, graph, context)

    def _spelled_out(self, clip: Node, graph: Graph, context: Context) -> bool:
        high, low = graph.scalar(graph.optional_input(clip, 2)), graph.scalar(graph.optional_input(clip, 1))
        add = graph.producer(clip.inputs[0])
        if low != 0 or high is None or high <= 0 or add is None or add.op != "Add" or add.domain:
            return False
        x, shift = _with_constant(graph, add)
        if x is None or graph.only_consumer(add.outputs[0]) is None:
            return False
        scaled = graph.only_consumer(clip.outputs[0])
        product = None
        if scaled is not None and scaled.op == "Mul" and not any(is_constant(t) for t in scaled.inputs):
            product, scaled = scaled, graph.only_consumer(scaled.outputs[0])
        if scaled is None or not _divides(graph, scaled, high):
            return context.skip(clip, f"what is clipped at {high:g} is not divided by it")
        # the division goes, and the product with it gives what the division gave
        result = scaled.outputs[0]
        gate = result if product is None else clip.outputs[0]
        graph.remove(scaled)
        if product is not None:
            graph.set_output(product, 0, result)
        name = clip.name
        graph.remove(clip)
        graph.remove(add)
        graph.add_node("HardSigmoid", name, [x], [gate], {"alpha": 1 / high, "beta": shift / high})
        return True


def _with_constant(graph: Graph, node: Node) -> tuple[Tensor | None, float]:
    """(what is computed, the number beside it) of a node with two inputs; (None, 0) when there is no number."""
    for index in (0, 1):
        number = graph.scalar(node.inputs[index])
        if number is not None and not is_constant(node.inputs[1 - index]):
            return node.inputs[1 - index], number
    return None, 0.0


def _divides(graph: Graph, node: Node, number: float) -> bool:
    if node.domain or node.op not in ("Div", "Mul"):
        return False
    if node.op == "Div":
        return graph.scalar(node.inputs[1]) == number
    factor = _with_constant(graph, node)[1]
    return abs(factor * number - 1.0) < 1e-6
