"""Constants of a half model, stored in half again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import FLOAT32, HALF, Graph, Tensor, dtype_of, is_constant, narrow, shape_of
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class NarrowConstants(Pass):
    """w float32 -> Cast(w float16 or bfloat16) -> `w.float`, in a graph that was widened from that type.

    Only where each value is one of the half type, so that nothing is lost, and from `min_elements` on. The runtime
    computes the Cast once, when it loads the model: the file is half as large, memory and speed are those of float32.
    """

    name: ClassVar[str] = "narrow-constants"
    min_elements: int = 1024

    def run(self, graph: Graph, context: Context) -> bool:
        """Constants that bodies read are cast in the main graph, whose tensors they see."""
        types = [dtype for dtype in HALF if str(dtype) in graph.half]
        if not types:
            return False
        found: dict[str, Tensor] = {}
        for node, _ in graph.walk():
            found |= {t.name: t for t in node.inputs if is_constant(t) and dtype_of(t) == FLOAT32}
        outputs = {t.name for holder in graph.graphs() for t in holder.outputs}
        changed = False
        for tensor in found.values():
            dims = [int(d or 0) for d in shape_of(tensor) or ()]
            if tensor.name in outputs or np.prod(dims, dtype=np.int64) < self.min_elements:
                continue
            name = f"{tensor.name}.float"
            if graph.has(name) or not any(narrow(tensor, dtype, graph.folder) for dtype in types):
                continue
            result = graph.variable(name, FLOAT32, dims)
            graph.redirect(tensor, result)
            graph.add_cast(f"{tensor.name}/float", tensor, result)
            changed = True
        return changed
