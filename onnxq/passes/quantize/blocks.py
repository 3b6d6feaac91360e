"""W -> (Cast(Wq) - zero point) * scale, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxq.graph import Graph, Shared, Tensor, is_constant, shape_of
from onnxq.passes.blocks import Array, Layout, bounds, coded, divided, layout, matrix_shape, step
from onnxq.passes.manager import Context, Pass
from onnxq.plan import UNTOUCHED, Plan


@dataclass(frozen=True)
class StoreBlocks(Pass):
    """op(x, W) -> op(x, Reshape((Cast(Wq) - zero_point) * scale)), W float32 [K, N] (of a look-up [V, D], of a Conv
    [M, C, ..], taken for [M, K]).

    Wq int8 or uint8 [nb, B, N] ([V, nb, B]) holds codes of any width, scale float32 and zero_point [nb, 1, N]
    ([V, nb, 1]); zero_point is left out for symmetric codes; a Slice takes off what fills up the last block. The
    runtime folds all of it as it loads the model. Source: ONNX DequantizeLinear-21 with block_size, which it would not
    fold.
    """

    name: ClassVar[str] = "store-blocks"

    def run(self, graph: Graph, context: Context) -> bool:
        """What decodes stands in the outermost graph, whoever reads it: it does so once, and the bodies see it."""
        shared, found = Shared(), False
        constants = {t.name: t for node, _ in graph.walk() for t in node.inputs if t.name and is_constant(t)}
        for node, holder in list(graph.walk()):
            verdict = context.plan.node(node.name)
            if verdict is None or verdict.activation != UNTOUCHED or verdict.weight is None:
                continue
            index = next((k for k, t in enumerate(node.inputs) if t.name == verdict.weight), None)
            if index is None:
                continue
            found = True
            context.weights[verdict.weight] = node.inputs[index]
            weight, source = node.inputs[index], constants.get(context.plan.ties.get(verdict.weight, ""))
            made = (self._decoded(graph, weight, context.plan, shared) if source is None else
                    self._transposed(graph, weight, source, context.plan, shared))
            holder.replace_input(node, index, made)
        if found:
            graph.sort()
        return found

    def _transposed(self, graph: Graph, table: Tensor, weight: Tensor, plan: Plan, shared: Shared) -> Tensor:
        """A table as the transpose of the layer's weight that it is tied to."""
        name = f"{table.name}.decoded"
        if graph.has(name):
            return graph.made(name)
        return step(graph, "Transpose", [self._decoded(graph, weight, plan, shared)], name, shape_of(table),
                     {"perm": [1, 0]})

    def _decoded(self, graph: Graph, weight: Tensor, plan: Plan, shared: Shared) -> Tensor:
        name = f"{weight.name}.decoded"
        if graph.has(name):
            return graph.made(name)
        form = layout(plan, weight.name)
        assert form is not None
        shape, dims = matrix_shape(weight), tuple(int(d or 0) for d in shape_of(weight) or ())
        codes, scale, zero_point = self._parts(graph, weight, form, shape, coded(graph, weight, plan), shared)
        split, whole = _split(shape, form), _whole(shape, form)
        values = step(graph, "Cast", [codes], f"{weight.name}.codes", split, {"to": 1})
        if zero_point is not None:
            zeros = step(graph, "Cast", [zero_point], f"{weight.name}.zeros", shape_of(zero_point), {"to": 1})
            values = step(graph, "Sub", [values, zeros], f"{weight.name}.levels", split)
        values = step(graph, "Mul", [values, scale], f"{weight.name}.blocks.decoded", split)
        into = graph.constant(f"{weight.name}.shape", np.asarray(dims if whole == shape else whole, np.int64))
        if whole == shape:
            return step(graph, "Reshape", [values, into], name, dims)
        values = step(graph, "Reshape", [values, into], f"{weight.name}.filled", whole)
        sliced = [values, *bounds(graph, weight.name, shape[form.axis], form.axis)]
        if dims == shape:
            return step(graph, "Slice", sliced, name, shape)
        values = step(graph, "Slice", sliced, f"{weight.name}.filters", shape)
        into = graph.constant(f"{weight.name}.filter_shape", np.asarray(dims, np.int64))
        return step(graph, "Reshape", [values, into], name, dims)

    @staticmethod
    def _parts(graph: Graph, weight: Tensor, form: Layout, shape: tuple[int, ...],
               compute: Callable[[], Any], shared: Shared) -> tuple[Tensor, Tensor, Tensor | None]:
        def parts() -> Sequence[Array]:
            found = divided(*compute())
            return [np.ascontiguousarray(np.moveaxis(part, -1, 0)) for part in found] if form.axis else found

        split, one = _split(shape, form), _split(shape, form, 1)
        get = shared.parts(parts, 2 if form.dtype.signed else 3)
        codes = graph.computed(f"{weight.name}.q", form.dtype.storage, split, get[0])
        scale = graph.computed(f"{weight.name}.scales", np.float32, one, get[1])
        if form.dtype.signed:
            return codes, scale, None
        return codes, scale, graph.computed(f"{weight.name}.zero_points", form.dtype.storage, one, get[2])


def _split(shape: tuple[int, ...], form: Layout, size: int = 0) -> tuple[int, ...]:
    """The shape with the axis of blocks divided into blocks and what is in one, `size` where that is given."""
    return (*shape[:form.axis], form.count(shape), size or form.block_size, *shape[form.axis + 1:])


def _whole(shape: tuple[int, ...], form: Layout) -> tuple[int, ...]:
    return (*shape[:form.axis], form.count(shape) * form.block_size, *shape[form.axis + 1:])
