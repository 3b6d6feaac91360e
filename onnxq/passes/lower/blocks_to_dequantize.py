"""A layer on decoded blocks  =>  DequantizeLinear of blocks, which the runtime fuses with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxq.graph import Graph, Node, Shared, Tensor, shape_of
from onnxq.numerics.dtypes import DType
from onnxq.passes.blocks import Array, code_type, coded, decoded_for, layout, part_names
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class BlocksToDequantize(Pass):
    """For the QDQ form: MatMul(x, decoded W) => MatMul(x, DequantizeLinear(Wq, scale, zero_point)), and the same of
    Gemm.

    Wq [K, N] in the codes' own type, scale float32 and zero_point [ceil(K / B), N], left out for symmetric codes; axis
    0 and block_size B. onnxruntime makes MatMulNBits of it, with int8 activations, where the layer alone reads these
    constants and all of it is in one graph.
    Source: ONNX DequantizeLinear-21 for 4 and 8 bits, -25 for 2.
    """

    name: ClassVar[str] = "blocks-to-dequantize"

    def run(self, graph: Graph, context: Context) -> bool:
        """Bodies of If, Loop and Scan are left alone: there, the runtime fuses nothing with what the outer graph holds,
        and can't load some of it."""
        shared, found = Shared(), False
        for node in graph.nodes:
            verdict = decoded_for(node, context)
            if verdict is None or node.op == "Gather":
                continue
            assert verdict.weight is not None
            found |= self._dequantized(graph, node, context.weights[verdict.weight], context, shared)
        if found:
            graph.prune()
            graph.sort()
        return found

    @staticmethod
    def _dequantized(graph: Graph, node: Node, weight: Tensor, context: Context, shared: Shared) -> bool:
        form = layout(context.plan, weight.name)
        assert form is not None
        if graph.opset < opset_of(form.dtype):
            return context.skip(node, f"DequantizeLinear takes blocks of {form.dtype.name} from opset "
                                f"{opset_of(form.dtype)} on")
        shape = [int(d or 0) for d in shape_of(weight) or ()]
        names = part_names(weight.name, form)
        kind, per_block = code_type(form.dtype), [form.count(shape), shape[1]]
        get = shared.parts(_parts(graph, weight, context, kind), len(names))
        kinds, shapes = (kind, np.dtype(np.float32), kind), (shape, per_block, per_block)
        stored = [graph.computed(*args) for args in zip(names, kinds, shapes, get, strict=False)]
        made = graph.variable(f"{weight.name}.dequantized", "float32", shape)
        graph.add_node("DequantizeLinear", f"{made.name}/dequantizelinear", stored, [made],
                       {"axis": form.axis, "block_size": form.block_size})
        graph.replace_input(node, 1, made)
        return True


def _parts(graph: Graph, weight: Tensor, context: Context, kind: np.dtype[Any]) -> Callable[[], list[Array]]:
    compute = coded(graph, weight, context.plan)

    def parts() -> list[Array]:
        codes, params = compute()
        return [codes.astype(kind), params.scale, params.zero_point.astype(kind)]

    return parts


def opset_of(dtype: DType) -> int:
    """The first opset in which DequantizeLinear takes blocks of a type."""
    return 25 if dtype.bits == 2 else 21
