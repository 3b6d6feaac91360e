"""Operators that one or two others stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import FLOAT32, Graph, Node, dtype_of, shape_of, type_number
from onnxq.passes.decompose.parts import Decomposition, Parts
from onnxq.passes.manager import Context

_LARGEST = 1 << 24  # elements of a mask


@dataclass(frozen=True)
class SpellOutSimple(Decomposition):
    """IsNaN(x) -> not x == x; IsInf(x) -> x == inf or x == -inf; CastLike(x, y) -> Cast(x); Tan(x) -> Sin(x) / Cos(x);
    Trilu(x) -> x where a constant mask holds, 0 elsewhere, for matrices of known size.

    Source: ONNX IsNaN-9, IsInf-10, CastLike-15, Tan-7, Trilu-14.
    """

    name: ClassVar[str] = "spell-out-simple"
    known: ClassVar[tuple[str, ...]] = ("CastLike", "IsInf", "IsNaN", "Tan", "Trilu")

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Replace one node."""
        parts, x = Parts(graph, node), node.inputs[0]
        if node.op == "Trilu":
            return self._trilu(parts, context)
        if node.op == "CastLike":
            dtype = dtype_of(node.inputs[1])
            if dtype is None:
                return context.skip(node, "the type that it casts to is not known")
            parts.finish("Cast", [x], {"to": type_number(dtype)})
        elif node.op == "IsNaN":
            parts.finish("Not", [parts.make("Equal", "number", [x, x], x, dtype=np.bool_)])
        elif dtype_of(x) != FLOAT32:
            return context.skip(node, "what it reads is not known to be float32")
        elif node.op == "Tan":
            parts.finish("Div", [parts.make("Sin", "sine", [x], x), parts.make("Cos", "cosine", [x], x)])
        else:
            return self._infinite(parts, context)
        return True

    @staticmethod
    def _infinite(parts: Parts, context: Context) -> bool:
        node, x = parts.node, parts.node.inputs[0]
        wanted = {part: value for part, value in (("positive", np.inf), ("negative", -np.inf))
                  if node.attrs.get(f"detect_{part}", 1)}
        if not wanted:
            return context.skip(node, "it detects nothing")
        numbers = {part: parts.number(part, value) for part, value in wanted.items()}
        if len(wanted) == 2:
            found = [parts.make("Equal", f"is_{part}", [x, number], x, dtype=np.bool_)
                     for part, number in numbers.items()]
            parts.finish("Or", found)
        else:
            parts.finish("Equal", [x, *numbers.values()])
        return True

    @staticmethod
    def _trilu(parts: Parts, context: Context) -> bool:
        graph, node = parts.graph, parts.node
        shift, dims = graph.optional_input(node, 1), shape_of(node.inputs[0]) or ()
        k, dtype = (0.0 if shift is None else graph.scalar(shift)), dtype_of(node.inputs[0])
        rows, columns = dims[-2:] if len(dims) > 1 else (None, None)
        if k is None or dtype is None or not isinstance(rows, int) or not isinstance(columns, int):
            return context.skip(node, "its type, the size of its matrices or its diagonal is not known")
        if rows * columns > _LARGEST:
            return context.skip(node, f"its matrices have more than {_LARGEST} elements")
        below = np.tri(rows, columns, int(k) - bool(node.attrs.get("upper", 1)), dtype=np.bool_)
        mask = graph.constant(f"{node.name}.mask", ~below if node.attrs.get("upper", 1) else below)
        parts.finish("Where", [mask, node.inputs[0], graph.constant(f"{node.name}.zero", np.zeros((), dtype))])
        return True
