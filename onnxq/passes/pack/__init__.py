"""Fewer bytes for the same values, once everything else is written."""

from __future__ import annotations

from onnxq.passes.manager import Pass
from onnxq.passes.pack.codes import PackCodes


def pack() -> list[Pass]:
    """The passes in their order."""
    return [PackCodes()]
