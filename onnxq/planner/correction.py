"""How far int8 shifts each layer's mean, so that its bias can take the shift back.

Every Conv, ConvTranspose and Gemm with a bias gets a shadow in a copy of the float graph: the same operator on weights
(and, where they are stored as codes, activations) that were quantized and dequantized. The per-channel mean of original
minus shadow is the layer's own error; one streamed run gives all.
Source: the bias correction of "Data-Free Quantization Through Weight Equalization and Bias Correction" (1906.04721),
section 4.2, in its empirical form. Not for MatMul: a transformer's rows are tokens, padding among them, whose mean says
little (measured: no gain in cosine, a loss in rank correlation).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from onnxq.calibration import observer
from onnxq.calibration.readers import Dataset
from onnxq.graph import Graph, Node, Tensor, is_constant, shape_of
from onnxq.numerics import affine
from onnxq.numerics.affine import QuantParams
from onnxq.numerics.correction import MeanError
from onnxq.plan import Plan
from onnxq.recipe import Calibration
from onnxq.runtime.session import SessionOptions

_CORRECTED = frozenset({"Conv", "ConvTranspose", "Gemm"})
ROWS = 128  # enough for a mean; the shadows cost more than the float model itself


def mean_errors(graph: Graph, plan: Plan, data: Dataset, how: Calibration, options: SessionOptions,
                progress: Callable[[int], None] | None = None) -> dict[str, npt.NDArray[np.float32]]:
    """Node name -> float32 [C], what to add to its bias; nodes without a bias of their own are left out."""
    shadowed, outputs = shadow(graph, plan)
    if not outputs:
        return {}
    few = replace(how, samples=min(ROWS, how.samples or ROWS))
    folds = {tensor: MeanError() for tensor in outputs.values()}
    observer.fold(shadowed, folds, data, few, options, progress)
    return {node: folds[tensor].result() for node, tensor in outputs.items()}


def shadow(graph: Graph, plan: Plan) -> tuple[Graph, dict[str, str]]:
    """A copy of the float graph with shadows, and per node the tensor [C] that holds its mean error."""
    copy = graph.copy()
    nodes = {n.name: n for n in copy.nodes}
    outputs: dict[str, str] = {}
    for verdict in plan.nodes.values():
        node = nodes.get(verdict.node)
        bias = copy.optional_input(node, 2) if node is not None and node.op in _CORRECTED else None
        if node is None or bias is None or not is_constant(bias):
            continue
        x, w = node.inputs[:2]
        if verdict.weight == w.name and x.name in plan.activations:
            x = _decoded_activation(copy, x, plan.activations[x.name])
        elif w.name not in verdict.stored:
            continue
        w = _decoded_weight(copy, w, plan)
        outputs[node.name] = _mean_difference(copy, node, [x, w, bias])
    copy.sort()
    return copy, outputs


def _decoded_activation(graph: Graph, x: Tensor, params: QuantParams) -> Tensor:
    if not graph.has(f"{x.name}.shadow"):
        scale = graph.constant(f"{x.name}.shadow.scale", params.scale)
        zero_point = graph.constant(f"{x.name}.shadow.zero_point", params.zero_point)
        codes = graph.like(x, f"{x.name}.shadow.q", params.dtype.storage)
        decoded = graph.like(x, f"{x.name}.shadow", "float32")
        graph.add_node("QuantizeLinear", f"{x.name}/shadow_quantize", [x, scale, zero_point], [codes])
        graph.add_node("DequantizeLinear", f"{x.name}/shadow_dequantize", [codes, scale, zero_point], [decoded])
    return graph.made(f"{x.name}.shadow")


def _decoded_weight(graph: Graph, w: Tensor, plan: Plan) -> Tensor:
    if not graph.has(f"{w.name}.shadow"):
        params, codes = plan.weights[w.name], plan.rounded.get(w.name)
        codes = affine.quantize(graph.read(w), params) if codes is None else codes
        graph.constant(f"{w.name}.shadow", affine.dequantize(codes, params))
    return graph.made(f"{w.name}.shadow")


def _mean_difference(graph: Graph, node: Node, inputs: list[Tensor]) -> str:
    """Add operator, difference and mean over all axes but the channel's, which is 1 for all of them."""
    name, result = node.name, node.outputs[0]
    shadowed = graph.like(result, f"{name}.shadowed", "float32")
    graph.add_node(node.op, f"{name}/shadow", inputs, [shadowed], dict(node.attrs))
    error = graph.like(result, f"{name}.error", "float32")
    graph.add_node("Sub", f"{name}/error", [result, shadowed], [error])
    axes = [k for k in range(len(shape_of(node.inputs[1]) or ())) if k != 1]
    mean = graph.variable(f"{name}.mean_error", "float32")
    graph.add_reduction("ReduceMean", f"{name}/mean_error", error, mean, axes, keepdims=False)
    return str(mean.name)
