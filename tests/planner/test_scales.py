"""From ranges and weights to scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, make_model, node, random
from lowering_support import CPU, canonical, make, recipe

from onnxq.errors import ModelError
from onnxq.numerics import affine
from onnxq.plan import Plan
from onnxq.planner.outline import outline
from onnxq.planner.scales import finish

ROWS = {"x": [4, 32]}
W, B = random(32, 32), random(32, seed=1)


def gemm(weight: Any = W, bias: Any = B) -> onnx.ModelProto:
    return make_model([node("Gemm", "x w b", "y", name="fc")], ROWS, {"y": [4, 32]}, {"w": weight, "b": bias})


def finished(model: onnx.ModelProto, opened: Opener, ranges: dict[str, tuple[float, float]] | None = None,
             name: str = "w8a8") -> Plan:
    graph = canonical(opened(model))
    found = outline(graph, recipe(name), CPU)
    return finish(found, graph, ranges or dict.fromkeys(found.ranges_of, (-1.0, 1.0)), recipe(name), CPU)


# ------------------------------------------------------------------ activations


@pytest.mark.parametrize(("low", "high", "scale", "zero_point"), [
    (-1.0, 3.0, 4 / 255, 64),
    (0.0, 6.0, 6 / 255, 0),  # behind a Relu: code 0 is 0
    (2.0, 6.0, 6 / 255, 0),  # 0 is always in the range
    (-4.0, -1.0, 4 / 255, 255),
    (0.0, 0.0, 1 / 255, 0),  # an all-zero tensor counts as [0, 1]
    (-3e38, 3e38, 6e38 / 255, 128),
])
def test_uint8_scales_of_a_range(low: float, high: float, scale: float, zero_point: int, opened: Opener) -> None:
    params = finished(gemm(), opened, {"x": (low, high)}).activations["x"]
    assert params.scale == np.float32(scale)
    assert params.zero_point == zero_point
    assert (params.scale.shape, params.zero_point.dtype) == ((), np.uint8)
    assert np.isfinite(params.scale)
    zero = affine.quantize(np.zeros(1, np.float32), params)
    assert affine.dequantize(zero, params)[0] == 0.0


CONCAT = {"w0": random(8, 8, 1, 1), "w1": random(8, 8, 1, 1, seed=1), "w2": random(8, 16, 1, 1)}


@pytest.mark.parametrize(("behind", "ranges", "shared"), [
    ("", {"a": (-1.0, 1.0), "b": (-2.0, 2.0), "c": (-2.0, 2.0)}, "ab"),
    ("", {"a": (-0.9, 0.9), "b": (-2.0, 2.0), "c": (-2.0, 2.0)}, "b"),  # it would lose more than a bit
    ("Relu", {"a": (0.0, 2.0), "b": (-2.0, 2.0), "c": (-2.0, 2.0)}, "b"),  # its code 0 is its Relu
    ("Relu", {"a": (0.0, 2.0), "b": (0.0, 3.0), "c": (0.0, 3.0)}, "ab"),
    ("Clip", {"a": (0.0, 2.0), "b": (0.0, 3.0), "c": (0.0, 3.0)}, "b"),  # its code 255 is its upper bound
])
def test_what_a_concat_joins_takes_the_scale_of_its_result(
        behind: str, ranges: dict[str, tuple[float, float]], shared: str, opened: Opener) -> None:
    """Its kernel copies codes then. MaxPool moves codes of a, so that they change with those of a."""
    nodes = [node("Conv", "x w0", "raw" if behind else "a"), node("Conv", "x w1", "b"),
             node("MaxPool", "a", "p", kernel_shape=[1, 1]), node("Concat", "p b", "c", axis=1),
             node("Conv", "c w2", "y")]
    if behind:
        nodes.insert(1, node(behind, "raw" if behind == "Relu" else "raw zero two", "a"))
    model = make_model(nodes, {"x": [1, 8, 4, 4]}, {"y": None},
                       {**CONCAT, **({"zero": np.float32(0), "two": np.float32(2)} if behind == "Clip" else {})})
    scales = finished(model, opened, {"x": (-1.0, 1.0), "y": (-1.0, 1.0), **ranges}).activations
    for name in "ab":
        wanted = ranges["c"] if name in shared else ranges[name]
        assert scales[name].scale == pytest.approx((wanted[1] - wanted[0]) / 255)
        assert (scales[name].zero_point == scales["c"].zero_point) or name not in shared
    assert scales["p"] == scales["a"]


def test_concats_in_a_row_share_one_scale(opened: Opener) -> None:
    """As in DenseNet: the last one's, as far as a bit of each tensor goes."""
    model = make_model([node("Conv", "x w0", "a"), node("Conv", "x w1", "b"), node("Concat", "a b", "c", axis=1),
                        node("Concat", "c a", "d", axis=1), node("Conv", "d w3", "y")], {"x": [1, 8, 4, 4]},
                       {"y": None}, {**CONCAT, "w3": random(8, 24, 1, 1)})
    ranges = {"x": (-1.0, 1.0), "a": (-1.0, 1.0), "b": (-1.5, 1.5), "c": (-1.5, 1.5), "d": (-1.9, 1.9), "y": (-1, 1)}
    scales = finished(model, opened, ranges).activations
    assert {float(scales[t].scale) for t in "abcd"} == {float(np.float32(3.8 / 255))}


