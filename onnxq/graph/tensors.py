"""Reading weights: from the model file, from external data through a memory map, from a constant that a pass made.

`Constant.values` of the graph library is never used: it keeps every array that it reads, converts external data
eagerly and breaks on sub-byte types.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxq.errors import GraphError, ModelError
from onnxq.numerics import halves
from onnxq.ports import BFLOAT16, Port

Array = NDArray[Any]
FLOAT32 = np.dtype(np.float32)
HALF: tuple[np.dtype[Any], ...] = (np.dtype(np.float16), BFLOAT16)

_WORTH_ADVICE = 1 << 20  # bytes
_EAGER = 1024  # elements
_PIECE = 16 << 20  # bytes in memory at a time of what is copied from file to file

# types of which several share a byte when stored; ONNX packs them from the low bits up
_BITS: dict[int, int] = {
    getattr(onnx.TensorProto, name): bits
    for name, bits in (("INT4", 4), ("UINT4", 4), ("FLOAT4E2M1", 4), ("INT2", 2), ("UINT2", 2))
    if hasattr(onnx.TensorProto, name)
}
# the version of the file format that each of them came with
FIRST_IR: dict[int, int] = {
    getattr(onnx.TensorProto, name): version
    for name, version in (("INT4", 10), ("UINT4", 10), ("FLOAT4E2M1", 11), ("INT2", 13), ("UINT2", 13))
    if hasattr(onnx.TensorProto, name)
}


class Widened(LazyValues):  # type: ignore[misc]  # the library ships no types
    """Stored values of float16 or bfloat16 that are read as float32, exactly; mapped from disk like all others."""

    def __init__(self, half: LazyValues) -> None:
        self.half, self.tensor, self.shape = half, half.tensor, half.shape
        self.dtype, self.nbytes = FLOAT32, 2 * half.nbytes


class Computed(LazyValues):  # type: ignore[misc]
    """Values that are computed each time they are asked for; `tensor` tells type and shape and holds no values.

    Copies of a graph share it.
    """

    def __init__(self, name: str, dtype: np.dtype[Any], shape: Sequence[int], compute: Callable[[], Array]) -> None:
        self.name, self.dtype, self.shape, self.compute = name, dtype, tuple(int(d) for d in shape), compute
        self.tensor = onnx.TensorProto(name=name, data_type=type_number(dtype), dims=self.shape)
        self.nbytes = stored_size(self.tensor.data_type, self.shape)

    def values(self) -> Array:
        """What `compute` gives. Raises GraphError when that is of another dtype or shape than was promised."""
        found = self.compute()
        if found.dtype != self.dtype or found.shape != self.shape:
            raise GraphError(f"{self.name!r} was computed as {found.dtype} {list(found.shape)} in place of "
                             f"{self.dtype} {list(self.shape)}; this is a bug in onnxq, please report it")
        return found


class Sparse(LazyValues):  # type: ignore[misc]
    """Values that are saved as ONNX's sparse initializer: those that are not 0, and where they are."""

    def __init__(self, dense: Array | LazyValues) -> None:
        self.dense, self.dtype, self.shape, self.nbytes = dense, np.dtype(dense.dtype), dense.shape, dense.nbytes
        self.tensor = onnx.TensorProto(data_type=type_number(self.dtype), dims=[int(d) for d in dense.shape])


class Bare(LazyValues):  # type: ignore[misc]
    """What the graph library is to export in place of values: their type and shape."""

    def __init__(self, tensor: gs.Constant) -> None:
        values = tensor._values
        self.dtype, self.shape, self.nbytes = values.dtype, values.shape, values.nbytes
        self.tensor = onnx.TensorProto(data_type=stored_type(tensor), dims=[int(d) for d in values.shape])


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


def read_proto(proto: onnx.TensorProto, folder: Path, rows: slice | None = None) -> Array:
    """The values of a TensorProto, or some of its rows.

    External data are mapped, not read, unless they lie where the processor can't use them (in a model file they lie
    anywhere) or share bytes. Raises ModelError when the external file is shorter than the tensor needs.
    """
    if proto.data_location != onnx.TensorProto.EXTERNAL:
        return _rows(numpy_helper.to_array(proto), rows)
    path, offset, length = external_span(proto, folder)
    shape = tuple(proto.dims)
    if proto.data_type in _BITS:
        raw = _map(path, offset, length).tobytes()
        return _rows(numpy_helper.to_array(onnx.TensorProto(data_type=proto.data_type, dims=shape, raw_data=raw)), rows)
    if rows is not None:
        first, last, _ = rows.indices(shape[0])
        each, count = length // max(shape[0], 1), max(0, last - first)
        offset, length, shape = offset + first * each, count * each, (count, *shape[1:])
    found = _map(path, offset, length).view(onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)).reshape(shape)
    return found if found.flags.aligned else np.array(found)


def _rows(values: Array, rows: slice | None) -> Array:
    return values if rows is None else values[rows]


