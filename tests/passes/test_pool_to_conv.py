"""Small AveragePools by the kernel of Conv, against numpy, code by code, in both formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, make_model, node, random, text
from lowering_support import (
    BOTH_FORMATS,
    CPU,
    Array,
    canonical,
    codes_of,
    convolve,
    make,
    recipe,
    requantized,
)

from onnxq.passes.lower import lower
from onnxq.passes.lower.pool_to_conv import PoolToConv
from onnxq.passes.lower.qlinear_others import LowerJoining
from onnxq.passes.manager import Context, PassManager
from onnxq.passes.quantize import quantize
from onnxq.plan import NodePlan, Plan
from onnxq.planner.outline import outline
from onnxq.planner.scales import finish

OPTIMIZED = pytest.mark.parametrize("optimize", [True, False], ids=["optimized", "plain"])
SHAPE = [2, 16, 6, 6]
EYE = np.eye(16, dtype=np.float32).reshape(16, 16, 1, 1)

# attributes, and how many Convs stand for the pool: one for each number that sums are divided by
POOLS: dict[str, tuple[dict[str, Any], int]] = {
    "side by side": ({"kernel_shape": [2, 2], "strides": [2, 2]}, 1),
    "overlapping": ({"kernel_shape": [3, 3]}, 1),
    "valid": ({"kernel_shape": [3, 2], "strides": [2, 1], "auto_pad": "VALID"}, 1),
    "in a row": ({"kernel_shape": [1, 6]}, 1),
    "padding counts": ({"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}, 1),
    "padding does not": ({"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, 3),
    "strided": ({"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}, 3),
    "uneven pads": ({"kernel_shape": [2, 2], "strides": [2, 1], "pads": [1, 0, 0, 1]}, 3),
    "on one side": ({"kernel_shape": [3, 1], "strides": [1, 2], "pads": [0, 0, 1, 0]}, 2),
}
POOL = {"kernel_shape": [1, 1], "strides": [1, 1], "pads": [0] * 4, "count_include_pad": 0}


def pooled(attrs: dict[str, Any], clamp: str = "") -> onnx.ModelProto:
    """x -> Conv by 1 -> a -> AveragePool (-> Relu) -> j -> Conv by 1 -> y; a and j are outputs, too."""
    behind = [node("AveragePool", "a", "i" if clamp else "j", name="pool", **attrs)]
    if clamp:
        behind.append(node(clamp, "i", "j", name="clamp"))
    return make_model([node("Conv", "x eye", "a"), *behind, node("Conv", "j eye", "y")], {"x": SHAPE},
                      {"y": [None] * 4, "a": SHAPE, "j": [None] * 4}, {"eye": EYE})


def means(a: Array, attrs: dict[str, Any]) -> Array:
    """AveragePool-22 of a [N, C, H, W] with ceil_mode 0, in float64."""
    window, strides, pads, counts = ({**POOL, **attrs}[k] for k in POOL)
    a, ones = a.astype(np.float64), np.ones((a.shape[1], 1, *window))
    sums, inside = (convolve(x, ones, strides, pads, [1, 1], a.shape[1]) for x in (a, np.ones_like(a)))
    return sums / (np.prod(window) if counts else inside)


@OPTIMIZED
@BOTH_FORMATS
@pytest.mark.parametrize("clamp", ["", "Relu"])
@pytest.mark.parametrize("case", POOLS)
def test_small_pools_are_convs_of_ones(case: str, clamp: str, fmt: str, optimize: bool, tmp_path: Path) -> None:
    attrs, convs = POOLS[case]
    made = make(pooled(attrs, clamp), tmp_path, [{"x": random(*SHAPE, seed=4)}], fmt)
    assert made.skips == []
    assert made.ran("pool") == ["QLinearConv" if fmt == "qoperator" else "QLinearAveragePool"]
    if fmt == "qoperator":
        assert made.stored().count("QLinearConv") == convs + 2
        assert made.stored().count("Where") == convs - 1
    found = made.run(made.compiled, optimize=optimize)
    wanted = means(found["a"], attrs)
    codes, right = codes_of(made, "j", found["j"]), requantized(made, "j", np.maximum(wanted, 0) if clamp else wanted)
    assert codes.shape == right.shape
    assert np.abs(codes - right).max() <= 1  # the borders, too: each is divided by its own number and rounded once
    assert np.mean(codes != right) < 0.01, "more than a tie here and there"


@OPTIMIZED
@pytest.mark.parametrize("low", [0.0, -5.0])
@pytest.mark.parametrize("case", ["side by side", "padding counts", "padding does not"])
def test_sums_of_the_greatest_codes_do_not_saturate(case: str, low: float, optimize: bool, tmp_path: Path) -> None:
    """All of a is at code 255, or at 0: without VNNI two products are added in 16 bits."""
    attrs, _ = POOLS[case]
    for value in (5.0, low):
        made = make(pooled(attrs), tmp_path, [{"x": np.full(SHAPE, value, np.float32)}],
                    ranges=dict.fromkeys("xajy", (low, 5.0)))
        assert made.ran("pool") == ["QLinearConv"]
        found = made.run(made.compiled, optimize=optimize)
        assert np.abs(codes_of(made, "j", found["j"]) - requantized(made, "j", means(found["a"], attrs))).max() <= 1


def test_golden_pools(opened: Opener, golden: Callable[[str, str], None]) -> None:
    nodes = [node("Conv", "x eye", "a"), node("AveragePool", "a", "b", name="apart", kernel_shape=[2, 2]),
             node("AveragePool", "b", "c", name="padded", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
             node("Conv", "c eye", "y")]
    graph = canonical(opened(make_model(nodes, {"x": SHAPE}, {"y": [None] * 4}, {"eye": EYE})))
    found = outline(graph, recipe(), CPU)
    context = Context(CPU, finish(found, graph, dict.fromkeys(found.ranges_of, (-1.0, 2.0)), recipe(), CPU))
    PassManager([*quantize(), *lower("qoperator")]).run(graph, context)
    golden("lower-pools", text(graph))
    assert context.skips == []
    assert PassManager([PoolToConv()]).run(graph, context) is False


NO_CODES = "not everything around it is uint8 codes"
NOT_KNOWN = "how many channels it has, or elements each window, is not known"


@pytest.mark.parametrize(("attrs", "shape", "pair", "reason"), [
    ({"kernel_shape": [2, 2]}, SHAPE, "scale", NO_CODES),
    ({"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, ["n", 16, "h", 6], "scale zero", NOT_KNOWN),
    ({"kernel_shape": [2, 2]}, ["n", "c", 6, 6], "scale zero", NOT_KNOWN),
], ids=["no zero points", "no height", "no channels"])
def test_a_pool_that_does_not_fit_stays(attrs: dict[str, Any], shape: list[Any], pair: str, reason: str,
                                        opened: Opener) -> None:
    """As by a Plan that was made for another graph."""
    nodes = [node("QuantizeLinear", f"x {pair}", "q"), node("DequantizeLinear", f"q {pair}", "d"),
             node("AveragePool", "d", "j", name="pool", **attrs), node("QuantizeLinear", f"j {pair}", "r"),
             node("DequantizeLinear", f"r {pair}", "y")]
    stored = {"scale": np.float32(0.1), "zero": np.uint8(7)}
    graph = opened(make_model(nodes, {"x": shape}, {"y": [None] * 4}, {k: stored[k] for k in pair.split()}))
    plan = Plan("w8a8", "cpu", {"pool": NodePlan("pool", "AveragePool", "w8a8", "QLinearConv", "", int_output=True)})
    context, before = Context(CPU, plan), text(graph)
    assert PassManager([PoolToConv(), LowerJoining()]).run(graph, context) is False
    assert [(s.pass_name, s.node, s.reason) for s in context.skips] == [("pool-to-conv", "pool", reason)]
    assert text(graph) == before
