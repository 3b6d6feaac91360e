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
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from onnxq.graph import (
    FLOAT32,
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
from onnxq.passes.blocks import layout
from onnxq.passes.halving import slots_of
from onnxq.plan import UNTOUCHED, Plan
from onnxq.planner import half_regions
from onnxq.planner.half_regions import MOVES, Found

_SHARE = 0.25  # of float16's range, which other data than those of the calibration may pass
_FEW = 64  # elements whose sum is taken to fit
_ROWS = 1 << 22  # elements of a constant that are read at a time
_COARSE = halves.SMALLEST_NORMAL / 8  # float16 has fewer than 8 digits of smaller numbers
_FILL = 1e9  # from here on a number stands for infinity

_SUMS = frozenset({"ReduceL1", "ReduceSum", "Sum"})
_POWERS = frozenset({"ReduceL2", "ReduceLogSumExp", "ReduceLogSum", "ReduceProd", "ReduceSumSquare", "LpNormalization",
                     "LpPool", "GlobalLpPool", "MeanVarianceNormalization"})
_DECODERS = frozenset({"DequantizeLinear", "GatherBlockQuantized", "MatMulNBits"})
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
        for node, reason in (*half_regions.find(part), *_sums(part, known)):
            wide.setdefault(node.name, reason)
    for node, reason in (*_without_half(graph), *_large(graph, known)):
        wide.setdefault(node.name, reason)
    _between(graph, wide)
    ends = {name for part in parts for name in half_regions.ends(part, wide, keep_ports and part is graph)}
    for name in ends:
        del wide[name]
    return wide, _constants(graph, wide, ends)


def small_scales(graph: Graph, plan: Plan) -> dict[str, str]:
    """Node -> why it stays float32, of those with weights in blocks whose scales have too few digits in float16, all of
    them; `graph` is the float one that the Plan tells of. Weights are read, a block of rows at a time, where their
    scales are not known yet."""
    found: dict[str, str] = {}
    largest: dict[str, float] = {}
    for node, _ in graph.walk():
        verdict = plan.node(node.name)
        name = verdict.weight if verdict is not None and verdict.is_int and verdict.activation == UNTOUCHED else None
        form = layout(plan, name) if name is not None else None
        if name is None or form is None:
            continue
        if name not in largest:
            known = plan.weights.get(name)
            if known is not None:
                largest[name] = float(np.max(known.scale, initial=0))
            else:
                least, greatest, _ = _look(graph, next(t for t in node.inputs if t.name == name))
                largest[name] = max(-least, greatest) / 2 ** (form.dtype.bits - 1)
        if 0 < largest[name] < _COARSE:
            found[node.name] = "the scales of its weights have too few digits in float16"
    return found


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
            if node.op in MOVES:
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
        moves = node.op in MOVES and not node.domain and not any(part.is_output(t) for t in node.outputs)
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
            elif user.op in MOVES or user.op == "Sqrt":
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
        if node.op in MOVES or node.op in ("Cast", "Mul"):
            fresh = [n for t in node.outputs for n in graph.consumers(t) if n.name not in seen]
            seen |= {n.name: n for n in fresh}
            frontier += fresh
    return False
