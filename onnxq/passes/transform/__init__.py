"""Rewrites of the float graph: what the target runs faster, and what makes up for the error of int8."""

from __future__ import annotations

from collections.abc import Collection

from onnxq.passes.manager import Pass
from onnxq.passes.transform.add_masks import AddMasks
from onnxq.passes.transform.correct_bias import CorrectBias
from onnxq.passes.transform.keep_layer_norm import KeepLayerNorm
from onnxq.passes.transform.normal_masks import NormalMasks


def transform(dropped: Collection[str] = ()) -> list[Pass]:
    """The passes in their order, without those of the names in `dropped`."""
    steps: list[Pass] = [CorrectBias(), AddMasks(), NormalMasks(), KeepLayerNorm()]
    return [step for step in steps if step.name not in dropped]
