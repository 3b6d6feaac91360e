"""From an outline and measured ranges to a Plan with all scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from onnxq.errors import ModelError
from onnxq.graph import Graph, Node, Tensor
from onnxq.numerics import affine, outliers
from onnxq.numerics.affine import QuantParams
from onnxq.numerics.dtypes import INT8, by_name
from onnxq.plan import NodePlan, Plan
from onnxq.planner import few_channels, two_levels
from onnxq.planner.outline import Outline
from onnxq.planner.storing import channel_axis, stored_by
from onnxq.planner.weight_only import blocks
from onnxq.recipe import Recipe
from onnxq.schemes import Scheme, TensorSpec
from onnxq.targets import Target

COARSER = 2.0  # one bit of what is joined


def finish(found: Outline, graph: Graph, ranges: Mapping[str, tuple[float, float]], recipe: Recipe,
           target: Target, widths: Mapping[str, TensorSpec] = MappingProxyType({})) -> Plan:
    """Decide scales: activations from `ranges` (tensor -> (min, max)), weights from their values, one at a time.

    `widths` maps a weight to another format than the recipe's.

    Raises ModelError when a weight holds NaN or infinities.
    """
    plan = Plan(recipe.scheme.name, target.name, dict(found.nodes))
    spec = recipe.scheme.activations
    if spec is not None and not spec.dynamic:
        _activations(found, ranges, plan, spec)
    nodes = {n.name: n for n, _ in graph.walk()}
    for verdict in plan.nodes.values():
        if verdict.weight in found.formats and verdict.weight not in found.ties and verdict.part_of is None:
            plan.blocks.setdefault(verdict.weight, blocks(nodes[verdict.node], found.formats[verdict.weight]))
    plan.ties = dict(found.ties)
    for verdict in plan.quantized():
        if verdict.weight is not None and verdict.weight not in found.formats:
            own = replace(recipe.scheme, weights=widths.get(verdict.weight, recipe.scheme.weights))
            _weight(nodes[verdict.node], verdict, graph, plan, own, target)
    stored_weights(graph, plan, recipe.scheme, target, widths)
    return plan


def _activations(found: Outline, ranges: Mapping[str, tuple[float, float]], plan: Plan, spec: TensorSpec) -> None:
    dtype = by_name(spec.dtype)
    for name in found.ranges_of:
        low, high = ranges[name]
        if low == high == 0.0:
            high = 1.0  # nothing was seen; a scale of 1 would make the biases behind it coarse
        plan.activations[name] = affine.choose(low, high, dtype, symmetric=spec.symmetric)
        if name in found.halved:
            most = 2 * max(-low, high)
            plan.activations[name] = affine.choose(-most, most, dtype, symmetric=True)
    _share_in_concats(found, plan)
    for name, (low, high) in found.known.items():
        plan.activations[name] = affine.choose(low, high, dtype, symmetric=spec.symmetric)
    for name, source in found.same_as.items():  # sources come first: nodes are in execution order
        plan.activations[name] = plan.activations[source]


def _share_in_concats(found: Outline, plan: Plan) -> None:
    """Give what a Concat joins the scale of its result, where that is at most COARSER times its own.

    The kernel then copies codes; it looks each code up in a table otherwise, which takes longer than a float Concat.
    Where saturation is the Relu of what is joined, code 0 has to stay its 0; a Clip needs its other end, too.
    """
    own = dict(plan.activations)
    clamped = {plan.nodes[v.part_of].result: v.op for v in plan.nodes.values()
               if v.part_of is not None and v.op in ("Clip", "Relu")}
    taken: set[str] = set()
    for result, joined in reversed(found.concats.items()):
        for name in joined:
            while name in found.same_as:
                name = found.same_as[name]
            wider = plan.activations[result]
            if name in taken or name not in own or wider.scale > COARSER * own[name].scale:
                continue
            if clamped.get(name) == "Clip" or (name in clamped and wider.zero_point != own[name].zero_point):
                continue
            plan.activations[name] = wider
            taken.add(name)


def stored_weights(graph: Graph, plan: Plan, scheme: Scheme, target: Target,
                   widths: Mapping[str, TensorSpec] = MappingProxyType({})) -> None:
    """Decide the scales of weights that are stored as codes and decoded, and of an LSTM that runs on codes.

    Raises ModelError for NaN or infinities.
    """
    for node, _ in graph.walk():
        verdict = plan.node(node.name)
        for index, weight in stored_by(node, verdict):
            spec = widths.get(weight.name, scheme.weights)
            if spec is not None and weight.name not in plan.weights:
                values = finite(graph, weight, node)
                paired = target.saturates and verdict is not None and verdict.is_int
                axis, least = channel_axis(node, index, values.ndim), 0.0
                pairs = _largest_pairs(node, values, target) if paired else least
                plan.weights[weight.name] = (
                    affine.weight_params(values, axis, INT8, least=pairs) if spec.bits is None else
                    outliers.choose(values, axis, spec.bits, spec.fraction, spec.sigma_factor, pairs))
                if spec.bits is not None:
                    plan.widths[weight.name] = spec.bits


def _largest_pairs(node: Node, values: npt.NDArray[np.float32], target: Target) -> npt.NDArray[np.float64]:
    """[C]: what two weights that a kernel multiplies side by side add up to at most, by output channel.

    Kernels go along K of MatMul and Gemm, through a Conv's filter channels last, and along an LSTM's inputs. That of
    a depthwise Conv multiplies one by one. Channels that are padded make other pairs; in QDQ format none are.
    """
    if node.op == "Conv":
        if values.shape[1] == 1 and node.attrs.get("group", 1) == values.shape[0]:
            return np.zeros(1)
        rows, more = np.moveaxis(values, 1, -1), few_channels.missing(values.shape, target)
        pairs = affine.largest_pair(rows.reshape(len(rows), -1))
        if more:
            padded = np.pad(rows, ((0, 0), (0, 0), (0, 0), (0, more)))
            pairs = np.maximum(pairs, affine.largest_pair(padded.reshape(len(rows), -1)))
        return pairs
    return affine.largest_pair(values.transpose(1, 0, 2) if node.op == "LSTM" else values.T)


def weight_params(node: Node, values: npt.NDArray[np.float32], scheme: Scheme, target: Target,
                  index: int = 1) -> QuantParams:
    """Scales of the weight [K, N] or [M, C, ..] that is input `index` of a Conv, MatMul or Gemm."""
    spec = scheme.weights
    assert spec is not None
    axis = (0 if node.op == "Conv" or index == 0 else values.ndim - 1) if spec.granularity == "channel" else None
    pairs = _largest_pairs(node, values, target) if target.saturates else np.zeros(1)
    if spec.bits is not None and axis is not None:
        return outliers.choose(values, axis, spec.bits, spec.fraction, spec.sigma_factor, pairs)
    return affine.weight_params(values, axis, by_name(spec.dtype), least=pairs if axis is not None else pairs.max())


def finite(graph: Graph, weight: Tensor, node: Node) -> npt.NDArray[np.float32]:
    """A node's weight. Raises ModelError for NaN or infinities."""
    values = np.asarray(graph.read(weight), np.float32)
    if not np.isfinite(values).all():
        raise ModelError(f"the weights {weight.name!r} of {node.name} hold NaN or infinite values; "
                         "export the model again")
    return values


