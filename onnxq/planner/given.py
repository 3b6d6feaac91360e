"""Nodes that the model's maker quantized: kept as they are, and lowered where our kernels take their form."""

from __future__ import annotations

from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant
from onnxq.plan import GIVEN, NodePlan
from onnxq.planner.chains import chain
from onnxq.targets import Target

CODES = frozenset({"int2", "int4", "int8", "uint2", "uint4", "uint8"})  # types of weights that are decoded at load
QUANT_OPS = frozenset({
    "ConvInteger", "DequantizeLinear", "DynamicQuantizeLSTM", "DynamicQuantizeLinear", "DynamicQuantizeMatMul",
    "GatherBlockQuantized", "MatMulBnb4", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "QAttention", "QGemm",
    "QLinearAdd", "QLinearAveragePool", "QLinearConcat", "QLinearConv", "QLinearGlobalAveragePool", "QLinearLeakyRelu",
    "QLinearMatMul", "QLinearMul", "QLinearSigmoid", "QLinearSoftmax", "QuantizeLinear",
})
_DECODING = frozenset({"Cast", "Mul", "Reshape", "Slice", "Sub"})


def is_quantized(graph: Graph, node: Node) -> bool:
    """Whether the node is an operator of a quantized model, or decodes weights that are stored as codes."""
    if node.domain not in ("", "com.microsoft", None):
        return False
    return node.op in QUANT_OPS or (node.op in _DECODING and decodes(graph, node.outputs[0]))


def decodes(graph: Graph, tensor: Tensor) -> bool:
    """Whether a tensor is made of codes in the file: by a Cast, of which a Sub may take a zero point, which a Mul may
    scale; a whole weight may be reshaped and cut behind that (see passes.quantize.blocks)."""
    maker = graph.producer(tensor)
    if maker is None or maker.domain or maker.op not in _DECODING:
        return False
    if maker.op in ("Reshape", "Slice"):
        return _stored(graph, tensor) and decodes(graph, maker.inputs[0])
    return any(_levels(graph, m) for m in ([maker] if maker.op != "Mul" else map(graph.producer, maker.inputs)))


def _levels(graph: Graph, maker: Node | None) -> bool:
    """Whether a node makes codes of the file to floats, and maybe takes a zero point from them."""
    if maker is not None and maker.op == "Sub":
        maker = graph.producer(maker.inputs[0])
    return maker is not None and _casts_codes(graph, maker)


def _stored(graph: Graph, tensor: Tensor) -> bool:
    """Whether a tensor is a constant, or decoded from constants alone."""
    maker = graph.producer(tensor)
    if maker is None:
        return is_constant(tensor)
    return maker.op in _DECODING and all(_stored(graph, t) for t in maker.inputs)


def _casts_codes(graph: Graph, node: Node) -> bool:
    """Whether a node is a Cast of codes in the file to floats; rows of a table that were looked up, too."""
    if node.op != "Cast" or str(dtype_of(node.outputs[0])) != "float32":
        return False
    source = node.inputs[0]
    maker = graph.producer(source)
    if maker is not None and maker.op == "Gather":
        source = maker.inputs[0]
    return is_constant(source) and str(dtype_of(source)) in CODES


def between_pairs(graph: Graph, node: Node, data: list[Tensor], target: Target) -> list[NodePlan]:
    """Verdicts on a float operator between the model's own DQ and Q, and on a Relu or Clip that its kernel absorbs.

    Empty where not all it reads comes from a DequantizeLinear, or no Q follows (a MatMul or Gemm needs none, and of
    weights alone in codes the runtime makes MatMulNBits). A Conv or
    Gemm of float weights is quantized, too: the runtime makes codes of them. A Relu is absorbed only where code 0
    stands for 0.
    """
    if node.op == "Add" and any(_int32_bias(graph, t) for t in data):
        return [NodePlan(node.name, node.op, GIVEN, GIVEN, "quantized already: it adds a bias stored as int32")]
    if node.op in ("Gemm", "MatMul") and not _from_codes(graph, node.inputs[0]) and _codes_alone(graph, node.inputs[1]):
        return [NodePlan(node.name, node.op, GIVEN, GIVEN, "quantized already: its weights are stored as codes")]
    if not data or not all(_from_codes(graph, t) for t in data):
        return []
    whole = node.op not in ("Conv", "Gemm", "MatMul") or _from_codes(graph, node.inputs[1])
    if node.op == "MatMul" and not whole:
        return []
    link = chain(graph, node)
    clamp = link.clamp if link.clamp is not None and link.clamp.op == "Relu" and _starts_at_zero(
        graph, link.clamp.outputs[0]) else None
    result = (clamp or node).outputs[0]
    reader = graph.only_consumer(result)
    as_int = reader is not None and reader.op == "QuantizeLinear"
    if not as_int and not (whole and node.op in ("Gemm", "MatMul")):
        return []
    reason = "quantized already, between the model's own Q and DQ"
    lowering = target.lowerings.get((node.op, "int" if as_int else "float"), GIVEN) if whole else GIVEN
    if any(_code_type(graph, graph.producer(t)) != "uint8" for t in data):
        lowering, reason = GIVEN, f"{reason}; its codes are not uint8, the kernels' type, so it stays as it is"
    found = [NodePlan(node.name, node.op, GIVEN, lowering, reason,
                      int_inputs=tuple(range(len(data))), int_output=as_int, result=result.name)]
    if clamp is not None and as_int:
        found.append(NodePlan(clamp.name, clamp.op, GIVEN, lowering, f"computed by the kernel of {node.name}",
                              part_of=node.name))
    return found


def _from_codes(graph: Graph, tensor: Tensor) -> bool:
    maker = graph.producer(tensor)
    return maker is not None and maker.op == "DequantizeLinear"


def _codes_alone(graph: Graph, tensor: Tensor) -> bool:
    """Whether a tensor is decoded from a constant by DequantizeLinear."""
    maker = graph.producer(tensor)
    return maker is not None and maker.op == "DequantizeLinear" and is_constant(maker.inputs[0])


def _int32_bias(graph: Graph, tensor: Tensor) -> bool:
    maker = graph.producer(tensor)
    return (maker is not None and maker.op == "DequantizeLinear" and is_constant(maker.inputs[0])
            and str(dtype_of(maker.inputs[0])) == "int32")


def _code_type(graph: Graph, node: Node | None) -> str:
    """dtype of the codes that a Q makes or a DQ reads, by its zero point; uint8 without one (ONNX's default)."""
    zero_point = graph.optional_input(node, 2) if node is not None else None
    return "uint8" if zero_point is None else str(dtype_of(zero_point))


def _starts_at_zero(graph: Graph, tensor: Tensor) -> bool:
    """Whether the Q behind a tensor has the least uint8 code as its zero point, so that saturation is a Relu."""
    reader = graph.only_consumer(tensor)
    if reader is None or reader.op != "QuantizeLinear" or len(reader.inputs) < 3 or not is_constant(reader.inputs[2]):
        return False
    return _code_type(graph, reader) == "uint8" and int(graph.read(reader.inputs[2]).max(initial=0)) == 0