def test_known_ranges_stay_as_they_are_in_front_of_a_concat(opened: Opener) -> None:
    """The codes of a HardSigmoid from 0 to 255 are its results from 0 to 1."""
    model = make_model([node("Conv", "x w0", "a"), node("HardSigmoid", "a", "h"), node("Concat", "a h", "c", axis=1),
                        node("Conv", "c w2", "y")], {"x": [1, 8, 4, 4]}, {"y": None}, CONCAT)
    scales = finished(model, opened, {"x": (-1, 1), "a": (-1, 1), "c": (-1, 1), "y": (-1, 1)}).activations
    assert (scales["h"].scale, scales["h"].zero_point) == (np.float32(1 / 255), 0)
    assert scales["a"].scale == scales["c"].scale


def test_a_constant_tensor_is_exact(tmp_path: Path) -> None:
    """Every row gives the same 3.0: one code, decoded without error."""
    model = make_model([node("Gemm", "x w b", "h", name="fc"), node("Gemm", "h w b", "y", name="fc2")], ROWS,
                       {"y": [4, 32]}, {"w": np.zeros((32, 32), np.float32), "b": np.full(32, 3, np.float32)})
    made = make(model, tmp_path, [{"x": random(4, 32)}])
    params = made.plan.activations["h"]
    assert params.scale == np.float32(3 / 255)
    np.testing.assert_allclose(made.run(made.compiled)["y"], 3.0, rtol=1e-6)


def test_an_all_zero_tensor_stays_zero(tmp_path: Path) -> None:
    model = make_model([node("Gemm", "x w", "h"), node("Relu", "h", "r"), node("Gemm", "r w b", "y")], ROWS,
                       {"y": [4, 32]}, {"w": np.abs(W), "b": B})
    made = make(model, tmp_path, [{"x": -np.abs(random(4, 32))}])  # Relu lets nothing through
    # the bias is int32 at the scale of the products: half a step of it is what may be lost
    step = made.plan.activations["r"].scale * np.abs(W).max() / 127
    assert step < 1e-3
    np.testing.assert_allclose(made.run(made.compiled)["y"], np.broadcast_to(B, (4, 32)), rtol=0, atol=step)


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize(("op", "shape", "axis"), [("MatMul", (32, 24), 1), ("Conv", (24, 8, 3, 3), 0),
                                                   ("Conv", (24, 8, 5), 0)])
