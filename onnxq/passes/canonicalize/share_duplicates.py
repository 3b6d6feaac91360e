"""Weights stored twice -> one weight read twice."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxq.graph import Graph, Tensor, dtype_of, is_constant, shape_of
from onnxq.passes.manager import Context, Pass

Array = NDArray[Any]


@dataclass(frozen=True)
class ShareDuplicates(Pass):
    """Initializers of equal type, shape and bytes become one; those below `min_elements` are not worth the search."""

    name: ClassVar[str] = "share-duplicates"
    min_elements: int = 256

    def run(self, graph: Graph, context: Context) -> bool:
        """Only weights that agree with another in type, shape and their first and last row are read, one at a time."""
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
        for group in _alike_at_their_ends(graph, alike.values()):
            first: dict[str, Tensor] = {}
            for tensor in group:
                kept = first.setdefault(_digest(graph.read(tensor)), tensor)
                if kept is not tensor and not graph.is_output(tensor):
                    graph.redirect(tensor, kept)
                    changed = True
        return changed


def _alike_at_their_ends(graph: Graph, groups: Iterable[list[Tensor]]) -> Iterator[list[Tensor]]:
    """Those of each group that have their ends in common with another."""
    for group in groups:
        parts: dict[str, list[Tensor]] = defaultdict(list)
        for tensor in group if len(group) > 1 else []:
            ends = _ends(graph, tensor)
            if ends is not None:
                parts[ends].append(tensor)
        yield from (part for part in parts.values() if len(part) > 1)


def _ends(graph: Graph, tensor: Tensor) -> str | None:
    """A digest of the first and the last row; None for texts, whose bytes here are pointers."""
    rows = int((shape_of(tensor) or (0,))[0] or 0)
    ends = [graph.read_rows(tensor, 0, 1), graph.read_rows(tensor, rows - 1, rows)]
    return None if ends[0].dtype.kind == "O" else "".join(_digest(e) for e in ends)


def _digest(values: Array) -> str:
    """Of type and bytes: types that the graph library can't name (float8) share a group, and are told apart here."""
    return f"{values.dtype} {hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()}"
