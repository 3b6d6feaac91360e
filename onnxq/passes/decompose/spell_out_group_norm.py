"""GroupNormalization -> InstanceNormalization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, Tensor, is_constant, shape_of
from onnxq.passes.decompose.parts import Decomposition, Parts, is_float32
from onnxq.passes.manager import Context


@dataclass(frozen=True)
class SpellOutGroupNorm(Decomposition):
    """GroupNormalization(x, scale, bias) -> InstanceNormalization of x as [N, groups, ..], times scale plus bias.

    x float32 [N, C, ..]; scale and bias float32 [C], or constants [groups] below opset 21.
    Source: ONNX GroupNormalization-18 and -21 (its function body), InstanceNormalization-6.
    """

    name: ClassVar[str] = "spell-out-group-norm"
    known: ClassVar[tuple[str, ...]] = ("GroupNormalization",)

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Replace one GroupNormalization."""
        x, dims = node.inputs[0], shape_of(node.inputs[0]) or ()
        groups, by_group = int(node.attrs["num_groups"]), graph.opset < 21
        if len(dims) < 3 or not isinstance(dims[1], int) or not is_float32(node):
            return context.skip(node, "what it normalises is not known to be float32 [N, C, ..]")
        if by_group and not all(is_constant(t) for t in node.inputs[1:3]):
            return context.skip(node, "its scale or bias is computed")
        parts = Parts(graph, node)
        ones = graph.constant(f"{node.name}.ones", np.ones(groups, np.float32))
        zeros = graph.constant(f"{node.name}.zeros", np.zeros(groups, np.float32))
        grouped = parts.make("Reshape", "grouped", [x, parts.integers("groups", [0, groups, -1])],
                             shape=[dims[0], groups, None])
        normal = parts.make("InstanceNormalization", "normal", [grouped, ones, zeros], grouped,
                            {"epsilon": float(node.attrs.get("epsilon", 1e-5))})
        shape = self._shape(parts, x, dims)
        flat = parts.make("Reshape", "apart", [normal, shape], x)
        factors = [self._by_channel(parts, node.inputs[k], part, dims[1] // groups if by_group else 1, len(dims))
                   for k, part in ((1, "scale"), (2, "bias"))]
        parts.finish("Add", [parts.make("Mul", "scaled", [flat, factors[0]], x), factors[1]])
        return True

    @staticmethod
    def _shape(parts: Parts, x: Tensor, dims: Sequence[object]) -> Tensor:
        """A constant where at most one size besides N is free, which then is what is left."""
        free = [k for k, d in enumerate(dims) if k and not isinstance(d, int)]
        if len(free) > 1:
            return parts.make("Shape", "shape", [x], shape=[len(dims)], dtype=np.int64)
        return parts.integers("shape", [0 if not k else d if isinstance(d, int) else -1 for k, d in enumerate(dims)])

    @staticmethod
    def _by_channel(parts: Parts, tensor: Tensor, part: str, times: int, rank: int) -> Tensor:
        """[C] or [groups] -> [C, 1, ..], each number `times` times."""
        graph, axes = parts.graph, list(range(1, rank - 1))
        if is_constant(tensor):
            values = np.repeat(np.asarray(graph.read(tensor)), times)
            return graph.constant(f"{parts.node.name}.{part}", values.reshape(-1, *([1] * len(axes))))
        shape = [*(shape_of(tensor) or (None,)), *([1] * len(axes))]
        return parts.make("Unsqueeze", part, [tensor, parts.integers(f"{part}_axes", axes)], shape=shape)
