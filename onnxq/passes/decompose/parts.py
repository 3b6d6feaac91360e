"""What all passes of this stage share: which operators they replace, and writing small ones in place of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxq.graph import FLOAT32, Graph, Node, Tensor, dtype_of, full_name, shape_of
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class Decomposition(Pass):
    """Replaces `operators`, or all that it knows; onnxruntime's own are named as in `com.microsoft.Gelu`."""

    known: ClassVar[tuple[str, ...]] = ()
    operators: tuple[str, ...] | None = None

    def run(self, graph: Graph, context: Context) -> bool:
        """Bodies of If, Loop and Scan, too."""
        wanted = self.known if self.operators is None else self.operators
        changed = False
        for part in list(graph.graphs()):
            edited = False
            for node in part.nodes:
                if full_name(node) in wanted and len(node.outputs):
                    edited |= self.visit(node, part, context)
            if edited:
                part.sort()
            changed |= edited
        return changed

    @classmethod
    def without(cls, supported: frozenset[str]) -> Decomposition | None:
        """The pass for a provider that has the operators `supported` alone; None where it has all of these."""
        lacking = tuple(name for name in cls.known if name not in supported)
        return cls(lacking) if lacking else None


class Parts:
    """Small operators in place of a node: `make` adds one after the other, `finish` the last, under the node's name."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph, self.node, self.result = graph, node, node.outputs[0]
        self.prefix = self.result.name or node.name

    def make(self, op: str, part: str, inputs: Sequence[Tensor], like: Tensor | None = None,
             attrs: dict[str, Any] | None = None, shape: Sequence[Any] | None = None, dtype: Any = FLOAT32) -> Tensor:
        """What a new node makes: `RESULT.part` in the shape of a tensor, or in `shape`, or of unknown shape."""
        dims = shape_of(like) if like is not None else shape
        made = self.graph.variable(f"{self.prefix}.{part}", dtype, dims)
        self.graph.add_node(op, f"{self.node.name}/{part}", inputs, [made], attrs)
        return made

    def mean(self, part: str, tensor: Tensor, axes: Sequence[int]) -> Tensor:
        """The mean over axes, counted from the last one, -1, which are kept with a size of 1."""
        dims = shape_of(tensor)
        shape = None if dims is None else [1 if k - len(dims) in axes else d for k, d in enumerate(dims)]
        made = self.graph.variable(f"{self.prefix}.{part}", FLOAT32, shape)
        self.graph.add_reduction("ReduceMean", f"{self.node.name}/{part}", tensor, made, axes, True)
        return made

    def number(self, part: str, value: float) -> Tensor:
        """A new scalar constant."""
        return self.graph.constant(f"{self.node.name}.{part}", np.asarray(value, np.float32))

    def integers(self, part: str, values: Sequence[int]) -> Tensor:
        """A new constant int64 [n]."""
        return self.graph.constant(f"{self.node.name}.{part}", np.asarray(values, np.int64))

    def finish(self, op: str, inputs: Sequence[Tensor], attrs: dict[str, Any] | None = None) -> None:
        """Make the last node in place of the first."""
        name = self.node.name
        self.graph.remove(self.node)
        self.graph.add_node(op, name, inputs, [self.result], attrs)


def is_float32(node: Node) -> bool:
    """Whether a node of one type of floats computes in float32; what it reads or makes tells."""
    found = {d for t in (*node.inputs, *node.outputs) if (d := dtype_of(t)) is not None and d.kind not in "biuO"}
    return found == {FLOAT32}
