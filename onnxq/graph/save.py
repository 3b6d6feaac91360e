"""From a Graph to a file: atomically, with external data where the weights are large."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import onnx
import onnx_graphsurgeon as gs

from onnxq.errors import OutputError
from onnxq.graph.decoders import PACKED, decoder
from onnxq.graph.graph import Graph
from onnxq.graph.names import with_bodies
from onnxq.graph.parse import GRAPH, INITIALIZER, RAW_DATA, field
from onnxq.graph.tensors import FIRST_IR, Bare, is_made, is_outside, is_sparse, is_text, nbytes, sparse_proto, stored

EXTERNAL_ABOVE = 1_500_000_000  # bytes of weights; protobuf ends at 2 GB
EXTERNAL_SMALLEST = 1024  # smaller tensors stay in the model, where shape inference reads them
_LONGEST_FIELD = 6  # bytes that name a field of protobuf and its length
_ALIGN = 4096  # offsets that can be memory-mapped

Fill = Callable[[IO[bytes]], Any]
Heard = Callable[[int, int], None]


def save(graph: Graph, path: str | Path, *, extra_outputs: list[str] | None = None,
         external_above: int = EXTERNAL_ABOVE, progress: Heard | None = None) -> None:
    """Write a model under a temporary name and rename it, so that nothing half-written is ever seen.

    Weights are written one after the other, in the order in which nodes read them, with no more than one in memory.
    `extra_outputs` names computed tensors to add as graph outputs of the written file only (the calibration model).
    `progress` hears of the bytes of weights that are written and of how many there are in all.
    Raises OutputError when the folder can't be written or the disk is full.
    """
    path = Path(path)
    graph.sort()
    total = sum(nbytes(t) for t in {t.name: t for t in constants_of(graph.ir)}.values())
    model = outline(graph)
    for name in extra_outputs or ():
        if all(o.name != name for o in model.graph.output):
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    _store_sparse(model, graph)
    kept, outside = {t.name for g in with_bodies(model.graph) for t in g.initializer}, apart(graph)
    weights = _Weights(graph.folder, {name: t for name, t in outside.items() if name in kept}, progress)
    with _written(path) as write:
        if total > external_above:
            write(path.name + ".data", lambda file: _move_outside(model, weights, path.name + ".data", file))
            write(path.name, lambda file: file.write(model.SerializeToString()))
        else:
            write(path.name, lambda file: _embed(model, weights, file))


class _Weights:
    """Values that were left out of a model, for writing each of them once."""

    def __init__(self, folder: Path, constants: dict[str, gs.Constant], progress: Heard | None) -> None:
        self._folder, self._constants, self._progress = folder, constants, progress
        self._done, self._total = 0, sum(nbytes(t) for t in constants.values())

    def length(self, name: str) -> int | None:
        """Bytes of a weight; None for what is in the model already."""
        return nbytes(self._constants[name]) if name in self._constants else None

    def write(self, name: str, file: IO[bytes]) -> None:
        """Append its bytes to a file; none of it is in memory afterwards."""
        for piece in stored(self._constants[name], self._folder):
            file.write(piece.data)
            self._done += len(piece)
            if self._progress:
                self._progress(self._done, self._total)


def apart(graph: Graph) -> dict[str, gs.Constant]:
    """The constants whose values `outline` leaves out, by name."""
    return {t.name: t for t in constants_of(graph.ir) if _is_apart(t)}


def outline(graph: Graph) -> onnx.ModelProto:
    """The model with what the graph library drops put back; of weights only types and shapes, see `apart`."""
    held = [(t, t._values) for t in {id(t): t for t in constants_of(graph.ir)}.values() if _is_apart(t)]
    try:
        for tensor, _ in held:
            tensor._values = Bare(tensor)
        model: onnx.ModelProto = gs.export_onnx(graph.ir)
    finally:
        for tensor, values in held:
            tensor._values = values
    model.MergeFrom(graph.header)
    used = {n.op_type for n in model.graph.node if n.domain == PACKED}
    model.functions.extend(decoder(name, graph.opset) for name in sorted(used))
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


def file_bytes(graph: Graph) -> int:
    """Bytes of what `save` would write, external data included, without reading or making any weight.

    At most a few bytes for each weight too many, and up to a page for each where they go into a file of their own.
    """
    weights = apart(graph)
    held = sum(nbytes(t) for t in {t.name: t for t in constants_of(graph.ir)}.values())
    each = _ALIGN if held > EXTERNAL_ABOVE else 2 * _LONGEST_FIELD
    return outline(graph).ByteSize() + sum(nbytes(t) + each for t in weights.values())


def _store_sparse(model: onnx.ModelProto, graph: Graph) -> None:
    """Make sparse initializers of constants of the main graph that are to be; of large ones there must be few."""
    sparse = {t.name: t for t in constants_of(graph.ir) if is_sparse(t)}
    names = [t.name for t in model.graph.initializer if t.name in sparse]
    for name in names:
        model.graph.sparse_initializer.append(sparse_proto(name, graph.read(sparse[name])))
    for index in reversed(range(len(model.graph.initializer))):
        if model.graph.initializer[index].name in names:
            del model.graph.initializer[index]


def _is_apart(tensor: gs.Constant) -> bool:
    """Whether values are written by `_Weights`: large ones, and those that the graph library can't export."""
    return not is_text(tensor) and (nbytes(tensor) >= EXTERNAL_SMALLEST or is_made(tensor) or is_outside(tensor))


