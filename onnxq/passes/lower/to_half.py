"""float32 -> float16, for targets that compute in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from onnxq.graph import FLOAT32, HALF, Graph, Node, Tensor, dtype_of, element_types, halve, is_constant, type_number
from onnxq.numerics import halves
from onnxq.passes.halving import FLOAT16, Slots, slots_of
from onnxq.passes.manager import Context, Pass

_BODIES = frozenset({"If", "Loop", "Scan"})
_TYPED = frozenset({"Cast", "Constant", "ConstantOfShape"})  # onnxruntime lets them make float16 where they say so
_MOST = 1024  # elements of a constant in an attribute


@dataclass(frozen=True)
class ToHalf(Pass):
    """Every float32 tensor becomes float16, those in bodies of If, Loop and Scan included, but for what `Plan.wide`
    names and what an operator takes in float32 alone.

    Casts stand where the type changes, one for each tensor: t -> Cast -> `t.float` or `t.half`. Constants are stored in
    float16, under their own name where nothing reads them in float32, else as `t.half`; numbers beyond its range become
    its largest, or what `Plan.limits` says of the constant. With `keep_ports` inputs and outputs of the graph keep
    their types. Casts that this leaves without effect go. Attributes that name float32 as the type of a result follow.
    """

    name: ClassVar[str] = "to-half"
    keep_ports: bool = True

    def run(self, graph: Graph, context: Context) -> bool:
        """Bodies are rewritten together with the graph: they capture its tensors."""
        types = element_types(graph)
        work = _Halving(graph, {name for name, dtype in types.items() if dtype == FLOAT32}, context.plan.limits,
                        self.keep_ports)
        work.collect(graph, context, frozenset(types), False)
        return work.run()


@dataclass
class _Read:
    """Where a tensor is read: input `index` of a node, or output `index` of a graph; `wants` None takes either type."""

    reader: Node | Graph
    index: int
    wants: np.dtype[np.generic] | None

    def put(self, tensor: Tensor) -> None:
        if isinstance(self.reader, Graph):
            self.reader.set_result(self.index, tensor)
        else:
            Graph.replace_input(self.reader, self.index, tensor)


@dataclass
class _Made:
    """A tensor that is float32 before the rewrite, the graph that holds it and the type that it will have."""

    tensor: Tensor
    holder: Graph
    becomes: np.dtype[np.generic]
    maker: Node | None = None


@dataclass
class _Halving:
    graph: Graph
    floats: set[str]
    limits: Mapping[str, float]
    keep_ports: bool
    made: dict[str, _Made] = field(default_factory=dict)
    reads: dict[str, list[_Read]] = field(default_factory=dict)
    constants: dict[str, list[Tensor]] = field(default_factory=dict)
    nodes: list[tuple[Node, Graph]] = field(default_factory=list)
    changed: bool = False

    # ------------------------------------------------------------------ looking

    def collect(self, graph: Graph, context: Context, known: frozenset[str], kept: bool) -> None:
        """Note what a graph and its bodies make and read; `kept` tells that all of it stays float32."""
        main = graph is self.graph
        ports = FLOAT32 if (self.keep_ports if main else kept) else FLOAT16
        for tensor in graph.inputs:
            self._make(tensor, graph, ports)
        bodies: dict[str, list[Graph]] = {}
        for owner, body in graph.subgraphs():
            bodies.setdefault(owner.name, []).append(body)
        for node in graph.nodes:
            self.nodes.append((node, graph))
            wide = kept or node.name in context.plan.wide
            unknown = next((t.name for t in (*node.inputs, *node.outputs) if t.name and t.name not in known), None)
            slots = slots_of(node, self.graph.opset, self.floats)
            if unknown is not None and not wide and any(t.name in self.floats for t in (*node.inputs, *node.outputs)):
                context.skip(node, f"nothing tells the type of {unknown}, so that it stays float32")
            if wide or unknown is not None:
                slots = Slots.wide(node)
            self._node(node, graph, slots)
            for body in bodies.get(node.name, []):
                self.collect(body, context, known, wide)
        for index, tensor in enumerate(graph.outputs):
            self._read(tensor, _Read(graph, index, ports))

    def _node(self, node: Node, graph: Graph, slots: Slots) -> None:
        for index, tensor in enumerate(node.inputs):
            self._read(tensor, _Read(node, index, slots.inputs[index]))
        for index, tensor in enumerate(node.outputs):
            free = index == 0 and not slots.tied and not self._names_type(node)
            self._make(tensor, graph, FLOAT32 if free else slots.outputs[index], node)

    @staticmethod
    def _names_type(node: Node) -> bool:
        """Whether an attribute says that a node makes float32, or holds that, and may say float16."""
        return node.op in _BODIES or (node.op in _TYPED and any(True for _ in _type_attributes(node)))

    def _make(self, tensor: Tensor, graph: Graph, becomes: np.dtype[np.generic], maker: Node | None = None) -> None:
        if tensor.name in self.floats:
            self.made[tensor.name] = _Made(tensor, graph, becomes, maker)

    def _read(self, tensor: Tensor, read: _Read) -> None:
        if tensor.name not in self.floats:
            return
        self.reads.setdefault(tensor.name, []).append(read)
        if is_constant(tensor):
            known = self.constants.setdefault(tensor.name, [])
            if all(t is not tensor for t in known):
                known.append(tensor)

    # ------------------------------------------------------------------ rewriting

    def run(self) -> bool:
        """Whether anything changed."""
        for name, tensors in self.constants.items():
            self._constant(name, tensors)
        for name, made in self.made.items():
            self._computed(name, made)
        for node, holder in self.nodes:
            self._drop_cast(node, holder)
        for graph in self.graph.graphs() if self.changed else ():
            graph.sort()
        return self.changed

    def _constant(self, name: str, tensors: list[Tensor]) -> None:
        """Store it in float16, beside its float32 form where something reads that."""
        limit = self.limits.get(name, halves.LARGEST)
        reads = self.reads[name]
        narrow = [r for r in reads if r.wants == FLOAT16]
        if not narrow:
            return
        self.changed = True
        if all(r.wants != FLOAT32 for r in reads):
            for tensor in tensors:
                halve(tensor, limit, self.graph.folder)
            return
        source = tensors[0]
        result = self.graph.computed(f"{name}.half", FLOAT16, source._values.shape,
                                     lambda: halves.nearest(self.graph.read(source), limit))
        for read in narrow:
            read.put(result)

    def _computed(self, name: str, made: _Made) -> None:
        """Give a tensor its type, and those that read it in the other type a Cast."""
        reads = self.reads.get(name, [])
        if made.maker is not None and made.maker.op == "Cast":  # it makes float32 where that is wanted at all
            made.becomes = FLOAT32 if any(r.wants == FLOAT32 for r in reads) else made.becomes
        other = FLOAT16 if made.becomes == FLOAT32 else FLOAT32
        readers = [r for r in reads if r.wants == other]
        port = next((r for r in readers if r.reader is self.graph), None)
        if port is not None and made.maker is not None:
            self._before_port(made, reads, other)
            return
        self._retype(made)
        if not readers:
            return
        self.changed = True
        result = self._source(made)
        if dtype_of(result) != other:
            result = made.holder.like(made.tensor, f"{name}{_suffix(other)}", other)
            made.holder.add_cast(f"{name}/{_suffix(other)[1:]}", self._source(made), result)
        for read in readers:
            read.put(result)

    def _before_port(self, made: _Made, reads: list[_Read], port: np.dtype[np.generic]) -> None:
        """A graph output that keeps its name and type: its maker makes another tensor, which is cast to it."""
        tensor, maker = made.tensor, made.maker
        assert maker is not None
        inner = made.holder.like(tensor, f"{tensor.name}{_suffix(made.becomes)}", made.becomes)
        index = next(k for k, t in enumerate(maker.outputs) if t is tensor)
        made.holder.set_output(maker, index, inner)
        for read in reads:
            if read.wants != port:
                read.put(inner)
        if port == FLOAT16:
            tensor.dtype = FLOAT16
        found = _Made(inner, made.holder, made.becomes, maker)
        self._retype(found)
        made.holder.add_cast(f"{tensor.name}/{_suffix(port)[1:]}", self._source(found), tensor)
        self.changed = True

    def _source(self, made: _Made) -> Tensor:
        """What a tensor of the other type is cast from: the tensor, or what it was cast from itself."""
        maker = made.maker
        cast = maker is not None and maker.op == "Cast" and maker.inputs[0].name not in self.floats
        return maker.inputs[0] if maker is not None and cast else made.tensor

    def _retype(self, made: _Made) -> None:
        if made.becomes == FLOAT32:
            return
        if dtype_of(made.tensor) != FLOAT16:
            made.tensor.dtype = FLOAT16
            self.changed = True
        maker: Node = made.maker
        for key in list(_type_attributes(maker)) if maker is not None else ():
            if is_constant(maker.attrs[key]):
                halve(maker.attrs[key], halves.LARGEST, self.graph.folder)
            else:
                maker.attrs[key] = type_number(FLOAT16)
            self.changed = True

    def _drop_cast(self, node: Node, holder: Graph) -> None:
        """Take out a Cast from float16 to float16, unless it carries the name of a body's output."""
        if node.op != "Cast" or not len(node.outputs) or any(dtype_of(t) not in HALF[:1] for t in (
                node.inputs[0], node.outputs[0])):
            return
        maker = holder.producer(node.inputs[0])
        if holder.is_output(node.outputs[0]) and (holder is not self.graph or maker is None
                                                  or holder.is_output(node.inputs[0])):
            return
        holder.bypass(node)
        self.changed = True


def _suffix(dtype: np.dtype[np.generic]) -> str:
    return ".half" if dtype == FLOAT16 else ".float"


def _type_attributes(node: Node) -> Iterator[str]:
    """Attributes that name float32 as the type of what a node makes, or hold it."""
    for key, value in node.attrs.items():
        if is_constant(value):
            if dtype_of(value) == FLOAT32 and np.prod(value._values.shape, dtype=np.int64) <= _MOST:
                yield key
        elif key in ("dtype", "output_datatype", "output_dtype", "to") and value == type_number(FLOAT32):
            yield key
