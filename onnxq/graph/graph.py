"""The graph that passes edit: onnx-graphsurgeon's IR behind the few verbs that onnxq needs.

Nodes and tensors are the library's own objects (`node.op`, `node.inputs`, `tensor.name`). A tensor's identity is its
name: the library's `==` compares names, so tensors are compared and stored by name, never hashed. New names are built
from old ones (`w.q`, `x.scale`) and are unique by construction; a clash is an error, not a counter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from onnxq.errors import GraphError
from onnxq.graph import tensors
from onnxq.graph.order import in_order
from onnxq.graph.tensors import Array, Computed, dtype_of, is_constant, port_of, shape_of, type_number
from onnxq.ports import Port

Node: TypeAlias = Any  # gs.Node and gs.Tensor: the library ships no types
Tensor: TypeAlias = Any

CONTRIB = "com.microsoft"


class Graph:
    """A model being compiled.

    `folder` is where its external data lie; `extras`, `metadata`, `annotations` and `header` (the model's doc string,
    domain and version) return on saving. `half` names the types, float16 or bfloat16, that the weights came in where
    the graph is computed in float32 instead.
    """

    def __init__(self, ir: gs.Graph, folder: Path, metadata: dict[str, str] | None = None,
                 extras: dict[str, Any] | None = None, annotations: Sequence[Any] = (),
                 parent: Graph | None = None, header: onnx.ModelProto | None = None) -> None:
        self.ir = ir
        self.folder = folder
        self.metadata = metadata if metadata is not None else {}
        self.extras = extras if extras is not None else {}
        self.annotations = list(annotations)
        self.header = header or onnx.ModelProto()
        self.parent = parent
        self.half: tuple[str, ...] = ()
        self._names = {name for g in self._with_subgraphs(ir) for name in self._local_names(g)}
        self._node_names = {n.name for n in ir.nodes}
        self._made: dict[str, Tensor] = {}  # tensors that passes made, by name

    # ------------------------------------------------------------------ looking

    @property
    def nodes(self) -> list[Node]:
        """Nodes of this graph in execution order; a copy, so that a pass may edit while it walks."""
        return list(self.ir.nodes)

    @property
    def inputs(self) -> list[Tensor]:
        """Graph inputs that a caller must feed."""
        return list(self.ir.inputs)

    @property
    def outputs(self) -> list[Tensor]:
        """Graph outputs in their order."""
        return list(self.ir.outputs)

    @property
    def opset(self) -> int:
        """Version of the ai.onnx operator set."""
        return int(self.ir.opset)

    def ports(self) -> list[Port]:
        """The inputs as data readers see them."""
        return [port_of(t) for t in self.ir.inputs]

    def subgraphs(self) -> Iterator[tuple[Node, Graph]]:
        """(owner, body) for each body of If, Loop or Scan in this graph; bodies nest."""
        for node in self.ir.nodes:
            for value in node.attrs.values():
                if isinstance(value, gs.Graph):
                    yield node, Graph(value, self.folder, extras=self.extras, parent=self)

    def graphs(self) -> Iterator[Graph]:
        """This graph and the bodies in it, nested ones too."""
        yield self
        for _, body in self.subgraphs():
            yield from body.graphs()

    def walk(self) -> Iterator[tuple[Node, Graph]]:
        """Every node with the graph that holds it, subgraphs included."""
        for graph in self.graphs():
            yield from ((node, graph) for node in graph.nodes)

    def read(self, tensor: Tensor) -> Array:
        """Values of a constant; mapped from disk where they are external, computed where they are so, never cached."""
        return tensors.read(tensor, self.folder)

    def read_rows(self, tensor: Tensor, start: int, stop: int) -> Array:
        """Rows `start:stop` along a constant's first axis, for weights that are too large to be in memory at once.

        What was read stays in memory only as long as its array does, where a part of `read`'s holds on to all of it.
        """
        return tensors.read(tensor, self.folder, slice(start, stop))

    def scalar(self, tensor: Tensor | None) -> float | None:
        """The single value of a constant of one element, else None."""
        if tensor is None or not is_constant(tensor):
            return None
        shape = shape_of(tensor)
        if shape is None or int(np.prod([int(d or 0) for d in shape], dtype=np.int64)) != 1:
            return None
        return float(self.read(tensor).reshape(-1)[0])

    def is_output(self, tensor: Tensor) -> bool:
        """Whether the tensor is an output of this graph."""
        return any(o.name == tensor.name for o in self.ir.outputs)

    @staticmethod
    def producer(tensor: Tensor) -> Node | None:
        """The node that computes the tensor, None for inputs and constants."""
        return tensor.inputs[0] if len(tensor.inputs) else None

    @staticmethod
    def consumers(tensor: Tensor) -> list[Node]:
        """Nodes that read the tensor, each once; nodes inside If/Loop bodies included."""
        found: dict[int, Node] = {id(n): n for n in tensor.outputs}
        return list(found.values())

    @staticmethod
    def optional_input(node: Node, index: int) -> Tensor | None:
        """Input `index` of a node, None where the node omits it."""
        return node.inputs[index] if len(node.inputs) > index and node.inputs[index].name else None

    def only_consumer(self, tensor: Tensor) -> Node | None:
        """The one node that reads the tensor, None when there are several readers or it is a graph output."""
        users = self.consumers(tensor)
        return users[0] if len(users) == 1 and not self.is_output(tensor) else None

    def scope(self, node: Node) -> str:
        """The exporter's module path of the node ('encoder/layer.0/attention'), '' when it left none."""
        extra = self.extras.get(node.name)
        meta = extra.metadata if extra else {}
        scopes = meta.get("pkg.torch.onnx.name_scopes")
        if scopes:
            parts = [p.strip(" '\"[]") for p in scopes.split(",")]
            return str(parts[-2] if len(parts) > 1 else parts[-1]).replace(".", "/")
        return str(meta.get("namespace", "")).replace(".", "/")

    # ------------------------------------------------------------------ editing

    def constant(self, name: str, values: Array) -> Tensor:
        """A new stored tensor, of int4 and the like, too. Raises GraphError when the name is taken."""
        self._claim(name)
        stored = tensors.storable(name, np.asarray(values, order="C"))  # ascontiguousarray makes rank 0 rank 1
        self._made[name] = gs.Constant(name, stored)
        return self._made[name]

    def computed(self, name: str, dtype: Any, shape: Sequence[int], compute: Callable[[], Array]) -> Tensor:
        """A new stored tensor whose values `compute` gives each time they are read and once more as it is saved.

        They are never kept; `Shared` lets several tensors come from one computation. Raises GraphError when the name
        is taken, and on reading when the values are of another dtype or shape.
        """
        self._claim(name)
        self._made[name] = gs.Constant(name, Computed(name, np.dtype(dtype), shape, compute))
        return self._made[name]

    def shared_constant(self, name: str, values: Array) -> Tensor:
        """The constant of that name if it exists with the same values, else a new one."""
        known = self._made.get(name)
        if known is not None and np.array_equal(self.read(known), values):
            return known
        return self.constant(name, values)

    def has(self, name: str) -> bool:
        """Whether a tensor of that name exists."""
        return name in self._names

    def made(self, name: str) -> Tensor:
        """A tensor that a pass made, by its name. Raises KeyError."""
        return self._made[name]

    def variable(self, name: str, dtype: Any = None, shape: Sequence[int | str | None] | None = None) -> Tensor:
        """A new computed tensor. Raises GraphError when the name is taken."""
        self._claim(name)
        self._made[name] = gs.Variable(name, dtype=np.dtype(dtype) if dtype is not None else None,
                                       shape=list(shape) if shape is not None else None)
        return self._made[name]

    def like(self, tensor: Tensor, name: str, dtype: Any = None) -> Tensor:
        """A new computed tensor with the shape of another."""
        return self.variable(name, dtype if dtype is not None else dtype_of(tensor), shape_of(tensor))

    def add_node(self, op: str, name: str, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor],
                 attrs: dict[str, Any] | None = None, domain: str | None = None) -> Node:
        """Append a node; `sort` puts it in its place. None stands for an omitted optional input."""
        if name in self._node_names:
            raise GraphError(f"a node named {name!r} exists already; this is a bug in onnxq, please report it")
        node = gs.Node(op, name, dict(attrs or {}), [t if t is not None else gs.Variable.empty() for t in inputs],
                       list(outputs), domain)
        self.ir.nodes.append(node)
        self._node_names.add(name)
        return node

    def add_cast(self, name: str, tensor: Tensor, result: Tensor) -> Node:
        """Append a Cast to the type of `result`."""
        dtype = dtype_of(result)
        assert dtype is not None
        return self.add_node("Cast", name, [tensor], [result], {"to": type_number(dtype)})

    def add_reduction(self, op: str, name: str, tensor: Tensor, result: Tensor, axes: Sequence[int],
                      keepdims: bool) -> Node:
        """Append ReduceMin, ReduceMax or ReduceMean, whose axes are an attribute below opset 18 and an input from then.

        The axes are stored as `NAME.axes`.
        """
        attrs: dict[str, Any] = {"keepdims": int(keepdims)}
        if self.opset < 18:
            return self.add_node(op, name, [tensor], [result], {"axes": list(axes), **attrs})
        stored = self.constant(f"{name}.axes", np.asarray(axes, np.int64))
        return self.add_node(op, name, [tensor, stored], [result], attrs)

    def remove(self, node: Node) -> None:
        """Take a node out; its outputs keep their consumers, so rewire those first."""
        for inner in [node, *(n for g in self._bodies(node) for n in g.nodes)]:
            inner.inputs.clear()
            inner.outputs.clear()
        index = next(i for i, n in enumerate(self.ir.nodes) if n is node)
        del self.ir.nodes[index]
        self._node_names.discard(node.name)
        self.extras.pop(node.name, None)

    @staticmethod
    def replace_input(node: Node, index: int, tensor: Tensor) -> None:
        """Make input `index` of a node read another tensor; one past the last adds an input that was omitted."""
        if index == len(node.inputs):
            node.inputs.append(tensor)
        else:
            node.inputs[index] = tensor

    @staticmethod
    def set_output(node: Node, index: int, tensor: Tensor) -> None:
        """Make output `index` of a node write another tensor."""
        node.outputs[index] = tensor

    def set_result(self, index: int, tensor: Tensor) -> None:
        """Make another tensor output `index` of a body of If, Loop or Scan, whose outputs go by position."""
        self.ir.outputs[index] = tensor

    def redirect(self, old: Tensor, new: Tensor) -> None:
        """Let every reader of `old` read `new`; as a graph output `old` keeps its place and must not be redirected."""
        if self.is_output(old):
            raise GraphError(f"{old.name!r} is a graph output and can't be redirected; this is a bug in onnxq")
        for user in self.consumers(old):
            for index, tensor in enumerate(user.inputs):
                if tensor is old:
                    user.inputs[index] = new

    def bypass(self, node: Node) -> None:
        """Remove a node of one output, letting its readers (or the graph output) take its first input instead."""
        source, result = node.inputs[0], node.outputs[0]
        if not self.is_output(result):
            self.redirect(result, source)
            self.remove(node)
            self._names.discard(result.name)
            return
        producer = self.producer(source)
        if producer is None or self.is_output(source):
            return  # input or constant straight to an output: the node carries the name
        index = next(i for i, t in enumerate(producer.outputs) if t is source)
        self.remove(node)
        for user in self.consumers(source):
            for k, tensor in enumerate(user.inputs):
                if tensor is source:
                    user.inputs[k] = result
        producer.outputs[index] = result

    def sort(self) -> None:
        """Bring nodes into execution order, keeping the present order where it is one. Raises GraphError on a cycle."""
        self.ir.nodes[:] = in_order(self.ir.nodes, self.reads)

    def prune(self) -> bool:
        """Drop nodes whose results nobody reads; whether any was dropped."""
        before = len(self.ir.nodes)
        wanted = {t.name for t in self.ir.outputs}
        changed = True
        while changed:
            changed = False
            for node in reversed(list(self.ir.nodes)):
                if all(not len(t.outputs) and t.name not in wanted for t in node.outputs):
                    self.remove(node)
                    changed = True
        return len(self.ir.nodes) < before

    def evaluate(self, node: Node) -> list[Array]:
        """Outputs of a node whose inputs are all constant, by onnx's reference implementation.

        Raises NotImplementedError or any error of the operator where the reference can't run it.
        """
        if node.name in self.extras and self.extras[node.name].attributes:
            raise NotImplementedError("it has attributes that only the runtime understands")
        proto = gs.exporters.onnx_exporter.OnnxExporter.export_node(node)
        feeds = {t.name: np.asarray(self.read(t)) for t in node.inputs if t.name}
        graph = onnx.helper.make_graph(
            [proto], "fold", [onnx.helper.make_empty_tensor_value_info(n) for n in feeds],
            [onnx.helper.make_empty_tensor_value_info(t.name) for t in node.outputs])
        model = onnx.helper.make_model(graph, opset_imports=list(self.ir.import_domains))
        values = ReferenceEvaluator(model).run(None, feeds)
        if not all(isinstance(v, (np.ndarray, np.generic)) for v in values):
            raise NotImplementedError("its result is no tensor")
        return [np.asarray(v) for v in values]

    def copy(self) -> Graph:
        """An independent graph that shares the weights' storage."""
        ir = self.ir.copy()
        ir.import_domains = list(self.ir.import_domains)  # exporting adds to it
        ir.producer_name, ir.producer_version = self.ir.producer_name, self.ir.producer_version
        twin = Graph(ir, self.folder, dict(self.metadata), dict(self.extras), self.annotations, header=self.header)
        outer: dict[str, Tensor] = {}  # the library gives each body a copy of the weights that it captures
        for node, _ in twin.walk():
            for index, tensor in enumerate(node.inputs):
                if is_constant(tensor) and outer.setdefault(tensor.name, tensor) is not tensor:
                    node.inputs[index] = outer[tensor.name]
        twin.inherit(self)
        return twin

    def inherit(self, other: Graph) -> None:
        """Know what another graph of the same tensors knows of what passes did to them."""
        self.half = other.half
        self._made = {t.name: t for t in self._tensors() if t.name in other._made}

    def check(self) -> list[str]:
        """Structural faults: a tensor read before it is made, made twice, or a node name used twice."""
        faults: list[str] = []
        known = {t.name for t in self.ir.inputs}
        seen: set[str] = set()
        for node in self.ir.nodes:
            if node.name in seen:
                faults.append(f"two nodes are named {node.name!r}")
            seen.add(node.name)
            for t in self.reads(node):
                if t.name and not is_constant(t) and t.name not in known:
                    faults.append(f"{node.name} reads {t.name!r} before it is made")
            for t in node.outputs:
                if t.name and t.name in known:
                    faults.append(f"{t.name!r} is made twice")
                known.add(t.name)
        faults += [f"output {t.name!r} is never made" for t in self.ir.outputs
                   if t.name not in known and not is_constant(t)]
        return faults

    # ------------------------------------------------------------------ inside

    @staticmethod
    def _with_subgraphs(ir: gs.Graph) -> Iterator[gs.Graph]:
        yield ir
        for node in ir.nodes:
            yield from Graph._bodies(node)

    @staticmethod
    def _bodies(node: Node) -> Iterator[gs.Graph]:
        """Bodies of a node and of the nodes in them."""
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from Graph._with_subgraphs(value)

    @staticmethod
    def _local_names(ir: gs.Graph) -> Iterator[str]:
        for t in [*ir.inputs, *ir.outputs]:
            yield t.name
        for node in ir.nodes:
            for t in [*node.inputs, *node.outputs]:
                yield t.name

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.ir.inputs
        for node in self.ir.nodes:
            yield from node.inputs
            yield from node.outputs

    def reads(self, node: Node) -> Iterator[Tensor]:
        """Inputs of a node and the outer tensors that its bodies capture."""
        yield from node.inputs
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                made = {t.name for n in value.nodes for t in n.outputs} | {t.name for t in value.inputs}
                body = Graph(value, self.folder)
                for inner in value.nodes:
                    yield from (t for t in body.reads(inner) if t.name not in made)

    def _claim(self, name: str) -> None:
        if name in self._names:
            raise GraphError(f"a tensor named {name!r} exists already; rename it in the model")
        self._names.add(name)
