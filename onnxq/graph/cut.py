"""Parts of a graph as graphs of their own: what a kernel is timed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from onnxq.graph.graph import Graph, Tensor
from onnxq.graph.tensors import Array, dtype_of, is_constant, nbytes, shape_of, storable


@dataclass(frozen=True)
class Codes:
    """An input that takes codes in place of floats: its name, and scale and zero point of the codes."""

    name: str
    scale: Array
    zero_point: Array


_WORTH_COPYING = 1024  # bytes; smaller constants stay in the cache whatever is read besides


def cut(graph: Graph, names: Sequence[str], values: Mapping[str, Array]) -> Graph:
    """The nodes of these names, bodies excluded, as a graph that shares the weights' storage.

    What they read and none of them makes becomes its inputs, in order; what they make and something else reads, its
    outputs. Tensors keep their names and shapes; where those or the type are unknown, they are taken from `values`,
    one array per input.
    """
    wanted = set(names)
    nodes = [n for n in graph.ir.nodes if n.name in wanted]
    made = {t.name for n in nodes for t in n.outputs}
    copies: dict[str, Tensor] = {}
    inputs: list[Tensor] = []
    for tensor in (t for n in nodes for t in n.inputs):
        if tensor.name and tensor.name not in made and tensor.name not in copies and not is_constant(tensor):
            inputs.append(_typed(tensor.copy(), values.get(tensor.name)))
            copies[tensor.name] = inputs[-1]

    def copied(tensor: Tensor) -> Tensor:
        return copies.setdefault(tensor.name, tensor.copy()) if tensor.name else gs.Variable.empty()

    clones = [gs.Node(n.op, n.name, dict(n.attrs), [copied(t) for t in n.inputs], [copied(t) for t in n.outputs],
                      n.domain) for n in nodes]
    outputs = [copies[t.name] for n in nodes for t in n.outputs if t.name and (
        graph.is_output(t) or any(user.name not in wanted for user in graph.consumers(t)))]
    ir = gs.Graph(clones, inputs, outputs, name="cut", opset=graph.opset,
                  import_domains=list(graph.ir.import_domains or ()))
    extras = {name: graph.extras[name] for name in wanted if name in graph.extras}
    return Graph(ir, graph.folder, extras=extras)


def up_to(graph: Graph, names: Sequence[str]) -> Graph:
    """What computes the named tensors, as a graph of its own that shares the weights' storage."""
    copy = graph.copy()
    made = {t.name: t for n in copy.ir.nodes for t in n.outputs}
    copy.ir.outputs = [made[name] for name in dict.fromkeys(names)]
    copy.prune()
    return copy


def _typed(tensor: Tensor, values: Array | None) -> Tensor:
    if values is not None and dtype_of(tensor) is None:
        tensor.dtype = values.dtype
    if values is not None and shape_of(tensor) is None:
        tensor.shape = [None] * values.ndim
    return tensor


def expose_codes(graph: Graph) -> dict[str, Codes]:
    """Let callers feed and take codes: QuantizeLinear that alone reads an input goes, DequantizeLinear at the end, too.

    Gives for each input that is codes now, by its old name, the new one with its scale and zero point.
    """
    found: dict[str, Codes] = {}
    for index, tensor in enumerate(list(graph.ir.inputs)):
        quantize = graph.only_consumer(tensor)
        if quantize is not None and quantize.op == "QuantizeLinear":
            codes, (scale, zero_point) = quantize.outputs[0], (graph.read(t) for t in quantize.inputs[1:])
            graph.remove(quantize)
            graph.ir.inputs[index] = codes
            found[tensor.name] = Codes(codes.name, scale, zero_point)
    for index, tensor in enumerate(list(graph.ir.outputs)):
        decode = graph.producer(tensor)
        if decode is not None and decode.op == "DequantizeLinear" and not is_constant(decode.inputs[0]):
            codes = decode.inputs[0]
            if all(codes.name != t.name for t in graph.ir.inputs):
                graph.remove(decode)
                graph.ir.outputs[index] = codes
    graph.sort()
    return found


def alone(op: str, inputs: Sequence[Array], outputs: Sequence[Any], attrs: Mapping[str, Any] | None = None,
          constants: Sequence[Array] = ()) -> Graph:
    """One node as a graph of opset 13: inputs `x0`, `x1` .. like these arrays, constants; outputs of these dtypes."""
    graph = Graph(gs.Graph(opset=13), Path())
    read = [graph.variable(f"x{k}", a.dtype, a.shape) for k, a in enumerate(inputs)]
    made = [graph.variable(f"y{k}", dtype) for k, dtype in enumerate(outputs)]
    stored = [graph.constant(f"c{k}", a) for k, a in enumerate(constants)]
    graph.add_node(op, "node", [*read, *stored], made, dict(attrs or {}))
    graph.ir.inputs, graph.ir.outputs = read, made
    return graph


def weight_bytes(graph: Graph) -> int:
    """Bytes of the constants that the nodes of a graph read."""
    return sum(nbytes(t) for t in {t.name: t for n in graph.ir.nodes for t in n.inputs if is_constant(t)}.values())


def repeat(graph: Graph, times: int) -> None:
    """Compute everything `times` over, each time with weights of its own, so that they don't all stay in the cache.

    Only the first result of each output is an output; the others are added as outputs, or the runtime would drop them.
    """
    inputs = {t.name for t in graph.ir.inputs}
    nodes, outputs = list(graph.ir.nodes), list(graph.ir.outputs)
    for number in range(1, times):
        copies: dict[str, Any] = {}

        def copied(tensor: Tensor, copies: dict[str, Any] = copies, number: int = number) -> Tensor:
            if tensor.name in inputs or not tensor.name or (is_constant(tensor) and nbytes(tensor) < _WORTH_COPYING):
                return tensor
            name = f"{tensor.name}#{number}"
            if tensor.name not in copies and is_constant(tensor):
                # a twin of the values, too: twins of one constant would share its name
                copies[tensor.name] = gs.Constant(name, storable(name, graph.read(tensor)))
            elif tensor.name not in copies:
                copies[tensor.name] = gs.Variable(name, tensor.dtype, tensor.shape)
            return copies[tensor.name]

        for node in nodes:
            graph.ir.nodes.append(gs.Node(node.op, f"{node.name}#{number}", dict(node.attrs),
                                          [copied(t) for t in node.inputs], [copied(t) for t in node.outputs],
                                          node.domain))
        graph.ir.outputs.extend(copied(t) for t in outputs)
