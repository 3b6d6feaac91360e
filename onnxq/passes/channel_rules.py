"""What an operator does with channels: which of its tensors' axes hold the same ones, or why they have to stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxq.graph import Node, Tensor, dtype_of, is_constant, shape_of
from onnxq.passes.channel_sizes import entry, mapped, result_dims
from onnxq.passes.channels import Ids, Mark, Part, Walk

# What a rule gets: the walk, the node, one of its tensors with known channels, and which input that is (None: the
# result). It tells the walk of the node's other tensors, or gives the reason why the channels stay.
Rule = Callable[[Walk, Node, Mark, int | None], str | None]

_ELEMENTWISE = (
    "Abs", "Add", "Cast", "Celu", "Clip", "Div", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "QuickGelu", "Relu",
    "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh", "Where",
)
_OTHER_SIZES = "it puts together what is not known to have the same channels"
_SUMS = "it sums over them"
_ITS_AXIS = "they are no channels to it"


def _both(walk: Walk, node: Node, mark: Mark, axis: int | None = None, rank: int | None = None) -> None:
    """The same channels in the node's first input and in its first result, or in the one of these that is not known."""
    part = Part(mark.axis if axis is None else axis, mark.ids, mark.part.runs)
    for tensor in (node.inputs[0], node.outputs[0]):
        if tensor is not mark.tensor:
            walk.meet(tensor, rank or mark.rank, part)


def _rank(walk: Walk, tensor: Tensor) -> int | None:
    dims = shape_of(tensor)
    if dims is not None:
        return len(dims)
    return walk.marks[tensor.name].rank if tensor.name in walk.marks else None


def _aligned(walk: Walk, node: Node, mark: Mark, at: int | None) -> str | None:
    """Inputs whose dimensions are matched from the last one on, as those of elementwise operators and batches of
    matrices are: the same channels, or one for all."""
    place = mark.axis - mark.rank
    ranks = [_rank(walk, t) for t in node.inputs if t.name]
    if any(rank is None for rank in ranks):
        return _OTHER_SIZES
    for k, tensor in enumerate(node.inputs):
        if not tensor.name or k == at:
            continue
        dims, rank = shape_of(tensor), _rank(walk, tensor) or 0
        if rank + place < 0 or (dims is not None and dims[place] == 1):
            continue
        known = dims[place] if dims is not None else None
        same = known == len(mark.ids) or tensor.name in walk.marks
        if mark.part.runs or not same:
            return _OTHER_SIZES
        part = Part(rank + place, mark.ids)
        if is_constant(tensor):
            walk.take(node, k, part)
        else:
            walk.meet(tensor, rank, part)
    if at is not None:
        rank = max(rank for rank in ranks if rank is not None)
        walk.meet(node.outputs[0], rank, Part(rank + place, mark.ids, mark.part.runs))
    return None


def _elementwise(walk: Walk, node: Node, mark: Mark, at: int | None) -> str | None:
    if mark.part.runs and at is None:  # from the result to the one input that is no number
        wide = [t for t in node.inputs if t.name and not is_constant(t)]
        if len(wide) != 1 or _rank(walk, wide[0]) not in (None, mark.rank):
            return _OTHER_SIZES
        walk.meet(wide[0], mark.rank, mark.part)
        return None
    return _aligned(walk, node, mark, at)


# ------------------------------------------------------------------ layers


def _stored(tensor: Tensor, rank: int | None = None) -> bool:
    return is_constant(tensor) and dtype_of(tensor) == np.float32 and (
        rank is None or len(shape_of(tensor) or ()) == rank)


def _matmul(walk: Walk, node: Node, mark: Mark, at: int | None) -> str | None:
    left, right = node.inputs
    if is_constant(left):
        return "its left side is stored"
    if not is_constant(right):
        return _product(walk, node, mark, at)
    if not _stored(right, 2) or mark.part.runs:
        return "its weight is no float32 matrix"
    if mark.axis < mark.rank - 1:  # one of rows
        _both(walk, node, mark)
    elif at is None:
        walk.take(node, 1, Part(1, mark.ids))
    else:
        walk.read(node, mark.ids)
    return None


