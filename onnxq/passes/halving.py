"""Which inputs and outputs of a node may be float16."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.graph import CONTRIB, FLOAT32, HALF, Graph, Node, slots

FLOAT16 = HALF[0]
Wanted = np.dtype[Any] | None

# onnxruntime's own operators that take float16 wherever they take float32, and which of their inputs and outputs are
# float32 all the same. Source: onnxruntime's docs/ContribOperators.md, its CUDA kernels' types
_Fixed = tuple[frozenset[int], frozenset[int]]
_NONE: _Fixed = (frozenset(), frozenset())
_STATISTICS: _Fixed = (frozenset(), frozenset({1, 2}))  # means and inverse deviations
_CONTRIB: dict[str, _Fixed] = {
    **dict.fromkeys(("Attention", "BiasGelu", "FastGelu", "FusedMatMul", "GatherBlockQuantized", "Gelu", "MatMulBnb4",
                     "MatMulNBits", "MultiHeadAttention", "QuickGelu", "RotaryEmbedding"), _NONE),
    "GroupQueryAttention": (frozenset({12, 13}), frozenset()),  # scales of a quantized cache
    "SkipLayerNormalization": _STATISTICS,
    "SkipSimplifiedLayerNormalization": _STATISTICS,
}
_UNLISTED = {"SimplifiedLayerNormalization": _STATISTICS}  # in the domain of ONNX without being in its schemas
# inputs that the schema lets be float16, for which onnxruntime has no kernel
_RUNTIME = {"Resize": frozenset({1}), **dict.fromkeys(
    ("Bernoulli", "EyeLike", "RandomNormalLike", "RandomUniformLike"), frozenset({0}))}
# operators of one input, whose type no output shares
_EITHER = frozenset({"ArgMax", "ArgMin", "Cast", "IsInf", "IsNaN", "NonZero", "Shape", "Size"})
# outputs that are of an input's type where no attribute says another, though the schema gives them another variable
_LIKE_INPUT = {"DequantizeLinear": 1}


@dataclass(frozen=True)
class Slots:
    """For each input of a node what type it is read in, None for either; for each output the type that is made.

    `tied` tells whether the first output's type follows from that of an input, where else an attribute names it.
    """

    inputs: tuple[Wanted, ...]
    outputs: tuple[np.dtype[Any], ...]
    tied: bool = True

    @staticmethod
    def wide(node: Node) -> Slots:
        """All in float32."""
        return Slots((FLOAT32,) * len(node.inputs), (FLOAT32,) * len(node.outputs))


def slots_of(node: Node, opset: int, floats: Collection[str]) -> Slots:
    """How a node is rewritten, in which the tensors `floats` are float32; what isn't one of those has no meaning.

    What a Cast, Shape and the like read may be of either type.
    """
    fixed = _CONTRIB.get(node.op) if node.domain == CONTRIB else None if node.domain else _UNLISTED.get(node.op)
    if fixed is not None:
        return Slots(tuple(FLOAT32 if k in fixed[0] else FLOAT16 for k in range(len(node.inputs))),
                     tuple(FLOAT32 if k in fixed[1] else FLOAT16 for k in range(len(node.outputs))))
    found = slots(node, opset, FLOAT16)
    if found is None:
        return Slots.wide(node)
    reads, makes = found
    either = node.op in _EITHER
    inputs = [None if either else FLOAT16 if slot.allowed and k not in _RUNTIME.get(node.op, ()) else FLOAT32
              for k, slot in enumerate(reads)]
    outputs = tuple(FLOAT16 if slot.allowed else FLOAT32 for slot in makes)
    tied = bool(makes) and (any(s.variable == makes[0].variable for s in reads) or _tied_to_input(node, floats))
    return Slots(tuple(inputs), outputs, tied)


def _tied_to_input(node: Node, floats: Collection[str]) -> bool:
    index = _LIKE_INPUT.get(node.op)
    tensor = None if index is None else Graph.optional_input(node, index)
    return tensor is not None and tensor.name in floats
