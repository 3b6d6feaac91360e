"""Gather(Shape(x)), Slice(Shape(x)) -> constant, where those dimensions are fixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxq.graph import Graph, Node, is_constant, shape_of
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class FoldDims(Pass):
    """Single dimensions that are fixed become constants, also where others of the same Shape are free.

    Exporters compute half the size of a head, say, from the shape of a tensor whose batch is free; from the constant
    on, constant folding takes the rest. Source: ONNX Shape-15, Gather-13, Slice-13.
    """

    name: ClassVar[str] = "fold-dims"

    def run(self, graph: Graph, context: Context) -> bool:
        """Shapes that nobody reads any more go."""
        return super().run(graph, context) and (graph.prune() or True)

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Replace one Gather or Slice of a Shape."""
        if node.domain or node.op not in ("Gather", "Slice") or graph.is_output(node.outputs[0]):
            return False
        shape = graph.producer(node.inputs[0])
        if shape is None or shape.op != "Shape" or shape.domain or not all(is_constant(t) for t in node.inputs[1:]):
            return False
        dims = shape_of(shape.inputs[0])
        if dims is None or (node.op == "Slice" and len(node.inputs) < 3):
            return False
        known = np.asarray([*dims, None], object)[:-1][shape.attrs.get("start", 0):shape.attrs.get("end")]
        given = [graph.read(t) for t in node.inputs[1:] if t.name]
        try:
            found = known[given[0]] if node.op == "Gather" else _sliced(known, given)
        except IndexError:
            return context.skip(node, "it reads a dimension that there is not")
        if not all(isinstance(d, int) for d in np.asarray(found, object).ravel()):
            return False
        values = np.asarray(found, np.int64)
        graph.redirect(node.outputs[0], graph.constant(f"{node.outputs[0].name}.folded", values))
        graph.remove(node)
        return True


def _sliced(values: np.ndarray[Any, Any], given: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """One-dimensional values [start:end:step]; the axis, which can only be 0, stands between end and step."""
    start, end = int(given[0][0]), int(given[1][0])
    step = int(given[3][0]) if len(given) > 3 else 1
    # the least end of a negative step stands for "to the first"
    return values[start:None if step < 0 and end < -len(values) else end:step]
