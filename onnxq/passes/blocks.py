"""The codes, scales and zero points of a weight in blocks: what both the decoded form and the kernels' are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxq.graph import Graph, Tensor
from onnxq.numerics import affine, blocks, packing
from onnxq.numerics.affine import QuantParams
from onnxq.numerics.dtypes import DType
from onnxq.plan import Plan

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
    found = plan.blocks.get(name)
    if found is not None:
        return Layout(found.dtype, found.block_size, found.axis)
    params = plan.weights.get(name)
    if params is None or params.block_size is None:
        return None
    assert params.axis is not None
    return Layout(params.dtype, params.block_size, params.axis)


def code_type(dtype: DType) -> np.dtype[Any]:
    """The type of codes whose bytes several of them share in the file, where they have less than 8 bits."""
    return np.dtype(getattr(ml_dtypes, dtype.name)) if dtype.bits < 8 else dtype.storage


def coded(graph: Graph, weight: Tensor, plan: Plan) -> Callable[[], tuple[Array, QuantParams]]:
    """(codes [K, N], their parameters along axis 0) of a weight, found when they are asked for.

    A table [V, D], whose blocks run along its columns, gives those of its transpose [D, V].
    """
    how, known, rounded = plan.blocks.get(weight.name), plan.weights.get(weight.name), plan.rounded.get(weight.name)

    def compute() -> tuple[Array, QuantParams]:
        if how is not None:
            values = _inputs_first(graph.read(weight), how.axis)
            params = blocks.choose(values, how.dtype, how.block_size, how.symmetric, how.search)
            return affine.quantize(values, params), params
        assert known is not None
        params = known
        if known.axis == 1:
            params = _by_rows(known)
        if rounded is not None:
            return _inputs_first(rounded, known.axis or 0), params
        return affine.quantize(_inputs_first(graph.read(weight), known.axis or 0), params), params

    return compute


def packed(graph: Graph, weight: Tensor, plan: Plan) -> Callable[[], list[Array]]:
    """[codes, scales, zero points unless they are symmetric] in the bytes that kernels read (see numerics.packing)."""
    form = layout(plan, weight.name)
    assert form is not None

    def compute() -> list[Array]:
        how = plan.blocks.get(weight.name)
        values = graph.read(weight) if how is not None else np.empty((0, 0))
        if how is not None and not (form.axis and values.shape[1] % form.block_size):  # in one go, as it is saved
            values = _inputs_first(values, form.axis)
            blobs, scales, zeros = blocks.quantize_packed(values, how.dtype, how.block_size, how.symmetric, how.search)
            blobs = blobs.reshape(len(blobs), -1) if form.axis else blobs  # rows of a table are blocks one by one
            zeros = _default(scales, how.dtype) if zeros is None else zeros
            return [blobs, scales] if how.symmetric else [blobs, scales, zeros]
        codes, params = coded(graph, weight, plan)()
        found = packing.pack_gather(codes.T, _by_rows(params)) if form.axis else packing.pack_matmul(codes, params)
        if form.dtype.signed:
            return list(found[:2])
        zeros = packing.pack_zero_points(packing.stored(params.zero_point.T, params.dtype), params.dtype.bits)
        return [*found[:2], _default(found[1], params.dtype) if zeros is None else zeros]

    return compute


def _default(scales: Array, dtype: DType) -> Array:
    """Zero points for scales [N, nb] that are all those that kernels take for granted, written out."""
    return packing.pack_bits(np.full(scales.shape, 2 ** (dtype.bits - 1), np.uint8), dtype.bits)


def _by_rows(params: QuantParams) -> QuantParams:
    """Of the transpose: blocks along axis 1 in place of 0, or the other way round."""
    assert params.axis is not None
    return QuantParams(np.ascontiguousarray(params.scale.T), np.ascontiguousarray(params.zero_point.T), params.dtype,
                       1 - params.axis, params.block_size)


def _inputs_first(values: Array, axis: int) -> Array:
    return values.T if axis == 1 else values


def divided(codes: Array, params: QuantParams) -> tuple[Array, Array, Array]:
    """Codes [K, N] as [nb, B, N], filled up with what stands for 0, with scale and zero point [nb, 1, N]."""
    assert params.block_size is not None
    count, size = len(params.scale), params.block_size
    missing = count * size - len(codes)
    if missing:
        codes = np.concatenate([codes, np.broadcast_to(params.zero_point[-1:], (missing, codes.shape[1]))])
    return codes.reshape(count, size, -1), params.scale[:, None], params.zero_point[:, None]
