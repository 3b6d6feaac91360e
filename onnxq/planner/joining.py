"""Which nodes join the int8 regions around nodes with weights, and what of theirs is data.

A node joins where all the data it reads can be codes, and leaves again unless an int8 node reads what it makes: so no
region ends in an operator that gains nothing from codes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant, shape_of
from onnxq.numerics import affine
from onnxq.numerics.dtypes import by_name
from onnxq.plan import MOVES_CODES
from onnxq.planner.chains import Chain, chain, clip_bounds
from onnxq.targets import Target

LINEAR = frozenset({"Gemm", "MatMul"})
WEIGHTED = LINEAR | {"Conv"}
ARITHMETIC = frozenset({
    "Add", "AveragePool", "Concat", "GlobalAveragePool", "HardSigmoid", "LeakyRelu", "Mul", "ReduceMean", "Sigmoid"})
JOINING = MOVES_CODES | ARITHMETIC
RANGES = {"HardSigmoid": (0.0, 1.0), "Sigmoid": (0.0, 1.0)}  # what they make lies there whatever they read

_ALL_ARE_DATA = frozenset({"Add", "Concat", "Mul"})
_BROADCAST = frozenset({"Add", "Mul"})
_CLAMPS = frozenset({"Clip", "Relu"})
# behind a linear layer they are as fast in float: its kernel decodes on the way out
_BEHIND_CONV = frozenset({"HardSigmoid", "LeakyRelu", "Mul", "Sigmoid"})
# computed in float, but worth a Q of its own where one reads codes and an int8 node reads its result
_FLANKED = frozenset({"ConvTranspose", "Resize", "SpaceToDepth"})
_LARGEST_FACTOR_ERROR = 0.01  # relative; of a Mul by constants that share one scale

NOT_INT8 = "what it reads is float: int8 here would only add conversions"
NO_CLAMP = "a Relu or Clip is free inside an int8 kernel in front of it, and there is none"


def data_inputs(node: Node) -> list[Tensor]:
    """Inputs that carry activations (a Reshape's shape and a Conv's weight do not)."""
    if node.op in _ALL_ARE_DATA:
        return list(node.inputs)
    if node.op == "Where":
        return [t for t in node.inputs[1:] if not is_constant(t)]
    return list(node.inputs[:1])


def results(graph: Graph, node: Node, link: Chain) -> list[Tensor]:
    """What a node makes and somebody reads: several tensors for a Split, else the end of its chain."""
    if node.op != "Split":
        return [link.result]
    return [t for t in node.outputs if t.name and (len(t.outputs) or graph.is_output(t))]


def _wide(node: Node) -> list[Tensor]:
    """Data without constants and without what holds one number per channel for another operand (a gate).

    Codes of a constant are stored, and a gate has so few elements that a Q of its own costs nothing.
    """
    data = [t for t in data_inputs(node) if not is_constant(t)]
    flat = [t for t in data if node.op in _BROADCAST and _per_channel(t)]
    return [t for t in data if len(flat) == len(data) or not any(t is f for f in flat)]


def _per_channel(tensor: Tensor) -> bool:
    dims = shape_of(tensor) or ()
    return len(dims) > 2 and all(d == 1 for d in dims[2:])


class Regions:
    """Grows int8 regions from the nodes in `int_nodes` and `chains` (by name), and trims what gains nothing.

    Why a node stays outside is written into `reasons`; nodes that have one already never join. `barred` names nodes
    that no chain takes in.
    """

    def __init__(self, graph: Graph, target: Target, int_nodes: dict[str, Node], chains: dict[str, Chain],
                 reasons: dict[str, str], barred: Collection[str]) -> None:
        self.graph, self.target, self.barred = graph, target, barred
        self.int_nodes, self.chains, self.reasons = int_nodes, chains, reasons
        self.possible: set[str] = set()  # names of tensors that could be stored as codes
        self.linear: set[str] = set()  # those of them that a linear layer made, maybe with data moved since
        self.flanked: set[str] = set()  # those that a float node makes of codes

    def grow(self) -> None:
        """Forward, then backward until nothing leaves any more."""
        self._join()
        self._leave()
        while self._let_go():
            self._leave()

    # -------------------------------------------------------------- forward

    def _join(self) -> None:
        for node in self.graph.nodes:
            if node.op in JOINING and node.name not in self.reasons and node.name not in self.int_nodes:
                self._admit(node)
            if node.name in self.int_nodes:
                made = {t.name for t in results(self.graph, node, self.chains[node.name])}
                self.possible |= made
                if node.op in LINEAR or any(t.name in self.linear for t in _wide(node)):
                    self.linear |= made
            elif self._is_flanked(node):
                self.flanked.add(node.outputs[0].name)
                self.possible.add(node.outputs[0].name)

    def _admit(self, node: Node) -> None:
        # codes pass through data movement unchanged, and a fixed range is no clamp: neither can absorb one
        absorbs = node.op in ARITHMETIC and node.op not in RANGES
        link = chain(self.graph, node, self.barred) if absorbs else Chain(node, None, None, node.outputs[0])
        reason = self._outside(node) or misfit(self.graph, node) or name_taken(
            self.graph, node, [*results(self.graph, node, link), *data_inputs(node)])
        if reason is not None:
            self.reasons[node.name] = reason
            return
        self.int_nodes[node.name], self.chains[node.name] = node, link

    def _outside(self, node: Node) -> str | None:
        """Why what a node reads can't be codes, or had better not be; None when it can."""
        wide = _wide(node)
        if node.op == "Gather" and is_constant(node.inputs[0]):
            return "a look-up in a table that is too small to gain from int8"
        fits = bool(wide) and all(t.name in self.possible for t in wide)
        if node.op in _CLAMPS and (not fits or wide[0].name in self.linear | self.flanked):
            return NO_CLAMP
        if not fits:
            return NOT_INT8
        if node.op in _BEHIND_CONV and any(t.name in self.linear for t in wide):
            return "it is behind a linear layer, whose kernel hands on float at no cost"
        return None

    def _is_flanked(self, node: Node) -> bool:
        """Whether a float node reads codes and its result is worth a Q; a clamp behind such a node, too."""
        if node.domain or not len(node.inputs):
            return False
        source = node.inputs[0].name
        return (node.op in _FLANKED and source in self.possible) or (node.op in _CLAMPS and source in self.flanked)

    # -------------------------------------------------------------- backward

    def _leave(self) -> None:
        """What joined leaves again unless an int8 node reads its result."""
        for node in reversed(self.graph.nodes):
            if node.name not in self.int_nodes or node.op in WEIGHTED:
                continue
            made = results(self.graph, node, self.chains[node.name])
            if not any(self.reads_codes(user, t) for t in made for user in self.graph.consumers(t)):
                self._drop(node, "only float operators read its result: int8 would be converted back at once")

    def _let_go(self) -> bool:
        """Arithmetic beside a linear layer whose result is float after all is float, too; whether there was any."""
        codes = {t.name for n in self.int_nodes.values() if self.int_result(n)
                 for t in results(self.graph, n, self.chains[n.name])} | self.flanked
        gone = [n for n in self.int_nodes.values() if n.op in ARITHMETIC | _CLAMPS
                and not all(t.name in codes for t in _wide(n))]
        for node in gone:
            self._drop(node, NO_CLAMP if node.op in _CLAMPS else NOT_INT8)
        return bool(gone)

    def _drop(self, node: Node, reason: str) -> None:
        del self.int_nodes[node.name]
        del self.chains[node.name]
        self.reasons[node.name] = reason

    def reads_codes(self, user: Node, tensor: Tensor) -> bool:
        """Whether an int8 node reads a tensor as data."""
        return user.name in self.int_nodes and any(t is tensor for t in data_inputs(user))

    def int_result(self, node: Node) -> bool:
        """Whether a node's result is stored as codes: where the target has a kernel that makes such, and for linears
        where only int8 nodes read it."""
        if (node.op, "int") not in self.target.lowerings:
            return False
        if node.op not in LINEAR:
            return True
        link = self.chains[node.name]
        if self.graph.is_output(link.result) or link.bias_add is not None:
            return False  # the integer-output MatMul kernel has no bias
        users = self.graph.consumers(link.result)
        return bool(users) and all(self.reads_codes(u, link.result) for u in users)


