"""A model file as a ModelProto without its large weights: they stay in the file and are read from there as external
data are, so that a model of gigabytes takes no more memory than its graph.

The file is walked as protobuf messages are written: fields one after the other, each a key (its number and how its
value is written) and a value, some of which have a length first.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import onnx

KEPT_BELOW = 1 << 20  # bytes of values; smaller ones are read with the model

# fields of ModelProto, GraphProto and TensorProto by their numbers in onnx.proto
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
_SIZED = 2  # the wire type of what has a length first
_FIXED = {1: 8, 5: 4}  # bytes of the wire types that have one size


class _Field(NamedTuple):
    """Field `number` from byte `start` on; its value, for those that are sized, is what lies in [value, end)."""

    number: int
    start: int
    value: int
    end: int


def parse(path: Path) -> onnx.ModelProto:
    """Read a model; raw values from KEPT_BELOW on become external data that lie in the model file itself.

    Raises DecodeError of protobuf when it isn't a model, and OSError when it can't be read.
    """
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
                light = b"".join(_model(whole, path.resolve().name))
        except (ValueError, IndexError):  # empty, or not written by the rules: protobuf says what is wrong
            file.seek(0)
            light = file.read()
    model = onnx.ModelProto()
    model.ParseFromString(light)
    return model


def field(number: int, length: int) -> bytes:
    """What stands before `length` bytes of a sized field: its key, and the length in base 128, low digits first."""
    found = bytearray([number << 3 | _SIZED])
    while length > 127:
        found.append(length & 127 | 128)
        length >>= 7
    return bytes([*found, length])


def _model(whole: mmap.mmap, name: str) -> Iterator[bytes]:
    for part in _fields(whole, 0, len(whole)):
        if part.number == GRAPH:
            graph = b"".join(_graph(whole, part, name))
            yield field(GRAPH, len(graph)) + graph
        else:
            yield whole[part.start:part.end]


def _graph(whole: mmap.mmap, graph: _Field, name: str) -> Iterator[bytes]:
    """The fields of a graph; whatever lies between two large weights is taken in one piece."""
    taken = graph.value
    for part in _fields(whole, graph.value, graph.end):
        if part.number == INITIALIZER and part.end - part.value >= KEPT_BELOW:
            tensor = _outside(whole, part, name)
            if tensor is not None:
                yield whole[taken:part.start] + field(INITIALIZER, len(tensor)) + tensor
                taken = part.end
    yield whole[taken:graph.end]


def _outside(whole: mmap.mmap, tensor: _Field, name: str) -> bytes | None:
    """A TensorProto that points to its values in place of holding them; None where they are not raw or small."""
    parts = list(_fields(whole, tensor.value, tensor.end))
    raw = [p for p in parts if p.number == RAW_DATA]
    if len(raw) != 1 or raw[0].end - raw[0].value < KEPT_BELOW:
        return None
    proto = onnx.TensorProto()
    proto.ParseFromString(b"".join(whole[p.start:p.end] for p in parts if p.number != RAW_DATA))
    proto.data_location = onnx.TensorProto.EXTERNAL
    del proto.external_data[:]
    for key, value in (("location", name), ("offset", raw[0].value), ("length", raw[0].end - raw[0].value)):
        proto.external_data.add(key=key, value=str(value))
    return proto.SerializeToString()


def _fields(whole: mmap.mmap, start: int, stop: int) -> Iterator[_Field]:
    """The fields in [start, stop). Raises ValueError or IndexError where they aren't written by the rules."""
    at = start
    while at < stop:
        begin = at
        key, at = _number(whole, at)
        kind, value = key & 7, at
        if kind == _SIZED:
            length, value = _number(whole, at)
            at = value + length
        elif kind == 0:
            _, at = _number(whole, at)
        else:
            at += _FIXED.get(kind, stop)  # groups, which ONNX has none of, lead behind the end
        if at > stop:
            raise ValueError(f"field {key >> 3} ends behind what holds it")
        yield _Field(key >> 3, begin, value, at)


def _number(whole: mmap.mmap, at: int) -> tuple[int, int]:
    """(number in base 128, low digits first, where it ends)."""
    found = shift = 0
    while True:
        byte = whole[at]
        found |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return found, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
