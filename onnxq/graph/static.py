"""Graphs whose free axes have fixed sizes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import defs

from onnxq.errors import UsageError
from onnxq.graph.graph import Graph
from onnxq.graph.names import with_bodies
from onnxq.graph.save import apart, outline
from onnxq.graph.tensors import dtype_of, shape_of
from onnxq.graph.versions import adopt


def fix_axes(graph: Graph, sizes: Mapping[str, int]) -> Graph:
    """A graph of the same weights whose inputs have these sizes along the axes of these names, shapes inferred anew.

    Axes of other names stay free. Raises UsageError for a name that no input's axis has, with those there are, and for
    a size below 0.
    """
    graph.sort()
    model, weights = outline(graph), apart(graph)
    free = {d.dim_param for value in model.graph.input for d in value.type.tensor_type.shape.dim if d.dim_param}
    for axis, size in sizes.items():
        if axis not in free:
            raise UsageError(f"no input has a free axis {axis!r}; name one of {', '.join(sorted(free))}"
                             if free else f"no input has a free axis {axis!r}, nor any other; leave out its size")
        if size < 0:
            raise UsageError(f"axis {axis!r} can't have the size {size}; give 0 or more")
    for part in with_bodies(model.graph):
        for value in (*part.input, *part.output, *part.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param in sizes:
                    dim.dim_value = sizes[dim.dim_param]
        _forget(part, part is model.graph)
    return adopt(graph, model, weights, outputs=True)


def free_axes(graph: Graph) -> tuple[list[str], list[str]]:
    """(names of free axes of the inputs, inputs that have free axes without a name, or no shape at all)."""
    dims = {t.name: shape_of(t) for t in graph.inputs}
    named = sorted({d for shape in dims.values() for d in shape or () if isinstance(d, str)})
    return named, [name for name, shape in dims.items() if shape is None or None in shape]


def fix_inputs(graph: Graph, values: Mapping[str, float]) -> None:
    """Make constants of inputs of one element, such as a sampling rate that a model chooses its branch by.

    Raises UsageError for a name that no such input has, and for a number that its type doesn't hold.
    """
    inputs = {t.name: t for t in graph.inputs}
    for name, value in values.items():
        dims = shape_of(inputs[name]) if name in inputs else None
        dtype = dtype_of(inputs[name]) if name in inputs else None
        if dtype is None or dims is None or any(d != 1 for d in dims):
            raise UsageError(f"there is no input {name!r} of one element that could be fixed; leave it out")
        stored = np.full([1] * len(dims), value).astype(dtype)
        if stored.ravel()[0] != value:
            raise UsageError(f"the input {name!r} is {dtype}, which doesn't hold {value:g}; give another number")
        graph.redirect(inputs[name], graph.constant(f"{name}.fixed", stored))
    graph.ir.inputs[:] = [t for t in graph.ir.inputs if t.name not in values]


def infer_again(graph: Graph) -> Graph:
    """A graph of the same weights with shapes that follow from the constants that it has now."""
    return fix_axes(graph, {})


def _forget(part: onnx.GraphProto, main: bool) -> None:
    """Drop shapes of computed tensors with a free axis, unless inference can't find them again: behind operators that
    ONNX doesn't have."""
    strange = {name for node in part.node if not defs.has(node.op_type, node.domain) for name in node.output}
    for value in (*part.value_info, *(() if main else part.output)):
        shape = value.type.tensor_type.shape
        if value.name not in strange and not all(d.HasField("dim_value") for d in shape.dim):
            value.type.tensor_type.ClearField("shape")
