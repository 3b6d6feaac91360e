"""Convs of few channels: whether they had better read channels of zeros besides their own."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from onnxq.targets import Target

_BLOCK = 4  # channels that the kernel without im2col takes at once (MLAS ConvSym)


def missing(filters: Sequence[int], target: Target) -> int:
    """By how many channels a Conv of one group with filters of this shape [M, C, kH, kW] is padded; 0 for most."""
    if len(filters) != 4 or filters[1] not in target.padded_channels or prod(filters[2:]) > target.padded_window:
        return 0
    return -filters[1] % _BLOCK
