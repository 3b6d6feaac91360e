"""int8 weights that are 4-bit levels times a number for each block, as these two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxq.graph import Graph, Shared, Tensor, shape_of
from onnxq.numerics.dtypes import INT4
from onnxq.passes.blocks import Array, code_type
from onnxq.passes.manager import Context, Pass
from onnxq.passes.pack.codes import OPSETS
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
        if not found or graph.opset < OPSETS[INT4.bits]:
            return False
        shared = Shared()
        for name in found:
            codes = graph.made(f"{name}.q")
            decoded = _decoded(graph, codes, name, context.plan, shared)
            for node, holder in list(graph.walk()):
                for index, tensor in enumerate(node.inputs):
                    if tensor.name == codes.name:
                        holder.replace_input(node, index, decoded)
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
    wide = [_step(graph, "Cast", [t], f"{t.name}.wide", "int32", shape_of(t), {"to": _INT32}) for t in (levels, each)]
    value = _step(graph, "Mul", wide, f"{name}.products", "int32", (count, size, outputs))
    value = _step(graph, "Cast", [value], f"{name}.divided", "int8", (count, size, outputs), {"to": _INT8})
    dims = graph.constant(f"{name}.whole", np.asarray([count * size, outputs], np.int64))
    value = _step(graph, "Reshape", [value, dims], f"{name}.filled", "int8", (count * size, outputs))
    if count * size == inputs:
        return value
    bounds = [graph.constant(f"{name}.{key}", np.asarray([number], np.int64))
              for key, number in (("start", 0), ("end", inputs), ("axis", 0))]
    return _step(graph, "Slice", [value, *bounds], f"{name}.codes", "int8", (inputs, outputs))


def _step(graph: Graph, op: str, inputs: list[Tensor], name: str, dtype: str, shape: Any,
          attrs: dict[str, object] | None = None) -> Tensor:
    made = graph.variable(name, dtype, shape)
    graph.add_node(op, f"{name}/{op.lower()}", inputs, [made], attrs)
    return made
