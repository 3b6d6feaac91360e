"""Weights stored twice -> one weight read twice."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Tensor, dtype_of, is_constant, shape_of
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class ShareDuplicates(Pass):
    """Initializers of equal type, shape and bytes become one; those below `min_elements` are not worth the search."""

    name: ClassVar[str] = "share-duplicates"
    min_elements: int = 256

    def run(self, graph: Graph, context: Context) -> bool:
        """Only weights that agree in type and shape with another are read, one at a time."""
        alike: dict[object, list[Tensor]] = defaultdict(list)
        seen: set[str] = set()
        for node, _ in graph.walk():
            for tensor in node.inputs:
                if is_constant(tensor) and tensor.name not in seen:
                    seen.add(tensor.name)
                    dims = shape_of(tensor) or ()
                    if np.prod([int(d or 0) for d in dims], dtype=np.int64) >= self.min_elements:
                        alike[(str(dtype_of(tensor)), dims)].append(tensor)
        changed = False
        for group in alike.values():
            first: dict[str, Tensor] = {}
            for tensor in group if len(group) > 1 else []:
                values = np.ascontiguousarray(graph.read(tensor))
                if values.dtype.kind == "O":
                    continue  # texts: their bytes here are pointers
                # types that the graph library can't name (float8) share a group: the values tell them apart
                digest = f"{values.dtype} {hashlib.sha256(values.tobytes()).hexdigest()}"
                kept = first.setdefault(digest, tensor)
                if kept is not tensor and not graph.is_output(tensor):
                    graph.redirect(tensor, kept)
                    changed = True
        return changed
