"""Operators that onnxruntime's CUDA provider has kernels for, with the types of their first input.

Source: onnxruntime, docs/OperatorKernels.md at commit 001d12d2.
"""

from __future__ import annotations

_NUM = "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64"
_SETS = {"@num": _NUM, "@all": f"{_NUM} bool bfloat16", "@float": "float16 float32 float64"}

# No types: no input, a first input that is no tensor, or one that the source gives no constraint for (BeamSearch,
# EmbedLayerNormalization, GreedySearch, Sampling and WhisperBeamSearch of com.microsoft).
_TABLE = """
Abs: @num bfloat16
Add: @num bfloat16
Affine: @float
And: bool
ArgMax: @float
ArgMin: @float
Attention: bfloat16 float16 float32
AveragePool: @float bfloat16
BatchNormalization: @float
Cast: @all float4_e2m1fn float8_e4m3fn float8_e5m2
Ceil: @float
Clip: @float int8 int64 uint8 uint64
Compress: @all
Concat: @all
ConcatFromSequence:
ConstantOfShape: int64
Conv: @float bfloat16
ConvTranspose: @float
Cos: @float
Crop: @float
CumSum: @float int32 int64 uint32 uint64
DepthToSpace: @float
DequantizeLinear: float8_e4m3fn float8_e5m2 int4 int8 uint4 uint8
Div: @num bfloat16
Dropout: @float bfloat16
DynamicSlice: @all
Einsum: @float
Elu: @float
Equal: @float bool int32 int64 uint32 uint64
Erf: @float bfloat16
Exp: @float bfloat16
Expand: @all
EyeLike: float32 float64 int32 int64 uint64
Flatten: @all
Floor: @float
GRU: @float
Gather: @all
GatherElements: @all
GatherND: @float bfloat16 bool int64
Gelu: @float bfloat16
Gemm: @float bfloat16
GlobalAveragePool: @float
GlobalMaxPool: @float
Greater: @float int32 int64 uint32 uint64
GreaterOrEqual: @float int32 int64 uint32 uint64
GridSample: float32
HardSigmoid: @float bfloat16
HardSwish: @float bfloat16
Identity: @all float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz
If: bool
ImageScaler: @float
InstanceNormalization: @float
IsInf: @float bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz
IsNaN: @float bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz
LRN: @float
LSTM: @float
LayerNormalization: @float bfloat16
LeakyRelu: @float
Less: @float int32 int64 uint32 uint64
LessOrEqual: @float int32 int64 uint32 uint64
Log: @float
LogSoftmax: @float
Loop: int64
MatMul: @float bfloat16
MatMulInteger: int8
Max: @float bfloat16 int32 int64 uint32 uint64
MaxPool: @float int8 uint8
MemcpyFromHost: @all float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz
MemcpyToHost: @all float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz
Min: @float bfloat16 int32 int64 uint32 uint64
Mod: @float bfloat16 int32 int64 uint32 uint64
Mul: @num bfloat16
Neg: @float bfloat16 int8 int16 int32 int64
NonZero: bool float16 float32 int32 int64 uint8
Not: bool
OneHot: int32 int64
Or: bool
PRelu: @float
Pad: @float bool
ParametricSoftplus: @float
Pow: @float bfloat16 int32 int64
QuantizeLinear: float16 float32
RMSNormalization: @float bfloat16
RNN: @float
RandomNormal:
RandomNormalLike: @all object
RandomUniform:
RandomUniformLike: @all object
Range: float32 float64 int16 int32 int64
Reciprocal: @float
ReduceL1: @float int32
ReduceL2: @float int32
ReduceLogSum: @float
ReduceLogSumExp: @float
ReduceMax: @float int32 int64
ReduceMean: @float int32
ReduceMin: @float int8 int32 int64 uint8
ReduceProd: @float int32
ReduceSum: @float bfloat16 int32 int64
ReduceSumSquare: @float
Relu: @float bfloat16
Reshape: @all float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz
Resize: @float int32 uint8
ReverseSequence: @all
RoiAlign: float32 float64
RotaryEmbedding: bfloat16 float16 float32
Round: @float
ScaledTanh: @float
Scan: @all float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz
Scatter: @all
ScatterElements: @all
ScatterND: @all
Selu: @float
SequenceAt:
SequenceConstruct: @all
SequenceEmpty:
SequenceErase:
SequenceInsert:
SequenceLength:
Shape: @all float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz
Shrink: @num
Sigmoid: @float bfloat16
Sign: @num bfloat16
SimplifiedLayerNormalization: @float bfloat16
Sin: @float
Size: @all object
Slice: @all
Softmax: @float bfloat16
Softplus: @float
Softsign: @float
SpaceToDepth: @float
Split: @all
Sqrt: @float bfloat16
Squeeze: @all
Sub: @num bfloat16
Sum: @float bfloat16
Tanh: @float bfloat16
TensorScatter: @all
ThresholdedRelu: @float
Tile: @float bfloat16 int32 int64
TopK: @float int32 int64
Transpose: @all
Trilu: @all
Unsqueeze: @all
Upsample: @float int32 uint8
Where: bool
Xor: bool
com.microsoft.Attention: bfloat16 float16 float32
com.microsoft.BeamSearch:
com.microsoft.BiasAdd: float16 float32
com.microsoft.BiasDropout: @float bfloat16
com.microsoft.BiasGelu: @float bfloat16
com.microsoft.BiasSoftmax: @float
com.microsoft.BiasSplitGelu: float16 float32
com.microsoft.BitmaskBiasDropout: @float bfloat16
com.microsoft.BitmaskDropout: @float bfloat16
com.microsoft.ComplexMul: float16 float32
com.microsoft.ComplexMulConj: float16 float32
com.microsoft.ConvTransposeWithDynamicPads: float32
com.microsoft.DecoderAttention: float16 float32
com.microsoft.DecoderMaskedMultiHeadAttention: float16 float32
com.microsoft.DecoderMaskedSelfAttention: float16 float32
com.microsoft.DequantizeLinear: int8 uint8
com.microsoft.DequantizeWithOrder: int8
com.microsoft.DynamicTimeWarping: float32
com.microsoft.EmbedLayerNormalization:
com.microsoft.FastGelu: @float bfloat16
com.microsoft.FusedConv: float32
com.microsoft.FusedMatMul: @float bfloat16
com.microsoft.GatedRelativePositionBias: float16 float32
com.microsoft.GatherBlockQuantized: int4 uint4 uint8
com.microsoft.Gelu: @float bfloat16
com.microsoft.GemmFloat8: bfloat16 float16 float32 float8_e4m3fn float8_e5m2
com.microsoft.GemmaRotaryEmbedding: float32
com.microsoft.GreedySearch:
com.microsoft.GridSample: float32
com.microsoft.GroupNorm: float16 float32
com.microsoft.GroupQueryAttention: bfloat16 float16
com.microsoft.Inverse: @float
com.microsoft.Irfft: @float
com.microsoft.LongformerAttention: float16 float32
com.microsoft.MatMulBnb4: bfloat16 float16 float32
com.microsoft.MatMulNBits: bfloat16 float16 float32
com.microsoft.MoE: bfloat16 float16 float32
com.microsoft.MultiHeadAttention: bfloat16 float16 float32
com.microsoft.NGramRepeatBlock: int64
com.microsoft.NhwcConv: float16 float32
com.microsoft.PackedAttention: float16 float32
com.microsoft.PackedMultiHeadAttention: float16 float32
com.microsoft.PagedAttention: bfloat16 float16
com.microsoft.QAttention: int8
com.microsoft.QMoE: bfloat16 float16
com.microsoft.QOrderedAttention: int8
com.microsoft.QOrderedGelu: int8
com.microsoft.QOrderedLayerNormalization: int8
com.microsoft.QOrderedLongformerAttention: int8
com.microsoft.QOrderedMatMul: int8
com.microsoft.QuantizeLinear: float16
com.microsoft.QuantizeWithOrder: float16 float32
com.microsoft.QuickGelu: @float bfloat16
com.microsoft.RelativePositionBias: float16 float32
com.microsoft.RemovePadding: float16 float32
com.microsoft.RestorePadding: float16 float32
com.microsoft.Rfft: @float
com.microsoft.RotaryEmbedding: bfloat16 float16 float32
com.microsoft.Sampling:
com.microsoft.SkipGroupNorm: float16 float32
com.microsoft.SkipLayerNormalization: bfloat16 float16 float32
com.microsoft.SkipSimplifiedLayerNormalization: bfloat16 float16 float32
com.microsoft.SparseAttention: bfloat16 float16
com.microsoft.TransposeMatMul: @float bfloat16
com.microsoft.Trilu: @all
com.microsoft.UnfoldTensor: @all object
com.microsoft.WhisperBeamSearch:
"""

KERNELS = {
    name: frozenset(kind for word in types.split() for kind in _SETS.get(word, word).split())
    for name, _, types in (line.partition(":") for line in _TABLE.split("\n") if line)
}
