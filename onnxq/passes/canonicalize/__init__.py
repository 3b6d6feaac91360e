"""Rewrites that leave the outputs as they are within float rounding and give every exporter's graph one form."""

from __future__ import annotations

from onnxq.passes.canonicalize.affine_to_batchnorm import AffineToBatchNorm
from onnxq.passes.canonicalize.affine_to_conv import AffineToConv
from onnxq.passes.canonicalize.all_axes import AllAxes
from onnxq.passes.canonicalize.batchnorm_to_conv import BatchNormToConv
from onnxq.passes.canonicalize.conv_before_pool import ConvBeforePool
from onnxq.passes.canonicalize.fold_batchnorm import FoldBatchNorm
from onnxq.passes.canonicalize.fold_constants import FoldConstants
from onnxq.passes.canonicalize.fold_dims import FoldDims
from onnxq.passes.canonicalize.hard_swish import HardSwish
from onnxq.passes.canonicalize.normal_gemm import NormalGemm
from onnxq.passes.canonicalize.prelu_to_leaky import PReluToLeaky
from onnxq.passes.canonicalize.remove_identity import RemoveIdentity
from onnxq.passes.canonicalize.rotary_embedding import RotaryEmbedding
from onnxq.passes.canonicalize.share_duplicates import ShareDuplicates
from onnxq.passes.canonicalize.share_kv_heads import ShareKVHeads
from onnxq.passes.canonicalize.shuffle_to_gather import ShuffleToGather
from onnxq.passes.canonicalize.sum_to_add import SumToAdd
from onnxq.passes.canonicalize.widen_half import WidenHalf
from onnxq.passes.manager import Pass


def canonicalize() -> list[Pass]:
    """The passes in the order that needs one round."""
    return [WidenHalf(), RemoveIdentity(), FoldDims(), FoldConstants(), HardSwish(), FoldBatchNorm(), AffineToConv(),
            AffineToBatchNorm(), BatchNormToConv(), ConvBeforePool(), ShuffleToGather(), SumToAdd(), NormalGemm(),
            PReluToLeaky(), AllAxes(), ShareDuplicates(), RotaryEmbedding(), ShareKVHeads()]
