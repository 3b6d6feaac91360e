"""float16 and bfloat16 -> float32, for targets that don't compute in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxq.graph import (
    CONTRIB,
    FLOAT32,
    HALF,
    Graph,
    Node,
    Tensor,
    dtype_of,
    element_types,
    is_constant,
    type_number,
    widen,
    widen_attribute,
)
from onnxq.passes.manager import Context, Pass
from onnxq.targets import Target

# attributes of ONNX's operators that name an element type (Cast, EyeLike, DequantizeLinear, HannWindow, QuantizeLinear,
# Attention, LayerNormalization and others)
TYPE_ATTRIBUTES = frozenset({
    "dtype", "output_datatype", "output_dtype", "precision", "softmax_precision", "stash_type", "to",
})
_HALF_NUMBERS = frozenset(type_number(t) for t in HALF)


@dataclass(frozen=True)
class WidenHalf(Pass):
    """Every float16 and bfloat16 tensor becomes float32, those in bodies of If, Loop and Scan included.

    Graph inputs x and outputs y keep their types: x -> Cast -> `x.float`, and `y.float` -> Cast -> y. So does what
    operators of unknown domains read and make: `t.half` is a float32 tensor t cast for them. Stored values stay exact;
    what a half model rounds or lets overflow between two nodes stays as float32 has it. Attributes that name a half
    type, or hold a tensor of one, follow. Where the target computes in half types, nothing is done.
    """

    name: ClassVar[str] = "widen-half"

    def run(self, graph: Graph, context: Context) -> bool:
        """Bodies are rewritten together with the graph: they capture its tensors."""
        if context.target is None or context.target.half:
            return False
        types = element_types(graph)
        half = {name: dtype for name, dtype in types.items() if dtype in HALF}
        if not half:
            return False
        graph.half = tuple(sorted({str(dtype) for dtype in half.values()}))
        work = _Widening(graph, half, context.target)
        for node, tensor in work.unknown(types):
            context.skip(node, f"nothing tells the type of {tensor.name}, which is taken to be no half")
        return work.run()


class _Widening:
    """`half` gives the type of each half tensor before the rewrite; `kept` names those that keep it."""

    def __init__(self, graph: Graph, half: dict[str, np.dtype[Any]], target: Target) -> None:
        self.graph, self.half, self.target = graph, half, target
        self.plain: list[tuple[Node, Graph]] = []
        self.opaque: list[tuple[Node, Graph]] = []
        self.bodies: list[Graph] = []
        self._split(graph, False)
        self.outputs = {t.name for t in graph.outputs}
        self.read_opaquely = {t.name for node, _ in self.opaque for t in node.inputs}
        self.read_plainly = {t.name for node, _ in self.plain for t in node.inputs}
        self.read_plainly |= {t.name for body in self.bodies for t in body.outputs}
        self.kept = {t.name for t in self._stay_half()} & half.keys()
        self.changed = False

    def _split(self, graph: Graph, opaque: bool) -> None:
        """Sort nodes by whether they are rewritten; what is in the body of one that is not, is not."""
        if graph is not self.graph and not opaque:
            self.bodies.append(graph)
        held: dict[str, list[Graph]] = {}
        for owner, body in graph.subgraphs():
            held.setdefault(owner.name, []).append(body)
        for node in graph.nodes:
            untouched = opaque or self._is_opaque(node)
            (self.opaque if untouched else self.plain).append((node, graph))
            for body in held.get(node.name, []):
                self._split(body, untouched)

    def _is_opaque(self, node: Node) -> bool:
        if node.domain == CONTRIB:
            return node.op not in self.target.contrib
        if node.domain not in (None, "", "ai.onnx"):
            return True
        # the bits of a type, and a Constant whose value is no plain tensor
        return node.op == "BitCast" or (node.op == "Constant" and not node.attrs)

    def _stay_half(self) -> Iterator[Tensor]:
        yield from self.graph.inputs
        for node, _ in self.opaque:
            yield from node.outputs
            yield from (t for t in node.inputs if is_constant(t))
        yield from (t for t in self.graph.outputs if is_constant(t))
        yield from (node.outputs[0] for node, _ in self.plain if self._at_border(node))

    def _at_border(self, node: Node) -> bool:
        """Whether a node is a Cast to what a graph output or an untouched operator wants."""
        if node.op != "Cast":
            return False
        name = node.outputs[0].name
        return name in self.outputs or (name in self.read_opaquely and name not in self.read_plainly)

    def unknown(self, types: dict[str, np.dtype[Any]]) -> Iterator[tuple[Node, Tensor]]:
        """(untouched node, tensor) between it and others of which nothing tells the type."""
        made = {t.name for node, _ in self.plain for t in node.outputs}
        for node, _ in self.opaque:
            yield from ((node, t) for t in node.inputs if t.name in made and t.name not in types)
            yield from ((node, t) for t in node.outputs if t.name in self.read_plainly and t.name not in types)

    # -------------------------------------------------------------- rewriting

    def run(self) -> bool:
        """Whether anything changed."""
        makers = {t.name: (t, holder) for node, holder in self.plain + self.opaque for t in node.outputs}
        for graph in (self.graph, *self.bodies):
            makers |= {t.name: (t, graph) for t in graph.inputs}
        makers |= {t.name: (t, self.graph) for node, _ in self.plain for t in node.inputs if is_constant(t)}
        for name, (tensor, holder) in makers.items():
            if name not in self.half:
                continue
            if name in self.kept:
                self._cast_behind(tensor, holder)
            elif name in self.outputs:
                self._cast_before(tensor)
            elif name in self.read_opaquely:
                self._cast_for_opaque(tensor, holder)
        self._retype()
        for graph in (self.graph, *self.bodies) if self.changed else ():
            graph.sort()
        return self.changed

    def _cast_behind(self, tensor: Tensor, holder: Graph) -> None:
        """A tensor that stays half: its readers read it widened."""
        if not self._read(tensor):
            return
        result = holder.like(tensor, f"{tensor.name}.float", FLOAT32)
        self._reroute(tensor, result)
        if dtype_of(tensor) is None:
            tensor.dtype = self.half[tensor.name]  # told by readers, which are gone now
        holder.add_cast(f"{tensor.name}/float", tensor, result)
        self.changed = True

    def _cast_before(self, tensor: Tensor) -> None:
        """A graph output: its maker and its readers take the widened tensor."""
        maker = self.graph.producer(tensor)
        assert maker is not None
        result = self.graph.like(tensor, f"{tensor.name}.float", FLOAT32)
        index = next(k for k, t in enumerate(maker.outputs) if t is tensor)
        self._reroute(tensor, result)
        self.graph.set_output(maker, index, result)
        self.graph.add_cast(f"{tensor.name}/half", result, tensor)
        self.kept.add(tensor.name)
        self.changed = True

    def _cast_for_opaque(self, tensor: Tensor, holder: Graph) -> None:
        """A tensor that becomes float32: untouched operators read it narrowed."""
        result = holder.like(tensor, f"{tensor.name}.half", self.half[tensor.name])
        for node, _ in self.opaque:
            self._replace(node, tensor, result)
        holder.add_cast(f"{tensor.name}/half", tensor, result)
        self.kept.add(result.name)
        self.changed = True

    def _read(self, tensor: Tensor) -> bool:
        """Whether anything that is rewritten reads the tensor; Casts alone may read it as it is."""
        return any(t.name == tensor.name for node, _ in self.plain if node.op != "Cast" for t in node.inputs) or any(
            t.name == tensor.name for body in self.bodies for t in body.outputs)

    def _reroute(self, tensor: Tensor, result: Tensor) -> None:
        for node, _ in self.plain:
            self._replace(node, tensor, result)
        for body in self.bodies:
            for index, output in enumerate(body.outputs):
                if output.name == tensor.name:
                    body.set_result(index, result)

    def _replace(self, node: Node, tensor: Tensor, result: Tensor) -> None:
        for index, given in enumerate(node.inputs):
            if given.name == tensor.name:
                self.graph.replace_input(node, index, result)

    def _retype(self) -> None:
        for body in self.bodies:
            self._widen([*body.inputs, *body.outputs])
        for node, _ in self.plain:
            self._widen([*node.inputs, *node.outputs])
            if self._at_border(node) and node.outputs[0].name in self.kept:
                continue
            for key, value in node.attrs.items():
                if is_constant(value) and dtype_of(value) in HALF:
                    widen_attribute(value, self.graph.folder)
                    self.changed = True
                elif key in TYPE_ATTRIBUTES and value in _HALF_NUMBERS:
                    node.attrs[key] = type_number(FLOAT32)
                    self.changed = True

    def _widen(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if tensor.name in self.half and tensor.name not in self.kept and dtype_of(tensor) != FLOAT32:
                widen(tensor)
                self.changed = True
