"""From QDQ to the operators of onnxruntime's integer kernels."""

from __future__ import annotations

from onnxq.passes.lower.blocks import LowerBlocks
from onnxq.passes.lower.blocks_to_dequantize import BlocksToDequantize
from onnxq.passes.lower.dynamic_matmul import LowerDynamicMatMul
from onnxq.passes.lower.fence_float import FenceFloat
from onnxq.passes.lower.movement import LowerMovement
from onnxq.passes.lower.narrow_constants import NarrowConstants
from onnxq.passes.lower.pad_channels import PadChannels
from onnxq.passes.lower.per_token import LowerPerToken
from onnxq.passes.lower.pool_to_conv import PoolToConv
from onnxq.passes.lower.qlinear_conv import LowerConv
from onnxq.passes.lower.qlinear_linear import LowerLinear
from onnxq.passes.lower.qlinear_others import LowerJoining
from onnxq.passes.lower.separate_linear import SeparateLinear
from onnxq.passes.lower.shed_dequantize import ShedDequantize
from onnxq.passes.lower.to_half import ToHalf
from onnxq.passes.manager import Pass
from onnxq.targets import Target

# Kernel times on disk are kept under this number. Raise it when a pass of this stage or of quantize comes to write
# other operators, attributes or forms of constants for the same plan: times of the graphs before would be taken for
# those of the new ones. Not for a change of names, of order, or of what is emitted where.
EMITTER_VERSION = 6


def written(output_format: str, target: Target) -> list[Pass]:
    """Those of `lower`, and what makes of the result the float type that a target computes in."""
    return [*lower(output_format), *([ToHalf()] if target.floats == "float16" else [])]


def lower(output_format: str) -> list[Pass]:
    """Passes for an output format: `qoperator` writes fused operators, `qdq` leaves fusing to the runtime."""
    if output_format == "qdq":
        return [BlocksToDequantize(), SeparateLinear(), FenceFloat(), NarrowConstants()]
    return [LowerConv(), PadChannels(), LowerLinear(), PoolToConv(), LowerJoining(), LowerMovement(),
            LowerDynamicMatMul(), LowerPerToken(), LowerBlocks(), ShedDequantize(), FenceFloat(), NarrowConstants()]
