"""layer(x) -> layer'(x without some channels)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from onnxq.errors import GraphError
from onnxq.graph import Graph, Node, dtype_of, is_constant, shape_of
from onnxq.passes.absorbing import unused
from onnxq.passes.families import family, fits, keep
from onnxq.passes.manager import Context, Pass
from onnxq.passes.transform.smooth import tell
from onnxq.plan import Narrowed

NARROWED = ".narrowed"


@dataclass(frozen=True)
class RemoveChannels(Pass):
    """MatMul(x, W) -> MatMul(x', W'), x' [.., C'] the channels of x [.., C] that stay, W' float32 [K', N]; likewise
    Gemm, and Conv on x' [N, C', ..] with W' [M, C', ..].

    The layers above make no other channels any more: their columns or filters are taken out, what lies between gets
    narrower, and so do all layers that read channels tied to them: behind the Adds of a residual network, the slices of
    a Concat, or the heads of an attention. W', and what is added to biases, are the Plan's: what makes up for the
    channels that are gone.
    Source: ZipLM (arXiv 2302.04089); MatMul-13, Gemm-13, Conv-11.
    """

    name: ClassVar[str] = "remove-channels"

    def run(self, graph: Graph, context: Context) -> bool:
        """Narrow what the Plan names."""
        changed = False
        for found in context.plan.narrowed.values():
            changed |= self._narrow(graph, found)
        return changed

    @staticmethod
    def _narrow(graph: Graph, one: Narrowed) -> bool:
        nodes = {n.name: n for n in graph.nodes}
        layers = [nodes[name] for name in one.layers]
        if all(inputs(node) == weight.shape[_along(node)] for node, weight in zip(layers, one.weights, strict=True)):
            return False  # they are gone already
        found = family(graph, layers[0], one.grouped)
        if found is None or not fits(found, one.count, one.kept, one.layers):
            raise GraphError(f"no channels of {one.tensor!r} can be taken out as the plan says; this is a bug in onnxq")
        keep(graph, found, one.kept, NARROWED)
        tell(graph, found.tensors)
        for node, weight, shift in zip(layers, one.weights, one.shifts, strict=True):
            give(graph, node, weight, shift)
        return True


def give(graph: Graph, layer: Node, weight: npt.NDArray[np.float32], shift: npt.NDArray[np.float32]) -> None:
    """Give a layer another weight, and add to its bias, float32 [N]; [0] adds nothing."""
    name = unused(graph, layer.inputs[1].name, NARROWED)
    graph.replace_input(layer, 1, graph.constant(name, np.asarray(weight, np.float32)))
    if shift.size:
        _add(graph, layer, shift)


def inputs(node: Node) -> int:
    """The input channels of a layer's weight."""
    return int((shape_of(node.inputs[1]) or ())[_along(node)] or 0)


def _along(node: Node) -> int:
    return 1 if node.op == "Conv" else 0


def bias_of(graph: Graph, layer: Node) -> tuple[Node, int] | None:
    """The node and the index of its input that hold a number for each output of a layer, or may hold one: a Conv's or
    Gemm's bias, or what an Add adds to a product. None where there is none."""
    if layer.op != "MatMul":
        bias = graph.optional_input(layer, 2)
        stored = bias is None or (is_constant(bias) and dtype_of(bias) == np.float32)
        return (layer, 2) if stored and (bias is None or _per_output(shape_of(bias), layer)) else None
    add = graph.only_consumer(layer.outputs[0])
    if add is None or add.op != "Add" or add.domain:
        return None
    index = 1 if add.inputs[0] is layer.outputs[0] else 0
    bias = add.inputs[index]
    fits = is_constant(bias) and dtype_of(bias) == np.float32 and _per_output(shape_of(bias), layer)
    return (add, index) if fits else None


def _per_output(dims: tuple[int | str | None, ...] | None, layer: Node) -> bool:
    """Whether dimensions are [N] or [1, .., N] for N outputs."""
    outputs = (shape_of(layer.inputs[1]) or ())[0 if layer.op == "Conv" else 1]
    return dims is not None and dims[-1:] == (outputs,) and all(d == 1 for d in dims[:-1])


def _add(graph: Graph, layer: Node, shift: npt.NDArray[np.float32]) -> None:
    found = bias_of(graph, layer)
    assert found is not None
    node, index = found
    old = graph.optional_input(node, index)
    if old is None:
        name, values = unused(graph, f"{layer.name}.bias", NARROWED), shift
    else:
        name, values = unused(graph, old.name, NARROWED), np.asarray(graph.read(old), np.float32) + shift
    graph.replace_input(node, index, graph.constant(name, values))
