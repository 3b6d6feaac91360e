"""A BatchNormalization that nothing can absorb -> a Conv of one number per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, dtype_of, is_constant, shape_of
from onnxq.passes.manager import Context, Pass

_BLOCK = 16  # channels in a block of the runtime's float convolutions (MLAS NCHWc: 8 or 16), and of its int8 depthwise


@dataclass(frozen=True)
class BatchNormToConv(Pass):
    """BN(x) -> Conv(x, W, b) with group C, W [C, 1, 1, 1] = gamma / sqrt(var + epsilon), b = beta - mean * W.

    x is [N, C, H, W] with C a multiple of 16, and its maker is no layer that fold-batchnorm folds into: behind a Concat
    (DenseNet), an Add (ResNet v2) or a pool. onnxruntime makes the same of it in float, within its blocked layout; as a
    Conv it takes the Relu behind it into its kernel and has an integer form, too. Computed in float64, stored in x's
    type. Source: ONNX BatchNormalization-9 to -15 in inference, Conv-11.
    """

    name: ClassVar[str] = "batchnorm-to-conv"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Rewrite one BatchNormalization."""
        if node.op != "BatchNormalization" or node.domain or dtype_of(node.outputs[0]) != np.float32:
            return False
        if node.attrs.get("training_mode", 0) or any(t.name and len(t.outputs) for t in node.outputs[1:]):
            return context.skip(node, "it trains")
        if not all(is_constant(t) for t in node.inputs[1:5]):
            return context.skip(node, "its statistics are computed")
        maker, dims = graph.producer(node.inputs[0]), shape_of(node.inputs[0]) or ()
        if maker is None or maker.op in ("Conv", "ConvTranspose", "Gemm"):
            return context.skip(node, "it reads an input of the model, or a layer that other nodes read, too")
        channels = int((shape_of(node.inputs[1]) or (0,))[0] or 0)
        if len(dims) != 4 or channels % _BLOCK:
            return context.skip(node, f"what it reads is not [N, C, H, W] with C a multiple of {_BLOCK}")
        gamma, beta, mean, var = (np.asarray(graph.read(t), np.float64) for t in node.inputs[1:5])
        gain = gamma / np.sqrt(var + float(node.attrs.get("epsilon", 1e-5)))
        weight = graph.constant(f"{node.name}.gain", gain.reshape(-1, 1, 1, 1).astype(np.float32))
        bias = graph.constant(f"{node.name}.shift", (beta - mean * gain).astype(np.float32))
        x, y, name = node.inputs[0], node.outputs[0], node.name
        extra = graph.extras.get(name)
        graph.remove(node)
        graph.add_node("Conv", name, [x, weight, bias], [y], {"kernel_shape": [1, 1], "group": channels})
        if extra is not None:
            graph.extras[name] = extra
        return True
