"""From a Graph to a file: atomically, with external data where the weights are large."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import onnx
import onnx_graphsurgeon as gs

from onnxq.errors import OutputError
from onnxq.graph.graph import Graph
from onnxq.graph.names import with_bodies
from onnxq.graph.tensors import FIRST_IR, is_made, is_text, nbytes, stored, stored_type

EXTERNAL_ABOVE = 1_500_000_000  # bytes of weights; protobuf ends at 2 GB
EXTERNAL_SMALLEST = 1024  # smaller tensors stay in the model, where shape inference reads them
_ALIGN = 4096  # offsets that can be memory-mapped
_CHUNK = 16 << 20

Fill = Callable[[IO[bytes]], Any]


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
    model.MergeFrom(graph.header)
    for node in [n for g in with_bodies(model.graph) for n in g.node]:
        extra = graph.extras.get(node.name)
        if extra is None:
            continue
        node.attribute.extend(extra.attributes)
        node.doc_string = extra.doc_string
        for key, value in extra.metadata.items():
            node.metadata_props.add(key=key, value=value)
    _store_once(model.graph)
    model.ir_version = max([model.ir_version, *(FIRST_IR.get(t.data_type, 0) for g in with_bodies(model.graph)
                                                for t in g.initializer)])
    made = {t for node in model.graph.node for t in node.output} | {t.name for t in model.graph.initializer}
    model.graph.quantization_annotation.extend(a for a in graph.annotations if a.tensor_name in made)
    for key, value in graph.metadata.items():
        model.metadata_props.add(key=key, value=value)
    return model


def _constants(ir: gs.Graph) -> Iterator[gs.Constant]:
    for sub in Graph._with_subgraphs(ir):
        for tensors in [*(node.inputs for node in sub.nodes), sub.outputs]:
            yield from (t for t in tensors if isinstance(t, gs.Constant))


def _store_once(main: onnx.GraphProto) -> None:
    """Keep a weight that several graphs read in the outermost one only; the library exports it with each."""
    graphs = list(with_bodies(main))
    readers = Counter(t.name for g in graphs for t in g.initializer)
    here = {t.name for t in main.initializer}
    for body in graphs[1:]:
        for index in reversed(range(len(body.initializer))):
            proto = body.initializer[index]
            if readers[proto.name] == 1:
                continue
            if proto.name not in here:
                main.initializer.append(proto)
                here.add(proto.name)
            del body.initializer[index]


def _embed(model: onnx.ModelProto, constants: dict[str, gs.Constant], graph: Graph) -> None:
    for proto in [t for g in with_bodies(model.graph) for t in g.initializer]:
        tensor = constants[proto.name]
        if proto.data_location == onnx.TensorProto.EXTERNAL or is_made(tensor):
            _embed_one(proto, tensor, graph)


def _embed_one(proto: onnx.TensorProto, tensor: gs.Constant, graph: Graph) -> None:
    raw = stored(tensor, graph.folder).tobytes()
    _clear(proto, tensor)
    proto.data_location = onnx.TensorProto.DEFAULT
    proto.raw_data = raw


def _clear(proto: onnx.TensorProto, tensor: gs.Constant) -> None:
    """Take out the values as the library exported them, which for widened ones are still those of the half type."""
    if is_made(tensor):
        proto.data_type = stored_type(tensor)
    for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
        proto.ClearField(field)
    del proto.external_data[:]


def _move_outside(model: onnx.ModelProto, constants: dict[str, gs.Constant], graph: Graph, name: str,
                  file: IO[bytes]) -> None:
    """Stream every large weight into one data file, one tensor in memory at a time."""
    offset = 0
    for proto in [t for g in with_bodies(model.graph) for t in g.initializer]:
        tensor = constants[proto.name]
        if nbytes(tensor) < EXTERNAL_SMALLEST or is_text(tensor):
            if is_made(tensor):
                _embed_one(proto, tensor, graph)
            continue
        offset = -(-offset // _ALIGN) * _ALIGN
        values = stored(tensor, graph.folder)
        file.seek(offset)
        for start in range(0, len(values), _CHUNK):
            file.write(values[start:start + _CHUNK].tobytes())
        _clear(proto, tensor)
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", offset), ("length", len(values))):
            proto.external_data.add(key=key, value=str(value))
        offset += len(values)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Callable[[str, Fill], None]]:
    """Collect files under temporary names in the target folder; rename all at the end, remove all on failure."""
    pending: list[tuple[str, Path]] = []

    def write(name: str, fill: Fill) -> None:
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
