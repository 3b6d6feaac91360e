"""onnxruntime's CPU provider on every processor that it runs on: with VNNI, AMX or NEON, and without.

Weight scales are those of CPU_WITHOUT_VNNI: two products of uint8 by int8 never leave 16 bits, so that each kernel adds
up the same integers, whatever instructions it is made of. What is computed in float differs by rounding, as it does for
a float model. Without VNNI these are the scales of target cpu, too; with it they cost up to one bit of some channels.
"""

from __future__ import annotations

from dataclasses import replace

from onnxq.targets.cpu import CPU_WITHOUT_VNNI

CPU_PORTABLE = replace(
    CPU_WITHOUT_VNNI,
    name="cpu-portable",
    summary="any CPU: the same integer results with and without VNNI, AMX or NEON",
    machines=None,
)
