"""Packed weights of a model that is being loaded: they become the dense constants that they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxq.errors import ModelError
from onnxq.graph.decoders import PACKED, decoder
from onnxq.graph.names import with_bodies
from onnxq.graph.parse import parse
from onnxq.graph.tensors import Array, Computed, read_proto, stored_size, type_number
from onnxq.numerics import encodings
from onnxq.numerics.encodings import Encoded, Stored

SPARSE = "SparseInitializer"  # in place of the name of an encoding
_IN_BYTES: dict[str, Any] = {"int4": np.int8, "uint4": np.uint8}


@dataclass(frozen=True)
class PackedWeight:
    """A weight that a model stores packed; `names` are those of its encodings, from the outermost one on."""

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dense_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class _Call:
    """A node that decodes, with the stored tensors and the other calls that it reads."""

    name: str
    parts: Mapping[str, onnx.TensorProto | _Call]
    shape: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *(name for p in self.parts.values() if isinstance(p, _Call) for name in p.names))

    @property
    def dtype(self) -> np.dtype[Any]:
        kind, _ = encodings.split(self.name)
        if kind == "Planes":
            return np.dtype(np.int8)
        part = self.parts[encodings.ELEMENTS[kind]]
        return part.dtype if isinstance(part, _Call) else onnx.helper.tensor_dtype_to_np_dtype(part.data_type)

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes if isinstance(p, _Call) else stored_size(p.data_type, tuple(p.dims))
                   for p in self.parts.values())

    def decoded(self, folder: Path) -> Array:
        """The weight, from what is stored."""
        try:
            return encodings.decode(self._encoded(folder))
        except (IndexError, ValueError):
            raise ModelError("a packed weight does not fit its shape; copy the model again, or pack it anew") from None

    def _encoded(self, folder: Path) -> Encoded:
        kind, numbers = encodings.split(self.name)
        parts: dict[str, Stored | Encoded] = {}
        for name, part in self.parts.items():
            if isinstance(part, _Call):
                parts[name] = part._encoded(folder)
                continue
            values, dtype = read_proto(part, folder), _type_name(part)
            parts[name] = Stored(values.astype(_IN_BYTES.get(dtype, values.dtype)), dtype)
        return Encoded(kind, parts, self.shape, numbers)


def unpack(model: onnx.ModelProto, folder: Path) -> dict[str, Computed]:
    """Take the decoders of weights out of a model, put declarations of the dense weights in place of what they read,
    and give the values of those, by name, which are computed as they are read.

    Only decoders that are those of this version; others are left, to be inlined as any function is.
    """
    calls = _calls(model)
    if not calls:
        return {}
    read = {t for node in _others(model) for t in node.input} | {o.name for o in model.graph.output}
    wanted = {name: call for name, call in calls.items() if name in read}
    gone = {t for name, node in _nodes(model).items() if name in calls for t in node.input} - read - wanted.keys()
    nodes = [n for n in model.graph.node if not (n.domain == PACKED and n.output[0] in calls)]
    stored = [t for t in model.graph.initializer if t.name not in gone]
    for name, call in wanted.items():
        shell = onnx.TensorProto(name=name, data_type=type_number(call.dtype), dims=call.shape,
                                 data_location=onnx.TensorProto.EXTERNAL)
        shell.external_data.add(key="location", value="unread")
        stored.append(shell)
    _replace(model.graph.node, nodes)
    _replace(model.graph.initializer, stored)
    if not any(n.domain == PACKED for g in with_bodies(model.graph) for n in g.node):
        _replace(model.functions, [f for f in model.functions if f.domain != PACKED])
        _replace(model.opset_import, [o for o in model.opset_import if o.domain != PACKED])
    return {name: Computed(name, call.dtype, call.shape, partial(call.decoded, folder))
            for name, call in wanted.items()}


def packed_weights(path: str | Path) -> list[PackedWeight]:
    """The weights that a model file stores packed, in the order of its nodes, and its sparse initializers, unread."""
    model = parse(Path(path))
    calls = _calls(model)
    read = {t for node in _others(model) for t in node.input} | {o.name for o in model.graph.output}
    return [PackedWeight(name, call.names, call.shape, stored_size(type_number(call.dtype), call.shape), call.nbytes)
            for name, call in calls.items() if name in read] + [_sparse(s) for s in model.graph.sparse_initializer]


def _sparse(proto: onnx.SparseTensorProto) -> PackedWeight:
    values, shape = proto.values, tuple(proto.dims)
    held = sum(stored_size(t.data_type, tuple(t.dims)) for t in (values, proto.indices))
    return PackedWeight(values.name, (SPARSE,), shape, stored_size(values.data_type, shape), held)


def _calls(model: onnx.ModelProto) -> dict[str, _Call]:
    """What is made by decoders of this version from stored tensors alone, by name."""
    known = {f.name for f in model.functions if f.domain == PACKED and _is_ours(f)}
    stored = {t.name: t for t in model.graph.initializer}
    found: dict[str, _Call] = {}
    for node in model.graph.node:
        if node.domain != PACKED or node.op_type not in known:
            continue
        parts = [found.get(name, stored.get(name)) for name in node.input]
        shape = next((tuple(a.ints) for a in node.attribute if a.name == "shape"), None)
        if shape is not None and all(part is not None for part in parts):
            names = encodings.part_names(node.op_type)
            found[node.output[0]] = _Call(node.op_type, dict(zip(names, parts, strict=True)), shape)  # type: ignore
    return found


def _is_ours(function: onnx.FunctionProto) -> bool:
    version = next((o.version for o in function.opset_import if o.domain == ""), 0)
    try:
        return bool(function == decoder(function.name, version))
    except ValueError:
        return False


def _nodes(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {n.output[0]: n for n in model.graph.node if n.domain == PACKED}


def _others(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Nodes that decode nothing, those of bodies included."""
    yield from (n for g in with_bodies(model.graph) for n in g.node if n.domain != PACKED)


def _replace(field: Any, kept: list[Any]) -> None:
    copies = [type(item).FromString(item.SerializeToString()) for item in kept]
    del field[:]
    field.extend(copies)


def _type_name(proto: onnx.TensorProto) -> str:
    return str(onnx.TensorProto.DataType.Name(proto.data_type)).lower()
