"""onnxruntime's CPU provider on 64-bit ARM (Cortex-A, Apple, Graviton).

Its integer kernels (udot and ummla, with sdot and smmla for int8 activations) add products up in 32 bits: nothing
saturates, and weights keep all of their 8 bits. uint8 activations times int8 weights are read as uint8 by uint8, as
fast as any other pair, so models have the types of x86-64, and one file serves both. Nothing was timed here yet: what
is lowered is by x86-64's tables, and `onnxq bench` on the device says what it is worth.
Source: onnxruntime's core/mlas/lib/qgemm.h and platform.cpp.
"""

from __future__ import annotations

from dataclasses import replace

from onnxq.targets.cpu import CPU

CPU_ARM64 = replace(
    CPU,
    name="cpu-arm64",
    summary="64-bit ARM processors: phones, Raspberry Pi, Graviton, Apple",
    machines=frozenset({"aarch64", "arm64"}),
)
