"""Gelu, Swish and Mish in small operators."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Node, Tensor, full_name
from onnxq.passes.decompose.parts import Decomposition, Parts, is_float32
from onnxq.passes.manager import Context

_CONTRIB = "com.microsoft."


@dataclass(frozen=True)
class SpellOutActivations(Decomposition):
    """Gelu(x) -> x * (1 + erf(x / sqrt(2))) * 0.5, its approximation -> x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 *
    x ** 3))) * 0.5, Swish and QuickGelu -> x * sigmoid(alpha * x), HardSwish -> x * HardSigmoid(x), Mish ->
    x * tanh(softplus(x)).

    x float32 of any shape. Source: ONNX Gelu-20, Swish-24, Mish-18, HardSwish-14 (their function bodies),
    com.microsoft BiasGelu-1, FastGelu-1, Gelu-1, QuickGelu-1.
    """

    name: ClassVar[str] = "spell-out-activations"
    known: ClassVar[tuple[str, ...]] = ("Gelu", "HardSwish", "Mish", "Swish", f"{_CONTRIB}BiasGelu",
                                        f"{_CONTRIB}FastGelu", f"{_CONTRIB}Gelu", f"{_CONTRIB}QuickGelu")

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Replace one activation."""
        if not is_float32(node):
            return context.skip(node, "it is not known to make float32")
        parts, x, name = Parts(graph, node), node.inputs[0], full_name(node)
        bias = graph.optional_input(node, 1)
        if bias is not None:
            x = parts.make("Add", "biased", [x, bias], node.outputs[0])
        if name == f"{_CONTRIB}FastGelu" or node.attrs.get("approximate", "none") == "tanh":
            self._by_tanh(parts, x)
        elif node.op in ("BiasGelu", "Gelu"):
            inner = parts.make("Div", "inner", [x, parts.number("root", math.sqrt(2))], x)
            self._halved(parts, x, parts.make("Erf", "erf", [inner], x))
        elif node.op in ("QuickGelu", "Swish"):
            alpha = float(node.attrs.get("alpha", 1.702 if node.op == "QuickGelu" else 1.0))
            inner = x if alpha == 1 else parts.make("Mul", "inner", [x, parts.number("alpha", alpha)], x)
            parts.finish("Mul", [x, parts.make("Sigmoid", "gate", [inner], x)])
        elif node.op == "HardSwish":
            parts.finish("Mul", [x, parts.make("HardSigmoid", "gate", [x], x, {"alpha": 1 / 6, "beta": 0.5})])
        else:
            parts.finish("Mul", [x, parts.make("Tanh", "gate", [parts.make("Softplus", "positive", [x], x)], x)])
        return True

    def _by_tanh(self, parts: Parts, x: Tensor) -> None:
        square = parts.make("Mul", "square", [x, x], x)
        cube = parts.make("Mul", "cube", [square, x], x)
        bent = parts.make("Add", "bent", [x, parts.make("Mul", "part", [cube, parts.number("cubic", 0.044715)], x)], x)
        inner = parts.make("Mul", "inner", [bent, parts.number("root", math.sqrt(2 / math.pi))], x)
        self._halved(parts, x, parts.make("Tanh", "tanh", [inner], x))

    @staticmethod
    def _halved(parts: Parts, x: Tensor, gate: Tensor) -> None:
        raised = parts.make("Add", "raised", [gate, parts.number("one", 1.0)], x)
        parts.finish("Mul", [parts.make("Mul", "product", [x, raised], x), parts.number("half", 0.5)])
