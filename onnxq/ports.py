"""What a model's input or output accepts, in terms that need neither onnx nor onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Port:
    """One input or output of a model.

    `dtype` is None for what is no tensor (sequence, map, optional) and for tensors without a numpy dtype (float8,
    int4); string tensors have dtype object. A `bfloat16` tensor, which files of arrays can't hold, is fed and given as
    float32, rounded to nearest even where it enters. A dimension is an int (fixed), a name or None (free); `shape` is
    None where the model declares no rank. onnxruntime does not tell a scalar from an unknown rank: both are ().
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...] | None
    bfloat16: bool = False

    def __str__(self) -> str:
        dtype = "no numpy type" if self.dtype is None else "bfloat16" if self.bfloat16 else dtype_name(self.dtype)
        return f"{dtype} [{', '.join('?' if size is None else str(size) for size in self.shape or ())}]"


def dtype_name(dtype: np.dtype[Any]) -> str:
    """A dtype as users know it: `string` for objects, byte order where it is foreign."""
    if dtype == np.object_:
        return "string"
    return dtype.name if dtype.isnative else f"byte-swapped {dtype.name}"
