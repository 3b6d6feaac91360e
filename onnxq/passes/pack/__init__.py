"""Fewer bytes for the same values, once everything else is written."""

from __future__ import annotations

from onnxq.passes.manager import Pass
from onnxq.passes.pack.codes import PackCodes
from onnxq.passes.pack.multiples import PackMultiples


def pack() -> list[Pass]:
    """The passes in their order."""
    return [PackCodes(), PackMultiples()]
