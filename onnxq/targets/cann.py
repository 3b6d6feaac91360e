"""onnxruntime's CANN provider for Ascend NPUs: float16, fixed sizes, the whole graph at once.

It compiles a graph of the 134 operators that it knows into one program for each set of input sizes, and takes none of
QuantizeLinear, DequantizeLinear, QLinear*, LayerNormalization or com.microsoft: quantized models would run on the CPU,
or fail. So it gets a float16 graph of its own operators, with nothing left to fold; what stays float32 in it is to stay
so (precision_mode). int8 on Ascend goes by the vendor's compiler instead: target ascend. Source: onnxruntime's
core/providers/cann; not run yet.
"""

from __future__ import annotations

from onnxq.targets.base import Target
from onnxq.targets.cann_operators import CANN_OPERATORS

CANN = Target(
    name="cann",
    provider="CANNExecutionProvider",
    format="qoperator",
    summary="Ascend NPUs by onnxruntime's CANN provider: float16, fixed sizes",
    scheme="float",
    scheme_without_data="float",
    floats="float16",
    operators=dict.fromkeys(CANN_OPERATORS, frozenset()),
    static=True,
    provider_options=(("precision_mode", "allow_fp32_to_fp16"), ("dump_om_model", "0")),
)
