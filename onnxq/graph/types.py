"""Element types that follow from the operators around a tensor, where neither the model nor inference tells them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from onnx import defs

from onnxq.graph.graph import Graph, Node, Tensor
from onnxq.graph.tensors import dtype_of

STANDARD = (None, "", "ai.onnx")  # spellings of the domain of ONNX's own operators


def full_name(node: Node) -> str:
    """An operator's name with its domain in front, unless that is ONNX's own."""
    return str(node.op) if node.domain in STANDARD else f"{node.domain}.{node.op}"


def element_types(graph: Graph) -> dict[str, np.dtype[Any]]:
    """Tensor name -> element type, tensors of bodies included; those of unknown type are left out.

    Inference stops at an operator of unknown domain. Beyond it the operators' schemas still say which inputs and
    outputs share a type (the type variables of ONNX), so that one known type settles a whole chain, either way.
    """
    alike: dict[str, str] = {}  # a forest: tensor -> another of the same type

    def root(name: str) -> str:
        while alike.setdefault(name, name) != name:
            alike[name] = name = alike[alike[name]]
        return name

    known: dict[str, np.dtype[Any]] = {}
    tensors: list[Tensor] = [*graph.inputs, *graph.outputs]
    for node, holder in graph.walk():
        tensors += [*node.inputs, *node.outputs, *holder.inputs, *holder.outputs]
        for group in _sharing(node, graph.opset):
            for name in group[1:]:
                alike[root(name)] = root(group[0])
    for tensor in tensors:
        dtype = dtype_of(tensor)
        if tensor.name and dtype is not None:
            known.setdefault(root(tensor.name), dtype)
    return {t.name: known[root(t.name)] for t in tensors if t.name and root(t.name) in known}


def _sharing(node: Node, opset: int) -> Iterator[list[str]]:
    """Names of a node's tensors, grouped by the type variable that they share; omitted ones left out."""
    if node.domain not in STANDARD or not defs.has(node.op, opset, ""):
        return
    schema = defs.get_schema(node.op, opset, "")
    groups: dict[str, list[str]] = {}
    for formal, actual in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
        for parameter, tensor in paired(formal, actual):
            if tensor.name and parameter.is_homogeneous and "(" not in parameter.type_str:
                groups.setdefault(parameter.type_str, []).append(tensor.name)
    yield from groups.values()


def paired(formal: Sequence[Any], actual: Sequence[Tensor]) -> Iterator[tuple[Any, Tensor]]:
    """Each tensor with its formal parameter; the last parameter of a variadic operator stands for all that follow."""
    for index, tensor in enumerate(actual):
        if formal:
            yield formal[min(index, len(formal) - 1)], tensor
