"""Which nodes stay float32 where the rest of a graph computes in float16, and why.

float16 ends at 65504 and has 11 binary digits. What would pass the one or needs more of the other stays float32:
squares and what is summed of them, exponentials that are summed, angles and indices that are computed from whole
numbers, constants and tensors that are too large or too small. Convolutions, products of matrices, means and whole
normalisations add up in float32 in onnxruntime's CUDA provider, whatever the type of their inputs, and become float16.
Source: its reduction_ops.cc (sums of float16 in float32, squares for ReduceSumSquare in float16) and cumsum_impl.cu
(sums in the tensor's type).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from onnxq.graph import (
    FLOAT32,
    HALF,
    Graph,
    Node,
    Tensor,
    constants,
    dtype_of,
    element_types,
    is_computed,
    is_constant,
    shape_of,
)
from onnxq.numerics import halves
from onnxq.passes.halving import slots_of
from onnxq.planner import composites

Found = Iterator[tuple[Node, str]]

_SHARE = 0.25  # of float16's range, which other data than those of the calibration may pass
_MOST = 24  # nodes of a region
_FEW = 64  # elements whose sum is taken to fit
_ROWS = 1 << 22  # elements of a constant that are read at a time
_FILL = 1e9  # from here on a number stands for infinity
_INTEGERS = "biu"
_SQUARES = ", whose squares pass float16's range"

# operators that hand numbers on as they are
_MOVES = frozenset({
    "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape",
    "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
})
_ELEMENTWISE = frozenset({
    "Abs", "Add", "Ceil", "Clip", "Div", "Floor", "Log", "Max", "Min", "Mod", "Mul", "Neg", "Pow", "Reciprocal",
    "Round", "Sqrt", "Sub",
})
_SUMS = frozenset({"ReduceL1", "ReduceSum", "Sum"})
_POWERS = frozenset({"ReduceL2", "ReduceLogSumExp", "ReduceLogSum", "ReduceProd", "ReduceSumSquare", "LpNormalization",
                     "LpPool", "GlobalLpPool", "MeanVarianceNormalization"})
_REDUCE = frozenset({"ReduceMean", "ReduceSum"})
_DECODERS = frozenset({"DequantizeLinear", "GatherBlockQuantized", "MatMulNBits"})
_COMPARES = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
_DIVIDES = frozenset({"Div", "Log", "Pow", "Reciprocal"})
_LAYERS = frozenset({"BatchNormalization", "Conv", "ConvTranspose", "GRU", "Gather", "Gemm", "LSTM", "MatMul", "RNN"})


def decide(graph: Graph, ranges: Mapping[str, tuple[float, float]] | None = None,
           keep_ports: bool = True) -> tuple[dict[str, str], dict[str, float]]:
    """`Plan.wide` and `Plan.limits` of a float32 graph as ToHalf will find it, bodies included.

    `ranges` gives least and greatest numbers of tensors, where they are known; `keep_ports` is that of ToHalf.
    Constants are read, a block of rows at a time, but for scales of codes: those of a whole weight are a computation.
    """
    known = ranges or {}
    wide: dict[str, str] = {}
    parts = list(graph.graphs())
    for part in parts:
        for find in (_normalisations, _roots, _exponentials, _whole_numbers):
            for node, reason in find(part):
                wide.setdefault(node.name, reason)
        for node, reason in _sums(part, known):
            wide.setdefault(node.name, reason)
    for node, reason in (*_without_half(graph), *_large(graph, known)):
        wide.setdefault(node.name, reason)
    _between(graph, wide)
    ends = {name for part in parts for name in _ends(part, wide, keep_ports and part is graph)}
    for name in ends:
        del wide[name]
    return wide, _constants(graph, wide, ends)


# ------------------------------------------------------------------ regions


def _normalisations(graph: Graph) -> Found:
    """Those spelled out in small operators."""
    labels = composites.find(graph)
    for node in graph.nodes:
        if labels.get(node.name) in ("LayerNorm", "RMSNorm"):
            yield node, f"part of a {labels[node.name]}{_SQUARES}"


def _ends(graph: Graph, wide: Mapping[str, str], keep_ports: bool) -> Iterator[str]:
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
    return half and not listed and sorted(users) in (["ReduceMean", "Sub"],
                                                                      ["ReduceMean", "Sub", "Sub"])


def _roots(graph: Graph) -> Found:
    """From squares to the root of their sum."""
    for root in graph.nodes:
        if root.domain or not (root.op == "Sqrt" or (root.op == "Pow" and graph.scalar(root.inputs[1]) in (0.5, -0.5))):
            continue
        above = list(_upward(graph, root, _ELEMENTWISE | _MOVES | _REDUCE))
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
        through = _ELEMENTWISE | _MOVES | {"Cast", "Range"} | ({"MatMul"} if angle else set())
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


# ------------------------------------------------------------------ single nodes


def _sums(graph: Graph, ranges: Mapping[str, tuple[float, float]]) -> Found:
    for node in graph.nodes:
        if node.domain:
            continue
        if node.op == "CumSum":
            yield node, "adds up in the type of what it reads"
        elif node.op in _POWERS:
            yield node, "adds up powers, which pass float16's range"
        elif node.op in _SUMS and dtype_of(node.outputs[0]) in (None, FLOAT32):
            found = ranges.get(node.outputs[0].name)
            fits = _elements(graph, node) <= _FEW if found is None else not _passes(found)
            if not fits:
                yield node, "its sums may pass float16's range"


def _elements(graph: Graph, node: Node) -> float:
    """How many elements of what it reads make one of a sum; infinity where that is unknown."""
    read, made = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    if node.op == "Sum":
        return len(node.inputs)
    if read is None or made is None:
        return math.inf
    free = [d for d in read if not isinstance(d, int)]
    if sorted(map(str, free)) != sorted(str(d) for d in made if not isinstance(d, int)) or None in free:
        return math.inf
    sizes = [math.prod(d for d in dims if isinstance(d, int)) for dims in (read, made)]
    return sizes[0] / max(sizes[1], 1)


def _without_half(graph: Graph) -> Found:
    """Operators that take no float16 at all."""
    floats = {name for name, dtype in element_types(graph).items() if dtype == FLOAT32}
    for node, _ in graph.walk():
        slots = slots_of(node, graph.opset, floats)
        types = [t for t, tensor in (*zip(slots.inputs, node.inputs, strict=True),
                                     *zip(slots.outputs, node.outputs, strict=True)) if tensor.name in floats]
        if types and all(t == FLOAT32 for t in types):
            yield node, f"{node.op} takes no float16" + ("" if node.domain else f" at opset {graph.opset}")


def _large(graph: Graph, ranges: Mapping[str, tuple[float, float]]) -> Found:
    """What makes or reads tensors whose numbers come near the end of float16."""
    large = {name for name, bounds in ranges.items() if _passes(bounds)}
    for node, _ in graph.walk():  # in execution order, so that what is handed on is followed
        if any(t.name in large for t in node.inputs):
            yield node, "reads numbers that come near the end of float16's range"
            if node.op in _MOVES:
                large |= {t.name for t in node.outputs if t.name not in ranges}
        elif any(t.name in large for t in node.outputs):
            yield node, "makes numbers that come near the end of float16's range"


def _passes(bounds: tuple[float, float]) -> bool:
    return max(abs(float(b)) for b in bounds) > _SHARE * halves.LARGEST


def _between(graph: Graph, wide: dict[str, str]) -> None:
    """Add nodes that only hand on, and cast nothing: from float32 to float32."""
    found: dict[str, list[Node | None]] = {}  # what each reads from and is read by
    for node, part in graph.walk():
        data = [t for t in node.inputs if t.name and dtype_of(t) == FLOAT32 and not is_constant(t)]
        users = [user for t in node.outputs for user in graph.consumers(t)]
        moves = node.op in _MOVES and not node.domain and not any(part.is_output(t) for t in node.outputs)
        if moves and data and users:
            found[node.name] = [*(graph.producer(t) for t in data), *users]
    before = -1
    while len(found) != before:
        before = len(found)
        found = {name: around for name, around in found.items()
                 if all(n is not None and (n.name in wide or n.name in found) for n in around)}
    wide |= {name: "between nodes that stay float32" for name in found if name not in wide}


# ------------------------------------------------------------------ constants


def _constants(graph: Graph, wide: dict[str, str], ends: Collection[str]) -> dict[str, float]:
    """What numbers beyond float16's range become, by constant; readers of others that don't fit are added to `wide`,
    unless they are among `ends`."""
    limits: dict[str, float] = {}
    readers: dict[str, list[Node]] = {}
    for node, _ in graph.walk():
        for tensor in node.inputs:
            if is_constant(tensor) and dtype_of(tensor) == FLOAT32:
                readers.setdefault(tensor.name, []).append(node)
    for tensor in constants(graph):
        narrow = [n for n in readers.get(tensor.name, []) if n.name not in wide]
        if not narrow or any(n.op in _DECODERS for n in narrow):
            continue
        least, greatest, few_digits = _look(graph, tensor)
        reason = "a constant of it has too few digits in float16" if few_digits else ""
        if max(-least, greatest) > halves.LARGEST:
            is_fill = not any(n.op in _LAYERS for n in narrow) and not halves.LARGEST < greatest < _FILL
            if is_fill:
                limits[tensor.name] = halves.LARGEST / (2 if _is_added(graph, narrow) else 1)
            else:
                reason = "a constant of it passes float16's range"
        for node in narrow if reason else ():
            if node.name not in ends:
                wide[node.name] = reason
            for user in _behind_epsilon(graph, node) if few_digits else ():
                wide.setdefault(user.name, "divides by what may be too small for float16")
    return limits


def _behind_epsilon(graph: Graph, node: Node) -> list[Node]:
    """What leads from a number that keeps a divisor from 0 to the division, or to a logarithm, and these."""
    found: dict[str, Node] = {}
    seen: set[str] = set()
    frontier = [[node]] if node.op in ("Add", "Clip", "Max") else []
    while frontier:
        path = frontier.pop()
        for user in [n for t in path[-1].outputs for n in graph.consumers(t) if n.name not in seen]:
            seen.add(user.name)
            if user.op in _DIVIDES:
                found |= {n.name: n for n in (*path[1:], user)}
            elif user.op in _MOVES or user.op == "Sqrt":
                frontier.append([*path, user])
    return list(found.values())


def _look(graph: Graph, tensor: Tensor) -> tuple[float, float, bool]:
    """Least and greatest finite number of a constant, and whether most of it would lose digits."""
    dims = [int(d or 0) for d in shape_of(tensor) or ()]
    rows, width = (dims[0], math.prod(dims[1:])) if dims else (1, 1)
    each = rows if is_computed(tensor) else max(1, _ROWS // max(1, width))  # each reading would compute all of it
    least, greatest, counts = math.inf, -math.inf, np.zeros(2, np.int64)
    for start in range(0, rows, max(1, each)):
        values = np.asarray(graph.read_rows(tensor, start, start + each) if dims else graph.read(tensor))
        finite = values[np.isfinite(values)]
        if finite.size:
            least, greatest = min(least, float(finite.min())), max(greatest, float(finite.max()))
        counts += halves.shares(finite)
    return least, greatest, bool(2 * counts[1] > counts[0])


def _is_added(graph: Graph, readers: Sequence[Node]) -> bool:
    """Whether a fill comes to an Add, as that of a mask does: two masks and a score have to stay finite together."""
    seen: dict[str, Node] = {n.name: n for n in readers}
    frontier = list(readers)
    while frontier:
        node = frontier.pop()
        if node.op in ("Add", "Sub", "Sum"):
            return True
        if node.op in _MOVES or node.op in ("Cast", "Mul"):
            fresh = [n for t in node.outputs for n in graph.consumers(t) if n.name not in seen]
            seen |= {n.name: n for n in fresh}
            frontier += fresh
    return False
