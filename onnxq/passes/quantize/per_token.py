"""MatMul(x, W) with a scale per row (token) of x, computed at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, Tensor, shape_of
from onnxq.numerics import affine
from onnxq.passes.manager import Context, Pass
from onnxq.passes.quantize.weights import store_weight
from onnxq.plan import TOKEN

ONE, ZERO_CODE = "onnxq.one", "onnxq.zero_code"  # scale and zero point of codes whose row scale is applied apart
_LEVELS = 255.0
_LEAST_SCALE = 1e-30  # of a constant row, whose codes are all 0 whatever the scale


@dataclass(frozen=True)
class QuantizePerToken(Pass):
    """x W + b  =>  s * ((c Wq) * w_scale) + (low * colsum + b), with c = round((x - low) / s), s and low per row of x.

    x is float32 [..., K]; low and s = (high - low) / 255 are float32 [..., 1]; c is uint8 [..., K] with zero point 0;
    Wq int8 [K, N]; w_scale float32 [N]; colsum float32 [1, N] is the sum over K of Wq * w_scale. Products accumulate in
    int32. A row's least value is exact, so rows need not contain 0. Rounds half to even.
    Source: per-token quantization of activations as in SmoothQuant (2211.10438), in its asymmetric form.
    """

    name: ClassVar[str] = "quantize-per-token"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Rewrite one linear node."""
        verdict = context.plan.node(node.name)
        if verdict is None or verdict.activation != TOKEN or node.op not in ("MatMul", "Gemm"):
            return False
        assert verdict.weight is not None
        bias, result = _take_bias(graph, node, verdict.bias_add)
        codes, scale, low = _row_codes(graph, node.inputs[0])
        params = context.plan.weights[verdict.weight]
        w_codes, w_scale, _ = store_weight(graph, node.inputs[1], context.plan)
        colsum = f"{verdict.weight}.colsum"
        if not graph.has(colsum):
            decoded = affine.dequantize(graph.read(w_codes), params)
            graph.constant(colsum, decoded.sum(axis=0, dtype=np.float64).astype(np.float32)[None])
        name = node.name
        graph.remove(node)
        sums = graph.like(result, f"{name}.sums", "int32")
        graph.add_node("MatMulInteger", name, [codes, w_codes], [sums])
        floats = _step(graph, "Cast", [sums], result, f"{name}/cast", {"to": 1})
        columns = _step(graph, "Mul", [floats, w_scale], result, f"{name}/columns")
        product = _step(graph, "Mul", [columns, scale], result, f"{name}/rows")
        offset = _step(graph, "MatMul", [low, graph.made(colsum)], result, f"{name}/offset")
        if bias is not None:
            offset = _step(graph, "Add", [offset, bias], result, f"{name}/bias")
        graph.add_node("Add", f"{name}/sum", [product, offset], [result])
        return True


def _take_bias(graph: Graph, node: Node, bias_add: str | None) -> tuple[Tensor | None, Tensor]:
    """(bias or None, the result behind it); an Add that the Plan joins to the node is taken out."""
    if node.op == "Gemm":
        return graph.optional_input(node, 2), node.outputs[0]
    if bias_add is None:
        return None, node.outputs[0]
    add = graph.only_consumer(node.outputs[0])
    assert add is not None
    bias, result = next(t for t in add.inputs if t is not node.outputs[0]), add.outputs[0]
    graph.remove(add)
    graph.set_output(node, 0, result)
    return bias, result


def _step(graph: Graph, op: str, inputs: list[Tensor], like: Tensor, name: str,
          attrs: dict[str, object] | None = None) -> Tensor:
    """Add a node whose float32 result has the shape of `like`; gives the result."""
    made = graph.like(like, f"{name}.out", "float32")
    graph.add_node(op, name, inputs, [made], attrs)
    return made


def _row_codes(graph: Graph, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, low) of a tensor, made once for all its readers."""
    if graph.has(f"{x.name}.q"):
        return graph.made(f"{x.name}.q"), graph.made(f"{x.name}.row_scale"), graph.made(f"{x.name}.row_low")
    dims = shape_of(x)
    column = [*dims[:-1], 1] if dims else None
    low = graph.variable(f"{x.name}.row_low", "float32", column)
    graph.add_reduction("ReduceMin", f"{x.name}/row_low", x, low, [-1], keepdims=True)
    high = graph.variable(f"{x.name}.row_high", "float32", column)
    graph.add_reduction("ReduceMax", f"{x.name}/row_high", x, high, [-1], keepdims=True)
    levels = graph.shared_constant("onnxq.levels", np.asarray(1 / _LEVELS, np.float32))
    least = graph.shared_constant("onnxq.least_scale", np.asarray(_LEAST_SCALE, np.float32))
    spread = _step(graph, "Sub", [high, low], low, f"{x.name}/row_spread")
    step = _step(graph, "Mul", [spread, levels], low, f"{x.name}/row_step")
    scale = graph.like(low, f"{x.name}.row_scale", "float32")
    graph.add_node("Max", f"{x.name}/row_scale", [step, least], [scale])
    above = _step(graph, "Sub", [x, low], x, f"{x.name}/above")
    units = _step(graph, "Div", [above, scale], x, f"{x.name}/units")
    one = graph.shared_constant(ONE, np.asarray(1, np.float32))
    zero = graph.shared_constant(ZERO_CODE, np.asarray(0, np.uint8))
    codes = graph.like(x, f"{x.name}.q", "uint8")
    graph.add_node("QuantizeLinear", f"{x.name}/quantize", [units, one, zero], [codes])
    return codes, scale, low
