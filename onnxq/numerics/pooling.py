"""How many elements the windows of a pool hold where they hang over the padding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt


def window_counts(sizes: Sequence[int], window: Sequence[int], strides: Sequence[int],
                  pads: Sequence[int]) -> npt.NDArray[np.int64]:
    """Elements of each window that are no padding, int64 of the result's spatial shape [OH, OW, ..].

    `sizes`, `window` and `strides` go by the spatial axes; `pads` holds all beginnings, then all ends. It is what ONNX
    AveragePool-22 divides by with count_include_pad 0 and ceil_mode 0. Empty where no window fits.
    """
    along = []
    for k, (size, width, stride) in enumerate(zip(sizes, window, strides, strict=True)):
        fits = (size + pads[k] + pads[len(sizes) + k] - width) // stride + 1
        first = np.arange(max(fits, 0)) * stride - pads[k]
        along.append(np.maximum(np.minimum(first + width, size) - np.maximum(first, 0), 0))
    return np.asarray(reduce(np.multiply.outer, along), np.int64)
