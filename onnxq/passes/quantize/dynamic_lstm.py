"""LSTM(x, W, R) -> DynamicQuantizeLSTM(x, Wq, Rq)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import CONTRIB, Graph, Node, Tensor
from onnxq.numerics import affine
from onnxq.numerics.affine import QuantParams
from onnxq.passes.manager import Context, Pass

KERNEL = "DynamicQuantizeLSTM"
_LAST_INPUT = 7  # P, the peepholes; what the operator needs of scales follows


@dataclass(frozen=True)
class QuantizeLSTM(Pass):
    """LSTM(x, W, R, ...) -> DynamicQuantizeLSTM(x, Wq, Rq, ..., scales and zero points), in bodies, too.

    x is float32 [S, N, I] and stays so; W is float32 [D, 4H, I] and R [D, 4H, H] for D directions and the gates i, o,
    f, c. Wq is int8 [D, I, 4H], Rq int8 [D, H, 4H]: the codes of W and R with their last two axes swapped. Their
    scales are float32 [D, 4H], a scale per row of a gate; their zero points, int8 [D, 4H], must be 0. The kernel
    quantizes all of x with one scale, and at each step the hidden states of the sequences that a thread works on; so a
    sequence's result depends a little on the others in the batch and on the number of threads. Products accumulate in
    int32; biases, peepholes, states and gates are float32.
    Source: com.microsoft DynamicQuantizeLSTM-1 and its CPU kernel.
    """

    name: ClassVar[str] = "dynamic-lstm"

    def run(self, graph: Graph, context: Context) -> bool:
        """Rewrite every LSTM that the Plan gives to the kernel."""
        changed = False
        for node, holder in list(graph.walk()):
            verdict = context.plan.node(node.name)
            if node.op != "LSTM" or verdict is None or verdict.lowering != KERNEL:
                continue
            if node.attrs.get("layout", 0):
                context.skip(node, "its layout is batch first, which the kernel does not take")
                continue
            self._rewrite(node, holder, graph, context)
            changed = True
        return changed

    @staticmethod
    def _rewrite(node: Node, holder: Graph, graph: Graph, context: Context) -> None:
        weights, recurrence = node.inputs[1:3]
        codes, scales, zeros = _stored(graph, weights, context.plan.weights[weights.name])
        r_codes, r_scales, r_zeros = _stored(graph, recurrence, context.plan.weights[recurrence.name])
        kept = [graph.optional_input(node, k) for k in range(3, _LAST_INPUT + 1)]
        inputs = [node.inputs[0], codes, r_codes, *kept, scales, zeros, r_scales, r_zeros]
        attrs = {k: v for k, v in node.attrs.items() if k != "layout"}
        name, outputs = node.name, list(node.outputs)
        holder.remove(node)
        holder.add_node(KERNEL, name, inputs, outputs, attrs, CONTRIB)
        holder.sort()


def _stored(graph: Graph, weight: Tensor, params: QuantParams) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, zero points) as constants `w.lstm.q`, `w.lstm.scale`, `w.lstm.zero_point`; made once.

    They belong to the outermost graph, as LSTMs of several bodies may share a weight. The scales of `params`, float32
    [4H] along axis 1 or one for all, serve both directions.
    """
    name = f"{weight.name}.lstm"
    if not graph.has(f"{name}.q"):
        codes = affine.quantize(graph.read(weight), params)
        graph.constant(f"{name}.q", codes.transpose(0, 2, 1))
        graph.constant(f"{name}.scale", np.broadcast_to(params.scale, codes.shape[:2]))
        graph.constant(f"{name}.zero_point", np.broadcast_to(params.zero_point, codes.shape[:2]))
    return graph.made(f"{name}.q"), graph.made(f"{name}.scale"), graph.made(f"{name}.zero_point")
