"""DQ -> AveragePool -> (Relu) -> Q  =>  QLinearConv with filters of ones."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from onnxq.graph import Graph, Node, Tensor, shape_of
from onnxq.numerics import pooling
from onnxq.passes import pattern
from onnxq.passes.manager import Context, Pass

KERNEL = "QLinearConv"


def divisors(node: Node) -> npt.NDArray[np.int64] | None:
    """What the sums over the windows of an AveragePool are divided by: [OH, OW], or [] where that is one number.

    None where it depends on sizes that are not known, or where a window is all padding or there is none. The pool has
    no auto_pad but VALID, and ceil_mode 0.
    """
    window, pads = node.attrs["kernel_shape"], _pads(node)
    if not any(pads) or node.attrs.get("count_include_pad", 0):
        return np.asarray(prod(window))
    sizes = [d for d in (shape_of(node.inputs[0]) or ())[2:] if isinstance(d, int)]
    if len(sizes) < len(window):
        return None
    counts = pooling.window_counts(sizes, window, node.attrs.get("strides", [1] * len(window)), pads)
    return counts if counts.size and counts.min() else None


def _pads(node: Node) -> list[int]:
    return list(node.attrs.get("pads", ())) if node.attrs.get("auto_pad", "NOTSET") == "NOTSET" else []


@dataclass(frozen=True)
class PoolToConv(Pass):
    """The mean over windows [kH, kW] of x [N, C, H, W] as a Conv of group C: W int8 [C, 1, kH, kW], all 1, whose scale
    float32 [] divides the sum.

    Padding adds 0. Where it counts as elements, too, the scale is 1 / (kH kW) everywhere. Else each number of elements
    gets a Conv of its own, and a Where with a mask bool [1, 1, OH, OW] takes from each what it divides rightly. Either
    way the int32 sum is rounded once; two products of 255 by 1 fit the 16 bits of processors without VNNI.
    Source: ONNX AveragePool-22, QLinearConv-10, Where-9.
    """

    name: ClassVar[str] = "pool-to-conv"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Lower one AveragePool that the Plan gives to the kernel of Conv."""
        verdict = context.plan.node(node.name)
        if node.op != "AveragePool" or verdict is None or verdict.lowering != KERNEL:
            return False
        x, found = pattern.read(graph, node.inputs[0]), pattern.stored(graph, node.outputs[0], context.absorbed)
        if x is None or not pattern.activation(x) or found is None or not pattern.activation(found.codes):
            return context.skip(node, "not everything around it is uint8 codes")
        channels, by = (shape_of(node.inputs[0]) or (None, None))[1], divisors(node)
        if not isinstance(channels, int) or by is None:
            return context.skip(node, "how many channels it has, or elements each window, is not known")
        attrs: dict[str, Any] = {"kernel_shape": node.attrs["kernel_shape"], "group": channels}
        if any(_pads(node)):
            attrs["pads"] = _pads(node)
        if "strides" in node.attrs:
            attrs["strides"] = node.attrs["strides"]
        ones = graph.constant(f"{node.name}.ones", np.ones((channels, 1, *attrs["kernel_shape"]), np.int8))
        self._write(graph, node, x, found, ones, attrs, by)
        return True

    @staticmethod
    def _write(graph: Graph, node: Node, x: pattern.Codes, found: pattern.Stored, ones: Tensor, attrs: dict[str, Any],
               by: npt.NDArray[np.int64]) -> None:
        """A Conv for each divisor, the greatest first, under the name of the pool."""
        name, made = node.name, [found.codes.scale, found.codes.zero_point]
        no_shift = graph.constant(f"{name}.no_shift", np.zeros((), np.int8))
        first, *others = np.unique(by)[::-1].tolist()

        def inputs(divisor: int, end: str) -> list[Tensor | None]:
            share = graph.constant(f"{name}.share{end}", np.asarray(1 / divisor, np.float32))
            return [*x.inputs, ones, share, no_shift, *made]

        conv = pattern.finish(graph, node, found, KERNEL, inputs(first, ""), attrs, None)
        if not others:
            return
        result = conv.outputs[0]
        chosen = graph.like(result, f"{name}.mean.q")
        graph.set_output(conv, 0, chosen)
        for k, divisor in enumerate(others, 1):
            mean = graph.like(result, f"{name}.mean.{k}.q")
            graph.add_node(KERNEL, f"{name}/mean_{k}", inputs(divisor, f".{k}"), [mean], attrs)
            here = graph.constant(f"{name}.here.{k}", (by == divisor)[None, None])
            joined = result if divisor == others[-1] else graph.like(result, f"{name}.joined.{k}.q")
            graph.add_node("Where", f"{name}/where_{k}", [here, mean, chosen], [joined])
            chosen = joined
