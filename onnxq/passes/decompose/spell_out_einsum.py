"""Einsum -> Transpose, Reshape, MatMul."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from onnxq.graph import Graph, Node, Tensor, dtype_of, shape_of
from onnxq.passes.decompose.parts import Decomposition, Parts
from onnxq.passes.manager import Context

Sizes = Mapping[str, Any]  # of the axes by letter; what is no int is free


@dataclass(frozen=True)
class SpellOutEinsum(Decomposition):
    """Einsum of one tensor -> Transpose; of two -> MatMul of [batch.., M, K] and [batch.., K, N], with a Transpose and
    a Reshape in front of it and behind it where the axes lie otherwise.

    Axes of both operands and of the result are batch axes; those of both alone are summed over, as one axis K; M and N
    are the other axes of the first and of the second, merged. Source: ONNX Einsum-12.
    """

    name: ClassVar[str] = "spell-out-einsum"
    known: ClassVar[tuple[str, ...]] = ("Einsum",)

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Replace one Einsum."""
        given = node.attrs["equation"]
        ranks = [len(dims) if (dims := shape_of(t)) is not None else None for t in node.inputs]
        found = _terms(given, ranks)
        if found is None:
            return context.skip(node, f"{given!r} names an axis twice, or its axes are not known")
        terms, result = found
        sizes = {letter: d for term, tensor in zip(terms, node.inputs, strict=True)
                 for letter, d in zip(term, shape_of(tensor) or (), strict=False)}
        if len(terms) == 1 and sorted(terms[0]) == sorted(result):
            Parts(graph, node).finish("Transpose", node.inputs[:1], {"perm": [terms[0].index(c) for c in result]})
            return True
        if len(terms) != 2 or any(c not in result for c in set(terms[0]) ^ set(terms[1])):
            return context.skip(node, f"{given!r} is no product of two matrices")
        product = _Product(terms[0], terms[1], result, sizes)
        shapes = product.shapes()
        if shapes is None:
            return context.skip(node, "more than one size that it merges is not known")
        product.write(Parts(graph, node), shapes)
        return True


def _terms(equation: str, ranks: Sequence[int | None]) -> tuple[list[str], str] | None:
    """Letters of each operand and of the result, capital ones for axes under an ellipsis; None where one comes twice,
    or a rank is not known or another."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:  # the letters that come once, in alphabetical order, behind what the ellipsis stands for
        letters = sorted(c for c in set(left) - set(".,") if left.count(c) == 1)
        result = ("..." if "..." in left else "") + "".join(letters)
    hidden = 0
    for term, rank in zip(terms, ranks, strict=True):
        if "..." in term:
            if rank is None:
                return None
            hidden = max(hidden, rank - len(term) + 3)
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation][:hidden]
    found = []
    for term, rank in zip((*terms, result), (*ranks, None), strict=True):
        count = hidden if rank is None or "..." not in term else rank - len(term) + 3
        found.append(term.replace("...", "".join(spare[len(spare) - count:])))
        if len(set(found[-1])) < len(found[-1]) or (rank is not None and rank != len(found[-1])):
            return None
    return found[:-1], found[-1]


@dataclass(frozen=True)
class _Product:
    left: str
    right: str
    result: str
    sizes: Sizes

    @property
    def batch(self) -> str:
        return "".join(c for c in self.result if c in self.left and c in self.right)

    @property
    def leading(self) -> str:
        """Axes of the left operand that stay apart: a single right one is multiplied by as many matrices as there
        are."""
        return self.batch or self._of_left[:-1]

    @property
    def rows(self) -> str:
        return self._of_left if self.batch else self._of_left[-1:]

    @property
    def summed(self) -> str:
        return "".join(c for c in self.left if c in self.right and c not in self.result)

    @property
    def columns(self) -> str:
        return "".join(c for c in self.result if c not in self.left)

    @property
    def _of_left(self) -> str:
        return "".join(c for c in self.result if c not in self.right)

    def shapes(self) -> tuple[list[int] | None, ...] | None:
        """What the operands and the product are reshaped to, None in place of what stays; all None if unknown."""
        left = self._merged(self.leading, self.rows, self.summed)
        right = self._merged(self.batch, self.summed, self.columns)
        parted: list[int] | None = None
        if len(self.rows) != 1 or len(self.columns) != 1:
            parted = [0] * len(self.leading) + [self._size(c) for c in self.rows + self.columns]
            if len(self.rows) == 1:
                parted[len(self.leading)] = 0  # in place
        found = (left, right, parted)
        return None if any(dims is not None and dims.count(-1) > 1 for dims in found) else found

    def _merged(self, leading: str, *pair: str) -> list[int] | None:
        if all(len(letters) == 1 for letters in pair):
            return None
        sizes = [[self._size(c) for c in letters] for letters in pair]
        return [0] * len(leading) + [-1 if -1 in dims else math.prod(dims) for dims in sizes]

    def _size(self, letter: str) -> int:
        size = self.sizes.get(letter)
        return size if isinstance(size, int) else -1

    def write(self, parts: Parts, shapes: tuple[list[int] | None, ...]) -> None:
        """Replace the node."""
        dtype, (left, right) = dtype_of(parts.result), parts.node.inputs
        left = self._brought(parts, "left", left, self.left, self.leading + self.rows + self.summed, shapes[0])
        right = self._brought(parts, "right", right, self.right, self.batch + self.summed + self.columns, shapes[1])
        order = self.leading + self.rows + self.columns
        turned = order != self.result
        if shapes[2] is None and not turned:
            parts.finish("MatMul", [left, right])
            return
        product = parts.make("MatMul", "product", [left, right], dtype=dtype)
        if shapes[2] is not None:
            target = parts.integers("apart", shapes[2])
            if not turned:
                parts.finish("Reshape", [product, target])
                return
            product = parts.make("Reshape", "parted", [product, target], dtype=dtype)
        parts.finish("Transpose", [product], {"perm": [order.index(c) for c in self.result]})

    def _brought(self, parts: Parts, side: str, tensor: Tensor, letters: str, order: str,
                 shape: list[int] | None) -> Tensor:
        """An operand with its axes in an order, and merged."""
        dtype = dtype_of(parts.result)
        if letters != order:
            attrs, turned = {"perm": [letters.index(c) for c in order]}, [self.sizes.get(c) for c in order]
            tensor = parts.make("Transpose", f"{side}.turned", [tensor], attrs=attrs, shape=turned, dtype=dtype)
        if shape is not None:
            tensor = parts.make("Reshape", f"{side}.merged", [tensor, parts.integers(f"{side}_shape", shape)],
                                dtype=dtype)
        return tensor
