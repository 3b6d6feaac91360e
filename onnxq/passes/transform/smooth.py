"""layer(x) -> layer'(x / s): outliers of x go into the weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from onnxq.errors import GraphError
from onnxq.graph import Graph, Node, Tensor
from onnxq.passes.absorbing import Constant, absorber, unused
from onnxq.passes.families import plain, widen
from onnxq.passes.manager import Context, Pass
from onnxq.plan import Smoothing

Floats = npt.NDArray[np.float32]
ABSORBED, SMOOTHED, SPLIT = ".absorbed", ".smoothed", ".split"
SCALED = "onnxq.scaled"  # metadata: the tensors, as JSON, whose channels are not those of the float model


@dataclass(frozen=True)
class Smooth(Pass):
    """MatMul(x, W) -> MatMul(x / s, s W), likewise Gemm and Conv; s float32 [C], one positive factor per input channel.

    The division is done by the constants above that x is proportional to, such as a normalisation's gain; where there
    are none, by a Mul with 1 / s, `x.smooth`, that all layers of the Plan's Smoothing read. Outlier channels may be
    repeated first, by columns of the layers above: n copies of a channel, each with an n-th of s W, need an n-th of its
    range. Float results stay the same but for rounding. Source: SmoothQuant (2211.10438); outlier channel splitting
    (1901.09504); MatMul-13, Gemm-13, Conv-11.
    """

    name: ClassVar[str] = "smooth"

    def run(self, graph: Graph, context: Context) -> bool:
        """Scale what each Smoothing of the Plan names."""
        changed = False
        for found in context.plan.smoothings.values():
            changed |= self._smooth(graph, found)
        return changed

    def _smooth(self, graph: Graph, found: Smoothing) -> bool:
        nodes = {n.name: n for n in graph.nodes}
        layers = [nodes[name] for name in found.layers]
        x = layers[0].inputs[0]
        if x.name != found.tensor:
            return False  # they read `x.smooth` already
        if all(SMOOTHED in n.inputs[1].name for n in layers):
            return False
        if found.source is not None:
            wide = plain(graph, found.layers, int(found.source.max()) + 1)
            if wide is None:
                raise GraphError(f"no columns above {x.name!r} can be repeated for the plan; this is a bug in onnxq")
            widen(graph, wide, found.source, SPLIT)
            tell(graph, wide.tensors)
        if found.absorbed:
            above = absorber(graph, x, frozenset(found.layers), found.factors.size, found.axis)
            if above is None:
                raise GraphError(f"nothing above {x.name!r} takes the factors of the plan; this is a bug in onnxq")
            for constant in above.constants:
                _divide(graph, nodes[constant.node], constant, _by_slice(found.factors, above.tie))
            tell(graph, above.tensors)
        else:
            smoothed = _mul(graph, x, found.factors)
            for node in layers:
                graph.replace_input(node, 0, smoothed)
        for node in layers:
            _multiply(graph, node, found)
        return True


def scaled_tensors(graph: Graph) -> set[str]:
    """Names of tensors that hold something else than those of the same names in the float model."""
    return set(json.loads(graph.metadata.get(SCALED, "[]")))


def tell(graph: Graph, tensors: Iterable[str]) -> None:
    """Note that tensors hold something else than those of the same names in the float model."""
    graph.metadata[SCALED] = json.dumps(sorted(scaled_tensors(graph) | set(tensors)))


def _by_slice(s: Floats, tie: npt.NDArray[np.int64] | None) -> Floats:
    """The factor of each slice; channels of the same slice share theirs."""
    if tie is None:
        return s
    slices = np.ones(int(tie.max()) + 1, np.float32)
    slices[tie] = s
    return slices


def _divide(graph: Graph, node: Node, constant: Constant, s: Floats) -> None:
    old = node.inputs[constant.index]
    values = np.asarray(graph.read(old), np.float32)
    shape = [1] * values.ndim
    shape[constant.axis] = s.size
    graph.replace_input(node, constant.index,
                        graph.constant(unused(graph, old.name, ABSORBED), values / s.reshape(shape)))


def _mul(graph: Graph, x: Tensor, s: Floats) -> Tensor:
    inverse = graph.constant(f"{x.name}.smooth.factors", (1 / s).astype(np.float32))
    smoothed = graph.like(x, f"{x.name}.smooth")
    graph.add_node("Mul", f"{x.name}/smooth", [x, inverse], [smoothed])
    return smoothed


def _multiply(graph: Graph, node: Node, found: Smoothing) -> None:
    old = node.inputs[1]
    values = np.asarray(graph.read(old), np.float32)
    if found.source is not None:
        values = values[found.source]
    values = scaled(values, (found.factors / found.copies).astype(np.float32), node)
    graph.replace_input(node, 1, graph.constant(unused(graph, old.name, SMOOTHED), values))


def scaled(weight: Floats, s: Floats, node: Node) -> Floats:
    """A weight times the factors of its input channels: rows of [K, N], or axis 1 of a Conv's [M, C, ..] by group."""
    if node.op != "Conv":
        return weight * s[:, None]
    groups = int(node.attrs.get("group", 1))
    by_group = weight.reshape(groups, -1, *weight.shape[1:]) * s.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
    return by_group.reshape(weight.shape)
