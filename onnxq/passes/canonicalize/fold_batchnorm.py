"""BatchNormalization behind Conv, ConvTranspose or Gemm -> their weights and bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, is_constant, shape_of
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """BN(Conv(x, W) + b) -> Conv(x, W * g) + (b - mean) * g + beta with g = gamma / sqrt(var + epsilon) per channel.

    W is [M, ...] (Conv), [C, M, ...] (ConvTranspose) or [K, M] ([M, K] with transB; Gemm); computed in float64, stored
    in W's type. A Gemm's beta goes into its bias, which keeps its form ([M], [1, M], [N, 1] ...) where it has one.
    Source: ONNX BatchNormalization-9 to -15 in inference.
    """

    name: ClassVar[str] = "fold-batchnorm"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Fold one BatchNormalization into its producer."""
        if node.op != "BatchNormalization" or node.domain:
            return False
        if node.attrs.get("training_mode", 0) or any(t.name and len(t.outputs) for t in node.outputs[1:]):
            return context.skip(node, "it trains")
        source = node.inputs[0]
        producer = graph.producer(source)
        if producer is None or producer.op not in ("Conv", "ConvTranspose", "Gemm") or producer.domain:
            return context.skip(node, "what feeds it has no weights to fold into")
        if graph.only_consumer(source) is None:
            return context.skip(node, f"the result of {producer.name} is read elsewhere too")
        stored = [*producer.inputs[1:], *node.inputs[1:]]
        if not all(is_constant(t) for t in stored if t.name):
            return context.skip(node, "weights or statistics are computed")
        if producer.op == "ConvTranspose" and producer.attrs.get("group", 1) != 1:
            return context.skip(node, "a grouped ConvTranspose interleaves its channels")
        if producer.op == "Gemm" and producer.attrs.get("alpha", 1.0) != 1.0:
            return context.skip(node, "the Gemm scales its product")
        self._fold(node, producer, graph)
        return True

    def _fold(self, node: Node, producer: Node, graph: Graph) -> None:
        gamma, beta, mean, var = (np.asarray(graph.read(t), np.float64) for t in node.inputs[1:5])
        gain = gamma / np.sqrt(var + float(node.attrs.get("epsilon", 1e-5)))
        weight, bias = producer.inputs[1], graph.optional_input(producer, 2)
        channels = len(gain)
        old_bias = np.zeros(channels) if bias is None else np.asarray(graph.read(bias), np.float64)
        if producer.op == "Gemm":
            old_bias = old_bias * float(producer.attrs.pop("beta", 1.0))
        shape = [1] * len(shape_of(weight) or ())
        shape[_channel_axis(producer)] = channels
        values = np.asarray(graph.read(weight))
        folded = (values.astype(np.float64) * gain.reshape(shape)).astype(values.dtype)
        result = node.outputs[0]
        # a weight that several layers share is folded once for each
        shared = len(graph.consumers(weight)) > 1
        name = f"{weight.name}.{producer.name}.bn" if shared else f"{weight.name}.bn"
        graph.replace_input(producer, 1, graph.constant(name, folded))
        new_bias = ((old_bias - mean) * gain + beta).astype(values.dtype)
        graph.replace_input(producer, 2, graph.constant(f"{node.name}.bias.bn", new_bias))
        graph.remove(node)
        graph.set_output(producer, 0, result)


def _channel_axis(producer: Node) -> int:
    """Axis of the weight along which output channels lie."""
    if producer.op == "Conv" or (producer.op == "Gemm" and producer.attrs.get("transB", 0)):
        return 0
    return 1
