"""Which tensors are stored as codes and how, and which nodes read and make them: in a Plan, or in a model's file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.errors import UsageError
from onnxq.graph import Graph, Node, Tensor, dtype_of, full_name, is_constant, shape_of
from onnxq.numerics import packing
from onnxq.numerics.affine import QuantParams
from onnxq.numerics.dtypes import by_name
from onnxq.passes.blocks import matrix_shape, transposed
from onnxq.passes.quantize.per_token import ONE
from onnxq.plan import STATIC, STORED, UNTOUCHED, Blocks, NodePlan, Plan
from onnxq.planner import given
from onnxq.report.report import Encoding, NodeRow

# the one type that codes made at run time have (ONNX DynamicQuantizeLinear-11, and the per-token form of the passes)
_RUN_TIME_DTYPE = "uint8"
_RUN_TIME_READERS = frozenset({"DynamicQuantizeLSTM", "DynamicQuantizeMatMul"})
# operator -> positions of (codes, scale, zero point) among its inputs
_READS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "DequantizeLinear": ((0, 1, 2),),
    "DynamicQuantizeLSTM": ((1, 8, 9), (2, 10, 11)),
    "DynamicQuantizeMatMul": ((1, 2, 3),),
    "GatherBlockQuantized": ((0, 2, 3),),
    "MatMulIntegerToFloat": ((0, 2, 4), (1, 3, 5)),
    "MatMulNBits": ((1, 2, 3),),
    "QAttention": ((0, 3, 6), (1, 4, 7)),
    "QGemm": ((0, 1, 2), (3, 4, 5)),
    "QLinearAdd": ((0, 1, 2), (3, 4, 5)),
    "QLinearAveragePool": ((0, 1, 2),),
    "QLinearConv": ((0, 1, 2), (3, 4, 5)),
    "QLinearGlobalAveragePool": ((0, 1, 2),),
    "QLinearLeakyRelu": ((0, 1, 2),),
    "QLinearMatMul": ((0, 1, 2), (3, 4, 5)),
    "QLinearMul": ((0, 1, 2), (3, 4, 5)),
    "QLinearSigmoid": ((0, 1, 2),),
    "QLinearSoftmax": ((0, 1, 2),),
}
# operator -> positions of (scale, zero point) of its result among its inputs
_MAKES: dict[str, tuple[int, int]] = {
    "QGemm": (7, 8),
    "QLinearAdd": (6, 7),
    "QLinearAveragePool": (3, 4),
    "QLinearConcat": (0, 1),
    "QLinearConv": (6, 7),
    "QLinearGlobalAveragePool": (3, 4),
    "QLinearLeakyRelu": (3, 4),
    "QLinearMatMul": (6, 7),
    "QLinearMul": (6, 7),
    "QLinearSigmoid": (3, 4),
    "QLinearSoftmax": (3, 4),
    "QuantizeLinear": (1, 2),
}
# operators whose codes and zero points are packed, several to a byte
_PACKED = frozenset({"GatherBlockQuantized", "MatMulNBits"})
# operators that hand codes on as they are
_MOVES = frozenset({
    "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "SpaceToDepth", "Split",
    "Squeeze", "Transpose", "Unsqueeze",
})


def encoding(scale: npt.ArrayLike, zero_point: npt.ArrayLike, dtype: str, axis: int | None = None,
             block_size: int | None = None) -> Encoding:
    """What is worth telling of a scale (float32, any shape) and a zero point (of its shape, or scalar).

    Bounds are None for a dtype that is none of numerics.dtypes (float8, say), and for the 32 bits of a bias, which uses
    a small part of them. Of several scales those that are exactly 1 tell nothing: a channel of zeros has that one.
    """
    scales, zeros = np.asarray(scale, np.float64), np.asarray(zero_point, np.float64)
    several, count = scales.ndim > 0, scales.size
    if several and zeros.shape in ((), scales.shape) and (scales != 1.0).any():
        used = scales != 1.0
        scales, zeros = scales[used], zeros if zeros.ndim == 0 else zeros[used]
    found = Encoding(dtype, "block" if block_size else "channel" if several else "tensor",
                     _short(np.median(scales)) if scales.size else None,
                     int(zeros.flat[0]) if zeros.size and (zeros == zeros.flat[0]).all() else None)
    try:
        bounds = by_name(dtype)
    except UsageError:
        return found
    if scales.size and zeros.shape in ((), scales.shape) and bounds.bits < 32:
        found.low = _short(((bounds.qmin - zeros) * scales).min())
        found.high = _short(((bounds.qmax - zeros) * scales).max())
    if several:
        found.axis, found.block_size, found.scales = axis, block_size or None, count
        if scales.size:
            found.least_scale, found.greatest_scale = _short(scales.min()), _short(scales.max())
    return found


def of_params(params: QuantParams, count: int | None = None) -> Encoding:
    """The encoding that parameters stand for; `count` is the number of elements of a weight, whose bytes it adds."""
    found = encoding(params.scale, params.zero_point, params.dtype.name, params.axis, params.block_size)
    if count is not None:
        found.float_bytes = 4 * count
        found.code_bytes = -(-count * params.dtype.bits // 8) + params.scale.nbytes
    return found


def elements(tensor: Tensor) -> int:
    """How many elements a tensor of fixed shape has."""
    return int(np.prod([int(d or 0) for d in shape_of(tensor) or ()], dtype=np.int64))


def _short(value: Any) -> float:
    """The shortest number that is the same float32."""
    return float(str(np.float32(value)))


# ------------------------------------------------------------------ of a Plan


def planned(plan: Plan, graph: Graph) -> dict[str, Encoding]:
    """Tensor -> encoding, for all that a Plan stores as codes; `graph` is the canonical one that it was made for."""
    found = {name: of_params(params) for name, params in plan.activations.items()}
    for node, _ in graph.walk():
        verdict = plan.node(node.name)
        if verdict is not None and verdict.activation not in (STATIC, UNTOUCHED):
            for k in verdict.int_inputs:
                found.setdefault(node.inputs[k].name, Encoding(_RUN_TIME_DTYPE, verdict.activation))
        for tensor in node.inputs:
            two = plan.two_level(tensor.name) if is_constant(tensor) else None
            tied = plan.ties.get(tensor.name) if is_constant(tensor) else None
            if tied is not None:
                found[tensor.name] = _of_tied(plan, tied, tensor)
            elif two is not None:
                found[tensor.name] = of_params(two.blocks, elements(tensor))
                found[tensor.name].code_bytes = (elements(tensor) + two.multiples.size + 1) // 2 + two.scale.nbytes
            elif is_constant(tensor) and tensor.name in plan.weights:
                found[tensor.name] = of_params(plan.weights[tensor.name], elements(tensor))
            elif is_constant(tensor) and tensor.name in plan.blocks:
                found[tensor.name] = _of_blocks(plan.blocks[tensor.name], tensor)
    return found


def _of_tied(plan: Plan, source: str, table: Tensor) -> Encoding:
    """The codes of the layer's weight `source`, which take no bytes of their own."""
    found = (of_params(transposed(plan.weights[source])) if source in plan.weights else
             _of_blocks(replace(plan.blocks[source], axis=1), table))
    found.float_bytes, found.code_bytes = 4 * elements(table), 0
    return found


