"""Conv -> Add or Mul of a constant per channel -> Conv alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from onnxq.graph import Graph, Node, Tensor, is_constant, shape_of
from onnxq.passes import pattern
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class AffineToConv(Pass):
    """Conv(x, W, b) + c -> Conv(x, W, b + c) and Conv(x, W, b) * c -> Conv(x, W * c, b * c).

    c is [M, 1, ..] or [1, M, 1, ..] for an output of M channels, or one number. Older exporters (CNTK, Keras) write the
    bias so, scale layers and layer scales look so; each would be quantized as a tensor of its own.
    """

    name: ClassVar[str] = "affine-to-conv"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Fold one Add or Mul."""
        found = pattern.behind(graph, node, "Conv")
        if found is None or not is_constant(found[0].inputs[1]):
            return False
        conv, factor = found
        if graph.only_consumer(conv.outputs[0]) is None:
            return context.skip(node, f"the result of {conv.name} is read elsewhere too")
        dims = shape_of(conv.inputs[1]) or ()
        channels, rank = int(dims[0] or 0), len(dims)
        given = np.asarray(graph.read(factor))
        if not pattern.per_channel(given.shape, rank, channels):
            what = "adds" if node.op == "Add" else "multiplies by"
            return context.skip(node, f"what it {what} is not one number per channel")
        own = graph.optional_input(conv, 2)
        if own is not None and not is_constant(own):
            return context.skip(node, "the Conv's own bias is computed")
        numbers = np.broadcast_to(given.reshape(-1), (channels,))
        if node.op == "Add":
            bias = numbers if own is None else numbers + np.asarray(graph.read(own))
        else:
            bias = None if own is None else numbers * np.asarray(graph.read(own))
            graph.replace_input(conv, 1, self._scaled(graph, conv, node, numbers))
        if bias is not None:
            # not named after the Conv: another one may follow
            graph.replace_input(conv, 2, graph.constant(f"{node.name}.bias.folded", bias))
        result = node.outputs[0]
        graph.remove(node)
        graph.set_output(conv, 0, result)
        return True

    @staticmethod
    def _scaled(graph: Graph, conv: Node, node: Node, factors: npt.NDArray[np.generic]) -> Tensor:
        weight = conv.inputs[1]
        values = np.asarray(graph.read(weight))
        shared = len(graph.consumers(weight)) > 1
        name = f"{weight.name}.{node.name}.scaled" if shared else f"{weight.name}.scaled"
        return graph.constant(name, values * factors.reshape(-1, *[1] * (values.ndim - 1)))
