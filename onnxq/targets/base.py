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

    `scheme` and `scheme_without_data` are what `auto` stands for; `activations` is the type of integer activations, and
    `symmetric` tells whether their zero point is 0 (a Relu is no clamp of theirs then, and stays); `float_bias` whether
    biases of integer layers are float; `block_bits` and `block_sizes` are the blocks of weights with kernels,
    `code_bits` the types below 8 bits that are decoded at load, and `decodes` tells whether Cast and Mul decode weights
    there at all; `odd_tables` whether look-ups take zero points of 4 bits from rows of an odd number of blocks; `opset`
    and `ir_version` are the latest of ONNX; `floats` is the type that float parts compute in. `operators` are those
    that the provider runs, with the types of their first input (none: any), None for all; `static` tells whether it
    wants fixed sizes, `sizes_on_cpu` whether arithmetic with sizes stays on the CPU. `machines` are the processors, by
    platform.machine(), on which the provider found here is this target, None for all: elsewhere its models are checked
    by the CPU provider, and not timed. `since` is the oldest onnxruntime that runs what is written. `config` and
    `provider_options` are what a session of the application should set.
    """

    name: str
    provider: str
    format: str
    summary: str = ""
    scheme: str = "w8a8"
    scheme_without_data: str = "w8a8-dynamic"
    activations: str = "uint8"
    symmetric: bool = False
    float_bias: bool = False
    block_bits: frozenset[int] = frozenset({2, 4, 8})
    block_sizes: frozenset[int] = frozenset({16, 32, 64, 128, 256})
    code_bits: frozenset[int] = frozenset({2, 4})
    decodes: bool = True
    odd_tables: bool = False
    opset: int | None = None
    ir_version: int | None = None
    floats: str = "float32"
    operators: dict[str, frozenset[str]] | None = None
    static: bool = False
    sizes_on_cpu: bool = False
    machines: frozenset[str] | None = None
    since: str = "1.25"
    config: tuple[tuple[str, str], ...] = ()
    provider_options: tuple[tuple[str, str], ...] = ()
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
