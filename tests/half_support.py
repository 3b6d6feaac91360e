"""Float models as float16 or bfloat16 ones, by onnx alone."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

NUMPY = {TensorProto.FLOAT16: np.dtype(np.float16), TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16)}
HALVES = tuple(NUMPY)


def to_half(model: onnx.ModelProto, dtype: int) -> onnx.ModelProto:
    """The model with every float tensor in a half type: weights, ports, attributes, those of bodies, too."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    _convert(found.graph, dtype)
    return found


def rounded(model: onnx.ModelProto, dtype: int) -> onnx.ModelProto:
    """The float model with its weights rounded to a half type: what the half model computes without roundings."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    _convert(found.graph, TensorProto.FLOAT, through=dtype)
    return found


def nearest(values: np.ndarray, dtype: int) -> np.ndarray:
    """float32 values rounded to what the half type holds, as float32."""
    with np.errstate(over="ignore"):
        return values.astype(NUMPY[dtype]).astype(np.float32)


def stored_types(path: object) -> dict[str, int]:
    """Initializer -> element type in a file."""
    return {t.name: t.data_type for t in onnx.load(str(path)).graph.initializer}


def _convert(graph: onnx.GraphProto, dtype: int, through: int | None = None) -> None:
    """Make floats `dtype`, rounded to the half type `through` on the way."""
    for tensor in graph.initializer:
        _store(tensor, dtype, through or dtype)
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = dtype
    for item in graph.node:
        for attribute in item.attribute:
            if attribute.HasField("t"):
                _store(attribute.t, dtype, through or dtype)
            if attribute.HasField("g"):
                _convert(attribute.g, dtype, through)
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
                attribute.i = dtype


def _store(tensor: onnx.TensorProto, dtype: int, through: int) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        values = nearest(numpy_helper.to_array(tensor), through)
        tensor.CopyFrom(numpy_helper.from_array(values.astype(NUMPY.get(dtype, values.dtype)), tensor.name))
