"""Fewer bytes for the same values, once everything else is written."""

from __future__ import annotations

from onnxq.passes.manager import Pass
from onnxq.passes.pack.codes import PackCodes
from onnxq.passes.pack.multiples import PackMultiples
from onnxq.passes.pack.weights import PackWeights


def pack(weights: bool = True, load_memory: int | None = None) -> list[Pass]:
    """The passes in their order; the packing of `weights`, within `load_memory` bytes, only where that is asked for."""
    return [PackCodes(), PackMultiples(), *([PackWeights(load_memory)] if weights else [])]