def _map(path: Path, offset: int, length: int) -> NDArray[np.uint8]:
    """Bytes of a file, mapped; the mapping, and its pages with it, goes when the last array on it goes."""
    if length == 0:
        return np.empty(0, np.uint8)
    mapped = np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=(length,))
    if length >= _WORTH_ADVICE and isinstance(mapped.base, mmap.mmap) and hasattr(mapped.base, "madvise"):
        mapped.base.madvise(mmap.MADV_WILLNEED)  # from a disk, one long read in place of many short ones
    return mapped


def external_span(proto: onnx.TensorProto, folder: Path) -> tuple[Path, int, int]:
    """(file, offset, bytes) of external data. Raises ModelError when the file is shorter than the tensor needs."""
    path, offset, length = external_location(proto, folder)
    wanted = stored_size(proto.data_type, tuple(proto.dims))
    if os.path.getsize(path) < offset + wanted or (length is not None and length < wanted):
        raise ModelError(f"the external data of {proto.name!r} are shorter than its shape {list(proto.dims)} needs; "
                         "copy or export the model again")
    return path, offset, wanted


def stored_size(data_type: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in a file; types below a byte are packed, of strings there is no telling."""
    bits = _BITS.get(data_type) or 8 * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(data_type)).itemsize
    return -(-int(np.prod(shape, dtype=np.int64)) * bits // 8)


def is_constant(tensor: gs.Tensor | None) -> bool:
    """Whether the tensor's values are stored in the model."""
    return isinstance(tensor, gs.Constant)


def read(tensor: gs.Tensor, folder: Path, rows: slice | None = None) -> Array:
    """The values of a constant, or some of its rows, not kept anywhere: a second call reads again.

    Pages of external data count as memory once they were touched and until the array goes: of a weight that is large
    even alone, blocks of rows are to be asked for one by one, not cut from the whole.
    """
    if not isinstance(tensor, gs.Constant):
        raise TypeError(f"{tensor.name} is no constant")
    return _values(tensor._values, folder, rows)


def _values(values: Array | LazyValues, folder: Path, rows: slice | None) -> Array:
    if isinstance(values, Widened):
        return _values(values.half, folder, rows).astype(FLOAT32)
    if isinstance(values, Sparse):
        return _values(values.dense, folder, rows)
    if isinstance(values, Computed):
        return _rows(values.values(), rows)
    return _rows(values, rows) if isinstance(values, np.ndarray) else read_proto(values.tensor, folder, rows)


def stored(tensor: gs.Constant, folder: Path) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a constant as a file holds them, in pieces [n]; types below a byte are packed.

    Each piece is to be used before the next is taken. Of external data no more than a piece is in memory.
    """
    values = tensor._values
    lazy = not is_made(tensor) and not isinstance(values, np.ndarray)
    if lazy and is_outside(tensor):
        yield from _copied(values.tensor, folder)
    elif lazy and values.tensor.HasField("raw_data"):
        yield np.frombuffer(values.tensor.raw_data, np.uint8)
    else:
        found = read(tensor, folder)
        raw = np.ascontiguousarray(found).reshape(-1).view(np.uint8)
        bits = _BITS.get(type_number(found.dtype), 8)
        for start in range(0, len(raw), _PIECE):
            yield raw[start:start + _PIECE] if bits == 8 else _packed(raw[start:start + _PIECE], bits)


def _packed(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes [n] in the low bits of a byte each -> [ceil(n / each)], `each` = 8 / bits of them in a byte.

    The first is in the lowest bits; a last byte that isn't full ends in zeros.
    """
    each, mask = 8 // bits, np.uint8((1 << bits) - 1)
    packed = codes[::each] & mask
    for place in range(1, each):
        part = codes[place::each]
        packed[:len(part)] |= (part & mask) << np.uint8(place * bits)
    return packed


def _copied(proto: onnx.TensorProto, folder: Path) -> Iterator[NDArray[np.uint8]]:
    path, offset, left = external_span(proto, folder)
    buffer = np.empty(min(left, _PIECE), np.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while left:
            count = file.readinto(buffer[:left].data)
            if not count:
                raise ModelError(f"the external data of {proto.name!r} were cut short meanwhile; copy the model again")
            yield buffer[:count]
            left -= count


def is_made(tensor: gs.Constant) -> bool:
    """Whether the values are made as they are read, so that the library exports others or none."""
    return isinstance(tensor._values, (Widened, Computed, Sparse))


def is_computed(tensor: gs.Constant) -> bool:
    """Whether all values are computed anew each time some are read."""
    return isinstance(tensor._values, Computed)


def is_sparse(tensor: gs.Constant) -> bool:
    """Whether the constant is to be saved as a sparse initializer."""
    return isinstance(tensor._values, Sparse)


def make_sparse(tensor: gs.Constant) -> None:
    """Have a constant saved as a sparse initializer, in place."""
    store(tensor, Sparse(tensor._values))


def sparse_proto(name: str, values: Array) -> onnx.SparseTensorProto:
    """The elements that are not 0, all bits of them, with their places in C order as int64, which the standard asks."""
    flat = np.ascontiguousarray(values).reshape(-1)
    places = np.flatnonzero(flat.view(f"u{flat.dtype.itemsize}"))
    return onnx.SparseTensorProto(values=numpy_helper.from_array(flat[places], name), dims=values.shape,
                                  indices=numpy_helper.from_array(places.astype(np.int64), f"{name}.places"))


def is_outside(tensor: gs.Constant) -> bool:
    """Whether the values lie in a file of their own."""
    values = tensor._values
    return not isinstance(values, np.ndarray) and bool(values.tensor.data_location == onnx.TensorProto.EXTERNAL)


def is_text(tensor: gs.Constant) -> bool:
    """Whether the constant holds strings, which only the model file itself can store."""
    return bool(np.dtype(object) == tensor._values.dtype)


def nbytes(tensor: gs.Constant) -> int:
    """Bytes that the constant's values take when stored; of strings, those of their pointers."""
    if is_text(tensor):
        return int(tensor._values.nbytes)
    return stored_size(stored_type(tensor), tuple(tensor._values.shape))


def stored_type(tensor: gs.Constant) -> int:
    """The number of a constant's element type."""
    values = tensor._values
    if isinstance(values, (np.ndarray, Widened)):
        return type_number(np.dtype(values.dtype))
    return int(values.tensor.data_type)


def shape_of(tensor: gs.Tensor) -> tuple[int | str | None, ...] | None:
    """Dimensions of a tensor, names and None where they are free; None when even the rank is unknown."""
    if isinstance(tensor, gs.Constant):
        return tuple(int(d) for d in tensor._values.shape)
    if tensor.shape is None:
        return None
    # some exporters write a free dimension as -1
    return tuple(None if d == "" or (isinstance(d, int) and d < 0) else d for d in tensor.shape)


def dtype_of(tensor: gs.Tensor) -> np.dtype[Any] | None:
    """Element type as a numpy dtype (bfloat16 as that of ml_dtypes), None when unknown or when there is none."""
    dtype = tensor._values.dtype if isinstance(tensor, gs.Constant) else tensor.dtype
    if isinstance(dtype, int):
        return BFLOAT16 if dtype == onnx.TensorProto.BFLOAT16 else None
    return None if dtype is None else np.dtype(dtype)


def port_of(tensor: gs.Tensor) -> Port:
    """What a graph input or output accepts or gives."""
    dtype = dtype_of(tensor)
    if dtype == BFLOAT16:
        return Port(tensor.name, FLOAT32, shape_of(tensor), bfloat16=True)
    return Port(tensor.name, dtype, shape_of(tensor))


def type_number(dtype: np.dtype[Any]) -> int:
    """The number by which ONNX attributes such as Cast's `to` name an element type."""
    return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))