# ------------------------------------------------------------------ forms


def misfit(graph: Graph, node: Node) -> str | None:
    """Why an integer kernel does not take this form of its operator; None when it does."""
    if not all(dtype_of(t) in (None, np.float32) for t in data_inputs(node)):
        return "it does not work on float32"
    if node.op in _ALL_ARE_DATA:
        return _constants(graph, node)
    check = {"AveragePool": _average_pool, "Clip": _clip, "HardSigmoid": _hard_sigmoid, "MaxPool": _max_pool,
             "Pad": _pad, "ReduceMean": _mean, "Resize": _resize}.get(node.op)
    return check(graph, node) if check is not None else None


def _constants(graph: Graph, node: Node) -> str | None:
    for tensor in data_inputs(node):
        if not is_constant(tensor):
            continue
        values = np.asarray(graph.read(tensor), np.float32)
        if not values.size or not np.isfinite(values).all():
            return "its constant is empty or holds NaN or infinite values"
        params = affine.choose(values.min(), values.max(), by_name("uint8"))
        off = np.abs(affine.dequantize(affine.quantize(values, params), params) - values)
        if node.op == "Mul" and (off > _LARGEST_FACTOR_ERROR * np.abs(values)).any():
            return "its factors differ too much for one scale"
    return None


def _average_pool(graph: Graph, node: Node) -> str | None:
    if any(d != 1 for d in node.attrs.get("dilations", ())):
        return "the int8 kernel knows no dilations"
    if node.attrs.get("ceil_mode", 0) and node.attrs.get("count_include_pad", 0):
        return "the int8 kernel counts other elements where a window hangs over the padding"
    return None


