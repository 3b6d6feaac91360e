"""From a Graph to a file: atomically, with external data where the weights are large."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.errors import OutputError
from onnxq.graph.graph import Graph
from onnxq.graph.tensors import nbytes, read

EXTERNAL_ABOVE = 1_500_000_000  # bytes of weights; protobuf ends at 2 GB
EXTERNAL_SMALLEST = 1024  # smaller tensors stay in the model, where shape inference reads them
_ALIGN = 4096  # offsets that can be memory-mapped
_CHUNK = 16 << 20


def save(graph: Graph, path: str | Path, *, extra_outputs: list[str] | None = None,
         external_above: int = EXTERNAL_ABOVE) -> None:
    """Write a model under a temporary name and rename it, so that nothing half-written is ever seen.

    `extra_outputs` names computed tensors to add as graph outputs of the written file only (the calibration model).
    Raises OutputError when the folder can't be written or the disk is full.
    """
    path = Path(path)
    graph.sort()
    model = to_proto(graph)
    for name in extra_outputs or ():
        if all(o.name != name for o in model.graph.output):
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    constants = {t.name: t for t in _constants(graph.ir)}
    total = sum(nbytes(t) for t in constants.values())
    with _written(path) as write:
        if total > external_above:
            write(path.name + ".data", lambda file: _move_outside(model, constants, graph, path.name + ".data", file))
        else:
            _embed(model, constants, graph)
        write(path.name, lambda file: file.write(model.SerializeToString()))


def to_proto(graph: Graph) -> onnx.ModelProto:
    """The model with what the graph library drops put back; weights as the library exports them."""
    model: onnx.ModelProto = gs.export_onnx(graph.ir)
    for node in model.graph.node:
        extra = graph.extras.get(node.name)
        if extra is None:
            continue
        node.attribute.extend(extra.attributes)
        node.doc_string = extra.doc_string
        for key, value in extra.metadata.items():
            node.metadata_props.add(key=key, value=value)
    made = {t for node in model.graph.node for t in node.output} | {t.name for t in model.graph.initializer}
    model.graph.quantization_annotation.extend(a for a in graph.annotations if a.tensor_name in made)
    for key, value in graph.metadata.items():
        model.metadata_props.add(key=key, value=value)
    return model


def _constants(ir: gs.Graph) -> Iterator[gs.Constant]:
    for sub in Graph._with_subgraphs(ir):
        for node in sub.nodes:
            yield from (t for t in node.inputs if isinstance(t, gs.Constant))


def _embed(model: onnx.ModelProto, constants: dict[str, gs.Constant], graph: Graph) -> None:
    for proto in model.graph.initializer:
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            raw = read(constants[proto.name], graph.folder).tobytes()
            del proto.external_data[:]
            proto.data_location = onnx.TensorProto.DEFAULT
            proto.raw_data = raw


def _move_outside(model: onnx.ModelProto, constants: dict[str, gs.Constant], graph: Graph, name: str,
                  file: object) -> None:
    """Stream every large weight into one data file, one tensor in memory at a time."""
    stream = file
    offset = 0
    for proto in model.graph.initializer:
        tensor = constants.get(proto.name)
        if tensor is None or nbytes(tensor) < EXTERNAL_SMALLEST:
            continue
        offset = -(-offset // _ALIGN) * _ALIGN
        values = memoryview(read(tensor, graph.folder).reshape(-1).view(np.uint8))
        stream.seek(offset)  # type: ignore[attr-defined]
        for start in range(0, len(values), _CHUNK):
            stream.write(values[start:start + _CHUNK])  # type: ignore[attr-defined]
        proto.ClearField("raw_data")
        for typed in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            proto.ClearField(typed)
        del proto.external_data[:]
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", offset), ("length", len(values))):
            proto.external_data.add(key=key, value=str(value))
        offset += len(values)


@contextlib.contextmanager
def _written(path: Path):  # type: ignore[no-untyped-def]
    """Collect files under temporary names in the target folder; rename all at the end, remove all on failure."""
    pending: list[tuple[str, Path]] = []

    def write(name: str, fill) -> None:  # type: ignore[no-untyped-def]
        handle, temporary = tempfile.mkstemp(prefix=".onnxq-", dir=path.parent)
        pending.append((temporary, path.parent / name))
        with os.fdopen(handle, "wb") as file:
            fill(file)

    try:
        yield write
        for temporary, final in pending:
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, final)
    except OSError as e:
        raise OutputError(f"{path} can't be written ({e.strerror}); choose another folder with -o or free some space"
                          ) from None
    finally:
        for temporary, _ in pending:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