def test_weight_scales_run_along_the_output_channels(op: str, shape: tuple[int, ...], axis: int,
                                                     opened: Opener) -> None:
    weight = random(*shape)
    x = [4, 32] if op == "MatMul" else [1, 8, *[9] * (len(shape) - 2)]
    plan = finished(make_model([node(op, "x w", "y")], {"x": x}, {"y": None}, {"w": weight}), opened)
    params = plan.weights["w"]
    others = tuple(k for k in range(len(shape)) if k != axis)
    np.testing.assert_array_equal(params.scale, (np.abs(weight).max(axis=others).astype(np.float64) / 127).astype(
        np.float32))
    assert (params.axis, params.dtype.name) == (axis, "int8")
    assert not params.zero_point.any()


def test_all_zero_weights(opened: Opener) -> None:
    weight = W.copy()
    weight[:, 3] = 0
    scale = finished(gemm(weight), opened).weights["w"].scale
    assert scale[3] == 1.0
    assert np.isfinite(scale).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["w8a8", "w8a8-dynamic-tensor"])
def test_weights_that_are_no_numbers_are_refused(bad: float, name: str, opened: Opener) -> None:
    weight = W.copy()
    weight[3, 4] = bad
    with pytest.raises(ModelError, match=r"the weights 'w' of fc hold NaN or infinite values; export the model again"):
        finished(gemm(weight), opened, name=name)
    bias = B.copy()
    bias[2] = bad
    with pytest.raises(ModelError, match=r"the bias 'b' of fc holds NaN or infinite values; export the model again"):
        finished(gemm(bias=bias), opened, name=name)


# ------------------------------------------------------------------ bias guard


def test_a_bias_that_fits_leaves_the_weights_alone(opened: Opener) -> None:
    plain = finished(make_model([node("MatMul", "x w", "y")], ROWS, {"y": None}, {"w": W}), opened).weights["w"].scale
    np.testing.assert_array_equal(finished(gemm(), opened).weights["w"].scale, plain)


def test_tiny_activations_enlarge_the_scales_of_large_biases_only(opened: Opener) -> None:
    bias = np.zeros(32, np.float32)
    bias[5] = 100.0
    params = finished(gemm(bias=bias), opened, {"x": (-1e-9, 1e-9)}).weights["w"]
    plain = (np.abs(W).max(axis=0).astype(np.float64) / 127).astype(np.float32)
    changed = np.flatnonzero(params.scale != plain)
    assert changed.tolist() == [5]
    x_scale = np.float32(2e-9 / 255)
    assert 100.0 / (x_scale * params.scale[5].astype(np.float64)) <= 2**30


def test_a_shared_weight_takes_the_largest_scale_that_a_bias_needs(opened: Opener) -> None:
    model = make_model([node("Gemm", "x w b", "h"), node("Gemm", "z w c", "k"), node("Add", "h k", "y")],
                       {"x": [4, 32], "z": [4, 32]}, {"y": None},
                       {"w": W, "b": np.full(32, 1.0, np.float32), "c": np.full(32, 50.0, np.float32)})
    tiny = (-1e-9, 1e-9)
    params = finished(model, opened, {"x": tiny, "z": tiny}).weights["w"]
    x_scale = np.float64(np.float32(2e-9 / 255))
    assert (50.0 / (x_scale * params.scale.astype(np.float64)) <= 2**30).all()


def test_a_bias_that_no_scale_can_hold_is_refused_with_the_remedy(opened: Opener) -> None:
    huge = np.full(32, 3e38, np.float32)
    with pytest.raises(ModelError, match=r"no int32 scale holds the bias of fc .* --keep-float 'fc'"):
        finished(gemm(W * np.float32(1e-30), huge), opened, {"x": (-1e-38, 1e-38)})


def test_a_plan_without_activations_needs_no_ranges(opened: Opener) -> None:
    plan = finished(gemm(), opened, name="w8a8-dynamic-tensor")
    assert plan.activations == {}
    assert set(plan.weights) == {"w"}
