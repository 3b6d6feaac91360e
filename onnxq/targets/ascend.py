"""int8 on Ascend NPUs by the vendor's compiler: the form of Q and DQ that `onnxq export --format ascend` deploys.

ATC takes AscendQuant and AscendDequant around Conv, MatMul and Gemm with int8 weights and int32 biases, and no
QuantizeLinear; a compiled model has pairs of Q and DQ at the inputs of those layers alone, which onnxruntime runs, and
the export rewrites them one by one. Activations are int8 with zero point 0: what a zero point adds to a product is not
added there. Sizes are fixed, as a quantized model with free ones is refused; opsets end at 18. Everything else is one
of CANN's operators, which ATC computes in float16. Source: CANN's documentation of ATC and AMCT; not run yet.
"""

from __future__ import annotations

from onnxq.targets.base import Target
from onnxq.targets.cann_operators import CANN_OPERATORS

ASCEND = Target(
    name="ascend",
    provider="atc",
    format="qdq",
    summary="Ascend NPUs by ATC: int8, to be exported with --format ascend",
    scheme_without_data="float",
    activations="int8",
    symmetric=True,
    lowerings={
        ("Conv", "float"): "Conv",
        ("MatMul", "float"): "MatMul",
        ("Gemm", "float"): "Gemm",
    },
    operators={name: frozenset() for name in (*CANN_OPERATORS, "DequantizeLinear", "QuantizeLinear")},
    opset=18,
    static=True,
    portable=True,
    machines=frozenset(),
    # onnxruntime runs the pairs as they are written, as ATC's operators do
    config=(("session.disable_quant_qdq", "1"),),
)
