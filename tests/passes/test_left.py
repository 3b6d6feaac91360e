"""MatMul with a constant on the left side: what is written, what it computes, and what stays float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Opener, make_model, node, random
from lowering_support import BOTH_FORMATS, Array, described, make, needs_vnni, verdicts

W = random(130, 128) * np.linspace(0.01, 2, 130, dtype=np.float32).reshape(-1, 1)  # rows of very different scale
SHAPES = {"2-D": [128, 20], "3-D": [3, 128, 20], "4-D": [2, 2, 128, 7]}


def reference(made: Any, x: Array) -> Array:
    """Exact integer products of the codes in the file, scaled by rows."""
    stored = made.initializers()
    w = stored["w.q"].astype(np.int64) - int(stored["w.zero_point"])
    scale, zero = np.float32(stored["x.s8.scale"]), int(stored["x.s8.zero_point"])
    codes = np.clip(np.rint(x / scale) + zero, -128, 127).astype(np.int64) - zero
    return (w @ codes).astype(np.float64) * np.float64(scale) * stored["w.scale"].astype(np.float64)


@needs_vnni
@BOTH_FORMATS
@pytest.mark.parametrize("case", SHAPES)
def test_integer_products_with_the_weights_on_the_left(case: str, fmt: str, tmp_path: Path) -> None:
    shape = SHAPES[case]
    feed = {"x": random(*shape) + np.float32(0.7)}
    model = make_model([node("MatMul", "w x", "y", name="mix")], {"x": shape}, {"y": None}, {"w": W})
    made = make(model, tmp_path, [feed], fmt)
    assert (made.skips, made.ran("mix")) == ([], ["MatMulIntegerToFloat"])
    stored = made.initializers()
    assert (stored["w.q"].dtype, stored["w.zero_point"]) == (np.uint8, 128)
    assert stored["w.scale"].shape == (130, 1)
    assert "w" not in stored
    for optimize in (True, False):
        found = made.run(made.compiled, optimize=optimize)["y"]
        wanted = reference(made, feed["x"])
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    # both rounded by half a step: |W| s_x / 2 + |x| s_w / 2, summed over K
    s_x, s_w = float(stored["x.s8.scale"]), stored["w.scale"]
    bound = np.abs(W).sum(1, keepdims=True) * s_x / 2 + (np.abs(feed["x"]) + s_x / 2).sum(-2, keepdims=True) * s_w / 2
    assert (np.abs(found - W @ feed["x"]) <= bound * 1.001).all()


@needs_vnni
@BOTH_FORMATS
def test_it_reads_what_an_int8_region_makes(fmt: str, tmp_path: Path) -> None:
    """Codes of regions are uint8, those of its own int8 at the same scale: rounding twice changes nothing."""
    model = make_model([node("Conv", "x k", "c"), node("Conv", "c k", "d"), node("MatMul", "w c", "m", name="mix"),
                        node("MatMul", "w2 c", "n", name="mix2"), node("Add", "m n", "y")], {"x": [1, 4, 128, 16]},
                       {"y": None, "d": None}, {"k": random(4, 4, 1, 1), "w": W, "w2": random(130, 128, seed=3)})
    made = make(model, tmp_path, [{"x": random(1, 4, 128, 16)}], fmt)
    assert made.ran("Conv_c", "Conv_d", "mix", "mix2") == ["QLinearConv"] * 2 + ["MatMulIntegerToFloat"] * 2
    assert made.stored(made.twin).count("QuantizeLinear") == 4  # x, c, d, and c once more in int8
    wanted, found = made.run(made.source)["y"], made.run(made.compiled)["y"]
    assert np.square(found - wanted).sum() < 1e-3 * np.square(wanted).sum()


STAYS: dict[str, tuple[list[Any], dict[str, Any], dict[str, Any], str]] = {
    "few rows": ([node("MatMul", "w x", "y", name="mix")], {"x": [128, 9]}, {"w": random(127, 128)},
                 "its constant is on the left side, and M = 127 is below 128: converting costs more than int8 gains"),
    "short rows": ([node("MatMul", "w x", "y", name="mix")], {"x": [64, 9]}, {"w": random(128, 64)},
                   "its constant is on the left side, and K = 64 is below 128: converting costs more than int8 gains"),
    "batched weights": ([node("MatMul", "w x", "y", name="mix")], {"x": [2, 128, 9]}, {"w": random(2, 128, 128)},
                        "its weight has rank 3, and the int8 kernels take rank 2"),
    "a vector": ([node("MatMul", "w x", "y", name="mix")], {"x": [128]}, {"w": random(128, 128)},
                 "its activation has rank 1"),
    "shared": ([node("MatMul", "w x", "m", name="mix"), node("MatMul", "m w", "y")], {"x": [128, 128]},
               {"w": random(128, 128)}, "its constant is on the left side and read by other nodes, too"),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_stays_float_or_stored(case: str, opened: Opener) -> None:
    nodes, ports, stored, reason = STAYS[case]
    found = verdicts(opened(make_model(nodes, ports, {"y": None}, stored)))["mix"]
    assert found.removeprefix("stored: weights stored as int8 to save space, computed in float: ").removeprefix(
        "float: ") == reason


def test_a_dynamic_scheme_and_a_wish_leave_it_stored_or_float(opened: Opener) -> None:
    model = make_model([node("MatMul", "w x", "y", name="mix")], {"x": [128, 9]}, {"y": None}, {"w": random(128, 128)})
    assert verdicts(opened(model), "w8a8-dynamic-tensor")["mix"] == (
        "stored: weights stored as int8 to save space, computed in float: its constant is on the left side")
    assert verdicts(opened(model), keep=["mix"])["mix"] == "float: kept float as asked (mix)"


@needs_vnni
def test_its_row_scales_are_those_of_the_plan(tmp_path: Path) -> None:
    model = make_model([node("MatMul", "w x", "y", name="mix")], {"x": [128, 9]}, {"y": None}, {"w": W})
    made = make(model, tmp_path, [{"x": random(128, 9)}])
    plan = made.plan
    assert described(plan.nodes["mix"]) == "MatMulIntegerToFloat"
    assert (plan.weights["w"].axis, plan.weights["w"].scale.shape) == (0, (130,))
    np.testing.assert_array_equal(made.initializers()["w.scale"].reshape(-1), plan.weights["w"].scale)
