"""What makes the heads of an attention, so that some can be taken out: columns of the projections of Q, K and V."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant, shape_of
from onnxq.passes.absorbing import Constant, unused
from onnxq.passes.widening import ELEMENTWISE, is_layer

_INSIDE = ELEMENTWISE | {"Cast", "Softmax", "Transpose", "Where"}
_MOST = 64  # nodes of one attention


@dataclass(frozen=True)
class Heads:
    """An attention of `count` heads of `size` columns each: constants with a column for each of theirs, Reshapes that
    divide columns into heads or join them, and the computed tensors that have a head less for each that goes."""

    count: int
    size: int
    constants: tuple[Constant, ...]
    reshapes: tuple[str, ...]
    tensors: tuple[str, ...]


@dataclass
class _Walk:
    graph: Graph
    heads: int
    size: int
    nodes: dict[str, Node] = field(default_factory=dict)
    constants: list[Constant] = field(default_factory=list)
    reshapes: list[str] = field(default_factory=list)

    def up(self, tensor: Tensor) -> bool:
        """Collect what makes a tensor that has heads; whether all of it is known."""
        node = self.graph.producer(tensor)
        if node is None or len(self.nodes) > _MOST or node.domain or len([t for t in node.outputs if t.name]) != 1:
            return False
        if node.name in self.nodes:
            return True
        self.nodes[node.name] = node
        if node.op == "Reshape":
            self.reshapes.append(node.name)
            if _joins(node, self.heads, self.size):
                return self.up(node.inputs[0])
            return _divides(node, self.heads, self.size) and self.columns(node.inputs[0])
        if node.op == "MatMul" and not any(is_constant(t) for t in node.inputs):
            return all(self.up(t) for t in node.inputs)
        if node.op not in _INSIDE:
            return False
        return all(self._beside(t) for t in node.inputs if t.name)

    def _beside(self, tensor: Tensor) -> bool:
        """An input of what works element by element: with heads of its own, or the same for all of them."""
        dims = shape_of(tensor)
        if dims is None:
            return False
        alike = not {self.heads, self.heads * self.size} & {d for d in dims if isinstance(d, int)}
        return alike or (not is_constant(tensor) and self.up(tensor))

    def columns(self, tensor: Tensor) -> bool:
        """The same of a tensor [.., H D], up to the layers that make its columns."""
        node, width = self.graph.producer(tensor), self.heads * self.size
        if node is None or len(self.nodes) > _MOST or (shape_of(tensor) or (None,))[-1] != width:
            return False
        if node.name in self.nodes:
            return True
        self.nodes[node.name] = node
        if not is_layer(node) and (node.op not in ELEMENTWISE or node.domain):
            return False
        for k, one in enumerate(node.inputs):
            if one.name and is_constant(one):
                last = (shape_of(one) or (1,))[-1]
                if last == width and dtype_of(one) == np.float32:
                    self.constants.append(Constant(node.name, k, -1))
                elif last != 1:
                    return False
        if is_layer(node):
            return True
        return all(self.columns(t) for t in node.inputs if t.name and not is_constant(t))


def heads(graph: Graph, tensor: Tensor, readers: frozenset[str]) -> Heads | None:
    """The attention that makes a tensor [.., H D], which `readers` alone read, by joining its heads.

    Written in small operators: every head's columns of Q, K and V are divided by Reshapes, and nothing is shared by
    heads but what is the same for all, such as a mask. None for another form, for grouped or cached heads, and where
    something else reads what lies between.
    """
    joins = graph.producer(tensor)
    dims = shape_of(joins.inputs[0]) if joins is not None and joins.op == "Reshape" else None
    if dims is None or len(dims) < 2 or not all(isinstance(d, int) and d > 1 for d in dims[-2:]):
        return None
    count, size = (int(d or 0) for d in dims[-2:])
    walk = _Walk(graph, count, size)
    if not walk.up(tensor) or not walk.constants or not _closed(graph, walk.nodes.values(), readers):
        return None
    names = tuple(n.outputs[0].name for n in walk.nodes.values())
    return Heads(count, size, tuple(walk.constants), tuple(walk.reshapes), names)


def _closed(graph: Graph, nodes: Iterable[Node], readers: frozenset[str]) -> bool:
    """Whether nothing else reads what the nodes make, but for its other sizes."""
    inside = {n.name for n in nodes} | readers
    made = [n.outputs[0] for n in nodes]
    return all(not graph.is_output(t) and all(n.name in inside or n.op == "Shape" for n in graph.consumers(t))
               for t in made)


def _divides(node: Node, count: int, size: int) -> bool:
    """[.., H D] to [.., H, D]."""
    before, after = (shape_of(t) or () for t in (node.inputs[0], node.outputs[0]))
    return len(before) + 1 == len(after) and tuple(after[-2:]) == (count, size) and before[:-1] == after[:-2]


def _joins(node: Node, count: int, size: int) -> bool:
    """[.., H, D] to [.., H D]."""
    before, after = (shape_of(t) or () for t in (node.inputs[0], node.outputs[0]))
    return len(before) == len(after) + 1 and tuple(before[-2:]) == (count, size) and before[:-2] == after[:-1]


def keep(graph: Graph, found: Heads, kept: npt.NDArray[np.int64], suffix: str) -> None:
    """Leave the heads `kept`, int64 [H'], and take out the others."""
    nodes, made = {n.name: n for n in graph.nodes}, dict[str, Tensor]()
    columns = (kept[:, None] * found.size + np.arange(found.size)).reshape(-1)
    for constant in found.constants:
        node = nodes[constant.node]
        old = node.inputs[constant.index]
        if old.name not in made:
            values = np.ascontiguousarray(np.asarray(graph.read(old)).take(columns, -1))
            made[old.name] = graph.constant(unused(graph, old.name, suffix), values)
        graph.replace_input(node, constant.index, made[old.name])
    for name in found.reshapes:  # whose shapes others may read, too
        node = nodes[name]
        rank = len(shape_of(node.outputs[0]) or ())
        joined = rank < len(shape_of(node.inputs[0]) or ())
        into = [0] * (rank - 1) + [columns.size] if joined else [0] * (rank - 2) + [len(kept), found.size]
        node.attrs.pop("allowzero", None)  # a 0 is a size that stays
        graph.replace_input(node, 1, graph.constant(unused(graph, f"{name}.shape", suffix), np.asarray(into, np.int64)))
    inside = set(found.tensors)
    for tensor in (t for n in nodes.values() for t in n.outputs if t.name in inside):
        tensor.shape = _fewer(tensor.shape, found, len(kept))


def _fewer(dims: Sequence[int | str | None] | None, found: Heads, left: int) -> list[int | str | None] | None:
    """Sizes with `left` heads: the columns of all, or else the first size that is their number."""
    if dims is None:
        return None
    if dims[-1] == found.count * found.size:
        return [*dims[:-1], left * found.size]
    place = next((k for k, d in enumerate(dims) if d == found.count), None)
    return [left if k == place else d for k, d in enumerate(dims)]
