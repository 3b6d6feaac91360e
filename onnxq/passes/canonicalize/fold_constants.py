"""op(constants) -> constant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxq.graph import Graph, Node, dtype_of, is_constant, shape_of
from onnxq.passes.manager import Context, Pass

# random or stateful, or a deliberate quantization that must stay visible
_NEVER = frozenset({
    "Bernoulli", "DequantizeLinear", "Multinomial", "QuantizeLinear", "RandomNormal", "RandomNormalLike",
    "RandomUniform", "RandomUniformLike",
})


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute nodes whose inputs are all stored, where the result stays below `max_bytes`.

    Also Shape of a tensor whose asked dimensions are fixed, and a larger Transpose, which is computed as it is read.
    Values come from onnx's reference implementation; where their type is not the declared one or none of NumPy's own,
    the node stays.
    """

    name: ClassVar[str] = "fold-constants"
    max_bytes: int = 64 << 20

    def run(self, graph: Graph, context: Context) -> bool:
        """Nodes are visited in execution order, so chains fold in one run."""
        changed = super().run(graph, context)
        return graph.prune() or changed

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Replace the node's outputs by constants."""
        if node.domain or node.op in _NEVER or any(graph.is_output(t) for t in node.outputs):
            return False
        if any(hasattr(v, "nodes") for v in node.attrs.values()) or _decodes(node):
            return False
        if node.op == "Shape":
            dims = shape_of(node.inputs[0])
            dims = None if dims is None else dims[node.attrs.get("start", 0):node.attrs.get("end")]
            if dims is None or not all(isinstance(d, int) for d in dims):
                return False
            values: list[np.ndarray[Any, Any]] = [np.asarray(dims, np.int64)]
        elif not all(is_constant(t) or not t.name for t in node.inputs):
            return False
        else:
            if self._too_large(node, graph):
                if node.op == "Transpose" and dtype_of(node.inputs[0]) == np.float32:
                    return _transposed(node, graph)
                return context.skip(node, f"its result is larger than {self.max_bytes} bytes")
            try:
                values = graph.evaluate(node)
            except Exception as e:
                return context.skip(node, f"the reference implementation can't run it: {e}")
        if sum(v.nbytes for v in values) > self.max_bytes:
            return context.skip(node, f"its result is larger than {self.max_bytes} bytes")
        for tensor, value in zip(node.outputs, values, strict=True):
            if value.dtype.kind not in "biuf":
                return context.skip(node, "its result is text or of a type that NumPy lacks")
            if dtype_of(tensor) not in (None, value.dtype):
                return context.skip(node, f"the reference implementation gives {value.dtype}, not {dtype_of(tensor)}")
        for tensor, value in zip(list(node.outputs), values, strict=True):
            if tensor.name:
                graph.redirect(tensor, graph.constant(f"{tensor.name}.folded", value))
        graph.remove(node)
        return True

    def _too_large(self, node: Node, graph: Graph) -> bool:
        """Known before computing: the output's declared shape, or the shape that a filler is asked for."""
        result = node.outputs[0]
        dims = shape_of(result)
        if node.op == "ConstantOfShape" or (node.op == "Expand" and dims is None):
            dims = tuple(np.asarray(graph.read(node.inputs[-1])).tolist())
        if dims is None or not all(isinstance(d, int) for d in dims):
            return False
        dtype = dtype_of(result)
        return math.prod(int(d or 0) for d in dims) * (dtype.itemsize if dtype is not None else 4) > self.max_bytes


def _transposed(node: Node, graph: Graph) -> bool:
    """A large matrix, such as the table that a tied head multiplies by, is transposed whenever it is read."""
    weight, perm = node.inputs[0], node.attrs.get("perm")
    dims = [int(d or 0) for d in shape_of(weight) or ()]
    order = list(perm) if perm is not None else list(range(len(dims)))[::-1]
    made = graph.computed(f"{node.outputs[0].name}.folded", np.float32, [dims[k] for k in order],
                          lambda: np.ascontiguousarray(graph.read(weight).transpose(order)))
    graph.redirect(node.outputs[0], made)
    graph.remove(node)
    return True


def _decodes(node: Node) -> bool:
    """Whether a node makes floats of weights in 8 bits, or anything of fewer: they are stored so to keep the file
    small."""
    if node.op != "Cast" or not is_constant(node.inputs[0]):
        return False
    dims = shape_of(node.inputs[0]) or ()
    narrow, large = str(dtype_of(node.inputs[0])), math.prod(int(d or 0) for d in dims) >= 1024
    return narrow in ("int2", "int4", "uint2", "uint4") or (
        str(dtype_of(node.outputs[0])) == "float32" and narrow in ("int8", "uint8") and large)