def _of_blocks(how: Blocks, weight: Tensor) -> Encoding:
    """Scales are found as the weight is saved: how many there are is known, their values are not."""
    dims = matrix_shape(weight)
    scales = -(-dims[how.axis] // how.block_size) * (elements(weight) // max(dims[how.axis], 1))
    bits = elements(weight) * how.dtype.bits + scales * (32 + (0 if how.symmetric else how.dtype.bits))
    return Encoding(how.dtype.name, "block", axis=how.axis, block_size=how.block_size, scales=scales,
                    zero_point=0 if how.symmetric else None, float_bytes=4 * elements(weight), code_bytes=-(-bits // 8))


def connect(rows: Sequence[NodeRow], verdicts: Mapping[str, NodePlan], graph: Graph) -> None:
    """Note in the rows of a canonical graph's nodes what they read and make, and as what; bodies included."""
    nodes = {node.name: node for node, _ in graph.walk()}
    for row in rows:
        node, verdict = nodes.get(row.name), verdicts.get(row.name)
        if node is None or verdict is None:
            continue
        row.inputs, row.outputs = reads(node), [t.name for t in node.outputs if t.name]
        row.codes_in = [node.inputs[k].name for k in verdict.int_inputs if not is_constant(node.inputs[k])]
        row.codes_out = verdict.result if verdict.int_output else None
        row.weights = [*([verdict.weight] if verdict.weight is not None else []), *verdict.stored]
        row.part_of = verdict.part_of


def reads(node: Node) -> list[str]:
    """Names of the computed tensors among a node's inputs, each once."""
    return list(dict.fromkeys(t.name for t in node.inputs if t.name and not is_constant(t)))


# ------------------------------------------------------------------ of a file


def stored(graph: Graph) -> dict[str, Encoding]:
    """Tensor -> encoding, for the codes in a model of any making, as its operators' scales and zero points tell.

    Floats that are decoded from codes, and those that nothing but a QuantizeLinear reads, are in it, too.
    Tensors whose scale no operator names (what MatMulInteger reads) are not.
    """
    found: dict[str, Encoding] = {}
    for node, holder in graph.walk():
        for codes, scale, zero_point in _triples(node):
            if codes.name not in found:
                found[codes.name] = _of_constants(holder, node, codes, scale, zero_point)
        made = node.outputs[0] if len(node.outputs) else None
        if made is None or not made.name:
            continue
        if node.op == "DynamicQuantizeLinear":
            found[made.name] = Encoding(_RUN_TIME_DTYPE, "tensor")
        elif node.op in _RUN_TIME_READERS:
            found.setdefault(node.inputs[0].name, Encoding(_RUN_TIME_DTYPE, "tensor"))
        elif node.op == "DequantizeLinear" and node.inputs[0].name in found:
            found[made.name] = found[node.inputs[0].name]
        elif node.op == "Mul":
            found |= _decoded(holder, node)
        elif node.op in _MAKES and len(node.inputs) > _MAKES[node.op][0]:
            scale, zero_point = (_input(node, k) for k in _MAKES[node.op])
            found[made.name] = _of_constants(holder, node, made, scale, zero_point)
            source = node.inputs[0]
            if node.op == "QuantizeLinear" and holder.only_consumer(source) is node:
                found[source.name] = found[made.name]
        elif node.op in _MOVES and found.get(node.inputs[0].name, Encoding("", "")).granularity == "tensor":
            found.update((t.name, found[node.inputs[0].name]) for t in node.outputs if t.name)
    return found


def _decoded(graph: Graph, node: Node) -> dict[str, Encoding]:
    """How the codes in Mul(Cast(codes), scale), and the product itself, are encoded; rows of a table, too.

    This is how weights are stored for operators that compute in float (see passes.quantize.stored); where the product
    is reshaped, those in blocks, from which a Sub may take zero points (see passes.quantize.blocks).
    """
    for k, tensor in enumerate(node.inputs):
        cast, zeros = graph.producer(tensor), None
        if cast is not None and cast.op == "Sub":
            zeros, cast = cast.inputs[1], graph.producer(cast.inputs[0])
        if cast is None or cast.op != "Cast" or not given.decodes(graph, node.outputs[0]):
            continue
        codes, scale = (_looked_up(graph, t) for t in (cast.inputs[0], node.inputs[1 - k]))
        if not is_constant(scale) or dtype_of(scale) != np.float32:
            continue
        values = np.asarray(graph.read(scale), np.float32)
        dtype, whole = str(dtype_of(codes)), graph.only_consumer(node.outputs[0])
        if whole is not None and whole.op == "Reshape" and is_constant(codes):
            return _decoded_blocks(graph, whole, codes, values, zeros)
        axis = next((axis for axis, size in enumerate(values.shape) if size > 1), None)
        found = encoding(values.reshape(-1) if axis is not None else values.reshape(()), 0, dtype, axis)
        found.float_bytes, found.code_bytes = 4 * elements(codes), elements(codes) + values.nbytes
        return {codes.name: found, node.outputs[0].name: found}
    return {}


def _decoded_blocks(graph: Graph, whole: Node, codes: Tensor, scale: npt.NDArray[np.float32],
                    zeros: Tensor | None) -> dict[str, Encoding]:
    """Of codes [nb, B, N] or [V, nb, B] with scales [nb, 1, N] or [V, nb, 1], which a Reshape makes a matrix."""
    dims, last = [int(d or 0) for d in shape_of(codes) or ()], whole
    along = next((k for k, size in enumerate(scale.shape) if k and size == 1 and dims[k] > 1), None)
    if along is None or len(dims) != scale.ndim:
        return {}
    following = graph.only_consumer(whole.outputs[0])
    if following is not None and following.op == "Slice":  # takes off what fills up the last block
        last = following
    cast = graph.producer(zeros) if zeros is not None else None
    points = zeros if cast is None else cast.inputs[0]
    values = np.asarray(graph.read(points), np.float32) if points is not None and is_constant(points) else 0
    found = encoding(scale, values, str(dtype_of(codes)), along - 1, dims[along])
    found.float_bytes = 4 * elements(last.outputs[0])
    found.code_bytes = -(-elements(codes) * _bits(str(dtype_of(codes))) // 8) + scale.nbytes
    return {codes.name: found, last.outputs[0].name: found}


def _looked_up(graph: Graph, tensor: Tensor) -> Tensor:
    maker = graph.producer(tensor)
    return maker.inputs[0] if maker is not None and maker.op == "Gather" else tensor


def row_of(node: Node, graph: Graph, encodings: Mapping[str, Encoding]) -> NodeRow:
    """A node of a file as a row without a verdict; `encodings` are those of `stored`.

    What is made of stored codes of rank 2 and more by a DequantizeLinear, or by Cast and Mul (the node's scheme is
    `stored` then), counts as a weight, and a float tensor as codes where it was decoded right in front of the node or
    is quantized right behind it.
    """
    op, told = full_name(node), parameters(node)
    weights, read, scheme = [], [], ""
    for tensor in [t for k, t in enumerate(node.inputs) if t.name in encodings and k not in told]:
        maker = graph.producer(tensor)
        source = maker.inputs[0] if maker is not None and maker.op == "DequantizeLinear" else None
        if maker is not None and maker.op in ("Mul", "Reshape", "Slice") and given.decodes(graph, tensor):
            weights.append(tensor.name)
            scheme = STORED
        elif is_constant(tensor) or (is_constant(source) and len(shape_of(tensor) or ()) > 1):
            weights.append(tensor.name)
        elif source is not None or _integer(tensor) or node.op in _RUN_TIME_READERS | _MOVES | set(_READS):
            read.append(tensor.name)
    made = [t for t in node.outputs if t.name in encodings and node.op != "DequantizeLinear"]
    stored_as = [t.name for t in made if _integer(t) or node.op in _MAKES or (node.op in _MOVES and read)
                 or getattr(graph.only_consumer(t), "op", "") == "QuantizeLinear"]
    outputs = [t.name for t in node.outputs if t.name]
    return NodeRow(node.name, op, scheme, "", op, "", "", None, reads(node), outputs, read,
                   stored_as[0] if stored_as else None, weights)


def _integer(tensor: Tensor) -> bool:
    return str(dtype_of(tensor)).startswith(("int", "uint"))  # NumPy's own know no int4


def parameters(node: Node) -> set[int]:
    """Positions of the inputs that hold scales and zero points, which tell of other inputs or of the result."""
    triples = _positions(node)
    return {k for _, scale, zero in triples for k in (scale, zero)} | set(_MAKES.get(node.op, ()))


def _positions(node: Node) -> Sequence[tuple[int, int, int]]:
    if node.op == "QLinearConcat":
        return [(k, k + 1, k + 2) for k in range(2, len(node.inputs), 3)]
    return _READS.get(node.op, ())


def _triples(node: Node) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    for codes, scale, zero_point in _positions(node):
        if _input(node, codes) is not None:
            yield node.inputs[codes], _input(node, scale), _input(node, zero_point)


def _input(node: Node, index: int) -> Tensor | None:
    return Graph.optional_input(node, index)


def _of_constants(graph: Graph, node: Node, codes: Tensor, scale: Tensor | None,
                  zero_point: Tensor | None) -> Encoding:
    dtype = _dtype(node, codes, zero_point)
    if scale is None or not is_constant(scale):
        return Encoding(dtype, "tensor")
    if scale.name == ONE:  # the rows' own scales are multiplied in behind the kernel
        return Encoding(dtype, "token")
    if node.op in _PACKED:
        return _of_packed(graph, node, codes, scale, zero_point)
    zeros: npt.NDArray[Any] = np.zeros((), np.int64)
    if zero_point is not None and is_constant(zero_point):
        zeros = np.asarray(graph.read(zero_point))
    values = np.asarray(graph.read(scale), np.float32)
    if values.size == 1:
        values, zeros = values.reshape(()), zeros.reshape(()) if zeros.size == 1 else zeros
    found = encoding(values, zeros, dtype, _axis(node, codes), int(node.attrs.get("block_size", 0)) or None)
    if is_constant(codes) and dtype != "int32":  # int32 is a bias: it shrinks nothing
        count = elements(codes)
        found.float_bytes, found.code_bytes = 4 * count, -(-count * _bits(dtype) // 8) + values.nbytes
    return found


def _of_packed(graph: Graph, node: Node, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Encoding:
    """Of a kernel's weights in blocks: codes count from 0, zero points are 2**(bits - 1) where there are none.

    Source: com.microsoft MatMulNBits-1 and GatherBlockQuantized-1.
    """
    bits, rows = int(node.attrs.get("bits", 4)), int((shape_of(codes) or (1,))[0] or 1)
    scales = np.asarray(graph.read(scale), np.float32).reshape(rows, -1)
    zeros: npt.NDArray[Any] = np.asarray(2 ** (bits - 1))
    if zero_point is not None and is_constant(zero_point):
        zeros = np.asarray(graph.read(zero_point)).reshape(rows, -1)
        zeros = packing.unpack_bits(zeros, bits, scales.shape[1]) if _packs(zero_point) else zeros.astype(np.float32)
    found = encoding(scales, zeros, _dtype(node, codes, zero_point), 1, int(node.attrs.get("block_size", 128)))
    count = int(node.attrs.get("K", 0)) * int(node.attrs.get("N", 0))  # of MatMulNBits
    if is_constant(codes):
        found.float_bytes = 4 * (count or elements(codes) * (8 // bits if _packs(codes) else 1))
        found.code_bytes = elements(codes) * (8 if _packs(codes) else bits) // 8 + scales.nbytes
    return found


def _packs(tensor: Tensor) -> bool:
    """Whether bytes hold the codes of a kernel, rather than one element each."""
    return str(dtype_of(tensor)) == "uint8"


def _dtype(node: Node, codes: Tensor, zero_point: Tensor | None) -> str:
    """Of the codes, else of the zero point, else the operator's default."""
    if node.op in _PACKED:
        return f"uint{int(node.attrs.get('bits', 4))}"
    known = [dtype_of(t) for t in (zero_point, codes) if t is not None]
    return next((str(d) for d in known if d is not None and d.kind not in "f"), "uint8")


def _bits(dtype: str) -> int:
    try:
        return by_name(dtype).bits
    except UsageError:
        return 8


def _axis(node: Node, codes: Tensor) -> int | None:
    """The axis along which a tensor of codes has its scales, counted from 0."""
    if node.op in ("DequantizeLinear", "QuantizeLinear"):
        axis = int(node.attrs.get("axis", 1))
    elif node.op == "QLinearConv" or node.attrs.get("transB", 0):
        axis = 0
    else:
        axis = -1
    rank = len(shape_of(codes) or ())
    return axis % rank if rank else None
