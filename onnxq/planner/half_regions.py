"""Regions of a float32 graph that have to stay float32 as a whole: see halving."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from onnxq.graph import FLOAT32, HALF, Graph, Node, Tensor, dtype_of, is_constant, shape_of
from onnxq.planner import composites

Found = Iterator[tuple[Node, str]]

_MOST = 24  # nodes of a region
_INTEGERS = "biu"
_SQUARES = ", whose squares pass float16's range"

# operators that hand numbers on as they are
MOVES = frozenset({
    "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape",
    "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
})
_ELEMENTWISE = frozenset({
    "Abs", "Add", "Ceil", "Clip", "Div", "Floor", "Log", "Max", "Min", "Mod", "Mul", "Neg", "Pow", "Reciprocal",
    "Round", "Sqrt", "Sub",
})
_REDUCE = frozenset({"ReduceMean", "ReduceSum"})
_COMPARES = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})


def find(graph: Graph) -> Found:
    """Each node of such a region of one graph, bodies excluded, and why; the first reason for a node counts."""
    for look in (_normalisations, _roots, _exponentials, _whole_numbers):
        yield from look(graph)


def _normalisations(graph: Graph) -> Found:
    """Those spelled out in small operators."""
    labels = composites.find(graph)
    for node in graph.nodes:
        if labels.get(node.name) in ("LayerNorm", "RMSNorm"):
            yield node, f"part of a {labels[node.name]}{_SQUARES}"


def ends(graph: Graph, wide: Mapping[str, str], keep_ports: bool) -> Iterator[str]:
    """Names of the scales and shifts at the end of normalisations that are float16 again.

    onnxruntime 1.32 fuses a LayerNormalization of what is read behind a Cast that nothing else reads, and of scale and
    shift in their types: it then refuses one of two types. So they are float16 where there will be such a Cast, and
    float32 where there won't. Source: its layer_norm_fusion.cc.
    """
    for core in graph.nodes:
        reason = wide.get(core.name, "")
        if core.op not in ("Div", "Mul") or not reason.endswith(_SQUARES) or any(is_constant(t) for t in core.inputs):
            continue
        chain, last = [], core
        for op in ("Mul", "Add"):
            user = graph.only_consumer(last.outputs[0])
            if user is None or user.op != op or wide.get(user.name) != reason or not _has_vector(graph, user):
                break
            chain.append(user)
            last = user
        if "LayerNorm" not in reason or _is_cast_alone(graph, core, wide, keep_ports):
            yield from (node.name for node in chain)


def _has_vector(graph: Graph, node: Node) -> bool:
    return any(is_constant(t) and graph.scalar(t) is None for t in node.inputs)


def _is_cast_alone(graph: Graph, core: Node, wide: Mapping[str, str], keep_ports: bool) -> bool:
    """Whether what a LayerNorm reads becomes float16, and its mean and difference alone read it as float32."""
    centred = graph.producer(core.inputs[0])
    if centred is None or centred.op != "Sub":
        return False
    source = centred.inputs[0]
    maker = graph.producer(source)
    half = not keep_ports
    if maker is not None:
        half = dtype_of(maker.inputs[0]) == HALF[0] if maker.op == "Cast" else maker.name not in wide
    users = [user.op for user in graph.consumers(source) if user.name in wide]
    listed = keep_ports and graph.is_output(source)  # whose Cast is an output
    return half and not listed and sorted(users) in (["ReduceMean", "Sub"], ["ReduceMean", "Sub", "Sub"])


def _roots(graph: Graph) -> Found:
    """From squares to the root of their sum."""
    for root in graph.nodes:
        if root.domain or not (root.op == "Sqrt" or (root.op == "Pow" and graph.scalar(root.inputs[1]) in (0.5, -0.5))):
            continue
        above = list(_upward(graph, root, _ELEMENTWISE | MOVES | _REDUCE))
        if any(_is_square(graph, n) for n in above):
            inside = _until_squares(graph, above, root)
            for node in (root, *inside):
                yield node, "part of a root of squares, which pass float16's range"


def _is_square(graph: Graph, node: Node) -> bool:
    return (node.op == "Mul" and node.inputs[0].name == node.inputs[1].name) or (
        node.op == "Pow" and graph.scalar(node.inputs[1]) == 2)


def _exponentials(graph: Graph) -> Found:
    """From Exp to where its result is divided, or its logarithm is taken: a Softmax, Sigmoid or Softplus spelled out.

    Alone, Exp gives in float16 what it gives in float32, rounded.
    """
    through = frozenset({"Add", "Expand", "Mul", "ReduceSum", "Reshape", "Squeeze", "Sub", "Unsqueeze"})
    for start in graph.nodes:
        if start.op != "Exp" or start.domain:
            continue
        inside, frontier, ends = {start.name: start}, [start], False
        while frontier and len(inside) < _MOST:
            for user in graph.consumers(frontier.pop().outputs[0]):
                closes = user.op in ("Div", "Log", "Reciprocal")
                if user.domain or user.name in inside or not (closes or user.op in through):
                    continue
                inside[user.name] = user
                ends |= closes
                frontier += [] if closes else [user]
        for node in inside.values() if ends else ():
            yield node, "part of a sum of exponentials, which pass float16's range"


def _whole_numbers(graph: Graph) -> Found:
    """From whole numbers, such as positions, to angles, to whole numbers or to what these are compared with: float16
    counts to 2048."""
    for anchor in graph.nodes:
        angle = anchor.op in ("Cos", "Sin")
        rounded = (anchor.op in _COMPARES or (anchor.op == "Cast" and _integer(anchor.outputs[0]))) and (
            dtype_of(anchor.inputs[0]) == FLOAT32)
        if anchor.domain or not (angle or rounded):
            continue
        through = _ELEMENTWISE | MOVES | {"Cast", "Range"} | ({"MatMul"} if angle else set())
        above = [n for n in _upward(graph, anchor, through) if n.op != "MatMul" or not _multiplies_stored(n)]
        starts = {t.name for t in graph.inputs if len(shape_of(t) or (0, 0)) < 2}  # of times, say
        if not any(_counts(n) or any(t.name in starts for t in n.inputs) for n in (anchor, *above)):
            continue
        what = "angles" if angle else "whole numbers"
        for node in (anchor, *above):
            yield node, f"part of {what} that follow from whole numbers, of which float16 has few"


def _counts(node: Node) -> bool:
    return node.op == "Range" or (node.op == "Cast" and _integer(node.inputs[0]))


def _integer(tensor: Tensor) -> bool:
    dtype = dtype_of(tensor)
    return dtype is not None and dtype.kind in _INTEGERS


def _multiplies_stored(node: Node) -> bool:
    return any(is_constant(t) and math.prod(int(d or 0) for d in shape_of(t) or ()) > 1024 for t in node.inputs)


def _upward(graph: Graph, anchor: Node, through: Collection[str]) -> Iterator[Node]:
    """Nodes of these operators that compute float32 inputs of the anchor, nearest first."""
    seen, frontier = {anchor.name}, [anchor]
    while frontier and len(seen) < _MOST:
        for tensor in frontier.pop(0).inputs:
            above = graph.producer(tensor)
            if above is None or above.name in seen or above.domain or above.op not in through:
                continue
            if dtype_of(tensor) not in (None, FLOAT32):
                continue
            seen.add(above.name)
            frontier.append(above)
            yield above


def _until_squares(graph: Graph, above: Sequence[Node], root: Node) -> list[Node]:
    """Those of `above` from which the root is reached without passing a square, and the squares."""
    kept, wanted = [], {t.name for t in root.inputs}
    for node in above:  # nearest first
        if any(t.name in wanted for t in node.outputs):
            kept.append(node)
            wanted |= set() if _is_square(graph, node) else {t.name for t in node.inputs}
    return kept
