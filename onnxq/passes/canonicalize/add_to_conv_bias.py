"""Conv -> Add(constant per channel) -> Conv with a bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, is_constant, shape_of
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class AddToConvBias(Pass):
    """Conv(x, W) + c -> Conv(x, W, c), where c is [M, 1, ..] or [1, M, 1, ..] for an output of M channels.

    Older exporters (CNTK, Keras) write the bias so; as an Add it would be quantized as a tensor of its own.
    """

    name: ClassVar[str] = "add-to-conv-bias"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Fold one Add."""
        if node.op != "Add" or node.domain:
            return False
        index = next((i for i, t in enumerate(node.inputs) if is_constant(t)), None)
        if index is None:
            return False
        source = node.inputs[1 - index]
        conv = graph.producer(source)
        if conv is None or conv.op != "Conv" or conv.domain or not is_constant(conv.inputs[1]):
            return False
        if graph.only_consumer(source) is None:
            return context.skip(node, f"the result of {conv.name} is read elsewhere too")
        dims = shape_of(conv.inputs[1]) or ()
        channels, rank = int(dims[0] or 0), len(dims)
        added = np.asarray(graph.read(node.inputs[index]))
        padded = (1,) * (rank - added.ndim) + added.shape
        if len(padded) != rank or padded[1] not in (1, channels) or any(d != 1 for k, d in enumerate(padded) if k != 1):
            return context.skip(node, "what it adds is not one number per channel")
        bias = np.broadcast_to(added.reshape(-1), (channels,))
        own = graph.optional_input(conv, 2)
        if own is not None:
            if not is_constant(own):
                return context.skip(node, "the Conv's own bias is computed")
            bias = bias + np.asarray(graph.read(own))
        # not named after the Conv: a second Add may follow
        graph.replace_input(conv, 2, graph.constant(f"{node.name}.bias.added", bias))
        result = node.outputs[0]
        graph.remove(node)
        graph.set_output(conv, 0, result)
        return True
