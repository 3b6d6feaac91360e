"""Groups of channels that can be taken out of a network together, from a layer that reads them."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import numpy.typing as npt

from onnxq.graph import Graph, Node, Tensor, is_constant, shape_of
from onnxq.passes.absorbing import unused
from onnxq.passes.channel_rules import RULES
from onnxq.passes.channels import Family, Ids, Mark, Part, Walk


def family(graph: Graph, layer: Node, grouped: bool = False) -> Family | None:
    """Those of what a Conv, MatMul or Gemm with a stored weight reads; `grouped` as for Walk.

    None where the sizes of what it reads are not known. Groups of which something is not understood are fixed, with
    the reason; where all are, the walk ends early and not all else is found.
    """
    tensor, weight, dims = layer.inputs[0], shape_of(layer.inputs[1]) or (), shape_of(layer.inputs[0])
    rank = len(weight) if layer.op in ("Conv", "Gemm") else len(dims or ())
    axis = 1 if layer.op == "Conv" else rank - 1
    count = weight[1 if layer.op == "Conv" else 0] if len(weight) > 1 else None
    if rank < 2 or not isinstance(count, int):
        return None
    walk = Walk(graph, grouped)
    walk.meet(tensor, rank, Part(axis, walk.groups.more(count)))
    inside = {id(n) for n in graph.nodes}
    while walk.waiting and not walk.over:
        _around(walk, walk.waiting.pop(0), inside)
    return walk.result() if walk.marks else None


def _around(walk: Walk, mark: Mark, inside: set[int]) -> None:
    """Go on to what makes a tensor, and to all that reads it."""
    graph, tensor = walk.graph, mark.tensor
    maker = graph.producer(tensor)
    if graph.is_output(tensor) or maker is None:
        walk.keep(mark.ids, f"{tensor.name!r} is an {'output' if graph.is_output(tensor) else 'input'} of the model")
    if maker is not None:
        _step(walk, maker, mark, None, inside)
    for node in graph.consumers(tensor):
        for k, one in enumerate(node.inputs):
            if one is tensor:
                _step(walk, node, mark, k, inside)


def _step(walk: Walk, node: Node, mark: Mark, at: int | None, inside: set[int]) -> None:
    rule = RULES.get(node.op) if not node.domain or node.op == "RotaryEmbedding" else None
    more = len([t for t in node.outputs if t.name]) > 1 and node.op != "Split"
    if rule is None or more or id(node) not in inside:
        why: str | None = "what it does with channels is not known"
    else:
        why = rule(walk, node, mark, at)
    if why is not None:
        does = "makes" if at is None else "reads"
        walk.keep(mark.ids, f"{node.op} {node.name} {does} {mark.tensor.name!r}: {why}")


def keep(graph: Graph, found: Family, kept: Ids, suffix: str) -> None:
    """Leave the groups `kept`, int64 [G'], and take all others out of the graph; readers' weights stay as they are."""
    stays = np.zeros(found.count, bool)
    stays[kept] = True
    _select(graph, found, lambda ids: np.flatnonzero(stays[ids]), suffix)


def widen(graph: Graph, found: Family, source: Ids, suffix: str) -> None:
    """Channel c of what is made with a `plain` family becomes source[c] of it, `source` int64 [C']: some are repeated.
    """
    _select(graph, found, lambda ids: np.argsort(ids)[source], suffix)


def plain(graph: Graph, layers: Collection[str], channels: int) -> Family | None:
    """The family of `channels` that `layers` alone read, where all can be repeated: each stands for itself in all that
    is made with it. None where that is not so."""
    first = next((n for n in graph.nodes if n.name in layers), None)
    found = family(graph, first) if first is not None else None
    if found is None or found.fixed or found.count != channels or set(found.readers) != set(layers):
        return None
    parts = [*found.tensors.values(), *found.constants.values()]
    alone = all(len(part.ids) == np.unique(part.ids).size == channels for part in parts)
    return found if alone and found.constants and not found.sizes else None


def _select(graph: Graph, found: Family, slices: Callable[[Ids], Ids], suffix: str) -> None:
    """Leave, of each axis, the slices that are chosen by the groups that they belong to."""
    nodes, made = {n.name: n for n in graph.nodes}, dict[tuple[str, bytes], Tensor]()
    for (name, index), part in found.constants.items():
        chosen, old = slices(part.ids), nodes[name].inputs[index]
        if np.array_equal(chosen, np.arange(len(part.ids))):
            continue
        key = old.name, chosen.tobytes() + bytes([part.axis])
        if key not in made:
            values = np.ascontiguousarray(np.asarray(graph.read(old)).take(chosen, part.axis))
            made[key] = graph.constant(unused(graph, old.name, suffix), values)
        graph.replace_input(nodes[name], index, made[key])
    for (name, index, place), ids in found.sizes.items():
        _resize(graph, nodes[name], index, place, slices(ids).size, suffix)
    for tensor in (t for n in nodes.values() for t in n.outputs if t.name in found.tensors):
        part = found.tensors[tensor.name]
        if tensor.shape is not None and not part.runs:
            tensor.shape = [*tensor.shape[: part.axis], slices(part.ids).size, *tensor.shape[part.axis + 1 :]]
    for name in found.depthwise:
        nodes[name].attrs["group"] = slices(found.constants[name, 1].ids).size


def _resize(graph: Graph, node: Node, index: int, place: int, size: int, suffix: str) -> None:
    """Put a size into a list of them that a node reads."""
    old = node.inputs[index]
    name = unused(graph, f"{node.name}.sizes", suffix)
    if is_constant(old):
        values = np.array(graph.read(old))
        values[place] = size
        graph.replace_input(node, index, graph.constant(name, values))
        return
    joins = graph.producer(old)
    assert joins is not None
    whole = graph.like(old, name)
    entry = graph.constant(unused(graph, f"{node.name}.size", suffix), np.array([size], np.int64))
    inputs = [*joins.inputs[:place], entry, *joins.inputs[place + 1 :]]
    graph.add_node("Concat", f"{node.name}/sizes{suffix}", inputs, [whole], dict(joins.attrs))
    graph.replace_input(node, index, whole)
    graph.sort()


def readers_of(found: Family, graph: Graph) -> list[tuple[Node, Ids]]:
    """Layers that read the groups, in execution order, with the group of each of their channels."""
    return [(node, found.readers[node.name]) for node in graph.nodes if node.name in found.readers]


def fits(found: Family | None, count: int, kept: npt.NDArray[np.int64], layers: Collection[str]) -> bool:
    """Whether a family has `count` groups, and no others than `layers` read some that are not among those `kept`."""
    if found is None or found.count != count or not set(layers) <= set(found.readers):
        return False
    stays = np.zeros(count, bool)
    stays[kept] = True
    return all(name in layers or stays[ids].all() for name, ids in found.readers.items())
