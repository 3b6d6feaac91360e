"""RotaryEmbedding in small operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import CONTRIB, Graph, Node, Tensor, shape_of
from onnxq.passes.decompose.parts import Decomposition, Parts, is_float32
from onnxq.passes.manager import Context


@dataclass(frozen=True)
class SpellOutRotary(Decomposition):
    """RotaryEmbedding(x) -> Concat(a * cos - b * sin, b * cos + a * sin, rest), where a and b are the halves of the
    first R elements of each head or, interleaved, those with even and with odd numbers; cos and sin are rows of their
    tables [M, R/2] at the positions [B, S], or [B, S, R/2] themselves.

    x float32 [B, heads, S, D], or [B, S, heads * D]. Source: ONNX RotaryEmbedding-23, com.microsoft RotaryEmbedding-1.
    """

    name: ClassVar[str] = "spell-out-rotary"
    known: ClassVar[tuple[str, ...]] = ("RotaryEmbedding", f"{CONTRIB}.RotaryEmbedding")

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Replace one RotaryEmbedding."""
        contrib = node.domain == CONTRIB
        positions = graph.optional_input(node, 1 if contrib else 3)
        x, (cos, sin) = node.inputs[0], node.inputs[2:4] if contrib else node.inputs[1:3]
        dims, half = shape_of(x), (shape_of(cos) or (None,))[-1]
        if dims is None or len(dims) not in (3, 4) or not isinstance(half, int) or not is_float32(node):
            return context.skip(node, "what it turns is not known to be float32 [B, heads, S, D] or [B, S, heads * D]")
        if positions is not None and len(shape_of(positions) or ()) != 2:
            return context.skip(node, "its positions are not known to be one per row and token")
        if node.attrs.get("scale", 1.0) != 1.0 or node.attrs.get("is_packed_batching", 0):
            return context.skip(node, "it scales positions or packs batches")
        size = self._size(node, dims, half)
        if size is None:
            return context.skip(node, "the size of its heads is not known")
        parts = Parts(graph, node)
        angles = [self._rows(parts, part, table, positions, 2 if len(dims) == 3 else 1)
                  for part, table in (("cos", cos), ("sin", sin))]
        if len(dims) == 3:
            shape = parts.integers("heads", [0, 0, -1, size])
            x = parts.make("Reshape", "heads", [x, shape], shape=[dims[0], dims[1], None, size])
        pieces = self._turned(parts, x, angles, half, bool(node.attrs.get("interleaved", 0)))
        if size > 2 * half:
            pieces.append(_slice(parts, "rest", x, 2 * half, size))
        if len(dims) == 4:
            parts.finish("Concat", pieces, {"axis": -1})
        else:
            whole = parts.make("Concat", "whole", pieces, x, {"axis": -1})
            parts.finish("Reshape", [whole, parts.integers("flat", [0, 0, -1])])
        return True

    @staticmethod
    def _size(node: Node, dims: Sequence[object], half: int) -> int | None:
        """Elements of a head."""
        last, heads = dims[-1], int(node.attrs.get("num_heads", 0))
        if len(dims) == 4:
            return last if isinstance(last, int) else None
        if heads and isinstance(last, int):
            return last // heads
        return None if node.attrs.get("rotary_embedding_dim", 0) else 2 * half

    @staticmethod
    def _rows(parts: Parts, part: str, table: Tensor, positions: Tensor | None, axis: int) -> Tensor:
        """[B, S, R/2], with an axis for the heads."""
        if positions is not None:
            shape = [*(shape_of(positions) or ()), (shape_of(table) or (None,))[-1]]
            table = parts.make("Gather", f"{part}.rows", [table, positions], attrs={"axis": 0}, shape=shape)
        dims = shape_of(table)
        raised = None if dims is None else [*dims[:axis], 1, *dims[axis:]]
        return parts.make("Unsqueeze", part, [table, parts.integers(f"{part}_axis", [axis])], shape=raised)

    @staticmethod
    def _turned(parts: Parts, x: Tensor, angles: Sequence[Tensor], half: int, pairs: bool) -> list[Tensor]:
        """The turned elements, in one piece or, by halves, in two."""
        cos, sin = angles
        first = _slice(parts, "first", x, 0, 2 * half if pairs else half, 2 if pairs else 1)
        second = _slice(parts, "second", x, 1 if pairs else half, 2 * half, 2 if pairs else 1)
        products = [parts.make("Mul", f"product_{k}", [value, angle], first)
                    for k, (value, angle) in enumerate(((first, cos), (second, sin), (second, cos), (first, sin)))]
        turned = [parts.make("Sub", "turned_first", products[:2], first),
                  parts.make("Add", "turned_second", products[2:], first)]
        if not pairs:
            return turned
        dims = shape_of(first) or ()
        axis = parts.integers("pair_axis", [-1])
        alone = [parts.make("Unsqueeze", f"pair_{k}", [t, axis], shape=[*dims, 1]) for k, t in enumerate(turned)]
        paired = parts.make("Concat", "pairs", alone, attrs={"axis": -1}, shape=[*dims, 2])
        return [parts.make("Reshape", "paired", [paired, parts.integers("pair_shape", [0, 0, 0, -1])],
                           shape=[*dims[:-1], 2 * half])]


def _slice(parts: Parts, part: str, x: Tensor, start: int, stop: int, step: int = 1) -> Tensor:
    """x[..., start:stop:step]."""
    dims = shape_of(x) or ()
    numbers = [parts.integers(f"{part}_{what}", [value])
               for what, value in (("start", start), ("stop", stop), ("axis", -1), ("step", step))]
    return parts.make("Slice", part, [x, *numbers], shape=[*dims[:-1], len(np.arange(start, stop, step))])
