"""TensorRT, as onnxruntime's provider or on its own: int8 by pairs of QuantizeLinear and DequantizeLinear.

Zero points are 0 and activations int8 in [-128, 127]; weights int8 per channel, stored as codes; biases float, since
its parser takes no int32 DequantizeLinear. Pairs stand at the inputs of Conv, MatMul and Gemm, at pooling, and at both
sides of an Add, which lets it fuse Conv, Add and Relu. A Relu is not absorbed into codes, whose zero is in the middle.
Its Cast takes no int8, so weights of float layers stay float. What is not int8 runs in float16 where it is faster
(trt_fp16_enable). A calibration table beside such a model is an error. Source: TensorRT's developer guide (explicit
quantization), onnxruntime's TensorRT-ExecutionProvider page; not run yet.
"""

from __future__ import annotations

from onnxq.targets.base import Target

# operators of ONNX that its parser takes, opsets 9 to 24. Source: onnx-tensorrt, docs/operators.md, TensorRT 10.15
_OPERATORS = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization BlackmanWindow
Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv
DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather
GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample
GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf
IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max
MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow
QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal
ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
Relu Reshape Resize ReverseSequence RoiAlign RotaryEmbedding Round STFT Scan Scatter ScatterElements ScatterND Selu
Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan
Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
"""

TENSORRT = Target(
    name="tensorrt",
    provider="TensorrtExecutionProvider",
    format="qdq",
    summary="TensorRT: int8 by symmetric pairs of Q and DQ, the rest in float16",
    scheme_without_data="float",
    activations="int8",
    symmetric=True,
    float_bias=True,
    lowerings={
        ("Conv", "int"): "Conv",
        ("MatMul", "int"): "MatMul",
        ("MatMul", "float"): "MatMul",
        ("Gemm", "int"): "Gemm",
        ("Gemm", "float"): "Gemm",
        ("Add", "int"): "Add",
        ("AveragePool", "int"): "AveragePool",
        ("GlobalAveragePool", "int"): "GlobalAveragePool",
        ("MaxPool", "int"): "MaxPool",
        ("Concat", "int"): "Concat",
        ("Flatten", "int"): "Flatten",
        ("Reshape", "int"): "Reshape",
        ("Slice", "int"): "Slice",
        ("Squeeze", "int"): "Squeeze",
        ("Transpose", "int"): "Transpose",
        ("Unsqueeze", "int"): "Unsqueeze",
    },
    decodes=False,
    operators={name: frozenset() for name in _OPERATORS.split()},
    opset=24,
    portable=True,
    provider_options=(("trt_int8_enable", "1"), ("trt_fp16_enable", "1")),
)
