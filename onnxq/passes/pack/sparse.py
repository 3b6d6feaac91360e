"""Weights of many zeros as ONNX's own sparse initializers."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from onnxq.graph import SPARSE, Graph, constants, dtype_of, is_sparse, make_sparse, shape_of
from onnxq.passes.manager import Context, Packed, Packing, Pass

PLACE_BYTES = 8  # the standard's places are int64
_TYPES = ("int8", "uint8", "float32")
_DECLARED = 60  # bytes that declare values and places, besides their names


@dataclass(frozen=True)
class StoreSparse(Pass):
    """w (initializer) -> w (sparse initializer), where that is smaller: int8 from 89 % zeros on, float32 from 67 %.

    onnxruntime makes it dense before it optimizes the graph, whatever the level: nothing else is in the file, of any
    opset, and loading takes hardly more memory. Encodings of PackWeights take less.
    """

    name: ClassVar[str] = "store-sparse"
    min_elements: int = 2048

    def run(self, graph: Graph, context: Context) -> bool:
        """Constants of the main graph alone."""
        outputs = {t.name for holder in graph.graphs() for t in holder.outputs}
        able = {t.name for node in graph.nodes for t in node.inputs if str(dtype_of(t)) in _TYPES} - outputs
        packed = []
        for weight in constants(graph):
            large = prod(int(d or 0) for d in shape_of(weight) or ()) >= self.min_elements
            if weight.name not in able or is_sparse(weight) or not large:
                continue
            values = graph.read(weight)
            count = int(np.count_nonzero(np.ascontiguousarray(values).view(f"u{values.itemsize}")))
            taken = count * (values.itemsize + PLACE_BYTES)
            if taken + _DECLARED + 2 * len(weight.name) < values.nbytes:
                make_sparse(weight)
                zeros = 1 - count / values.size
                packed.append(Packed(weight.name, (SPARSE,), values.shape, zeros, values.nbytes, taken))
        context.packing = Packing(tuple(packed))
        return bool(packed)