def _clip(graph: Graph, node: Node) -> str | None:
    return "its bounds are computed at run time" if clip_bounds(graph, node) is None else None


def _hard_sigmoid(graph: Graph, node: Node) -> str | None:
    return "its slope is not positive" if node.attrs.get("alpha", 0.2) <= 0 else None


def _max_pool(graph: Graph, node: Node) -> str | None:
    read = any(len(t.outputs) or graph.is_output(t) for t in node.outputs[1:])
    return "its indices are read, which the int8 kernel does not give" if read else None


def _pad(graph: Graph, node: Node) -> str | None:
    value = graph.optional_input(node, 2)
    if node.attrs.get("mode", "constant") != "constant" or value is None or graph.scalar(value) == 0:
        return None
    return "it pads with another value than 0, the only one that is always a code"


def _mean(graph: Graph, node: Node) -> str | None:
    dims, given = shape_of(node.inputs[0]), graph.optional_input(node, 1)
    axes = node.attrs.get("axes") if given is None else graph.read(given).tolist() if is_constant(given) else None
    if dims is None or len(dims) < 3 or sorted(a % len(dims) for a in axes or ()) != list(range(2, len(dims))):
        return "the int8 kernel averages over all of height and width, and over nothing else"
    return None


def _resize(graph: Graph, node: Node) -> str | None:
    mode = node.attrs.get("mode", "nearest")
    if mode == "linear":
        return "interpolating codes is slower than interpolating floats, and rounds down"
    if mode != "nearest":
        return f"no int8 kernel for a {mode} Resize"
    if node.attrs.get("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return "a Resize that crops fills in a value that may be no code"
    return None


def name_taken(graph: Graph, node: Node, tensors: Sequence[Tensor]) -> str | None:
    """Why a node stays float beside names of codes: a model that was compiled once holds names such as `x.q`."""
    wanted = [f"{t.name}.{part}" for t in tensors for part in (
        "q", "scale", "zero_point", "dq", "raw", "colsum", "row_low", "row_high", "row_scale", "u8", "u8.scale",
        "u8.zero_point", "u8.dq", "q.wide")]
    wanted += [f"{node.name}.{part}" for part in (
        "bias", "bias.q", "bias.scale", "bias.dq", "sums", "floats", "factor", "scaled", "shift.q", "shift.scale",
        "shift.zero_point", "shift.dq", "sum.scale", "mean.q", "mean.axes", "low.q", "high.q", "ones", "no_shift",
        "share", "share.1", "share.2", "mean.1.q", "mean.2.q", "here.1", "here.2", "joined.1.q", "more", "padded.q")]
    taken = next((name for name in wanted if graph.has(name)), None)
    return None if taken is None else f"the model has a tensor {taken!r} already, a name that its codes would take"
