"""onnxruntime's CPU provider on x86-64, as measured on version 1.31.

uint8 activations times int8 weights is the only pair with fast kernels on every x86-64 generation. Without VNNI
instructions they add two products in 16 bits, which saturate: weight scales there are chosen so that none does
(CPU_WITHOUT_VNNI, taken by itself on such a machine).
"""

from __future__ import annotations

from dataclasses import replace

from onnxq.targets.base import Target

CPU = Target(
    name="cpu",
    provider="CPUExecutionProvider",
    # operators written out: the runtime's own QDQ fusion misses some (a MatMul whose bias is added apart becomes a
    # Gemm first and then dequantizes its weights at every run)
    format="qoperator",
    summary="this machine's processor (x86-64 with VNNI or AMX, with AVX2 alone, or 64-bit ARM)",
    machines=frozenset({"AMD64", "i386", "i686", "x86", "x86_64"}),
    lowerings={
        ("Conv", "int"): "QLinearConv",
        ("MatMul", "int"): "QLinearMatMul",
        ("MatMul", "float"): "MatMulIntegerToFloat",
        ("MatMul", "left"): "MatMulIntegerToFloat",
        ("MatMul", "computed"): "MatMulIntegerToFloat",
        ("MatMul", "tensor"): "DynamicQuantizeMatMul",
        ("MatMul", "token"): "MatMulIntegerToFloat",
        ("MatMul", "blocks"): "MatMulNBits",
        ("Gemm", "int"): "QGemm",
        ("Gemm", "float"): "QGemm",
        ("Gemm", "tensor"): "DynamicQuantizeMatMul",
        ("Gemm", "token"): "MatMulIntegerToFloat",
        ("Gemm", "blocks"): "MatMulNBits",
        ("Gather", "blocks"): "GatherBlockQuantized",
        ("LSTM", "tensor"): "DynamicQuantizeLSTM",
        ("Add", "int"): "QLinearAdd",
        ("AveragePool", "int"): "QLinearAveragePool",
        ("AveragePool", "sum"): "QLinearConv",
        ("Concat", "int"): "QLinearConcat",
        ("GlobalAveragePool", "int"): "QLinearGlobalAveragePool",
        ("HardSigmoid", "int"): "QLinearAdd",
        ("LeakyRelu", "int"): "QLinearLeakyRelu",
        ("Mul", "int"): "QLinearMul",
        ("ReduceMean", "int"): "QLinearGlobalAveragePool",
        ("Sigmoid", "int"): "QLinearSigmoid",
        ("Clip", "int"): "Clip",
        ("DepthToSpace", "int"): "DepthToSpace",
        ("Expand", "int"): "Expand",
        ("Flatten", "int"): "Flatten",
        ("Gather", "int"): "Gather",
        ("MaxPool", "int"): "MaxPool",
        ("Pad", "int"): "Pad",
        ("Relu", "int"): "Clip",
        ("Reshape", "int"): "Reshape",
        ("Resize", "int"): "Resize",
        ("Slice", "int"): "Slice",
        ("Split", "int"): "Split",
        ("Squeeze", "int"): "Squeeze",
        ("Transpose", "int"): "Transpose",
        ("Unsqueeze", "int"): "Unsqueeze",
    },
    # time of QLinearAveragePool / time of QLinearConv of group C, without VNNI, one thread: 2x2 of stride 2, 128x56x56
    # to 512x14x14, 9x to 13x; 3x3, 64x28x28 and 128x28x28, 11x. Over all of 7x7 and 13x13 0.8x to 1.1x
    largest_sum=9,
    # 3x3 with padding of 1 that does not count (9, 6 and 4 elements: 3 QLinearConvs and 2 Wheres), 32x28x28 to
    # 576x14x14 and, of stride 2, 24x56x56 to 272x14x14: 1.2x to 2.7x on one thread, 1.1x to 3.7x on two
    most_divisors=3,
    # QLinearConv against Conv of rank 5, filters of 3x3x3, with AVX512-VNNI: 0.1x for 3 channels, 0.3x to 0.6x for 8,
    # 0.9x to 1.9x for 16, 1.9x to 2.5x for 24, 1.8x to 8.8x from 32 on; depthwise 0.9x
    least_channels_3d=24,
    # DynamicQuantizeLSTM against LSTM with AVX512-VNNI, for sequences of 16 steps and more: 0.65x to 1.0x at 16, 0.8x
    # to 1.3x at 32 and 48, 1.0x to 1.5x at 64, 1.3x to 2.0x at 128, 2.4x to 4x at 512; one step breaks even near 96
    least_hidden=64,
    small=16,
    # MatMulIntegerToFloat of uint8 weights on the left and int8 activations: 0.5x to 0.8x at 16 to 64, 0.7x to 2x at
    # 128 (by the columns), 2.2x to 2.4x for 196x196 by 8x196x384 and 512x128 by 128x3000, 3.2x at 768
    small_left=128,
    pairs_with_q=frozenset({
        "Add", "AveragePool", "Concat", "Conv", "ConvTranspose", "Gemm", "GlobalAveragePool", "LeakyRelu", "MatMul",
        "Mul", "Resize", "Sigmoid", "Softmax", "Where",
    }),
    slow_fusions=frozenset({"SkipLayerNormalization"}),
    # with AVX2, 8 rows of 255 tokens, 6 heads of 64: the 16 RotaryEmbeddings of 8 layers take 2.8 ms, the Mul, Slice,
    # Neg, Concat and Add that they stand for about 14 of 260. MultiHeadAttention (0.97x to 1.08x of an encoder, 1.04x
    # of this decoder) and GroupQueryAttention (1.02x, where smaller rewrites reach 1.1x) gain nothing or too little
    fused=frozenset({"RotaryEmbedding"}),
    # the runtime puts Casts around nearly every float16 node; for bfloat16 it has no kernels but Cast and data movement
    half=False,
    contrib=frozenset({
        "Attention", "BiasGelu", "ConvTransposeWithDynamicPads", "CropAndResize", "DecoderMaskedMultiHeadAttention",
        "DequantizeLinear", "EmbedLayerNormalization", "ExpandDims", "FastGelu", "FusedConv", "FusedGemm",
        "FusedMatMul", "GatherBlockQuantized", "GatherND", "Gelu", "GridSample", "GroupQueryAttention", "Inverse",
        "MatMulBnb4", "MatMulIntegerToFloat", "MatMulNBits", "MoE", "MultiHeadAttention", "Pad", "QAttention", "QMoE",
        "QuantizeLinear", "QuickGelu", "RotaryEmbedding", "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization", "SparseAttention", "TransposeMatMul", "Trilu", "UnfoldTensor", "Unique",
    }),
)

CPU_WITHOUT_VNNI = replace(
    CPU,
    saturates=True,
    # with AVX2 alone MatMulIntegerToFloat of uint8 weights on the left reads int8 activations in pairs, and no scale of
    # weights keeps those from saturating
    lowerings={key: kernel for key, kernel in CPU.lowerings.items() if key != ("MatMul", "left")},
    # QLinearConv of 1, 2 and 3 channels against Pad and QLinearConv of 4, one thread, 16 or 64 filters on 32x32 and
    # 112x112: 3x3 filters 0.9x to 1.5x, 1.0x to 1.6x and 1.0x to 1.8x (2.0x to 2.3x in networks, where the layout is
    # changed anyway); 5x5 0.4x to 1.0x, 0.6x to 1.1x, 0.8x to 1.6x; 7x7 0.5x to 1.0x for all. Not measured with VNNI
    padded_channels=frozenset({2, 3}),
    padded_window=9,
)
