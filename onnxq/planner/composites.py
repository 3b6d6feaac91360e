"""Normalisations and activations that an exporter spelled out in small operators, recognised so that they stay whole.

LayerNorm and RMSNorm are anchored at their square root, Gelu at its Erf or Tanh. From the anchor, everything back to
the tensor that is normalised or activated is a member, and so is what finishes the formula behind it. What is found is
a label per node; a graph that deviates from the formulas gets none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onnxq.graph import Graph, Node, Tensor, is_constant

_REDUCE = frozenset({"ReduceMean", "ReduceSum"})
_NORM_UP = _REDUCE | {"Add", "Cast", "Div", "Expand", "Max", "Mul", "Pow", "Reshape", "Squeeze", "Sub", "Unsqueeze"}
_NORM_DOWN = frozenset({"Add", "Cast", "Div", "Expand", "Mul", "Reciprocal", "Reshape", "Sub"})
_GELU_UP = frozenset({"Add", "Cast", "Div", "Mul", "Pow"})
_FIRST = _REDUCE | {"Expand", "Reshape", "Squeeze", "Unsqueeze"}  # their other inputs are shapes and axes
_MOST = 16  # nodes between what is normalised and the anchor


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


def normalises_rows(graph: Graph) -> bool:
    """Whether the model brings rows of features to one size anywhere, by LayerNorm, RMSNorm or the like."""
    whole = any(node.op.endswith(("LayerNormalization", "RMSNormalization")) for node in graph.nodes)
    return whole or any(label != "Gelu" for label in find(graph).values())


def _between(source: Tensor, anchor: Node, ops: frozenset[str], graph: Graph) -> list[Node] | None:
    """Nodes that compute the anchor's inputs from the source.

    None when an operator that is not in `ops` is among them, when another computed tensor comes in, or when the source
    has no part in it.
    """
    found: dict[str, Node] = {}
    frontier, reached = [anchor], False
    while frontier:
        for tensor in _data(frontier.pop()):
            if tensor.name == source.name:
                reached = True
                continue
            above = graph.producer(tensor)
            if above is None and (is_constant(tensor) or not tensor.name):
                continue
            if above is None or above.op not in ops or above.domain or len(found) == _MOST:
                return None
            if above.name not in found:
                found[above.name] = above
                frontier.append(above)
    return list(found.values()) if reached else None


def _data(node: Node) -> Sequence[Tensor]:
    """Inputs that carry values; those that carry a shape or axes are left out."""
    return [t for t in (node.inputs[:1] if node.op in _FIRST else node.inputs) if t.name]


# ------------------------------------------------------------------ LayerNorm, RMSNorm


def _norm(root: Node, graph: Graph) -> dict[str, str]:
    """x / sqrt(mean(x * x) + eps) * gamma, and the same of x - mean(x) with beta added; gamma and beta are optional."""
    for source in _normalised(root, graph):
        above = _between(source, root, _NORM_UP, graph)
        if above is not None:
            label = "LayerNorm" if any(n.op == "Sub" for n in above) else "RMSNorm"
            return dict.fromkeys((n.name for n in (root, *above, *_finish(root, above, source, graph))), label)
    return {}


def _normalised(root: Node, graph: Graph) -> Iterator[Tensor]:
    """What may be normalised: x of a mean(x * x) or mean((x - m) ** 2) above the root, before a Cast first."""
    frontier = [root]
    for _ in range(_MOST):
        above = [p for t in _data(frontier[0]) if (p := graph.producer(t)) is not None and p.op in _NORM_UP]
        frontier = [*frontier[1:], *(n for n in above if n.op not in _REDUCE)]
        for reduce in above:
            square = graph.producer(reduce.inputs[0]) if reduce.op in _REDUCE else None
            if square is None or not _is_square(square, graph):
                continue
            centre = graph.producer(square.inputs[0])
            source = centre.inputs[0] if centre is not None and centre.op == "Sub" else square.inputs[0]
            cast = graph.producer(source)
            if cast is not None and cast.op == "Cast":
                yield cast.inputs[0]
            yield source
        if not frontier:
            return


def _is_square(node: Node, graph: Graph) -> bool:
    return (node.op == "Mul" and node.inputs[0].name == node.inputs[1].name) or (
        node.op == "Pow" and graph.scalar(node.inputs[1]) == 2)


def _finish(root: Node, above: list[Node], source: Tensor, graph: Graph) -> list[Node]:
    """Elementwise nodes behind the root that read only the norm's own results, the source and constants.

    One Mul by a constant is gamma, one Add of a constant is beta and the end; more of them belong to something else, as
    does an Add of the source itself. What is made beside the root (a second x - mean) counts when it is read behind it.
    """
    own = {root.name, *(n.name for n in above)}
    behind, beside, gammas = {root.name: root}, dict[str, Node](), 0
    frontier = [root, *above]
    while frontier:
        for user in graph.consumers(frontier.pop(0).outputs[0]):
            makers = [graph.producer(t) for t in _data(user) if not is_constant(t) and t.name != source.name]
            if user.name in own or user.op not in _NORM_DOWN or user.domain or not all(
                    m is not None and m.name in own for m in makers):
                continue
            after = any(m is not None and m.name in behind for m in makers)
            constant = is_constant(user.inputs[-1]) or (user.op in ("Add", "Mul") and is_constant(user.inputs[0]))
            scales = after and constant and user.op in ("Mul", "Div")
            if (scales and gammas) or (user.op == "Add" and any(t.name == source.name for t in user.inputs)):
                continue
            gammas += scales
            own.add(user.name)
            (behind if after else beside)[user.name] = user
            if not (after and constant and user.op == "Add"):
                frontier.append(user)
    for node in reversed(list(beside.values())):
        if any(user.name in behind for user in graph.consumers(node.outputs[0])):
            behind[node.name] = node
    return list(behind.values())


# ------------------------------------------------------------------ Gelu


def _gelu(anchor: Node, graph: Graph) -> dict[str, str]:
    """x / 2 * (1 + erf(..)) or x / 2 * (1 + tanh(..)); the half may come at the start, inside or at the end."""
    shifted = _next(anchor, "Add", graph)
    if shifted is None or not _has(shifted, 1.0, graph):
        return {}
    members = [anchor, shifted]
    product = _next(shifted, "Mul", graph)
    halved = product is not None and _has(product, 0.5, graph)
    if product is not None and halved:
        members.append(product)
        product = _next(product, "Mul", graph)
    factor = _other(product, members[-1]) if product is not None else None
    if product is None or factor is None:
        return {}
    members.append(product)
    half = None if halved else graph.producer(factor)
    if half is not None and half.op == "Mul" and _has(half, 0.5, graph):
        source = next((t for t in half.inputs if not is_constant(t)), factor)
        above = _between(source, anchor, _GELU_UP, graph)
        if above is not None:
            return dict.fromkeys((n.name for n in (*members, *above, half)), "Gelu")
    above = _between(factor, anchor, _GELU_UP, graph)
    last = None if halved else _next(product, "Mul", graph)
    if above is None or not (halved or (last is not None and _has(last, 0.5, graph))):
        return {}
    return dict.fromkeys((n.name for n in (*members, *above, *([last] if last is not None else []))), "Gelu")


def _next(node: Node, op: str, graph: Graph) -> Node | None:
    """The only reader of a node's result, if it is that operator."""
    user = graph.only_consumer(node.outputs[0])
    return user if user is not None and user.op == op and not user.domain else None


def _has(node: Node, number: float, graph: Graph) -> bool:
    return any(graph.scalar(t) == number for t in node.inputs)


def _other(node: Node, producer: Node) -> Tensor | None:
    """What a node reads apart from the result of `producer`, None when that is a constant."""
    return next((t for t in node.inputs if t is not producer.outputs[0] and not is_constant(t)), None)
