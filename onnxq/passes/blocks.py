"""The codes, scales and zero points of a weight in blocks: what both the decoded form and the kernels' are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxq.graph import Graph, Node, Tensor, shape_of
from onnxq.numerics import affine, blocks, packing
from onnxq.numerics.affine import QuantParams
from onnxq.numerics.dtypes import DType
from onnxq.passes.manager import Context
from onnxq.plan import UNTOUCHED, Blocks, NodePlan, Plan

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """How a weight of K inputs is divided: blocks of `block_size` along `axis`, codes of `dtype`."""

    dtype: DType
    block_size: int
    axis: int

    def count(self, shape: Sequence[int]) -> int:
        """Blocks along the axis; the last one may be short."""
        return -(-shape[self.axis] // self.block_size)


def layout(plan: Plan, name: str) -> Layout | None:
    """That of a weight which a Plan stores in blocks, else None."""
    source = plan.ties.get(name)
    if source is not None:
        whole = layout(plan, source)
        return None if whole is None else replace(whole, axis=1 - whole.axis)
    found = plan.blocks.get(name)
    if found is not None:
        return Layout(found.dtype, found.block_size, found.axis)
    params = plan.weights.get(name)
    if params is None or params.block_size is None:
        return None
    assert params.axis is not None
    return Layout(params.dtype, params.block_size, params.axis)


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """(rows, columns) of a weight, of a Conv's [M, C, ..] with its filters as rows."""
    dims = [int(d or 0) for d in shape_of(weight) or ()]
    return dims[0], int(np.prod(dims[1:], dtype=np.int64))


def matrix(graph: Graph, weight: Tensor) -> Array:
    """The values of a weight as such a matrix."""
    values = graph.read(weight)
    return values if values.ndim == 2 else values.reshape(len(values), -1)


def code_type(dtype: DType) -> np.dtype[Any]:
    """The type of codes whose bytes several of them share in the file, where they have less than 8 bits."""
    return np.dtype(getattr(ml_dtypes, dtype.name)) if dtype.bits < 8 else dtype.storage


def part_names(weight: str, form: Layout) -> list[str]:
    """What codes, scales and, unless they are symmetric, zero points are called as kernels read them."""
    names = [f"{weight}.{part}" for part in ("blocks", "block_scales", "block_zeros")]
    return names[:2] if form.dtype.signed else names


def decoded_for(node: Node, context: Context) -> NodePlan | None:
    """The verdict on a node that a kernel shall run on blocks and that reads them decoded, else None."""
    verdict = context.plan.node(node.name)
    if verdict is None or verdict.activation != UNTOUCHED or not verdict.is_int or verdict.part_of is not None:
        return None
    reads = node.inputs[0 if node.op == "Gather" else 1].name
    return verdict if reads == f"{verdict.weight}.decoded" else None


def coded(graph: Graph, weight: Tensor, plan: Plan) -> Callable[[], tuple[Array, QuantParams]]:
    """(codes [K, N], their parameters along axis 0) of a weight, found when they are asked for.

    A table [V, D], whose blocks run along its columns, gives those of its transpose [D, V]; a Conv's filters likewise.
    """
    name = plan.ties.get(weight.name, weight.name)
    how, known, rounded, form = plan.blocks.get(name), plan.weights.get(name), plan.rounded.get(name), layout(
        plan, weight.name)

    def compute() -> tuple[Array, QuantParams]:
        assert form is not None
        if how is not None:
            return by_formula(inputs_first(matrix(graph, weight), form.axis), how)
        assert known is not None
        assert known.axis is not None
        params = transposed(known) if known.axis else known
        if rounded is not None:
            return inputs_first(rounded, known.axis), params
        return affine.quantize(inputs_first(matrix(graph, weight), form.axis), params), params

    return compute


def by_formula(values: Array, how: Blocks) -> tuple[Array, QuantParams]:
    """(codes, parameters along axis 0) of a weight [K, N] that follow from its values alone."""
    params = blocks.choose(values, how.dtype, how.block_size, how.symmetric, how.search)
    return affine.quantize(values, params), params


def packed(graph: Graph, weight: Tensor, plan: Plan) -> Callable[[], list[Array]]:
    """[codes, scales, zero points unless they are symmetric] in the bytes that kernels read (see numerics.packing)."""
    form = layout(plan, weight.name)
    assert form is not None

    dims = [int(d or 0) for d in shape_of(weight) or ()]

    def compute() -> list[Array]:
        how = plan.blocks.get(plan.ties.get(weight.name, weight.name))
        if how is not None and not (form.axis and dims[1] % form.block_size):  # in one go, as it is saved
            codes, scales, zeros = blocks.quantize_packed(inputs_first(graph.read(weight), form.axis), how.dtype,
                                                          how.block_size, how.symmetric, how.search)
            codes = codes.reshape(len(codes), -1) if form.axis else codes  # rows of a table are blocks one by one
        else:
            q, params = coded(graph, weight, plan)()
            codes, scales, zeros = (packing.pack_gather(q.T, transposed(params)) if form.axis
                                    else packing.pack_matmul(q, params))
        if form.dtype.signed:
            return [codes, scales]
        return [codes, scales, _default(scales, form.dtype) if zeros is None else zeros]

    return compute


def _default(scales: Array, dtype: DType) -> Array:
    """Zero points for scales [N, nb] that are all those that kernels take for granted, written out."""
    return packing.pack_bits(np.full(scales.shape, 2 ** (dtype.bits - 1), np.uint8), dtype.bits)


def transposed(params: QuantParams) -> QuantParams:
    """Those of the transpose: blocks along axis 1 in place of 0, or the other way round."""
    assert params.axis is not None
    return QuantParams(np.ascontiguousarray(params.scale.T), np.ascontiguousarray(params.zero_point.T), params.dtype,
                       1 - params.axis, params.block_size)


def inputs_first(values: Array, axis: int) -> Array:
    """[K, N] of a weight whose blocks run along `axis`: its transpose where that is 1."""
    return values.T if axis == 1 else values


def step(graph: Graph, op: str, inputs: list[Tensor], name: str, shape: Any, attrs: dict[str, object] | None = None,
         dtype: str = "float32") -> Tensor:
    """Add a node of what decodes a weight; gives its result, which is called `name`."""
    made = graph.variable(name, dtype, shape)
    graph.add_node(op, f"{name}/{op.lower()}", inputs, [made], attrs)
    return made


def bounds(graph: Graph, weight: str, end: int, axis: int) -> list[Tensor]:
    """Inputs of a Slice that takes off what fills up the last block."""
    return [graph.constant(f"{weight}.{key}", np.asarray([number], np.int64))
            for key, number in (("start", 0), ("end", end), ("axis", axis))]


def divided(codes: Array, params: QuantParams) -> tuple[Array, Array, Array]:
    """Codes [K, N] as [nb, B, N], filled up with what stands for 0, with scale and zero point [nb, 1, N]."""
    assert params.block_size is not None
    count, size = len(params.scale), params.block_size
    missing = count * size - len(codes)
    if missing:
        codes = np.concatenate([codes, np.broadcast_to(params.zero_point[-1:], (missing, codes.shape[1]))])
    return codes.reshape(count, size, -1), params.scale[:, None], params.zero_point[:, None]