def _product(walk: Walk, node: Node, mark: Mark, at: int | None) -> str | None:
    """Of two computed tensors: batches of matrices, rows of the left ones, or columns of the right ones."""
    walk.attends = True
    from_end = mark.rank - mark.axis
    if from_end > 2:
        return _aligned(walk, node, mark, at)
    ranks = [_rank(walk, t) for t in node.inputs]
    own = 2 - from_end  # 0: rows, those of the left side; 1: columns, those of the right side
    if at == 1 - own:
        return _SUMS
    rank = max((rank for rank in ranks if rank is not None), default=0)
    if min(ranks[own] or 0, mark.rank) < 2:
        return _OTHER_SIZES
    if at is None:
        source = ranks[own] or 0
        walk.meet(node.inputs[own], source, Part(source - from_end, mark.ids, mark.part.runs))
    else:
        walk.meet(node.outputs[0], rank, Part(rank - from_end, mark.ids, mark.part.runs))
    return None


def _gemm(walk: Walk, node: Node, mark: Mark, at: int | None) -> str | None:
    bias = walk.graph.optional_input(node, 2)
    if node.attrs or is_constant(node.inputs[0]) or not _stored(node.inputs[1], 2) or at not in (None, 0):
        return "it is no layer with a stored matrix"
    if mark.axis == 1 and at == 0:
        walk.read(node, mark.ids)
        return None
    if bias is not None and not _stored(bias):
        return "what it adds is computed"
    dims = (shape_of(bias) or ()) if bias is not None else ()
    if mark.axis == 1:
        walk.take(node, 1, Part(1, mark.ids))
        if dims and dims[-1] != 1:
            walk.take(node, 2, Part(len(dims) - 1, mark.ids))
        return None
    if len(dims) == 2 and dims[0] != 1:
        return "it adds another number for each row"
    _both(walk, node, mark)
    return None


def _conv(walk: Walk, node: Node, mark: Mark, at: int | None) -> str | None:
    weight, bias = node.inputs[1], walk.graph.optional_input(node, 2)
    if not _stored(weight) or (bias is not None and not _stored(bias)) or at not in (None, 0):
        return "its filters are not stored"
    groups, along = int(node.attrs.get("group", 1)), 0 if node.op == "Conv" else 1
    filters = shape_of(weight) or ()
    if mark.axis != 1:
        return _ITS_AXIS
    depthwise = node.op == "Conv" and groups == len(mark.ids) > 1 and filters[:2] == (groups, 1)
    if groups != 1 and not depthwise:
        return "it has groups of filters"
    if depthwise:
        walk.depthwise.append(node.name)
        _both(walk, node, mark)
    elif at == 0:
        if node.op != "Conv":
            return "no other weights can make up for them there"
        walk.read(node, mark.ids)
        return None
    walk.take(node, 1, Part(along, mark.ids))
    if bias is not None:
        walk.take(node, 2, Part(0, mark.ids))
    return None


# ------------------------------------------------------------------ what works channel by channel


def _by_channel(walk: Walk, node: Node, mark: Mark, at: int | None) -> str | None:
    """Pools, and norms with numbers for each channel."""
    if mark.axis != 1 or (mark.rank < 3 and node.op.endswith("Pool")):
        return _ITS_AXIS
    for k, tensor in enumerate(node.inputs[1:], 1):
        if tensor.name and not _stored(tensor, 1):
            return "its numbers are computed"
        if tensor.name:
            walk.take(node, k, Part(0, mark.ids))
    _both(walk, node, mark)
    return None


def _beside(walk: Walk, node: Node, mark: Mark, at: int | None) -> str | None:
    """What works along an axis, or along all from one on."""
    axis = int(node.attrs.get("axis", -1)) % mark.rank
    along = mark.axis == axis if node.op in ("Softmax", "LogSoftmax") else mark.axis >= axis
    if along:
        return "its statistics are those of all channels"
    _both(walk, node, mark)
    return None


def _rotary(walk: Walk, node: Node, mark: Mark, at: int | None) -> str | None:
    if mark.rank != 4 or mark.axis != 1 or at not in (None, 0):
        return _ITS_AXIS
    _both(walk, node, mark)
    return None


def _transpose(walk: Walk, node: Node, mark: Mark, at: int | None) -> str | None:
    perm = [int(p) for p in node.attrs.get("perm", range(mark.rank)[::-1])]
    _both(walk, node, mark, perm[mark.axis] if at is None else perm.index(mark.axis))
    return None


