"""DQ -> data movement -> Q  =>  the same operator on codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, Tensor
from onnxq.numerics import affine
from onnxq.numerics.affine import QuantParams
from onnxq.numerics.dtypes import by_name
from onnxq.passes import pattern
from onnxq.passes.manager import Context, Pass
from onnxq.passes.pattern import Codes, Stored
from onnxq.plan import GIVEN, MOVES_CODES


@dataclass(frozen=True)
class LowerMovement(Pass):
    """Reshape, MaxPool, Slice, Split, Pad and such on uint8 codes, whose scale and zero point stay as they are.

    Padding with 0 becomes padding with the zero point. Relu and Clip become a Clip whose bounds are the codes of
    theirs: rounding keeps the order of numbers, so it comes to the same before and behind it. Source: ONNX operators of
    those names from version 13 on, with uint8.
    """

    name: ClassVar[str] = "lower-movement"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Lower one node that joined an int8 region."""
        verdict = context.plan.node(node.name)
        if verdict is None or not verdict.int_output or node.domain or node.op not in MOVES_CODES:
            return False
        if verdict.lowering == GIVEN:
            return False
        codes = pattern.read(graph, node.inputs[0])
        read = [t for t in node.outputs if len(t.outputs) or graph.is_output(t)]
        made = [pattern.stored(graph, t, context.absorbed) for t in read]
        found = [m for m in made if m is not None and pattern.activation(m.codes)]
        if codes is None or not pattern.activation(codes) or len(found) < len(read):
            return context.skip(node, "not everything around it is uint8 codes")
        if not all(pattern.same_scale(graph, codes, m.codes) for m in found):
            return context.skip(node, "the model stores its result at another scale")
        op, rest = self._on_codes(graph, node, codes)
        if op != "Split":
            pattern.finish(graph, node, found[0], op, [codes.q, *rest], {} if op == "Clip" else dict(node.attrs), None)
        else:
            self._split(graph, node, codes, found)
        return True

    @staticmethod
    def _on_codes(graph: Graph, node: Node, codes: Codes) -> tuple[str, list[Tensor | None]]:
        """The operator on codes and its inputs behind the data."""
        if node.op in ("Clip", "Relu"):
            return "Clip", _bounds(graph, node, codes)
        rest: list[Tensor | None] = [t if t.name else None for t in node.inputs[1:]]
        if node.op == "Pad" and node.attrs.get("mode", "constant") == "constant":
            rest[1:2] = [codes.zero_point]
        return node.op, rest

    @staticmethod
    def _split(graph: Graph, node: Node, codes: Codes, found: list[Stored]) -> None:
        stored = {m.quantize.inputs[0].name: m for m in found}
        graph.replace_input(node, 0, codes.q)
        for index, tensor in enumerate(list(node.outputs)):
            if tensor.name in stored:
                graph.remove(stored[tensor.name].quantize)
                graph.set_output(node, index, stored[tensor.name].codes.q)
            elif tensor.name:
                graph.set_output(node, index, graph.like(tensor, f"{tensor.name}.q", "uint8"))


def _bounds(graph: Graph, node: Node, codes: Codes) -> list[Tensor | None]:
    if node.op == "Relu":
        return [codes.zero_point]
    params = QuantParams(graph.read(codes.scale), graph.read(codes.zero_point), by_name("uint8"))
    found: list[Tensor | None] = []
    for index, name in ((1, f"{node.name}.low.q"), (2, f"{node.name}.high.q")):
        bound = graph.optional_input(node, index)
        value = None if bound is None else np.asarray(graph.read(bound), np.float32).reshape(())
        found.append(None if value is None else graph.constant(name, affine.quantize(value, params)))
    return found
