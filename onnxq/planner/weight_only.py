"""Weights in blocks of low-bit codes beside float activations: who takes them, and by which kernel."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt

from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant, shape_of
from onnxq.numerics import blocks as numerics
from onnxq.numerics import two_level
from onnxq.numerics.affine import QuantParams
from onnxq.numerics.blocks import Search
from onnxq.numerics.dtypes import DType, by_name
from onnxq.passes.blocks import matrix_shape
from onnxq.passes.lower.blocks_to_dequantize import opset_of
from onnxq.plan import FLOAT, STORED, UNTOUCHED, Blocks, NodePlan
from onnxq.planner.chains import Chain, chain
from onnxq.schemes import Scheme, TensorSpec
from onnxq.targets import Target

LINEAR = frozenset({"Gemm", "MatMul"})
TAKERS = LINEAR | {"Conv", "Gather"}
_LEAST = 1024  # weights; below, scales and shapes eat what is gained
_LEAST_TABLE = 16384
_LEAST_INPUTS = 16  # of a layer, or columns of a table: what shares a scale at most
NO_INT8_KERNEL = "no kernel of MatMulNBits multiplies 2-bit blocks of 16 or 256 in integers, and others are slow"
_DECODED = "its weights are decoded as the model is loaded and {} in float"


def choose(graph: Graph, nodes: dict[str, NodePlan], schemes: Mapping[str, Scheme], refused: Mapping[str, str],
           target: Target) -> dict[str, TensorSpec]:
    """Turn float verdicts on linear layers and look-ups into weight-only ones, bodies of If, Loop and Scan included.

    `schemes` maps a node that may be quantized to its scheme; `refused` one whose kernel is slower than decoding to the
    reason. Gives each weight's format. A weight that several nodes read is quantized when all of them can, by the first
    one's scheme.
    """
    found: dict[str, TensorSpec] = {}
    if target.portable:
        refused = {**refused, **_unfused(graph, schemes)}
    barred = {name for name, verdict in nodes.items() if name not in schemes or verdict.scheme != FLOAT}
    for name, reading in readers(graph).items():
        takers = [(holder, node) for holder, node in reading if node.name in schemes and node.name not in barred]
        if len(takers) < len(reading) or not all(_takes(holder, node, name) for holder, node in takers):
            continue
        axes = {axis(node) for _, node in takers}
        spec = schemes[takers[0][1].name].weights
        assert spec is not None
        if len(axes) > 1 or any(graph.has(f"{name}.{part}") for part in ("q", "blocks", "decoded")):
            continue
        found[name] = spec
        for holder, node in takers:
            _decide(holder, node, name, spec, nodes, schemes[node.name].name, refused, target, barred)
    return found


def tie(graph: Graph, nodes: dict[str, NodePlan], formats: Mapping[str, TensorSpec], tied: Mapping[str, str],
        target: Target) -> dict[str, str]:
    """Those of `tied` (table -> weight that is its transpose) whose codes are stored once, for both.

    Both have the same format, and the table's rows are whole blocks. Where the weight is decoded as the model is
    loaded, the table is, too: kernels read other bytes than those that decode.
    """
    found: dict[str, str] = {}
    verdicts = {v.weight: v for v in nodes.values() if v.weight in formats and v.part_of is None}
    reading = readers(graph) if tied else {}
    for table, weight in tied.items() if not target.portable else ():
        spec = formats.get(table)
        columns = matrix_shape(weight_of(reading[table][0][1]))[1] if spec is not None else 0
        if spec is None or spec.block_size is None or formats.get(weight) != spec or columns % spec.block_size:
            continue
        of_table, of_weight = verdicts[table], verdicts[weight]
        if of_weight.scheme != STORED and of_table.scheme == STORED:
            continue
        found[table] = weight
        for _, node in reading[table]:
            verdict = nodes[node.name]
            reason = (f"{verdict.reason}; the codes are those of {weight}" if of_weight.scheme != STORED else
                      f"{spec.dtype} weights in blocks of {spec.block_size}: {_DECODED.format('looked up')}, as "
                      f"{weight} is, whose codes they are")
            if of_weight.scheme == STORED:
                verdict = replace(verdict, scheme=STORED, lowering=STORED)
            nodes[node.name] = replace(verdict, reason=reason)
    return found


def readers(graph: Graph) -> dict[str, list[tuple[Graph, Node]]]:
    """Matrix or filters of a Conv that are a constant -> the nodes that read them, each with the graph that holds it;
    bodies included."""
    found: dict[str, list[tuple[Graph, Node]]] = {}
    for node, holder in graph.walk():
        for tensor in node.inputs:
            if tensor.name and is_constant(tensor) and len(shape_of(tensor) or ()) >= 2:
                found.setdefault(tensor.name, []).append((holder, node))
    return found


def _takes(graph: Graph, node: Node, name: str) -> bool:
    """Whether a node can read its weight `name` in blocks."""
    position = 0 if node.op == "Gather" else 1
    if node.domain or node.op not in TAKERS or [t.name for t in node.inputs].index(name) != position:
        return False
    weight = node.inputs[position]
    if (len(shape_of(weight) or ()) == 2) is (node.op == "Conv"):
        return False
    rows, columns = matrix_shape(weight)
    if dtype_of(weight) != np.float32 or graph.is_output(weight) or (rows, columns)[axis(node)] < _LEAST_INPUTS:
        return False
    if node.op == "Gather":
        return int(node.attrs.get("axis", 0)) == 0 and rows * columns >= _LEAST_TABLE
    if node.op == "Conv":
        return rows * columns >= _LEAST and not is_constant(node.inputs[0])
    bias = graph.optional_input(node, 2)
    plain = not node.attrs and (bias is None or (is_constant(bias) and shape_of(bias) == (columns,)))
    rank = shape_of(node.inputs[0])
    return plain and rows * columns >= _LEAST and not is_constant(node.inputs[0]) and (rank is None or len(rank) > 1)


def axis(node: Node) -> int:
    """The axis of a weight along which its blocks run: that of a layer's inputs, of a table's columns, or of all that
    one filter of a Conv reads."""
    return 0 if node.op in LINEAR else 1


def blocks(node: Node, spec: TensorSpec) -> Blocks:
    """How a node's weight is quantized where no data say better."""
    assert spec.block_size is not None
    search = "absmax" if spec.search == "auto" else spec.search
    return Blocks(by_name(spec.dtype), spec.block_size, axis(node), cast(Search, search))


