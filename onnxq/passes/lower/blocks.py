"""A layer or look-up on decoded blocks  =>  the kernel that decodes them as it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import CONTRIB, Graph, Node, Shared, Tensor, is_constant, shape_of
from onnxq.passes.blocks import Layout, decoded_for, layout, packed, part_names
from onnxq.passes.manager import Context, Pass
from onnxq.plan import NodePlan

_INTEGER = 4  # accuracy_level of MatMulNBits: activations are rounded to int8 in blocks, and products are of integers


@dataclass(frozen=True)
class LowerBlocks(Pass):
    """MatMul(x, decoded W) (+ bias) => MatMulNBits(x, blobs, scales, zero_points, bias), and the same of Gemm;
    Gather(decoded T, i) => GatherBlockQuantized(rows, i, scales, zero_points).

    x float32 [.., K]; blobs uint8 [N, nb, B * bits / 8], scales float32 [N, nb], zero_points uint8
    [N, ceil(nb * bits / 8)], left out for symmetric codes, which are shifted by 2**(bits - 1); rows uint8
    [V, ceil(D * bits / 8)] for T [V, D] with blocks along D.
    Source: com.microsoft MatMulNBits-1 and GatherBlockQuantized-1.
    """

    name: ClassVar[str] = "lower-blocks"

    def run(self, graph: Graph, context: Context) -> bool:
        """Weights are packed as they are saved; what decoded them goes where nobody reads it any more."""
        shared, found = Shared(), False
        for node, holder in list(graph.walk()):
            verdict = decoded_for(node, context)
            if verdict is not None:
                self._lower(holder, graph, node, verdict, context, shared)
                found = True
        if found:
            for holder in graph.graphs():
                holder.prune()
                holder.sort()
        return found

    def _lower(self, holder: Graph, graph: Graph, node: Node, verdict: NodePlan, context: Context,
               shared: Shared) -> None:
        assert verdict.weight is not None
        form = layout(context.plan, verdict.weight)
        assert form is not None
        stored = _stored(graph, context.weights[verdict.weight], form, context, shared)
        attrs = {"bits": form.dtype.bits, "block_size": form.block_size}
        if node.op == "Gather":
            codes, *rest = stored
            indices, result = node.inputs[1], node.outputs[0]
            holder.remove(node)
            holder.add_node("GatherBlockQuantized", verdict.node, [codes, indices, *rest], [result],
                            {"gather_axis": 0, "quantize_axis": 1, **attrs}, CONTRIB)
            return
        inputs, outputs = (int(d or 0) for d in shape_of(context.weights[verdict.weight]) or ())
        x, bias, result = node.inputs[0], holder.optional_input(node, 2), node.outputs[0]
        add = holder.only_consumer(result) if verdict.bias_add is not None else None
        if add is not None and add.name == verdict.bias_add:
            added = next(t for t in add.inputs if is_constant(t))
            bias = holder.constant(f"{verdict.node}.bias", np.asarray(holder.read(added), np.float32).reshape(-1))
            result = add.outputs[0]
            holder.remove(add)
        holder.remove(node)
        read = [x, *stored, *[None] * (4 - len(stored)), bias] if bias is not None else [x, *stored]
        holder.add_node("MatMulNBits", verdict.node, read, [result],
                        {"K": inputs, "N": outputs, "accuracy_level": _INTEGER, **attrs}, CONTRIB)


def _stored(graph: Graph, weight: Tensor, form: Layout, context: Context, shared: Shared) -> list[Tensor]:
    """[codes, scales, zero points where there are any] of a weight as constants of the outermost graph, made once.

    Blocks of a table and of the layer's weight that it is tied to are the same bytes: rows of the one are outputs of
    the other.
    """
    names = part_names(context.plan.ties.get(weight.name, weight.name), form)
    dims = [int(d or 0) for d in shape_of(weight) or ()]
    bits, count, rows = form.dtype.bits, form.count(dims), dims[1 - form.axis]
    codes = (rows, -(-dims[1] * bits // 8)) if form.axis else (rows, count, form.block_size * bits // 8)
    if not graph.has(names[0]):
        shapes = (codes, (rows, count), (rows, -(-count * bits // 8)))
        get = shared.parts(packed(graph, weight, context.plan), len(names))
        for name, dtype, shape, part in zip(names, (np.uint8, np.float32, np.uint8), shapes, get, strict=False):
            graph.computed(name, dtype, shape, part)
    found = [graph.made(name) for name in names]
    if shape_of(found[0]) != codes:
        made = f"{names[0]}.{'rows' if form.axis else 'outputs'}"
        if not graph.has(made):
            into = graph.constant(f"{made}.shape", np.asarray(codes, np.int64))
            graph.add_node("Reshape", f"{made}/reshape", [found[0], into], [graph.variable(made, "uint8", codes)])
        found[0] = graph.made(made)
    return found
