"""Float rewrites that leave the outputs as they are and that the target runs faster."""

from __future__ import annotations

from onnxq.passes.manager import Pass
from onnxq.passes.transform.keep_layer_norm import KeepLayerNorm


def transform() -> list[Pass]:
    """The passes in their order."""
    return [KeepLayerNorm()]
