"""Raising a graph to a later version of ONNX's operators, without its weights."""

from __future__ import annotations

import onnx
from onnx import defs, version_converter

from onnxq.errors import GraphError
from onnxq.graph.graph import Graph, Node, Tensor
from onnxq.graph.load import NodeExtras, first_line, from_proto
from onnxq.graph.names import with_bodies
from onnxq.graph.save import apart, constants_of, outline
from onnxq.graph.schemas import type_string
from onnxq.graph.tensors import dtype_of, store
from onnxq.graph.types import STANDARD, paired

_RESHAPED = {"GroupNormalization": 21}  # operators whose inputs changed their shape with a version
# (operator, attribute, value) that came with a version, of attributes that there were before
_VALUES = {("Pad", "mode", "wrap"): 19, ("Resize", "coordinate_transformation_mode", "half_pixel_symmetric"): 19,
           ("GridSample", "mode", "linear"): 20, ("GridSample", "mode", "cubic"): 20}
_MASK = "onnxq.unknown"  # the domain that operators have meanwhile which only the runtime knows


def raise_opset(graph: Graph, version: int) -> Graph:
    """The graph at a version of the ai.onnx operators of at least `version`: itself, or a new one that shares weights.

    Cast takes int4 from 21 on and int2 from 25 on. onnx's converter sees types and shapes of the large weights only;
    what it gives has to pass onnx's checker with shape inference. Names stay, new ones are added.
    Raises GraphError with what stood in the way; the graph is as it was then.
    """
    if graph.opset >= version:
        return graph
    graph.sort()
    model, weights = outline(graph), apart(graph)
    oldest = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", version)], True)
    model.ir_version = max(model.ir_version, oldest)
    masked = _mask(model)
    try:
        raised = version_converter.convert_version(model, version)
        _unmask(raised, masked)
        _check(raised, set(weights))
    except Exception as e:  # the converter raises whatever its C++ side does
        raise GraphError(f"onnx can't raise the model from opset {graph.opset} to {version} ({first_line(e)}); "
                         f"export it at opset {version}") from None
    return adopt(graph, raised, weights)


def lower_opset(graph: Graph, version: int) -> str | None:
    """Call a graph one of opset `version`, 13 or later, as long as that means the same; else what stands in the way.

    It does where each operator was there, with the attributes, inputs, outputs and types that its nodes have: from 13
    on versions of operators added such to those before, but for GroupNormalization-21, whose scale has another shape.
    """
    if graph.opset <= version:
        return None
    for node, _ in graph.walk():
        if node.domain in STANDARD and defs.has(node.op, graph.opset, "") and not _was(node, version):
            return f"{node.op} {node.name!r} is not of opset {version}"
    for part in graph.graphs():
        part.ir.opset = version
        for domain in part.ir.import_domains or ():
            if domain.domain in STANDARD:
                domain.version = version
    return None


def _was(node: Node, version: int) -> bool:
    if not defs.has(node.op, version, "") or (node.op in _RESHAPED and version < _RESHAPED[node.op]):
        return False
    if any(_VALUES.get((node.op, name, str(value)), 0) > version for name, value in node.attrs.items()):
        return False
    schema = defs.get_schema(node.op, version, "")
    if not set(node.attrs) <= set(schema.attributes) or not (
            len(node.inputs) <= schema.max_input and len(node.outputs) <= schema.max_output):
        return False
    for formal, given in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
        for parameter, tensor in paired(formal, given):
            dtype = dtype_of(tensor)
            if tensor.name and dtype is not None and type_string(dtype) not in parameter.types:
                return False
    return True


def limit_ir_version(graph: Graph, most: int | None) -> None:
    """Save a graph as of this IR version at most, as far as the types of its weights go; None: as it came."""
    if most is not None:
        graph.ir.ir_version = min(graph.ir.ir_version or most, most)


def _mask(model: onnx.ModelProto) -> set[str]:
    """Move operators of the standard domain that onnx doesn't know to one that it leaves alone; names of the nodes."""
    names = set()
    for node in [n for g in with_bodies(model.graph) for n in g.node]:
        if node.domain in STANDARD and not defs.has(node.op_type, ""):
            node.domain = _MASK
            names.add(node.name)
    if names:
        model.opset_import.add(domain=_MASK, version=1)
    return names


def _unmask(model: onnx.ModelProto, names: set[str]) -> None:
    for node in [n for g in with_bodies(model.graph) for n in g.node]:
        if node.name in names and node.domain == _MASK:
            node.domain = ""
    kept = [o for o in model.opset_import if o.domain != _MASK]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _check(raised: onnx.ModelProto, weights: set[str]) -> None:
    """Raise what onnx's checker finds; weights without values are inputs to it, those of bodies, too."""
    model = onnx.ModelProto()
    model.CopyFrom(raised)
    _mask(model)
    for graph in with_bodies(model.graph):
        del graph.value_info[:]
        for index in reversed(range(len(graph.initializer))):
            proto = graph.initializer[index]
            if proto.name in weights:
                model.graph.input.append(onnx.helper.make_tensor_value_info(proto.name, proto.data_type, proto.dims))
                del graph.initializer[index]
    onnx.checker.check_model(model, full_check=True)


def adopt(graph: Graph, raised: onnx.ModelProto, weights: dict[str, Tensor], outputs: bool = False) -> Graph:
    """A Graph of a model that was made of an old one, with the weights and all else that only the old one knows.

    `outputs` tells whether sizes of outputs are inferred, too.
    """
    for proto in [t for g in with_bodies(raised.graph) for t in g.initializer]:
        if proto.name in weights:  # without values, inference would take it for an empty one
            proto.data_location = onnx.TensorProto.EXTERNAL
            proto.external_data.add(key="location", value="unread")
    twin = from_proto(raised, graph.folder, outputs)
    for tensor in constants_of(twin.ir):
        if tensor.name in weights:
            store(tensor, weights[tensor.name]._values)
    twin.metadata, twin.annotations, twin.header = dict(graph.metadata), list(graph.annotations), graph.header
    for name in {n.name for n, _ in twin.walk()} & graph.extras.keys():
        old, attributes = graph.extras[name], twin.extras[name].attributes if name in twin.extras else []
        twin.extras[name] = NodeExtras(attributes, dict(old.metadata), old.doc_string)
    twin.inherit(graph)
    return twin
