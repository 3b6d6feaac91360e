"""From a file to a Graph: everything that differs between exporters is settled here, once.

Packed weights are dense again, model-local functions are inlined, weights in Constant nodes and sparse weights become
plain initializers, initializers listed as graph inputs are inputs no more, opsets below 13 are raised to 13
(per-channel DequantizeLinear begins there), every node and every tensor gets a unique name, those in bodies of If and
Loop too, shapes are inferred where they can be.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx import numpy_helper, version_converter
from onnx_graphsurgeon.logger import G_LOGGER

from onnxq.errors import GraphError, ModelError
from onnxq.graph.graph import Graph
from onnxq.graph.names import name_nodes, name_tensors, with_bodies
from onnxq.graph.packed import unpack
from onnxq.graph.parse import parse
from onnxq.graph.save import constants_of
from onnxq.graph.tensors import store

OLDEST_OPSET = 7
WORKING_OPSET = 13  # the first with per-channel QuantizeLinear/DequantizeLinear
SMALL = 1024  # elements; initializers up to this size are kept for shape inference, which reads them

_TRACE = "pkg.torch.onnx.stack_trace"
_CARRIED_KINDS = {"FLOAT", "INT", "STRING", "TENSOR", "GRAPH", "FLOATS", "INTS", "STRINGS"}


@dataclass
class NodeExtras:
    """What the graph library would lose of a node: put back when the model is saved."""

    attributes: list[onnx.AttributeProto] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    doc_string: str = ""


@dataclass(frozen=True)
class Header:
    """What a model file says of itself.

    `opsets` are versions by domain, that of ai.onnx being ""; `operators` are (domain, operator) of every graph and
    function in it, `functions` the domains of the latter; `data_files` lie beside the model and hold its weights.
    """

    ir_version: int
    opsets: dict[str, int]
    metadata: dict[str, str]
    operators: frozenset[tuple[str, str]]
    functions: frozenset[str]
    data_files: tuple[str, ...]


def load(path: str | Path) -> Graph:
    """Read and normalise a model.

    Raises ModelError (missing, not ONNX, truncated, no nodes, opset outside of what is supported) and GraphError
    (constructs that can't be carried), each with what to do about it.
    """
    path = Path(path)
    model = _parse(path)
    _refuse(model)
    folder = path.resolve().parent
    packed = unpack(model, folder)
    model = _inline(model)
    _drop_initializer_inputs(model.graph)
    graph = from_proto(_raise_opset(model, path), folder)
    for tensor in constants_of(graph.ir) if packed else ():
        if tensor.name in packed:
            store(tensor, packed[tensor.name])
    return graph


def from_proto(model: onnx.ModelProto, folder: Path, outputs: bool = False) -> Graph:
    """The Graph of a model of a supported opset, which is changed on the way; `folder` holds its external data.

    `outputs` tells whether outputs get the sizes that inference finds in place of names of their axes.
    """
    for graph in with_bodies(model.graph):
        _constants_to_initializers(graph)
        _densify(graph)
    names = name_nodes(model.graph)
    name_tensors(model.graph)
    model = _infer_shapes(model, outputs)
    for graph in with_bodies(model.graph):
        _forget_odd_kinds(graph, is_body=graph is not model.graph)
    # inner nodes come last in `names` and have to be settled first: settling a node may copy its bodies
    extras = {name: _take_extras(node) for name, node in reversed(names.items())}
    metadata = {p.key: p.value for p in model.metadata_props}
    with G_LOGGER.suppress(G_LOGGER.ERROR):  # it prints a warning about every type that NumPy lacks
        ir = gs.import_onnx(model)
    ir.nodes = list(ir.nodes)
    return Graph(ir, folder, metadata=metadata,
                 extras={k: v for k, v in extras.items() if v is not None},
                 annotations=list(model.graph.quantization_annotation),
                 header=onnx.ModelProto(doc_string=model.doc_string, domain=model.domain,
                                        model_version=model.model_version))


def read_nodes(path: str | Path) -> list[tuple[str, str, str, tuple[str, ...], tuple[str, ...]]]:
    """(name, op_type, domain, inputs, outputs) of the main graph's nodes, as stored; weights are not read."""
    model = parse(Path(path))
    return [(n.name, n.op_type, n.domain, tuple(n.input), tuple(n.output)) for n in model.graph.node]


def read_header(path: str | Path) -> Header:
    """What a model file says of itself; weights are not read. Raises ModelError for what is no model."""
    path = Path(path)
    model = _parse(path)
    nodes = [n for g in with_bodies(model.graph) for n in g.node] + [n for f in model.functions for n in f.node]
    return Header(model.ir_version, {"" if o.domain == "ai.onnx" else o.domain: o.version
                                     for o in model.opset_import},
                  {p.key: p.value for p in model.metadata_props},
                  frozenset((n.domain, n.op_type) for n in nodes), frozenset(f.domain for f in model.functions),
                  tuple(sorted(_data_files(model, path))))


def stored_bytes(path: str | Path) -> int:
    """Size of a model file and the external data files that it names, in bytes.

    Raises ModelError when one of those is missing.
    """
    path = Path(path)
    names = _data_files(parse(path), path)
    try:
        return int(path.stat().st_size) + sum((path.parent / n).stat().st_size for n in names)
    except FileNotFoundError as e:
        raise ModelError(f"the external data file {Path(e.filename).name!r} is missing; "
                         "put it beside the model again") from None


def _data_files(model: onnx.ModelProto, path: Path) -> set[str]:
    """The files of external data that a model names; its own is one where large weights were left in it."""
    return {e.value for g in with_bodies(model.graph) for t in g.initializer for e in t.external_data
            if e.key == "location"} - {path.resolve().name}


def _parse(path: Path) -> onnx.ModelProto:
    if not path.exists():
        raise ModelError(f"{path} does not exist; check the path")
    if not path.is_file():
        raise ModelError(f"{path} is not a file; name the .onnx file itself")
    try:
        model = parse(path)
    except DecodeError:
        raise ModelError(f"{path} is not an ONNX model or is cut short; export or copy it again") from None
    except OSError as e:
        raise ModelError(f"{path} can't be read ({e.strerror}); check its permissions") from None
    if not model.HasField("graph") or not model.opset_import:
        raise ModelError(f"{path} holds no ONNX graph; check that it is a model and was written completely")
    if not model.graph.node:
        raise ModelError(f"{path} has no nodes, so there is nothing to compile; check the export")
    return model


def _refuse(model: onnx.ModelProto) -> None:
    for value in [*model.graph.input, *model.graph.output]:
        kind = value.type.WhichOneof("value")
        if kind not in (None, "tensor_type"):
            raise GraphError(f"{value.name!r} is of kind {kind}, which onnxq does not carry; "
                             "export the model with plain tensors as inputs and outputs")
    for graph in with_bodies(model.graph):
        for node in graph.node:
            if any(a.type == onnx.AttributeProto.GRAPHS for a in node.attribute):
                raise GraphError(f"node {node.name!r} ({node.op_type}) holds a list of graphs, which onnxq can't "
                                 "carry; replace it before the export")


def _inline(model: onnx.ModelProto) -> onnx.ModelProto:
    if not model.functions:
        return model
    from onnx import inliner

    try:
        return inliner.inline_local_functions(model, convert_version=True)
    except Exception as e:
        raise GraphError(f"its model-local functions can't be inlined ({first_line(e)}); "
                         "export without functions") from None


def _drop_initializer_inputs(graph: onnx.GraphProto) -> None:
    stored = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    kept = [i for i in graph.input if i.name not in stored]
    del graph.input[:]
    graph.input.extend(kept)


def _raise_opset(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
    if version is None or version >= WORKING_OPSET:
        return model
    if version < OLDEST_OPSET:
        raise ModelError(f"{path} uses opset {version}; the oldest that onnxq reads is {OLDEST_OPSET}: export it anew")
    props = list(model.metadata_props)
    model.ir_version = max(model.ir_version, 8)  # the converter wants older initializers listed as inputs
    try:
        raised = version_converter.convert_version(model, WORKING_OPSET)
    except Exception as e:
        raise ModelError(f"{path} uses opset {version} and onnx can't raise it to {WORKING_OPSET} "
                         f"({first_line(e)}); export the model at opset {WORKING_OPSET} or later") from None
    del raised.metadata_props[:]
    raised.metadata_props.extend(props)
    _drop_initializer_inputs(raised.graph)
    return raised


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    outputs = {o.name for o in graph.output}
    kept = []
    for node in graph.node:
        proto = _constant_value(node) if node.op_type == "Constant" and not node.domain else None
        if proto is None or node.output[0] in outputs:
            kept.append(node)
            continue
        proto.name = node.output[0]
        graph.initializer.append(proto)
    if len(kept) < len(graph.node):
        copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in kept]
        del graph.node[:]
        graph.node.extend(copies)


def _constant_value(node: onnx.NodeProto) -> onnx.TensorProto | None:
    if len(node.attribute) != 1:
        return None
    attribute = node.attribute[0]
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        copy = onnx.TensorProto()
        copy.CopyFrom(value)
        return copy
    dtypes = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if attribute.name not in dtypes:
        return None
    return numpy_helper.from_array(np.asarray(value, dtypes[attribute.name]))


def _densify(graph: onnx.GraphProto) -> None:
    for sparse in graph.sparse_initializer:
        values = numpy_helper.to_array(sparse.values)
        indices = numpy_helper.to_array(sparse.indices).astype(np.int64)
        dense = np.zeros(tuple(sparse.dims), values.dtype)
        if indices.ndim == 2:
            dense[tuple(indices.T)] = values
        else:
            dense.reshape(-1)[indices] = values
        graph.initializer.append(numpy_helper.from_array(dense, sparse.values.name))
    del graph.sparse_initializer[:]


def _forget_odd_kinds(graph: onnx.GraphProto, is_body: bool) -> None:
    """Leave the runtime to infer which tensors are sequences or optionals: the graph library can't say it."""
    kept = [v for v in graph.value_info if v.type.WhichOneof("value") in (None, "tensor_type")]
    if len(kept) < len(graph.value_info):
        del graph.value_info[:]
        graph.value_info.extend(kept)
    for value in [*graph.input, *graph.output] if is_body else []:
        if value.type.WhichOneof("value") not in (None, "tensor_type"):
            value.ClearField("type")


def _infer_shapes(model: onnx.ModelProto, outputs: bool) -> onnx.ModelProto:
    """Add inferred shapes; inference sees a copy without the large weights, so it costs no memory.

    A model that inference rejects keeps the shapes it came with: they help, nothing relies on them.
    """
    light = onnx.ModelProto()
    light.CopyFrom(_without_weights(model))
    try:
        inferred = onnx.shape_inference.infer_shapes(light, data_prop=True)
    except Exception:
        return model
    del model.graph.value_info[:]
    model.graph.value_info.extend(inferred.graph.value_info)
    for mine, found in zip(model.graph.output, inferred.graph.output, strict=True) if outputs else ():
        for dim, size in zip(mine.type.tensor_type.shape.dim, found.type.tensor_type.shape.dim, strict=False):
            if size.HasField("dim_value"):
                dim.dim_value = size.dim_value
    return model


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with initializers above SMALL elements declared as external data that nobody reads."""
    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    source, graph = model.graph, light.graph
    graph.name = source.name
    for field_name in ("node", "input", "output", "value_info"):
        getattr(graph, field_name).extend(getattr(source, field_name))
    for tensor in source.initializer:
        if int(np.prod(tensor.dims, dtype=np.int64)) <= SMALL:
            graph.initializer.append(tensor)
            continue
        shell = graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        shell.data_location = onnx.TensorProto.EXTERNAL
        shell.external_data.add(key="location", value="unread")
    return light


def _take_extras(node: onnx.NodeProto) -> NodeExtras | None:
    """Cut from a node what the graph library drops or breaks on: odd attributes, metadata, doc string.

    Not kept is the exporter's stack trace: often larger than the int8 weights, it names files of another machine.
    """
    odd = [a for a in node.attribute if not _carried(a)]
    kept_props = {p.key: p.value for p in node.metadata_props if p.key != _TRACE}
    extras = NodeExtras(metadata=kept_props, doc_string=node.doc_string)
    for attribute in odd:
        copy = onnx.AttributeProto()
        copy.CopyFrom(attribute)
        extras.attributes.append(copy)
    if odd:
        kept = [onnx.AttributeProto.FromString(a.SerializeToString()) for a in node.attribute if _carried(a)]
        del node.attribute[:]
        node.attribute.extend(kept)
    return extras if odd or extras.metadata or extras.doc_string else None


def _carried(attribute: onnx.AttributeProto) -> bool:
    kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
    if kind not in _CARRIED_KINDS:
        return False
    if kind in ("FLOATS", "INTS", "STRINGS") and not onnx.helper.get_attribute_value(attribute):
        return False  # exported again, an empty list has no type
    return _is_text([attribute.s, *attribute.strings])


def _is_text(values: Iterable[bytes]) -> bool:
    try:
        for value in values:
            value.decode()
    except UnicodeDecodeError:
        return False
    return True


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough for a part of a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__