def block_params(values: npt.NDArray[np.float32], scheme: Scheme) -> QuantParams:
    """Parameters of a layer's weight [K, N] by the simplest search, for what tries many of its forms."""
    spec = scheme.weights
    assert spec is not None
    assert spec.block_size is not None
    if scheme.has_two_levels:
        return two_level.choose(values, spec.block_size, "absmax").blocks
    return numerics.choose(values, by_name(spec.dtype), spec.block_size, spec.symmetric)


def _decide(graph: Graph, node: Node, weight: str, spec: TensorSpec, nodes: dict[str, NodePlan], scheme: str,
            refused: Mapping[str, str], target: Target, barred: Collection[str]) -> None:
    why = refused.get(node.name) or no_kernel(node, spec, target)
    stored = f"{spec.dtype} weights in blocks of {spec.block_size}"
    if why is not None:
        decoded = _DECODED.format("looked up" if node.op == "Gather" else "multiplied")
        nodes[node.name] = NodePlan(node.name, node.op, STORED, STORED, f"{stored}: {decoded}: {why}",
                                    weight=weight, activation=UNTOUCHED)
        return
    kernel = target.lowerings[(node.op, "blocks")]
    link = chain(graph, node, barred) if node.op in LINEAR else Chain(node, None, None, node.outputs[0])
    add = link.bias_add
    what = "whose rows are decoded as they are read" if node.op == "Gather" else "decoded as they are multiplied"
    nodes[node.name] = NodePlan(node.name, node.op, scheme, kernel, f"{stored}, {what}", result=link.unclamped.name,
                                weight=weight, activation=UNTOUCHED, bias_add=add.name if add is not None else None)
    if add is not None:
        nodes[add.name] = replace(nodes[add.name], scheme=scheme, lowering=kernel,
                                  reason=f"computed by the kernel of {node.name}", part_of=node.name)


def no_kernel(node: Node, spec: TensorSpec, target: Target) -> str | None:
    """Why a node's weight in blocks is decoded as the model is loaded; None where a kernel reads it."""
    if (node.op, "blocks") not in target.lowerings:
        return f"{target.name} has no kernel for such weights of a {node.op}"
    width = by_name(spec.dtype).bits
    if width not in target.block_bits or spec.block_size not in target.block_sizes:
        return f"{target.name} has no kernel for blocks of {spec.block_size} weights of {width} bits"
    if node.op == "Gather" and not target.odd_tables and width < 8 and not spec.symmetric and _is_odd(node, spec):
        return f"onnxruntime {target.since} takes wrong zero points of rows of an odd number of blocks"
    if node.op == "Gather" and width == 2:
        return "rows of 2 bits have no kernel"
    slow = width == 2 and spec.block_size in (16, 256)
    return NO_INT8_KERNEL if slow and node.op in LINEAR else None


