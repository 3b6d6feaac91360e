"""int8 weights that are 4-bit levels times a number for each block, as these two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Shared, Tensor, shape_of
from onnxq.numerics.dtypes import INT4
from onnxq.passes.blocks import Array, bounds, code_type, step
from onnxq.passes.manager import Context, Pass
from onnxq.passes.pack.codes import OPSETS, takes
from onnxq.plan import Plan

_INT32, _INT8 = 6, 3  # TensorProto.DataType


@dataclass(frozen=True)
class PackMultiples(Pass):
    """Wq int8 [K, N] -> Cast(Slice(Reshape(Cast(levels) * Cast(multiples)))) of a weight with two levels of scales.

    levels int4 [nb, B, N], multiples int4 [nb, 1, N]; products are int32, which Mul has a kernel for, and codes again
    behind the last Cast. A Slice takes off what fills up the last block. The runtime folds all of it as it loads the
    model, so that the same kernels read the same codes. Source: ONNX Cast-21.
    """

    name: ClassVar[str] = "pack-multiples"

    def run(self, graph: Graph, context: Context) -> bool:
        """Pack the codes of all such weights, each once."""
        found = [name for name in context.plan.multiples if graph.has(f"{name}.q") and not graph.has(f"{name}.levels")]
        if not found or graph.opset < OPSETS[INT4.bits] or not takes(context.target, INT4.bits):
            return False
        shared = Shared()
        made = {f"{name}.q": _decoded(graph, graph.made(f"{name}.q"), name, context.plan, shared) for name in found}
        for node, holder in list(graph.walk()):
            for index, tensor in enumerate(node.inputs):
                if tensor.name in made:
                    holder.replace_input(node, index, made[tensor.name])
        graph.sort()
        return True


def _decoded(graph: Graph, codes: Tensor, name: str, plan: Plan, shared: Shared) -> Tensor:
    """The codes as what decodes them makes them."""
    two, narrow = plan.two_level(name), code_type(INT4)
    assert two is not None
    size, multiples, count = two.block_size, two.multiples, len(two.multiples)
    inputs, outputs = (int(d or 0) for d in shape_of(codes) or ())

    def parts() -> list[Array]:
        levels = np.zeros((count * size, outputs), np.int8)
        levels[:inputs] = two.levels(graph.read(codes))
        return [levels.reshape(count, size, outputs).astype(narrow), multiples[:, None].astype(narrow)]

    get = shared.parts(parts, 2)
    levels = graph.computed(f"{name}.levels", narrow, (count, size, outputs), get[0])
    each = graph.computed(f"{name}.multiples", narrow, (count, 1, outputs), get[1])
    wide = [step(graph, "Cast", [t], f"{t.name}.wide", shape_of(t), {"to": _INT32}, "int32") for t in (levels, each)]
    value = step(graph, "Mul", wide, f"{name}.products", (count, size, outputs), dtype="int32")
    value = step(graph, "Cast", [value], f"{name}.divided", (count, size, outputs), {"to": _INT8}, "int8")
    dims = graph.constant(f"{name}.whole", np.asarray([count * size, outputs], np.int64))
    value = step(graph, "Reshape", [value, dims], f"{name}.filled", (count * size, outputs), dtype="int8")
    if count * size == inputs:
        return value
    cut = [value, *bounds(graph, name, inputs, 0)]
    return step(graph, "Slice", cut, f"{name}.codes", (inputs, outputs), dtype="int8")
