"""QLinearConv of 2 or 3 channels -> Pad of the codes to 4 -> QLinearConv of 4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, shape_of
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class PadChannels(Pass):
    """x uint8 [N, C, H, W] and W int8 [M, C, kH, kW] of a lowered Conv get channels of zero points and of 0.

    Networks on images begin with 3 channels, for which onnxruntime copies windows out and multiplies matrices (im2col);
    blocks of 4 it reads in place. The result is the same code by code. Source: ONNX Pad-13, QLinearConv-10.
    """

    name: ClassVar[str] = "pad-channels"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Widen one QLinearConv by the channels that the Plan says."""
        verdict, name = context.plan.node(node.name), node.name
        if node.op != "QLinearConv" or verdict is None or not verdict.extra_channels or graph.has(f"{name}.padded.q"):
            return False
        codes, weight, more = node.inputs[0], node.inputs[3], verdict.extra_channels
        dims = shape_of(codes) or (None,) * 4
        pads = graph.constant(f"{name}.more", np.array([0, 0, 0, 0, 0, more, 0, 0]))
        channels = int((shape_of(weight) or (0, 0))[1] or 0) + more
        padded = graph.variable(f"{name}.padded.q", codes.dtype, [dims[0], channels, *dims[2:]])
        graph.add_node("Pad", f"{name}/pad_channels", [codes, pads, node.inputs[2]], [padded])
        graph.replace_input(node, 0, padded)
        values = np.pad(graph.read(weight), ((0, 0), (0, more), (0, 0), (0, 0)))
        graph.replace_input(node, 3, graph.shared_constant(f"{weight.name}.wide", values))
        return True
