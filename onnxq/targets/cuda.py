"""onnxruntime's CUDA provider: float16, with weights in blocks of 4 or 8 bits.

It has no QLinearConv, QLinearMatMul, ConvInteger or QGemm and fuses no pair of QuantizeLinear and DequantizeLinear but
that of a weight in blocks, so int8 activations would run on the CPU or in float: target tensorrt is for these.
LayerNormalization and Softmax add up in float32 inside their float16 kernels; normalisations in small operators stay
float32. The fast kernels of MatMulNBits take float16, blocks of 32, 64 or 128, and N of a multiple of 64 (4 bits) or 32
(8 bits); they are behind the option ep.cuda.fpa_intb_gemm. Read from onnxruntime's source; not run yet.
"""

from __future__ import annotations

from onnxq.targets.base import Target
from onnxq.targets.cpu import CPU
from onnxq.targets.cuda_kernels import KERNELS

CUDA = Target(
    name="cuda",
    provider="CUDAExecutionProvider",
    format="qoperator",
    summary="NVIDIA GPUs: float16, weights in blocks of 4 or 8 bits",
    scheme="w8a16",
    scheme_without_data="w8a16",
    lowerings={
        ("MatMul", "blocks"): "MatMulNBits",
        ("Gemm", "blocks"): "MatMulNBits",
        ("Gather", "blocks"): "GatherBlockQuantized",
    },
    block_bits=frozenset({4, 8}),
    block_sizes=frozenset({16, 32, 64, 128}),
    floats="float16",
    sizes_on_cpu=True,
    fused=frozenset({"RotaryEmbedding"}),
    contrib=CPU.contrib,
    operators=KERNELS,
    config=(("ep.cuda.fpa_intb_gemm", "1"),),
)
