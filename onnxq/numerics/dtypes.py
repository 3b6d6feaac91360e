"""The integer types that onnxq quantizes to: name, width, code range and the numpy dtype that holds the codes.

Names and code ranges are those of the ONNX tensor types of the same name (TensorProto.DataType, opset 21; 2 bits: 25).
A code of 2 or 4 bits takes a whole byte here; several share one only when packed (see packing).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.errors import UsageError


@dataclass(frozen=True)
class DType:
    """An integer type whose codes run from `qmin` to `qmax`, both included.

    `storage` is the smallest numpy dtype that holds a code: int8 for int2 and int4, uint8 for uint2 and uint4.
    """

    name: str
    bits: int
    qmin: int
    qmax: int
    storage: np.dtype[Any]

    @property
    def signed(self) -> bool:
        """Whether codes can be negative."""
        return self.qmin < 0


INT2 = DType("int2", 2, -2, 1, np.dtype(np.int8))
UINT2 = DType("uint2", 2, 0, 3, np.dtype(np.uint8))
INT4 = DType("int4", 4, -8, 7, np.dtype(np.int8))
UINT4 = DType("uint4", 4, 0, 15, np.dtype(np.uint8))
INT8 = DType("int8", 8, -128, 127, np.dtype(np.int8))
UINT8 = DType("uint8", 8, 0, 255, np.dtype(np.uint8))
INT16 = DType("int16", 16, -32768, 32767, np.dtype(np.int16))
UINT16 = DType("uint16", 16, 0, 65535, np.dtype(np.uint16))
INT32 = DType("int32", 32, -(2**31), 2**31 - 1, np.dtype(np.int32))

ALL = (INT2, UINT2, INT4, UINT4, INT8, UINT8, INT16, UINT16, INT32)


def by_name(name: str) -> DType:
    """The type called `name`, e.g. "int8"; UsageError with the known names for any other."""
    for dtype in ALL:
        if dtype.name == name:
            return dtype
    raise UsageError(f"unknown data type {name!r}; use one of {', '.join(dtype.name for dtype in ALL)}")