def constants(graph: Graph) -> list[gs.Constant]:
    """Every constant that a node reads or that is an output, bodies included, each name once."""
    return list({t.name: t for t in constants_of(graph.ir)}.values())


def constants_of(ir: gs.Graph) -> Iterator[gs.Constant]:
    """Every constant that a node reads or that is an output, bodies included; several may be of one name."""
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


def _fill(proto: onnx.TensorProto, weights: _Weights) -> None:
    raw = io.BytesIO()
    weights.write(proto.name, raw)
    proto.raw_data = raw.getvalue()


def _move_outside(model: onnx.ModelProto, weights: _Weights, name: str, file: IO[bytes]) -> None:
    """Stream every large weight into one data file."""
    offset = 0
    for proto in [t for g in with_bodies(model.graph) for t in g.initializer]:
        length = weights.length(proto.name)
        if length is None:
            continue
        if length < EXTERNAL_SMALLEST:
            _fill(proto, weights)
            continue
        offset = -(-offset // _ALIGN) * _ALIGN
        file.seek(offset)
        weights.write(proto.name, file)
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", offset), ("length", length)):
            proto.external_data.add(key=key, value=str(value))
        offset += length


def _embed(model: onnx.ModelProto, weights: _Weights, file: IO[bytes]) -> None:
    """Stream a model with its weights in it; those of bodies, which are few, are filled in before.

    Parts of a protobuf message may follow one another in any order, so the initializers go behind all else.
    """
    for proto in [t for g in list(with_bodies(model.graph))[1:] for t in g.initializer]:
        if weights.length(proto.name) is not None:
            _fill(proto, weights)
    parts = []  # (name, initializer up to its values, their bytes or None)
    for proto in model.graph.initializer:
        head, length = proto.SerializeToString(), weights.length(proto.name)
        parts.append((proto.name, head if length is None else head + field(RAW_DATA, length), length))
    del model.graph.initializer[:]
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    heads = [field(INITIALIZER, len(head) + (length or 0)) for _, head, length in parts]
    whole = len(graph) + sum(len(h) + len(head) + (length or 0)
                             for h, (_, head, length) in zip(heads, parts, strict=True))
    file.write(model.SerializeToString() + field(GRAPH, whole) + graph)
    for before, (name, head, length) in zip(heads, parts, strict=True):
        file.write(before + head)
        if length is not None:
            weights.write(name, file)


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
