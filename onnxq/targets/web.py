"""onnxruntime-web: WebAssembly in browsers and Node.

It has the CPU provider's kernels, of which those for unsigned activations alone use SIMD: uint8 by int8 it is. Relaxed
SIMD may add two products in 16 bits, as x86-64 without VNNI does, so weight scales leave room. Memory ends at 4 GB and
a file at 2 GB. It is a build of the CPU provider's code for another processor: results are checked with that provider
here, and times are not taken.
"""

from __future__ import annotations

from dataclasses import replace

from onnxq.targets.cpu import CPU_WITHOUT_VNNI

WEB = replace(
    CPU_WITHOUT_VNNI,
    name="web",
    provider="wasm",
    summary="onnxruntime-web: WebAssembly in browsers and Node",
    machines=frozenset(),
)
