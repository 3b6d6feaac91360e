"""From the Plan's scales to QuantizeLinear/DequantizeLinear pairs: the portable form and the reference of the rest."""

from __future__ import annotations

from onnxq.passes.manager import Pass
from onnxq.passes.quantize.activations import QuantizeActivations
from onnxq.passes.quantize.biases import QuantizeBiases
from onnxq.passes.quantize.blocks import StoreBlocks
from onnxq.passes.quantize.dynamic import QuantizeDynamic
from onnxq.passes.quantize.dynamic_lstm import QuantizeLSTM
from onnxq.passes.quantize.hard_sigmoid import HardSigmoidToAdd
from onnxq.passes.quantize.left import QuantizeLeft
from onnxq.passes.quantize.mean_to_pool import MeanToPool
from onnxq.passes.quantize.per_token import QuantizePerToken
from onnxq.passes.quantize.products import QuantizeProducts
from onnxq.passes.quantize.stored import StoreWeights
from onnxq.passes.quantize.weights import QuantizeWeights


def quantize() -> list[Pass]:
    """The passes in their order: a bias needs the activation's name from before its DequantizeLinear.

    An LSTM has no form of Q and DQ, which could not reach the states within: its kernel is written here.
    """
    return [QuantizeDynamic(), QuantizeLSTM(), QuantizePerToken(), QuantizeLeft(), QuantizeProducts(), QuantizeBiases(),
            QuantizeWeights(), StoreWeights(), StoreBlocks(), QuantizeActivations(), HardSigmoidToAdd(), MeanToPool()]
