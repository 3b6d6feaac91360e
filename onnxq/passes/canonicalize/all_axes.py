"""Pad and Resize of some axes -> of all axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxq.graph import Graph, Node, is_constant, shape_of
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class AllAxes(Pass):
    """Pad(x, p, v, axes) -> Pad(x, p', v) with p' int64 [2 R], and Resize with `axes` -> with R scales or sizes.

    R is the rank of x; what the other axes get is a pad of 0, a scale of 1, a size as it is. onnxruntime permutes the
    pads and scales with the dimensions when it brings the Convs around them into its channels-last layout, but takes
    them for those of all axes, and the model fails as it runs. Source: ONNX Pad-18, Resize-18.
    """

    name: ClassVar[str] = "all-axes"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Rewrite one Pad or Resize."""
        if node.domain or not len(node.inputs):
            return False
        dims = shape_of(node.inputs[0])
        if node.op == "Pad" and graph.optional_input(node, 3) is not None:
            return self._pad(node, dims, graph, context)
        if node.op == "Resize" and node.attrs.get("axes"):
            return self._resize(node, dims, graph, context)
        return False

    @staticmethod
    def _pad(node: Node, dims: tuple[Any, ...] | None, graph: Graph, context: Context) -> bool:
        pads, axes = node.inputs[1], node.inputs[3]
        if dims is None or not is_constant(pads) or not is_constant(axes):
            return context.skip(node, "its pads, its axes or the rank of what it pads is computed")
        full = np.zeros((2, len(dims)), np.int64)
        full[:, graph.read(axes).reshape(-1) % len(dims)] = graph.read(pads).reshape(2, -1)
        graph.replace_input(node, 1, graph.constant(f"{node.name}.pads", full.reshape(-1)))
        del node.inputs[3]
        return True

    @staticmethod
    def _resize(node: Node, dims: tuple[Any, ...] | None, graph: Graph, context: Context) -> bool:
        index = 2 if graph.optional_input(node, 2) is not None else 3
        given = node.inputs[index]
        if dims is None or not is_constant(given) or graph.optional_input(node, 1) is not None:
            return context.skip(node, "its scales, sizes, region or the rank of what it resizes is computed")
        if index == 3 and node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
            return context.skip(node, "it keeps the aspect ratio of some axes")
        axes = [a % len(dims) for a in node.attrs["axes"]]
        others = [d for k, d in enumerate(dims) if k not in axes]
        if index == 3 and not all(isinstance(d, int) for d in others):
            return context.skip(node, "its other axes have no fixed size")
        values = graph.read(given)
        full = np.ones(len(dims), values.dtype) if index == 2 else np.asarray(
            [d if isinstance(d, int) else 0 for d in dims], values.dtype)
        full[axes] = values
        graph.replace_input(node, index, graph.constant(f"{node.name}.{'scales' if index == 2 else 'sizes'}", full))
        del node.attrs["axes"]
        return True
