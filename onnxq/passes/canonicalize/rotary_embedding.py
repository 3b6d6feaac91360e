"""Rotary position embeddings in small operators -> one RotaryEmbedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import CONTRIB, Graph, Node, Tensor, dtype_of, is_constant, shape_of
from onnxq.passes.manager import Context, Pass

_LOST = "unk__"  # how shape inference names a dimension that it could not follow


@dataclass(frozen=True)
class RotaryEmbedding(Pass):
    """x * cos + concat(-x[D/2:], x[:D/2]) * sin  =>  RotaryEmbedding(x, positions, cos', sin'), where the target lists
    it as faster.

    x and the result float32 [B, N, S, D]; cos and sin [B, 1, S, D] are rows `positions` int64 [B, S] of stored tables
    [M, D] whose halves agree (cos', sin' float32 [M, D/2]), or Cos and Sin of concat(f, f), where cos' and sin' are
    Cos and Sin of f as [B * S, D/2]. The form on pairs, where (x[2i], x[2i+1]) turn together and cos and sin have D/2
    columns, is interleaved=1. The products and sums are the same ones. Tables stay float: they are no layer's weights
    any more. Where shape inference lost S it is taken to be that of the positions; the kernel refuses any other.
    Source: RoFormer (Su et al. 2021), com.microsoft RotaryEmbedding-1.
    """

    name: ClassVar[str] = "rotary-embedding"
    weighed: ClassVar[bool] = True

    def run(self, graph: Graph, context: Context) -> bool:
        """What the small operators read alone goes at the end."""
        if context.target is None or "RotaryEmbedding" not in context.target.fused:
            return False
        return super().run(graph, context) and (graph.prune() or True)

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Rewrite the last node of one embedding: the Add of the halves' form, the Reshape of the pairs'."""
        if node.domain or node.op not in ("Add", "Reshape"):
            return False
        parts = _halves(node, graph) if node.op == "Add" else _pairs(node, graph)
        if parts is None:
            return False
        x, cos, sin = parts
        dims = shape_of(x)
        if dims is None or len(dims) != 4 or dtype_of(x) != np.float32 or not isinstance(dims[3], int):
            return context.skip(node, "what it turns is not known to be float32 [B, N, S, D]")
        found = _stored(node, graph, cos, sin) or _computed(node, graph, cos, sin)
        if found is None:
            return context.skip(node, "its cosines and sines are no rows of stored tables and not of the same angles")
        ids, tables = found
        rows = shape_of(ids)
        if rows is None or len(rows) != 2 or rows[0] != dims[0] or not _same(dims[2], rows[1]):
            return context.skip(node, "its positions are not known to be one per row and token")
        tables = [_half(graph, t, dims[3] // 2) for t in tables]
        if any(t is None for t in tables):
            return context.skip(node, "the halves of its cosines or sines differ")
        name, result, pairs = node.name, node.outputs[0], node.op == "Reshape"
        graph.remove(node)
        graph.add_node("RotaryEmbedding", name, [x, ids, *tables], [result], {"interleaved": int(pairs)}, CONTRIB)
        return True


def _same(size: object, positions: object) -> bool:
    return size is not None and (size == positions or str(size).startswith(_LOST))


# ------------------------------------------------------------------ forms


def _halves(add: Node, graph: Graph) -> tuple[Tensor, Tensor, Tensor] | None:
    """(x, cos, sin) of x * cos + concat(-x2, x1) * sin, the factors and terms in any order."""
    products = _factors(graph, add, "Mul")
    for direct, turned in (products, products[::-1]) if products else ():
        for k in (0, 1):
            x = _turned(graph, turned.inputs[k])
            if x is not None and any(t is x for t in direct.inputs):
                return x, next(t for t in direct.inputs if t is not x), turned.inputs[1 - k]
    return None


def _turned(graph: Graph, tensor: Tensor) -> Tensor | None:
    """x of concat(-x[D/2:], x[:D/2]) along the last of four axes."""
    join = graph.producer(tensor)
    if join is None or join.op != "Concat" or len(join.inputs) != 2 or join.attrs["axis"] not in (-1, 3):
        return None
    negated = graph.producer(join.inputs[0])
    if negated is None or negated.op != "Neg":
        return None
    second, first = _part(graph, negated.inputs[0]), _part(graph, join.inputs[1])
    if second is None or first is None or second[0] is not first[0]:
        return None
    size = (shape_of(first[0]) or (None,))[-1]
    if not isinstance(size, int) or size % 2 or first[1:] != (0, size // 2) or second[1:] != (size // 2, size):
        return None
    return first[0]


def _part(graph: Graph, tensor: Tensor) -> tuple[Tensor, int, int] | None:
    """(x, first, behind the last) of x[..., first:last], cut out by Slice or by Split into equal halves."""
    node = graph.producer(tensor)
    if node is None or node.domain or node.op not in ("Slice", "Split") or not len(node.inputs):
        return None
    dims = shape_of(node.inputs[0]) or ()
    if len(dims) != 4 or not isinstance(dims[3], int):
        return None
    if node.op == "Split":
        sizes = graph.optional_input(node, 1)
        halves = len(node.outputs) == 2 and node.attrs.get("axis", 0) in (-1, 3) and (
            sizes is None or (is_constant(sizes) and graph.read(sizes).tolist() == [dims[3] // 2] * 2))
        index = next(k for k, t in enumerate(node.outputs) if t is tensor)
        return (node.inputs[0], index * dims[3] // 2, (index + 1) * dims[3] // 2) if halves else None
    if len(node.inputs) < 4 or not all(is_constant(t) for t in node.inputs[1:] if t.name):
        return None
    starts, ends, axes, *steps = (graph.read(t).tolist() for t in node.inputs[1:] if t.name)
    if axes not in ([-1], [3]) or steps not in ([], [[1]]):
        return None
    first, last, _ = slice(starts[0], ends[0]).indices(dims[3])
    return node.inputs[0], first, last


def _pairs(reshape: Node, graph: Graph) -> tuple[Tensor, Tensor, Tensor] | None:
    """(x, cos, sin) of concat(x0 * cos - x1 * sin, x0 * sin + x1 * cos) over pairs (x0, x1) of the last axis."""
    join = graph.producer(reshape.inputs[0])
    dims = shape_of(reshape.outputs[0]) or ()
    if join is None or join.op != "Concat" or len(join.inputs) != 2 or join.attrs["axis"] not in (-1, 4):
        return None
    ends = [_past(graph, t, "Unsqueeze", 4) for t in join.inputs]
    made = [graph.producer(t) if t is not None else None for t in ends]
    if made[0] is None or made[1] is None or made[0].op != "Sub" or made[1].op != "Add":
        return None
    real, imaginary = _factors(graph, made[0], "Mul"), _factors(graph, made[1], "Mul")
    if not real or not imaginary:
        return None
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        (even, cos), (odd, sin) = _apart(real[0], i), _apart(real[1], j)
        x = _of_pairs(graph, even, odd)
        wanted = [{even.name, sin.name}, {odd.name, cos.name}]
        found = [{t.name for t in p.inputs} for p in imaginary]
        if x is not None and found in (wanted, wanted[::-1]) and _back_together(shape_of(x), dims):
            return x, cos, sin
    return None


def _apart(product: Node, index: int) -> tuple[Tensor, Tensor]:
    """One factor, and the other."""
    return product.inputs[index], product.inputs[1 - index]


def _back_together(whole: Sequence[object] | None, made: Sequence[object]) -> bool:
    """Whether [B, N, S, D/2, 2] became [B, N, S, D] again; S follows from the count of elements."""
    return (whole is not None and len(made) == 4 and None not in (whole[0], whole[1], whole[3])
            and (whole[0], whole[1], whole[3]) == (made[0], made[1], made[3]))


def _of_pairs(graph: Graph, even: Tensor, odd: Tensor) -> Tensor | None:
    """x [B, N, S, D] of the two columns of x as [B, N, S, D/2, 2]."""
    columns = [_past(graph, t, "Squeeze", 4) for t in (even, odd)]
    split = graph.producer(columns[0]) if columns[0] is not None else None
    if split is None or split.op != "Split" or len(split.outputs) != 2 or split.attrs.get("axis", 0) not in (-1, 4):
        return None
    reshape = graph.producer(split.inputs[0])
    if reshape is None or reshape.op != "Reshape" or any(c is not t for c, t in zip(columns, split.outputs,
                                                                                  strict=True)):
        return None
    whole, parts = shape_of(reshape.inputs[0]) or (), shape_of(reshape.outputs[0]) or ()
    fits = (len(whole) == 4 and len(parts) == 5 and isinstance(whole[3], int)
            and tuple(parts[3:]) == (whole[3] // 2, 2) and tuple(parts[:2]) == tuple(whole[:2]))
    return reshape.inputs[0] if fits else None


def _past(graph: Graph, tensor: Tensor, op: str, axis: int) -> Tensor | None:
    """What an Unsqueeze or Squeeze of axis 1 of four, or of axis 4 of five, reads."""
    node = graph.producer(tensor)
    if node is None or node.op != op or node.domain:
        return None
    given = graph.optional_input(node, 1)
    axes = node.attrs.get("axes") if given is None else graph.read(given).tolist() if is_constant(given) else None
    return node.inputs[0] if axes in ([axis], [axis - (5 if axis == 4 else 4)]) else None


def _factors(graph: Graph, node: Node, op: str) -> list[Node] | None:
    made = [graph.producer(t) for t in node.inputs]
    return [m for m in made if m is not None] if all(
        m is not None and m.op == op and not m.domain for m in made) else None


# ------------------------------------------------------------------ angles


def _stored(node: Node, graph: Graph, cos: Tensor, sin: Tensor) -> tuple[Tensor, list[Tensor]] | None:
    """(positions, tables) where both are rows of stored tables, unsqueezed to [B, 1, S, D]."""
    found = []
    for tensor in (cos, sin):
        rows = _past(graph, tensor, "Unsqueeze", 1)
        look = graph.producer(rows) if rows is not None else None
        if look is None or look.op != "Gather" or look.attrs.get("axis", 0) or not is_constant(look.inputs[0]):
            return None
        if len(shape_of(look.inputs[0]) or ()) != 2 or dtype_of(look.inputs[1]) != np.int64:
            return None
        found.append(look)
    if found[0].inputs[1] is not found[1].inputs[1]:
        return None
    return found[0].inputs[1], [look.inputs[0] for look in found]


def _half(graph: Graph, table: Tensor, columns: int) -> Tensor | None:
    """The first half of a table's columns, None where the second half differs; a table of that width itself."""
    width = (shape_of(table) or (None,))[-1]
    if width == columns:
        return table
    values = np.asarray(graph.read(table), np.float32)
    if width != 2 * columns or not np.array_equal(values[:, :columns], values[:, columns:]):
        return None
    return graph.shared_constant(f"{table.name}.half", np.ascontiguousarray(values[:, :columns]))


def _computed(node: Node, graph: Graph, cos: Tensor, sin: Tensor) -> tuple[Tensor, list[Tensor]] | None:
    """(positions, tables) of Cos and Sin of the same concat(f, f), f [B, 1, S, D/2] or, unsqueezed, [B, S, D/2].

    Every token of every row has a row of its own in the tables, so that its position is its number.
    """
    angles = []
    for tensor, op in ((cos, "Cos"), (sin, "Sin")):
        inner = _past(graph, tensor, "Unsqueeze", 1)
        wave = graph.producer(tensor if inner is None else inner)
        join = graph.producer(wave.inputs[0]) if wave is not None and wave.op == op else None
        if join is None or join.op != "Concat" or len(join.inputs) != 2 or join.inputs[0] is not join.inputs[1]:
            return None
        angles.append(join)
    f = angles[0].inputs[0]
    dims = shape_of(f)
    if angles[1].inputs[0] is not f or dims is None or (len(dims) == 4 and dims[1] != 1) or len(dims) not in (3, 4):
        return None
    if angles[0].attrs["axis"] not in (-1, len(dims) - 1) or not isinstance(dims[-1], int):
        return None
    made = [f"{f.name}.{op}" for op in ("cos", "sin")]
    if not graph.has(made[0]):
        _rows(graph, f, dims)
    return graph.made(f"{f.name}.position"), [graph.made(m) for m in made]


def _rows(graph: Graph, f: Tensor, dims: Sequence[int | str | None]) -> None:
    """Cos and Sin of f as [B * S, D/2], and the number of each row as int64 [B, S]."""
    name = f.name
    flat = graph.variable(f"{name}.rows", np.float32, [None, dims[-1]])
    graph.add_node("Reshape", f"{name}/rows", [f, graph.constant(f"{name}.rows.shape", np.array([-1, dims[-1]]))],
                   [flat])
    for op in ("Cos", "Sin"):
        graph.add_node(op, f"{name}/{op.lower()}", [flat],
                       [graph.variable(f"{name}.{op.lower()}", np.float32, [None, dims[-1]])])
    sizes, count = graph.variable(f"{name}.sizes", np.int64, [2]), graph.variable(f"{name}.count", np.int64, [])
    every, number = graph.variable(f"{name}.sizes.all", np.int64, [len(dims)]), graph.variable(
        f"{name}.number", np.int64, [None])
    graph.add_node("Shape", f"{name}/sizes/all", [f], [every])
    picked = graph.constant(f"{name}.sizes.axes", np.array([0, len(dims) - 2]))
    graph.add_node("Gather", f"{name}/sizes", [every, picked], [sizes], {"axis": 0})
    graph.add_node("ReduceProd", f"{name}/count", [sizes], [count], {"keepdims": 0})
    zero, one = (graph.constant(f"{name}.{k}", np.array(v)) for k, v in (("zero", 0), ("one", 1)))
    graph.add_node("Range", f"{name}/number", [zero, count, one], [number])
    graph.add_node("Reshape", f"{name}/position", [number, sizes],
                   [graph.variable(f"{name}.position", np.int64, [dims[0], dims[-2]])])
