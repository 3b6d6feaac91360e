"""Uniform affine quantization: q = saturate(rint(x / scale) + zero_point) and x ~ (q - zero_point) * scale.

Source: ONNX QuantizeLinear-13/-21 and DequantizeLinear-13/-21: division in float32, rounding half to even, saturation
to the code range. One scale serves a whole tensor, a channel along `axis`, or a block of `block_size` neighbours along
`axis`; `_expand` is the only place that knows the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.numerics.dtypes import INT8, DType

# The smallest scale: the smallest normal float32, whose reciprocal is still finite.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
LARGEST_SCALE = float(np.finfo(np.float32).max)

# The largest magnitude of an int32 bias: half of the int32 range stays free for the sum of products, enough for
# 2**30 / (255 * 128) = 32,896 products of uint8 by int8.
BIAS_LIMIT = 2**30

# The squared-error search tries 1 - step * k, k from 0 to SHRINK_STEPS, times the absolute maximum. The optimum of a
# normally distributed channel is near 0.97 for 8 bits but near 0.7 for 4 bits, so types of 4 bits or fewer take the
# longer steps.
SHRINK_STEPS = 10
SHRINK_STEP = 0.02
SHRINK_STEP_4BIT = 0.04


@dataclass(frozen=True, eq=False)
class QuantParams:
    """How a tensor x is quantized.

    scale: float32, normal and positive. [] for one scale per tensor (a single element of any rank counts as one too);
    [C] for one per channel along `axis`, C = x.shape[axis]; with `block_size` B it has the shape of x except for
    ceil(C / B) along `axis`, and scales may be negative: see blocks.
    zero_point: dtype.storage, the shape of scale; the code that stands for 0.0.
    ValueError when the two differ in shape or have other dtypes.
    """

    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[Any]
    dtype: DType
    axis: int | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.scale.dtype != np.float32 or self.zero_point.dtype != self.dtype.storage:
            raise ValueError(
                f"scale and zero_point are {self.scale.dtype} and {self.zero_point.dtype}; "
                f"convert them to float32 and {self.dtype.storage}"
            )
        if self.scale.shape != self.zero_point.shape:
            raise ValueError(
                f"scale {list(self.scale.shape)} and zero_point {list(self.zero_point.shape)} differ; "
                "give both the same shape"
            )


def choose(
    minimum: npt.ArrayLike,
    maximum: npt.ArrayLike,
    dtype: DType,
    symmetric: bool = False,
    axis: int | None = None,
) -> QuantParams:
    """Scale and zero point for values between `minimum` and `maximum` (scalars, or arrays of one shape, e.g. [C]).

    The range is first widened to contain 0, so that 0.0 is represented exactly.
    Asymmetric: scale = (maximum - minimum) / (qmax - qmin), zero_point = rint(qmin - minimum / scale), saturated.
    Symmetric: with m = max(|minimum|, |maximum|), scale = m / (2**(bits-1) - 1); zero_point is 0 for signed types
    (codes in [-qmax, qmax]) and 2**(bits-1) for unsigned ones (codes in [1, qmax]).
    A range of nothing but 0 gets scale 1.0. Scales are computed in float64, rounded to float32 and kept within the
    normal float32 numbers. Bounds near the largest float32 get a finite scale, too, but their outermost codes may
    dequantize to inf.
    ValueError for NaN or infinite bounds and for a minimum above its maximum.
    """
    low, high = np.asarray(minimum, dtype=np.float64), np.asarray(maximum, dtype=np.float64)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("a range has NaN or infinite bounds; take its bounds from finite values only")
    if (low > high).any():
        raise ValueError("a range has its minimum above its maximum; pass the minimum first")
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    if symmetric:
        scale = _float32_scale(np.maximum(-low, high) / (2 ** (dtype.bits - 1) - 1))
        zero_point = np.full(scale.shape, 0 if dtype.signed else 2 ** (dtype.bits - 1), dtype.storage)
    else:
        steps = dtype.qmax - dtype.qmin
        scale = _float32_scale(high / steps - low / steps)
        exact = np.clip(np.rint(dtype.qmin - low / scale.astype(np.float64)), dtype.qmin, dtype.qmax)
        zero_point = np.asarray(exact).astype(dtype.storage)
    return QuantParams(scale, zero_point, dtype, axis)


def quantize(x: npt.ArrayLike, params: QuantParams) -> npt.NDArray[Any]:
    """Codes of x (float32, any shape) as dtype.storage, in the shape of x.

    rint(x / scale) + zero_point, saturated to [qmin, qmax]; division in float32, half to even; infinities saturate.
    Source: ONNX QuantizeLinear-13 (tensor, channel) and -21 (block), bit-exact. Extra memory: one float array of the
    size of x, two more when blocked.
    ValueError when x holds NaN or does not have the shape that `params` was made for.
    """
    x = np.asarray(x, dtype=np.float32)
    with np.errstate(over="ignore"):  # a quotient beyond float32 becomes inf, which saturates as it should
        codes = np.asarray(x / _expand(params.scale, x.shape, params))
    # Only x can bring a NaN in, as scales are finite and not 0; the sum of the codes would miss inf - inf.
    if codes.size and np.isnan(codes.max()):
        raise ValueError("a tensor to quantize holds NaN; repair the weights or keep the node float")
    if params.dtype.bits > 16:
        codes = codes.astype(np.float64)  # float32 can't tell neighbouring 32-bit codes apart
    np.rint(codes, out=codes)
    if params.zero_point.any():
        codes += _expand(params.zero_point, x.shape, params)
    np.clip(codes, params.dtype.qmin, params.dtype.qmax, out=codes)
    return codes.astype(params.dtype.storage)


def dequantize(q: npt.NDArray[Any], params: QuantParams) -> npt.NDArray[np.float32]:
    """(q - zero_point) * scale as float32, in the shape of q; the difference is exact, the product is rounded once.

    For 32-bit codes the difference is rounded to float32 before the product.
    Source: ONNX DequantizeLinear-13 (tensor, channel) and -21 (block), bit-exact.
    ValueError when q does not have the shape that `params` was made for.
    """
    wide = np.float64 if params.dtype.bits > 16 else np.float32
    values: npt.NDArray[Any] = np.asarray(q).astype(wide)
    if params.zero_point.any():
        values -= _expand(params.zero_point, values.shape, params)
    x = values.astype(np.float32, copy=False)
    with np.errstate(over="ignore"):  # scales near the largest float32: see choose()
        x *= _expand(params.scale, x.shape, params)
    return x


def weight_params(w: npt.NDArray[np.float32], axis: int | None, dtype: DType = INT8, mse: bool = False,
                  least: npt.ArrayLike = 0.0) -> QuantParams:
    """Symmetric parameters for a float32 weight of any rank, per channel along `axis` (None: per tensor).

    Absolute maximum scales: scale = max(max|w|, least) / qmax, with `least` a scalar or [C], at least 0. With `mse`,
    each channel takes the factor f on a grid (1.0, 0.98 .. 0.80; up to 4 bits 1.0, 0.96 .. 0.60) whose scale
    f * max|w| / qmax has the least squared error sum((dequantize(quantize(w)) - w)**2). The largest f wins a tie, so
    the result is never worse than f = 1. A shrunk scale saturates: the code qmin may then occur.
    A channel of zeros (or without elements) gets scale 1.0. Extra memory: with `mse` two arrays of the size of w.
    ValueError when w holds NaN or infinities.
    """
    w = np.asarray(w, dtype=np.float32)
    kept = None if axis is None else _positive_axis(axis, w.ndim)
    others = tuple(i for i in range(w.ndim) if i != kept)
    absmax = np.maximum(w.max(axis=others, initial=0.0), -w.min(axis=others, initial=0.0)).astype(np.float64)
    absmax = np.maximum(absmax, least)
    best = choose(-absmax, absmax, dtype, symmetric=True, axis=kept)
    if not mse:
        return best
    best_error = _squared_error(w, best, others)
    step = SHRINK_STEP_4BIT if dtype.bits <= 4 else SHRINK_STEP
    for k in range(1, SHRINK_STEPS + 1):
        shrunk = absmax * (1.0 - step * k)
        trial = choose(-shrunk, shrunk, dtype, symmetric=True, axis=kept)
        error = _squared_error(w, trial, others)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best = QuantParams(np.where(better, trial.scale, best.scale), best.zero_point, dtype, kept)
    return best


def largest_pair(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """[C]: the largest magnitude of what neighbours 2i and 2i + 1 along the last axis of rows [C, .., K] add up to.

    Only of what has the same sign: opposite ones may meet activations that hide one of them. Codes of a scale of at
    least largest_pair / 127 add up to 128 at most, roundings included, and 128 times a uint8 code is within 16 bits.
    Source: the x86 instruction VPMADDUBSW, which adds two such products and saturates.
    """
    even = rows[..., 0::2].astype(np.float64)
    odd = np.zeros_like(even)
    odd[..., :rows.shape[-1] // 2] = rows[..., 1::2]
    sums = (np.maximum(sign * even, 0.0) + np.maximum(sign * odd, 0.0) for sign in (1.0, -1.0))
    return np.asarray(np.maximum(*sums).reshape(len(rows), -1).max(axis=1, initial=0.0))


def bias_params(
    x_scale: npt.ArrayLike, w_scale: npt.ArrayLike, bias: npt.ArrayLike
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """(weight scale, int32 bias) for a bias [C] that is added to an integer accumulator of scale x_scale * w_scale.

    bias_q = rint(bias / (x_scale * w_scale)), half to even, in float64; the product is rounded to float32 first, as
    onnxruntime does. x_scale is a scalar, w_scale [] or [C]; both positive.
    Where |bias_q| would exceed BIAS_LIMIT, or the product would not be a normal float32, that weight scale is enlarged
    by just enough (within 2**-21 of the exact need). The returned weight scale has the shape of w_scale; a caller
    quantizes the weight again where it differs from what it passed.
    ValueError for a bias with NaN or infinities, for scales that are not positive, for shapes that don't fit, and where
    no float32 scale fits.
    """
    activation = np.asarray(x_scale, dtype=np.float32).reshape(())
    weight = np.array(w_scale, dtype=np.float32)
    values = np.asarray(bias, dtype=np.float64)
    if values.ndim != 1 or weight.shape not in ((), values.shape):
        raise ValueError(f"bias {list(values.shape)} does not fit scale {list(weight.shape)}; pass [C] and [] or [C]")
    if not np.isfinite(values).all():
        raise ValueError("a bias holds NaN or infinities; repair it or keep the node float")
    if not (activation > 0 and (weight > 0).all()):
        raise ValueError("a scale is not positive; compute it with choose()")
    largest = np.abs(values) if weight.ndim else np.abs(values).max(initial=0.0)
    needed = np.maximum(largest / BIAS_LIMIT, SMALLEST_SCALE)
    with np.errstate(over="ignore"):  # an infinite product is refused below
        too_small = activation * weight < needed
        # Two roundings to float32 follow (the scale, then the product), each of at most one part in 2**24.
        enlarged = needed / activation.astype(np.float64) * (1.0 + 2.0**-22)
        weight = np.where(too_small, enlarged, weight).astype(np.float32)
        product = np.asarray(activation * weight).astype(np.float64)
    if not np.isfinite(product).all():
        raise ValueError("no float32 scale fits a bias and its input; keep the node float")
    return weight, np.rint(values / product).astype(np.int32)


def _float32_scale(exact: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """`exact`, at least 0, as normal float32 numbers; 1.0 in place of 0."""
    bounded = np.clip(np.where(exact == 0.0, 1.0, exact), SMALLEST_SCALE, LARGEST_SCALE)
    return np.asarray(bounded).astype(np.float32)


def _squared_error(w: npt.NDArray[np.float32], params: QuantParams, axes: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Squared rounding error of w, summed over `axes` in float64."""
    error = dequantize(quantize(w, params), params)
    error -= w
    with np.errstate(over="ignore"):  # an infinite error is never the smaller one
        np.square(error, out=error)
    return np.asarray(error.sum(axis=axes, dtype=np.float64))


def _positive_axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} does not exist in a tensor of rank {rank}; use one from {-rank} to {rank - 1}")
    return axis % rank


def _expand(values: npt.NDArray[Any], shape: tuple[int, ...], params: QuantParams) -> npt.NDArray[Any]:
    """`values` (a scale or zero point) in a shape that numpy broadcasts to `shape`, the shape of the tensor."""
    if values.size == 1 and params.block_size is None:
        return values.reshape(())
    if params.axis is None:
        raise ValueError(f"parameters of shape {list(values.shape)} have no axis; name the axis that they run along")
    axis = _positive_axis(params.axis, len(shape))
    if params.block_size is None:
        expected: tuple[int, ...] = (shape[axis],)
    else:
        expected = (*shape[:axis], -(-shape[axis] // params.block_size), *shape[axis + 1 :])
    if values.shape != expected:
        raise ValueError(
            f"parameters of shape {list(values.shape)} don't fit a tensor {list(shape)} along axis {axis}; "
            f"they need the shape {list(expected)}"
        )
    if params.block_size is None:
        return values.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    repeated = np.repeat(values, params.block_size, axis=axis)
    return repeated[tuple(slice(size) for size in shape)]  # the last block may be cut short