def widen(tensor: gs.Tensor) -> None:
    """Make float32 of a float16 or bfloat16 tensor, in place; stored values are converted when they are read."""
    if not isinstance(tensor, gs.Constant):
        tensor.dtype = FLOAT32
        return
    values = tensor._values
    store(tensor, values.astype(FLOAT32) if isinstance(values, np.ndarray) else Widened(values))


def widen_attribute(tensor: gs.Constant, folder: Path) -> None:
    """Make float32 of a float16 or bfloat16 tensor in an attribute, in place; these are small and converted at once."""
    store(tensor, read(tensor, folder).astype(FLOAT32))


def narrow(tensor: gs.Constant, half: np.dtype[Any], folder: Path) -> bool:
    """Store a float32 constant as float16 or bfloat16, in place, where that loses nothing; whether it was done."""
    values = tensor._values
    if isinstance(values, Widened) and values.tensor.data_type == type_number(half):
        store(tensor, values.half)
        return True
    given = read(tensor, folder)
    with np.errstate(over="ignore"):
        stored_as = given.astype(half)
    if not np.array_equal(stored_as.astype(FLOAT32), given, equal_nan=True):
        return False
    store(tensor, stored_as)
    return True


def halve(tensor: gs.Constant, limit: float, folder: Path) -> None:
    """Make float16 of a float32 constant, in place; numbers beyond +-`limit` become that.

    Small ones are converted at once, larger ones whenever they are read; what was widened from float16 is itself again.
    """
    values = tensor._values
    if isinstance(values, Widened) and values.tensor.data_type == onnx.TensorProto.FLOAT16:
        store(tensor, values.half)
        return

    def compute() -> Array:
        return halves.nearest(_values(values, folder, None), limit)

    small = np.prod(values.shape, dtype=np.int64) <= _EAGER
    store(tensor, compute() if small else Computed(tensor.name, np.dtype(np.float16), values.shape, compute))


def store(tensor: gs.Constant, values: Array | LazyValues) -> None:
    """Put other values in place of a constant's, of any type."""
    tensor._values = values
    tensor._export_dtype = tensor.data_location = None  # a copied constant holds its type apart


def storable(name: str, values: Array) -> Array | LazyValues:
    """An array as the graph library can export it: packed already where several values share a byte."""
    return LazyValues(as_proto(name, values)) if type_number(values.dtype) in _BITS else values


def as_proto(name: str, values: Array) -> onnx.TensorProto:
    """A TensorProto of an array, for types that the graph library can't export itself."""
    return numpy_helper.from_array(np.asarray(values, order="C"), name)