def _reduce(walk: Walk, node: Node, mark: Mark, at: int | None) -> str | None:
    given = walk.graph.optional_input(node, 1)
    if given is not None and not is_constant(given):
        return "its axes are computed"
    axes = node.attrs.get("axes", []) if given is None else walk.graph.read(given).tolist()
    kept = bool(node.attrs.get("keepdims", 1))
    rank = mark.rank + (len(axes) if at is None and not kept else 0)
    gone = {int(a) % rank for a in axes}
    if not gone:
        return _SUMS
    left = list(range(rank)) if kept else [a for a in range(rank) if a not in gone]
    source = left[mark.axis] if at is None else mark.axis
    if source in gone:
        return _SUMS
    _both(walk, node, mark, source if at is None else left.index(source), rank if at is None else len(left))
    return None


def _other_axes(walk: Walk, node: Node, mark: Mark, at: int | None) -> str | None:
    """Pad, Slice and Resize, of other axes than that of the channels."""
    if at not in (None, 0):
        return _ITS_AXIS
    axis, graph = mark.axis, walk.graph
    values = [np.asarray(graph.read(t)) if t.name and is_constant(t) else None for t in node.inputs] + [None] * 4
    if node.op == "Pad":
        axes = values[3] if graph.optional_input(node, 3) is not None else np.arange(mark.rank)
        fits = values[1] is not None and axes is not None and not any(
            values[1].reshape(2, -1)[:, k].any() for k, a in enumerate(axes) if int(a) % mark.rank == axis)
    elif node.op == "Slice":
        fits = values[3] is not None and axis not in {int(a) % mark.rank for a in values[3]}
    else:
        fits = (values[2] is not None and values[2].size == mark.rank and values[2][axis] == 1
                and not node.attrs.get("axes"))
    if not fits:
        return "it changes them"
    _both(walk, node, mark)
    return None


# ------------------------------------------------------------------ what joins and divides


def _concat(walk: Walk, node: Node, mark: Mark, at: int | None) -> str | None:
    rank, axis = mark.rank, mark.axis
    if int(node.attrs["axis"]) % rank != axis:
        return _side_by_side(walk, node, mark, at)
    counts = [(shape_of(t) or (None,) * rank)[axis] for t in node.inputs]
    if mark.part.runs or not all(isinstance(c, int) for c in counts):
        return _OTHER_SIZES
    ends = np.cumsum([int(c or 0) for c in counts])
    whole = mark.ids
    if at is not None:
        known = walk.marks.get(node.outputs[0].name)
        whole = known.ids if known is not None else walk.groups.more(int(ends[-1]))
    parts = np.split(whole, ends[:-1])
    if at is not None:
        walk.groups.tie(parts[at], mark.ids)
        walk.meet(node.outputs[0], rank, Part(axis, whole))
    for k, tensor in enumerate(node.inputs):
        if k != at:
            _meet_or_take(walk, node, k, tensor, Part(axis, parts[k]), rank)
    return None


def _side_by_side(walk: Walk, node: Node, mark: Mark, at: int | None) -> str | None:
    """Joined along another axis: all have the same channels."""
    for k, tensor in enumerate(node.inputs):
        if k != at:
            _meet_or_take(walk, node, k, tensor, mark.part, mark.rank)
    if at is not None:
        walk.meet(node.outputs[0], mark.rank, mark.part)
    return None


def _meet_or_take(walk: Walk, node: Node, k: int, tensor: Tensor, part: Part, rank: int) -> None:
    if is_constant(tensor):
        walk.take(node, k, part)
    else:
        walk.meet(tensor, rank, part)


def _split(walk: Walk, node: Node, mark: Mark, at: int | None) -> str | None:
    rank, axis = mark.rank, mark.axis
    if int(node.attrs.get("axis", 0)) % rank != axis:
        for tensor in [node.inputs[0], *node.outputs]:
            if tensor is not mark.tensor:
                walk.meet(tensor, rank, mark.part)
        return None
    if len(node.inputs) < 2 or not is_constant(node.inputs[1]) or mark.part.runs:
        return "the sizes of its parts are not stored"
    ends = np.cumsum(walk.graph.read(node.inputs[1]))
    known = walk.marks.get(node.inputs[0].name)
    whole = known.ids if known is not None else walk.groups.more(int(ends[-1]))
    parts = np.split(whole, ends[:-1])
    for k, tensor in enumerate(node.outputs):
        walk.sizes[node.name, 1, k] = parts[k]
        if tensor is mark.tensor:
            walk.groups.tie(parts[k], mark.ids)
        else:
            walk.meet(tensor, rank, Part(axis, parts[k]))
    if known is None:
        walk.meet(node.inputs[0], rank, Part(axis, whole))
    return None


