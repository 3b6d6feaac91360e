"""What makes the heads of an attention, so that some can be taken out: columns of the projections of Q, K and V."""

from __future__ import annotations

from collections.abc import Iterable
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
    divide columns into heads or join them, and the computed tensors that have a head less for each that goes, with the
    axis of the heads, or -1 where they are columns."""

    count: int
    size: int
    constants: tuple[Constant, ...]
    reshapes: tuple[str, ...]
    places: dict[str, int]


@dataclass
class _Walk:
    graph: Graph
    heads: int
    size: int
    nodes: dict[str, Node] = field(default_factory=dict)
    constants: list[Constant] = field(default_factory=list)
    reshapes: list[str] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)

    def joined(self, node: Node) -> bool:
        """Collect what makes a Reshape that joins heads."""
        self._take(node, -1)
        self.reshapes.append(node.name)
        return self.up(node.inputs[0], len(shape_of(node.inputs[0]) or ()) - 2)

    def up(self, tensor: Tensor, place: int) -> bool:
        """Collect what makes a tensor whose axis `place` is that of the heads; whether heads keep to themselves in all
        of it."""
        node, dims = self.graph.producer(tensor), shape_of(tensor)
        if node is None or dims is None or node.domain or len([t for t in node.outputs if t.name]) != 1:
            return False
        if place < 0 or place >= len(dims) or dims[place] != self.heads or len(self.nodes) > _MOST:
            return False
        if node.name in self.nodes:
            return self.places[tensor.name] == place
        self._take(node, place)
        if node.op == "Reshape":
            self.reshapes.append(node.name)
            return _divides(node, self.heads, self.size) and place == len(dims) - 2 and self.columns(node.inputs[0])
        if node.op == "MatMul" and not any(is_constant(t) for t in node.inputs):
            ranks = {len(shape_of(t) or ()) for t in node.inputs}
            return place < len(dims) - 2 and ranks == {len(dims)} and all(self.up(t, place) for t in node.inputs)
        if node.op == "Transpose":
            perm = node.attrs.get("perm", list(range(len(dims)))[::-1])
            return self.up(node.inputs[0], int(perm[place]))
        if node.op == "Softmax" and int(node.attrs.get("axis", -1)) % len(dims) == place:
            return False
        return node.op in _INSIDE and all(self._beside(t, place - len(dims)) for t in node.inputs if t.name)

    def _take(self, node: Node, place: int) -> None:
        self.nodes[node.name], self.places[node.outputs[0].name] = node, place

    def _beside(self, tensor: Tensor, from_end: int) -> bool:
        """An input of what works element by element: the same for all heads, or with heads of its own."""
        dims = shape_of(tensor)
        if dims is None:
            return False
        if len(dims) + from_end < 0 or dims[from_end] == 1:
            return True
        return not is_constant(tensor) and self.up(tensor, len(dims) + from_end)

    def columns(self, tensor: Tensor) -> bool:
        """The same of a tensor [.., H D], up to the layers that make its columns."""
        node, width = self.graph.producer(tensor), self.heads * self.size
        if node is None or len(self.nodes) > _MOST or (shape_of(tensor) or (None,))[-1] != width:
            return False
        if node.name in self.nodes:
            return self.places[tensor.name] == -1
        self._take(node, -1)
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
    if joins is None or dims is None or len(dims) < 2 or not all(isinstance(d, int) and d > 1 for d in dims[-2:]):
        return None
    count, size = (int(d or 0) for d in dims[-2:])
    walk = _Walk(graph, count, size)
    if not _joins(joins, count, size) or not walk.joined(joins) or not walk.constants:
        return None
    if not _closed(graph, walk.nodes.values(), readers):
        return None
    return Heads(count, size, tuple(walk.constants), tuple(walk.reshapes), walk.places)


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
    for tensor in (t for n in nodes.values() for t in n.outputs if t.name in found.places):
        place = found.places[tensor.name]
        dims = list(tensor.shape)
        dims[place] = columns.size if place < 0 else len(kept)
        tensor.shape = dims