def _weight(node: Node, verdict: NodePlan, graph: Graph, plan: Plan, scheme: Scheme, target: Target) -> None:
    index = next(k for k, t in enumerate(node.inputs) if t.name == verdict.weight)
    weight = node.inputs[index]
    spec = scheme.weights
    assert spec is not None
    if weight.name not in plan.weights and scheme.has_two_levels:
        two_levels.begin(plan, weight.name, finite(graph, weight, node), spec)
    elif weight.name not in plan.weights:
        plan.weights[weight.name] = weight_params(node, finite(graph, weight, node), scheme, target, index)
        if spec.bits is not None:
            plan.widths[weight.name] = spec.bits
    bias = graph.optional_input(node, 2)  # of Conv and Gemm; a MatMul has two inputs
    if bias is not None and not np.isfinite(graph.read(bias)).all():
        raise ModelError(f"the bias {bias.name!r} of {node.name} holds NaN or infinite values; export the model again")
    if bias is not None and node.inputs[0].name in plan.activations:
        params = plan.weights[weight.name]
        try:
            scale, _ = affine.bias_params(plan.activations[node.inputs[0].name].scale, params.scale,
                                          np.asarray(graph.read(bias), np.float32))
        except ValueError:
            raise ModelError(f"no int32 scale holds the bias of {node.name} beside its tiny activations; "
                             f"keep it float with --keep-float {node.name!r}") from None
        if not np.array_equal(scale, params.scale):  # a shared weight keeps the largest scale that any bias needs
            plan.weights[weight.name] = QuantParams(np.maximum(scale, params.scale), params.zero_point, params.dtype,
                                                    params.axis)