def _expand(walk: Walk, node: Node, mark: Mark, at: int | None) -> str | None:
    dims, rank = shape_of(node.inputs[0]), _rank(walk, node.outputs[0])
    if dims is None or rank is None or at not in (None, 0):
        return _OTHER_SIZES
    place = mark.axis - mark.rank
    if not entry(walk, node, rank + place, mark.ids, (1,)):
        return "the sizes of its result are computed"
    if at == 0:
        walk.meet(node.outputs[0], rank, Part(rank + place, mark.ids))
    elif len(dims) + place >= 0 and dims[place] != 1:
        walk.meet(node.inputs[0], len(dims), Part(len(dims) + place, mark.ids))
    return None


def _reshape(walk: Walk, node: Node, mark: Mark, at: int | None) -> str | None:
    """From [.., C] to [.., H, D] or back, and where channels keep to themselves: heads, or places of a picture."""
    if at not in (None, 0):
        return _ITS_AXIS
    other = node.outputs[0] if at == 0 else node.inputs[0]
    source, result = shape_of(node.inputs[0]), result_dims(walk.graph, node)
    before, after = (source, result) if at == 0 else (result, source)
    found = mapped(before, mark.part, after, walk.grouped) if before is not None and after is not None else None
    if found is None or after is None:
        return "its sizes are not known to keep them apart"
    part = _joined(walk, mark.ids, found.count, found.part)
    reads, makes = (mark.part, part) if at == 0 else (part, mark.part)
    alike = (reads.axis, len(reads.ids)) == (makes.axis, len(makes.ids))
    if node.op == "Reshape" and not entry(walk, node, makes.axis, makes.ids, (-1,), alike, makes.runs):
        return "the sizes of its result are computed"
    walk.meet(other, len(after), part)
    return None


def _joined(walk: Walk, ids: Ids, count: int, part: Part) -> Part:
    """`part` holds indices into ids; all ids of the same count-th are tied, or all whose places in groups are alike."""
    if part.runs or count < 0:
        across = ids.reshape(-1, len(part.ids)) if len(part.ids) <= len(ids) else ids[None]
        for row in across[1:]:
            walk.groups.tie(across[0], row)
    elif count < len(ids):
        along = ids.reshape(count, -1)
        for column in along.T[1:]:
            walk.groups.tie(along[:, 0], column)
    return Part(part.axis, ids[part.ids], part.runs)


def _shape(walk: Walk, node: Node, mark: Mark, at: int | None) -> str | None:
    """Other sizes than the number of channels may be asked for."""
    first, last = int(node.attrs.get("start", 0)), int(node.attrs.get("end", mark.rank))
    asked = range(mark.rank)[first:last]
    if mark.axis not in asked:
        return None
    for reader in walk.graph.consumers(node.outputs[0]):
        if reader.op != "Gather" or not is_constant(reader.inputs[1]) or any(
                int(k) % len(asked) == asked.index(mark.axis)
                for k in np.atleast_1d(walk.graph.read(reader.inputs[1])).reshape(-1)):
            return "it asks how many there are"
    return None


RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(["AveragePool", "BatchNormalization", "GlobalAveragePool", "GlobalMaxPool", "InstanceNormalization",
                     "LpPool", "MaxPool"], _by_channel),
    **dict.fromkeys(["LayerNormalization", "LogSoftmax", "RMSNormalization", "SimplifiedLayerNormalization",
                     "Softmax"], _beside),
    **dict.fromkeys([f"Reduce{kind}" for kind in ("L1", "L2", "Max", "Mean", "Min", "Sum", "SumSquare")], _reduce),
    **dict.fromkeys(["Pad", "Resize", "Slice"], _other_axes),
    **dict.fromkeys(["Flatten", "Reshape", "Squeeze", "Unsqueeze"], _reshape),
    **dict.fromkeys(["Conv", "ConvTranspose"], _conv),
    "Concat": _concat, "Expand": _expand, "Gemm": _gemm, "MatMul": _matmul, "RotaryEmbedding": _rotary, "Shape": _shape,
    "Split": _split, "Transpose": _transpose,
}
