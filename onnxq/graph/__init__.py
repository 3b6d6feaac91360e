"""The only importer of onnx and onnx-graphsurgeon."""

from onnxq.graph.graph import CONTRIB, Graph, Node, Tensor
from onnxq.graph.load import load, read_nodes, stored_bytes
from onnxq.graph.save import save
from onnxq.graph.tensors import dtype_of, is_constant, shape_of

__all__ = ["CONTRIB", "Graph", "Node", "Tensor", "dtype_of", "is_constant", "load", "read_nodes", "save", "shape_of",
           "stored_bytes"]