def _is_odd(node: Node, spec: TensorSpec) -> bool:
    assert spec.block_size is not None
    return -(-matrix_shape(weight_of(node))[1] // spec.block_size) % 2 == 1


def left(graph: Graph, node: Node) -> str:
    """Why a layer or look-up stays float unless `choose` gives it blocks."""
    weight = weight_of(node)
    if not is_constant(weight):
        return "what it looks up is computed at run time"
    rows, columns = matrix_shape(weight) if len(shape_of(weight) or ()) > 1 else (0, 0)
    if node.op == "Gather" and (len(shape_of(weight) or ()) != 2 or int(node.attrs.get("axis", 0)) != 0):
        return "only rows of a matrix are looked up in blocks"
    few = (rows, columns)[axis(node)] < _LEAST_INPUTS
    if few or rows * columns < (_LEAST_TABLE if node.op == "Gather" else _LEAST):
        return "its weights are too small to gain from fewer bits"
    if graph.is_output(weight) or len(graph.consumers(weight)) > 1:
        return "its weights are read as floats elsewhere, or along another axis: the file would hold them twice"
    return f"the model has a tensor of the name that a part of {weight.name!r} would take"


def _unfused(graph: Graph, schemes: Mapping[str, Scheme]) -> dict[str, str]:
    """Node -> why the runtime would not fuse it with a DequantizeLinear of its weight, which would run each time."""
    found: dict[str, str] = {}
    inside = {node.name for _, body in graph.subgraphs() for node, _ in body.walk()}
    for node, spec in [(n, schemes[n.name].weights) for n, _ in graph.walk() if n.name in schemes]:
        if spec is None or node.op not in TAKERS:
            continue
        weight, needed = weight_of(node), opset_of(by_name(spec.dtype))
        if graph.opset < needed:
            found[node.name] = f"DequantizeLinear takes blocks of {spec.dtype} from opset {needed} on"
        elif node.op == "Gather":
            found[node.name] = "the runtime has no kernel that decodes the rows of a look-up behind DequantizeLinear"
        elif node.op == "Conv":
            found[node.name] = "the runtime has no kernel for a Conv of weights in blocks"
        elif node.name in inside:
            found[node.name] = "the runtime fuses nothing in a body with weights outside of it"
        elif len(graph.consumers(weight)) > 1:
            found[node.name] = "the runtime fuses no DequantizeLinear of weights that several nodes read"
    return found


def opset(graph: Graph, schemes: Mapping[str, Scheme]) -> int:
    """The opset from which on DequantizeLinear takes the blocks of all of a graph's schemes; 0 where there are none."""
    specs = [schemes[n.name].weights for n, _ in graph.walk() if n.name in schemes and n.op in LINEAR]
    return max((opset_of(by_name(s.dtype)) for s in specs if s is not None and s.block_size is not None), default=0)


def stored_bytes(shape: tuple[int, ...], along: int, spec: TensorSpec, kernel: bool, width: int = 0) -> int:
    """Bytes of a weight with blocks along axis `along`: codes, float32 scales and zero points.

    kernel: as kernels read them, fields that fill bytes anew for each output; else as they are decoded at load, one
    after the other. width: bits of a code and a zero point, those of the type unless given.
    """
    assert spec.block_size is not None
    width = width or by_name(spec.dtype).bits
    count, rows = -(-shape[along] // spec.block_size), shape[1 - along]
    if not kernel:
        codes, zeros = rows * count * spec.block_size, 0 if spec.symmetric else rows * count
        return -(-codes * width // 8) + 4 * rows * count - (-zeros * width // 8)
    inputs = shape[1] if along else count * spec.block_size
    return rows * (-(-inputs * width // 8) + 4 * count + (0 if spec.symmetric else -(-count * width // 8)))


def bits(spec: TensorSpec) -> float:
    """Bits that a weight takes, with its share of a float32 scale and of a zero point."""
    dtype: DType = by_name(spec.dtype)
    assert spec.block_size is not None
    return dtype.bits + (32 + (0 if spec.symmetric else dtype.bits)) / spec.block_size


def weight_of(node: Node) -> Tensor:
    """The weight of a linear layer, or the table of a look-up."""
    return node.inputs[0 if node.op == "Gather" else 1]
