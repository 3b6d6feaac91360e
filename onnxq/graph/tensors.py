"""Reading weights: from the model file, from external data through a memory map, from a constant that a pass made.

`Constant.values` of the graph library is never used: it keeps every array that it reads, converts external data
eagerly and breaks on sub-byte types.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxq.errors import ModelError

Array = NDArray[np.generic]


def external_location(proto: onnx.TensorProto, folder: Path) -> tuple[Path, int, int | None]:
    """(file, offset in bytes, length in bytes or None for the rest) of a tensor that lives outside of the model.

    Raises ModelError for a location that leaves the model's folder or does not exist.
    """
    entries = {e.key: e.value for e in proto.external_data}
    name = entries.get("location", "")
    root = folder.resolve()
    path = (root / name).resolve()
    if not name or not path.is_relative_to(root):
        raise ModelError(f"the external data of {proto.name!r} lie at {name!r}, outside of the model's folder; "
                         "move them beside the model")
    if not path.is_file():
        raise ModelError(f"the external data file {name!r} is missing; put it beside the model again")
    length = entries.get("length")
    return path, int(entries.get("offset", 0)), int(length) if length else None


def read_proto(proto: onnx.TensorProto, folder: Path) -> Array:
    """The values of a TensorProto; external data are mapped, not read.

    Raises ModelError when the external file is shorter than the tensor needs.
    """
    if proto.data_location != onnx.TensorProto.EXTERNAL:
        return numpy_helper.to_array(proto)
    path, offset, length = external_location(proto, folder)
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(proto.data_type))
    shape = tuple(proto.dims)
    count = int(np.prod(shape, dtype=np.int64))
    wanted = count * dtype.itemsize
    if os.path.getsize(path) < offset + wanted or (length is not None and length < wanted):
        raise ModelError(f"the external data of {proto.name!r} are shorter than its shape {list(shape)} needs; "
                         "copy or export the model again")
    if count == 0:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def is_constant(tensor: gs.Tensor | None) -> bool:
    """Whether the tensor's values are stored in the model."""
    return isinstance(tensor, gs.Constant)


def read(tensor: gs.Tensor, folder: Path) -> Array:
    """The values of a constant, not kept anywhere: a second call reads again."""
    if not isinstance(tensor, gs.Constant):
        raise TypeError(f"{tensor.name} is no constant")
    values = tensor._values
    if isinstance(values, np.ndarray):
        return values
    return read_proto(values.tensor, folder)


def nbytes(tensor: gs.Constant) -> int:
    """Bytes that the constant's values take when stored."""
    values = tensor._values
    return int(values.nbytes)


def shape_of(tensor: gs.Tensor) -> tuple[int | str | None, ...] | None:
    """Dimensions of a tensor, names and None where they are free; None when even the rank is unknown."""
    if isinstance(tensor, gs.Constant):
        return tuple(int(d) for d in tensor._values.shape)
    return None if tensor.shape is None else tuple(d if d != "" else None for d in tensor.shape)


def dtype_of(tensor: gs.Tensor) -> np.dtype[np.generic] | None:
    """Element type as a numpy dtype, None when unknown or when numpy has no such type."""
    dtype = tensor._values.dtype if isinstance(tensor, gs.Constant) else tensor.dtype
    if dtype is None or isinstance(dtype, int):
        return None
    return np.dtype(dtype)


def as_proto(name: str, values: Array) -> onnx.TensorProto:
    """A TensorProto of an array, for types that the graph library can't export itself."""
    return numpy_helper.from_array(np.ascontiguousarray(values), name)
