"""Keys and values repeated for several query heads -> one MatMul for the heads that share them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, Tensor, is_constant, shape_of
from onnxq.passes.manager import Context, Pass

Dims = tuple[int | str | None, ...]

_SWAPPED = [0, 1, 3, 2]


@dataclass(frozen=True)
class ShareKVHeads(Pass):
    """MatMul(a, repeat(k))  =>  the H/G query heads of a key head below one another, times k as it is.

    a float32 [B, H, S, K] becomes [B, G, S * H/G, K]; k [B, G, K, N] (or transposed, or scaled by a number) is what an
    Expand repeats to H heads; the result is brought back to [B, H, S, N], behind a Mul or Div by a number where the
    runtime would fuse one. Exact: every sum is the same. No copy of keys and values is made, and the products are
    fewer and larger. Source: grouped-query attention (Ainslie et al. 2023), ONNX Reshape-14, MatMul-13.
    """

    name: ClassVar[str] = "share-kv-heads"
    weighed: ClassVar[bool] = True

    def run(self, graph: Graph, context: Context) -> bool:
        """Repeats that nobody reads any more go at the end."""
        return super().run(graph, context) and (graph.prune() or True)

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Rewrite one MatMul of a repeated matrix."""
        if node.op != "MatMul" or node.domain:
            return False
        between, repeated = _back(graph, node.inputs[1])
        found = _repeats(graph, repeated)
        if found is None:
            return False
        source, few, many = found
        rows = shape_of(node.inputs[0])
        if rows is None or len(rows) != 4 or rows[1] != many:
            return context.skip(node, f"what it multiplies is not known to have {many} heads")
        name, scale = node.name, _scale(graph, node)
        last = node if scale is None else scale
        result = last.outputs[0]
        matrix = source
        for step in reversed(between):
            matrix = _again(graph, step, matrix, name)
        inside = graph.variable(f"{name}.grouped", np.float32, [rows[0], few, None, rows[3]])
        _reshape(graph, f"{name}/group", node.inputs[0], inside, few)
        graph.replace_input(node, 0, inside)
        graph.replace_input(node, 1, matrix)
        columns = (shape_of(matrix) or (None,))[-1]
        made = graph.variable(f"{name}.product", np.float32, [rows[0], few, None, columns])
        graph.set_output(node, 0, made)
        if scale is not None:
            graph.replace_input(scale, next(k for k, t in enumerate(scale.inputs) if not is_constant(t)), made)
            made = graph.like(made, f"{name}.scaled")
            graph.set_output(scale, 0, made)
        _reshape(graph, f"{name}/ungroup", made, result, many)
        return True


def _reshape(graph: Graph, name: str, source: Tensor, result: Tensor, heads: int) -> None:
    """[B, *, *, N] to [B, heads, *, N]; a 0 keeps the dimension of that axis."""
    shape = graph.shared_constant(f"heads.{heads}", np.array([0, heads, -1, 0]))
    graph.add_node("Reshape", name, [source, shape], [result])


def _back(graph: Graph, tensor: Tensor) -> tuple[list[Node], Tensor]:
    """Transposes of a matrix and factors on it, from the tensor upwards, and what they read."""
    between: list[Node] = []
    node = graph.producer(tensor)
    while node is not None and not node.domain and len(between) < 3:
        swaps = node.op == "Transpose" and list(node.attrs.get("perm", ())) == _SWAPPED
        if not swaps and (node.op not in ("Mul", "Div") or not _is_number(graph, node.inputs[1])):
            break
        tensor = node.inputs[0]
        between.append(node)
        node = graph.producer(tensor)
    return between, tensor


def _again(graph: Graph, step: Node, source: Tensor, name: str) -> Tensor:
    """The same Transpose or factor on another tensor."""
    dims = shape_of(source)
    if dims is not None and step.op == "Transpose":
        dims = tuple(dims[k] for k in _SWAPPED)
    result = graph.variable(f"{name}.{step.outputs[0].name}", np.float32, dims)
    graph.add_node(step.op, f"{name}/{step.name}", [source, *step.inputs[1:]], [result], dict(step.attrs))
    return result


def _scale(graph: Graph, node: Node) -> Node | None:
    """The Mul or Div by a number that alone reads a product."""
    user = graph.only_consumer(node.outputs[0])
    if user is None or user.domain or user.op not in ("Mul", "Div"):
        return None
    number = user.inputs[1] if user.inputs[0] is node.outputs[0] else user.inputs[0]
    if user.op == "Div" and number is user.inputs[0]:
        return None
    return user if _is_number(graph, number) else None


def _is_number(graph: Graph, tensor: Tensor) -> bool:
    """Whether a tensor is one stored number, of a rank that adds no dimension to [B, H, S, N]."""
    return graph.scalar(tensor) is not None and len(shape_of(tensor) or ()) <= 4


def _repeats(graph: Graph, tensor: Tensor) -> tuple[Tensor, int, int] | None:
    """(k [B, G, ..], G, H) of a tensor [B, H, ..] that holds each head of k H/G times, one after the other.

    Either Expand from one head to H, or Unsqueeze to [B, G, 1, ..], Expand of that axis, Reshape to [B, H, ..].
    """
    node = graph.producer(tensor)
    merged = node is not None and node.op == "Reshape"
    expand = graph.producer(node.inputs[0]) if node is not None and merged else node
    if expand is None or expand.op != "Expand" or expand.domain:
        return None
    source = _unsqueezed(graph, expand.inputs[0]) if merged else expand.inputs[0]
    few = shape_of(source) if source is not None else None
    if few is None or len(few) != 4 or not isinstance(few[1], int) or (not merged and few[1] != 1):
        return None
    many = shape_of(tensor)
    sizes = graph.read(expand.inputs[1]).tolist() if is_constant(expand.inputs[1]) else None
    if sizes is not None:
        times = _times(sizes, few, merged)
        if times is None or (merged and not _is_merged(many, few, times)):
            return None
    elif many is None or not isinstance(many[1], int) or many[1] % few[1] or not _is_merged(
            many, few, many[1] // few[1]) or few[2] is None or many[2] != few[2]:
        return None
    else:
        times = many[1] // few[1]
    return (source, few[1], few[1] * times) if times > 1 else None


def _unsqueezed(graph: Graph, tensor: Tensor) -> Tensor | None:
    """What an Unsqueeze of axis 2 of five reads."""
    node = graph.producer(tensor)
    if node is None or node.op != "Unsqueeze" or node.domain:
        return None
    given = graph.optional_input(node, 1)
    axes = node.attrs.get("axes") if given is None else graph.read(given).tolist() if is_constant(given) else None
    return node.inputs[0] if axes in ([2], [-3]) else None


def _times(sizes: list[int], few: Dims, merged: bool) -> int | None:
    """How often a stored shape repeats the heads, where it repeats nothing else."""
    dims, axis = ([*few[:2], 1, *few[2:]], 2) if merged else (list(few), 1)
    if len(sizes) != len(dims) or not all(s in (1, d) for k, (s, d) in enumerate(zip(sizes, dims, strict=True))
                                          if k != axis):
        return None
    return sizes[axis]


def _is_merged(many: Dims | None, few: Dims, times: int) -> bool:
    """Whether [B, H, N, K] is the shape that [B, G, H/G, N, K] takes where its heads become one axis."""
    return (many is not None and len(many) == 4 and few[0] is not None and many[0] == few[0]
            and many[1] == int(few[1] or 0) * times and isinstance(few[3], int) and many[3] == few[3])
