"""Normalisations and activations that an exporter spelled out in small operators, recognised so that they stay whole.

LayerNorm and RMSNorm are anchored at their square root, Gelu at its Erf or Tanh. What is found is a label per node.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnxq.graph import Graph, Node, Tensor, is_constant

_REDUCE = frozenset({"ReduceMean", "ReduceSum"})
_NORM_UP = _REDUCE | {"Add", "Cast", "Div", "Expand", "Max", "Mul", "Pow", "Reshape", "Squeeze", "Sub", "Unsqueeze"}
_NORM_DOWN = frozenset({"Add", "Cast", "Div", "Expand", "Mul", "Reciprocal", "Reshape", "Sub"})
_DEPTH = 10


def find(graph: Graph) -> dict[str, str]:
    """Node name -> 'LayerNorm', 'RMSNorm' or 'Gelu' for every node that is part of a spelled-out one."""
    labels: dict[str, str] = {}
    for node in graph.nodes:
        if node.domain:
            continue
        if node.op == "Sqrt" or (node.op == "Pow" and graph.scalar(node.inputs[1]) in (0.5, -0.5)):
            labels.update(_norm(node, graph))
        elif node.op in ("Erf", "Tanh"):
            labels.update(_gelu(node, graph))
    return labels


def _norm(root: Node, graph: Graph) -> dict[str, str]:
    above = list(_upstream(root, graph, _NORM_UP))
    reduces = [n for n in above if n.op in _REDUCE]
    sources = {_reduced(n, graph).name for n in reduces}
    if not reduces or len(sources) != 1:
        return {}
    source = sources.pop()
    centred = any(n.op == "Sub" for n in above)
    members = {n.name for n in above if _depends(n, source, graph)} | {root.name}
    for node in _downstream(root, graph, source, members):
        members.add(node.name)
    return dict.fromkeys(members, "LayerNorm" if centred else "RMSNorm")


def _reduced(node: Node, graph: Graph) -> Tensor:
    """The tensor whose mean or variance this reduction takes: x in mean(x), mean(x * x), mean((x - m) ** 2)."""
    tensor = node.inputs[0]
    square = graph.producer(tensor)
    if square is None or not (
            (square.op == "Mul" and square.inputs[0].name == square.inputs[1].name)
            or (square.op == "Pow" and graph.scalar(square.inputs[1]) == 2)):
        return tensor
    tensor = square.inputs[0]
    centre = graph.producer(tensor)
    return centre.inputs[0] if centre is not None and centre.op == "Sub" else tensor


def _upstream(root: Node, graph: Graph, ops: frozenset[str] | set[str]) -> Iterator[Node]:
    seen, frontier = {root.name}, [(root, 0)]
    while frontier:
        node, depth = frontier.pop()
        for tensor in node.inputs:
            above = graph.producer(tensor)
            if above is None or above.name in seen or above.op not in ops or above.domain or depth >= _DEPTH:
                continue
            seen.add(above.name)
            yield above
            # a mean is where a norm begins; looking past it, only its square and centring belong to it
            if above.op not in _REDUCE:
                frontier.append((above, depth + 1))
            else:
                frontier += [(n, depth + 1) for n in _square(above, graph, seen)]


def _square(reduce: Node, graph: Graph, seen: set[str]) -> Iterator[Node]:
    square = graph.producer(reduce.inputs[0])
    if square is not None and square.op in ("Mul", "Pow") and _reduced(reduce, graph) is not reduce.inputs[0]:
        centre = graph.producer(square.inputs[0])
        if centre is not None and centre.op == "Sub":
            yield square


def _depends(node: Node, source: str, graph: Graph, depth: int = _DEPTH) -> bool:
    """Whether the node computes from the tensor named `source`."""
    if any(t.name == source for t in node.inputs):
        return True
    above = [graph.producer(t) for t in node.inputs]
    return depth > 0 and any(a is not None and a.op in _NORM_UP and _depends(a, source, graph, depth - 1)
                             for a in above)


def _downstream(root: Node, graph: Graph, source: str, members: set[str]) -> Iterator[Node]:
    """Elementwise nodes behind the root whose other inputs are constant, the source, or the norm's own."""
    inside, frontier = set(members), [root]
    waiting = [n for n in graph.nodes if n.name in members]
    frontier += waiting
    while frontier:
        node = frontier.pop()
        for tensor in node.outputs:
            for user in graph.consumers(tensor):
                if user.name in inside or user.op not in _NORM_DOWN | {"Sub"} or user.domain:
                    continue
                if all(is_constant(t) or t.name == source or _made_by(t, inside, graph) for t in user.inputs):
                    inside.add(user.name)
                    frontier.append(user)
                    yield user


def _made_by(tensor: Tensor, names: set[str], graph: Graph) -> bool:
    producer = graph.producer(tensor)
    return producer is not None and producer.name in names


def _gelu(anchor: Node, graph: Graph) -> dict[str, str]:
    above = list(_upstream(anchor, graph, {"Add", "Cast", "Div", "Mul", "Pow"}))[:6]
    read = {t.name for n in [anchor, *above] for t in n.inputs if not is_constant(t)}
    members, node = [anchor.name], anchor
    for _ in range(4):
        user = graph.only_consumer(node.outputs[0])
        if user is None or user.op not in ("Add", "Mul"):
            break
        members.append(user.name)
        others = [t for t in user.inputs if t is not node.outputs[0] and not is_constant(t)]
        closing = user.op == "Mul" and any(t.name in read for t in others)
        halved = [t for t in others if _half_of(t, read, graph)]
        node = user
        if closing or halved:
            after = graph.only_consumer(node.outputs[0])
            if after is not None and after.op == "Mul" and any(graph.scalar(t) == 0.5 for t in after.inputs):
                members.append(after.name)
            members += [p.name for t in halved if (p := graph.producer(t)) is not None]
            source = {t.name for t in others} & read
            inner = [n.name for n in above if not source or _depends(n, next(iter(source)), graph)]
            return dict.fromkeys([*members, *inner], "Gelu")
    return {}


def _half_of(tensor: Tensor, read: set[str], graph: Graph) -> bool:
    producer = graph.producer(tensor)
    return (producer is not None and producer.op == "Mul" and any(graph.scalar(t) == 0.5 for t in producer.inputs)
            and any(t.name in read for t in producer.inputs))
