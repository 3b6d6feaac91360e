"""The only importer of onnx and onnx-graphsurgeon."""

from onnxq.graph.cut import alone, cut, expose_codes, repeat, up_to, weight_bytes
from onnxq.graph.graph import CONTRIB, Graph, Node, Tensor
from onnxq.graph.identity import identity
from onnxq.graph.inline import inline
from onnxq.graph.load import Header, load, read_header, read_nodes, stored_bytes
from onnxq.graph.nudged import NUDGE, write_nudged
from onnxq.graph.packed import SPARSE, PackedWeight, packed_weights
from onnxq.graph.packing import decoder_bytes, pack_weight
from onnxq.graph.save import constants, file_bytes, save
from onnxq.graph.schemas import Slot, slots
from onnxq.graph.shared import Shared
from onnxq.graph.static import fix_axes, fix_inputs, free_axes, infer_again
from onnxq.graph.switched import Switch, switched
from onnxq.graph.tensors import (
    FLOAT32,
    HALF,
    dtype_of,
    halve,
    is_computed,
    is_constant,
    is_sparse,
    make_sparse,
    narrow,
    port_of,
    shape_of,
    type_number,
    widen,
    widen_attribute,
)
from onnxq.graph.types import element_types, full_name
from onnxq.graph.versions import limit_ir_version, lower_opset, raise_opset

__all__ = ["CONTRIB", "FLOAT32", "HALF", "NUDGE", "SPARSE", "Graph", "Header", "Node", "PackedWeight", "Shared", "Slot",
           "Switch", "Tensor", "alone", "constants", "cut", "decoder_bytes", "dtype_of", "element_types",
           "expose_codes", "file_bytes", "fix_axes", "fix_inputs", "free_axes", "full_name", "halve", "identity",
           "infer_again", "inline", "is_computed", "is_constant", "is_sparse", "limit_ir_version", "load",
           "lower_opset", "make_sparse", "narrow", "pack_weight", "packed_weights", "port_of", "raise_opset",
           "read_header", "read_nodes", "repeat", "save", "shape_of", "slots", "stored_bytes", "switched",
           "type_number", "up_to", "weight_bytes", "widen", "widen_attribute", "write_nudged"]
