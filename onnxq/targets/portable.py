"""QuantizeLinear and DequantizeLinear of ONNX alone: for runtimes and compilers that fuse these themselves.

No com.microsoft operator is written. uint8 activations, int8 weights with zero point 0, a scale per channel; two
products never leave 16 bits. Checked and timed with onnxruntime's CPU provider, which fuses most of the pairs.
"""

from __future__ import annotations

from dataclasses import replace

from onnxq.targets.cpu import CPU_WITHOUT_VNNI

PORTABLE = replace(
    CPU_WITHOUT_VNNI,
    name="portable",
    format="qdq",
    summary="QuantizeLinear and DequantizeLinear of ONNX alone, for any runtime",
    # an LSTM's integer kernel has no form of these
    lowerings={key: kernel for key, kernel in CPU_WITHOUT_VNNI.lowerings.items() if key[0] != "LSTM"},
    fused=frozenset(),
    portable=True,
    machines=None,
)
