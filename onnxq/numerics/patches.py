"""The rows that a Conv multiplies its weight by: patches of its input, without the whole im2col matrix.

A Conv of group 1, x [B, C, *spatial] by w [M, C, *kernel], is rows @ w.reshape(M, -1).T: one row of C * prod(kernel)
values per output position of each sample. Source: ONNX Conv-11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def output_sizes(spatial: Sequence[int], kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int],
                 dilations: Sequence[int]) -> tuple[int, ...]:
    """The spatial sizes of a Conv's output, 0 where the kernel does not fit; the arguments are those of patches.

    floor((size + pads - (dilation * (kernel - 1) + 1)) / stride) + 1. ValueError unless there is one size, kernel,
    stride and dilation and two pads per axis, pads at least 0 and the others positive.
    """
    rank = len(spatial)
    if {len(kernel), len(strides), len(dilations), len(pads) / 2} != {rank}:
        raise ValueError(f"kernel {list(kernel)}, strides {list(strides)}, pads {list(pads)} and dilations "
                         f"{list(dilations)} don't fit {rank} spatial axes; give one each per axis, two pads")
    if min(*kernel, *strides, *dilations) < 1 or min(pads) < 0:
        raise ValueError("a kernel, stride or dilation is below 1 or a pad is negative; use those of the Conv")
    ends = [size + pads[i] + pads[rank + i] - dilations[i] * (kernel[i] - 1) for i, size in enumerate(spatial)]
    return tuple(max(0, (end - 1) // stride + 1) for end, stride in zip(ends, strides, strict=True))


def patches(x: npt.NDArray[Any], kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int],
            dilations: Sequence[int], wanted: npt.ArrayLike | None = None) -> npt.NDArray[np.float32]:
    """Rows [R, C * prod(kernel)], float32, of the im2col matrix of a Conv of any spatial rank.

    x: [B, C, *spatial], of any real dtype. pads: ONNX order, all beginnings, then all ends; what lies there is 0.
    wanted: [R] row numbers, in any order, of B * prod(output_sizes), counted as output[:, 0] in C order is; None for
    all of them. Columns are ordered as w.reshape(M, -1) is. Memory beside x: the rows, and about C + 4 * rank numbers
    for each of them.
    ValueError as in output_sizes, for an x without spatial axes and for row numbers that don't exist.
    """
    if x.ndim < 3:
        raise ValueError(f"x has the shape {list(x.shape)}; pass [B, C, *spatial]")
    sizes = (len(x), *output_sizes(x.shape[2:], kernel, strides, pads, dilations))
    total = math.prod(sizes)
    rows = np.arange(total) if wanted is None else np.asarray(wanted, dtype=np.int64).reshape(-1)
    if rows.size and (rows.min() < 0 or rows.max() >= total):
        raise ValueError(f"rows {rows.min()} to {rows.max()} are wanted of {total}; use numbers from 0 to {total - 1}")
    begins = pads[: len(kernel)]
    result = np.zeros((rows.size, x.shape[1], math.prod(kernel)), np.float32)
    sample, *corner = np.unravel_index(rows, sizes) if total else [rows] * len(sizes)
    for column, tap in enumerate(np.ndindex(*kernel)):
        at = [place * stride - begin + step * dilation
              for place, stride, begin, step, dilation in zip(corner, strides, begins, tap, dilations, strict=True)]
        inside = np.logical_and.reduce([(place >= 0) & (place < size)
                                        for place, size in zip(at, x.shape[2:], strict=True)])
        index = (sample[inside], slice(None), *(place[inside] for place in at))
        result[inside, :, column] = x[index]
    return result.reshape(rows.size, x.shape[1] * math.prod(kernel))
