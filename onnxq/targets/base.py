"""What a target file states."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Target:
    """Facts that the planner obeys.

    `lowerings` maps (operator, what its result is: "int" or "float") to the kernel that runs it in integers, and
    (operator, "tensor" or "token") to the kernel for scales found at run time per tensor or per row, and
    ("MatMul", "left") to the one for a constant on the left side, ("MatMul", "computed") to that for two computed ones,
    (operator, "blocks") to the one for weights in blocks beside float activations;
    ("AveragePool", "sum") is the kernel for windows of up to `largest_sum` elements, where these are divided by up to
    `most_divisors` different numbers, as padding does not count;
    `padded_channels` are the numbers of channels for which an integer Conv is faster once they are padded to 4, with
    filters of up to `padded_window` elements (kH kW);
    `least_channels_3d` is the least number of channels that a filter of a 3-D Conv reads for int8 to be faster;
    `least_hidden` is the least hidden size of an LSTM for which int8 gains more than quantizing each step costs;
    `small` is the least K and N for which a MatMul or Gemm gains more than its Q and DQ cost;
    `small_left` is the least M and K of a MatMul whose stored matrix [M, K] is on the left side;
    `pairs_with_q` names the operators that the runtime rewrites to integer when they stand between DQ and Q;
    `slow_fusions` names fusions of the runtime that are slower than what they replace;
    `saturates` tells whether it adds two products of uint8 by int8 in 16 bits, for which weight scales leave room;
    `fused` names its com.microsoft operators that are faster than the small operators which they stand for;
    `portable` tells whether operators of ONNX alone are written, and what the runtime fuses of them is what runs;
    `half` tells whether it computes in float16 and bfloat16: where not, such models are computed in float32;
    `contrib` names the com.microsoft operators that take float32 wherever they take a half type.
    """

    name: str
    provider: str
    format: str
    lowerings: dict[tuple[str, str], str] = field(default_factory=dict)
    largest_sum: int = 0
    most_divisors: int = 1
    padded_channels: frozenset[int] = frozenset()
    padded_window: int = 0
    least_channels_3d: int = 1
    least_hidden: int = 1
    small: int = 1
    small_left: int = 1
    pairs_with_q: frozenset[str] = frozenset()
    slow_fusions: frozenset[str] = frozenset()
    saturates: bool = False
    fused: frozenset[str] = frozenset()
    portable: bool = False
    half: bool = False
    contrib: frozenset[str] = frozenset()
