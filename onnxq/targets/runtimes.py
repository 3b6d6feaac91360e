"""What each onnxruntime runs of what onnxq writes, as tried with `python -m benchmarks.runtimes`.

Versions 1.16 to 1.32 were tried, one of each. From 1.19 on all of them have QLinearConv, QLinearMatMul,
MatMulIntegerToFloat, DynamicQuantizeMatMul, QGemm, DynamicQuantizeLSTM, the QLinear operators between them,
RotaryEmbedding, and MatMulNBits of 4 bits.
"""

from __future__ import annotations

Version = tuple[int, int]

OLDEST: Version = (1, 19)  # the first whose MatMulNBits has a bias

# the first version that takes an opset of ai.onnx or more, and the IR version that it reads at most
OPSETS: tuple[tuple[Version, int, int], ...] = (
    ((1, 19), 21, 10), ((1, 21), 22, 10), ((1, 23), 23, 11), ((1, 24), 25, 13), ((1, 25), 26, 13),
    ((1, 31), 27, 14))

# kernel, or operator that moves uint8 codes -> the first version that has it
KERNELS: dict[str, Version] = {
    "DepthToSpace": (1, 21),
    "GatherBlockQuantized": (1, 23),  # rows packed in uint8
}

# before, GatherBlockQuantized took wrong zero points of 4 bits from rows of an odd number of blocks
ODD_TABLES: Version = (1, 27)

# bits of a code -> the first version whose MatMulNBits multiplies it, and whose Cast decodes it at load
BLOCKS: dict[int, Version] = {4: (1, 19), 8: (1, 22), 2: (1, 24)}
CASTS: dict[int, Version] = {4: (1, 23), 2: (1, 24)}
