"""Canonical rewrites for what joins int8 regions: hard swish, PRelu, factors behind a Conv, Pad and Resize of axes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, Try, apply, make_model, node, random
from lowering_support import canonical
from onnx import TensorProto

from onnxq.graph import Graph
from onnxq.passes.canonicalize.affine_to_conv import AffineToConv
from onnxq.passes.canonicalize.all_axes import AllAxes
from onnxq.passes.canonicalize.hard_swish import HardSwish
from onnxq.passes.canonicalize.prelu_to_leaky import PReluToLeaky

IMAGE = {"x": random(2, 4, 6, 6) * np.float32(3)}
PORTS = {"x": [2, 4, 6, 6]}
FREE = [None] * 4
NUMBERS = {"three": np.float32(3), "zero": np.float32(0), "six": np.float32(6), "sixth": np.float32(1 / 6),
           "one": np.full((1, 1, 1, 1), 3, np.float32), "eight": np.float32(8), "row": random(6)}


def ops(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes]


def of(nodes: list[onnx.NodeProto], outputs: list[str] | None = None, opset: int = 17,
       stored: dict[str, Any] | None = None) -> onnx.ModelProto:
    read = {t for n in nodes for t in n.input}
    known = {**NUMBERS, **(stored or {})}
    return make_model(nodes, PORTS, dict.fromkeys(outputs or ["y"], FREE),
                      {k: v for k, v in known.items() if k in read}, opset)


# ------------------------------------------------------------------ hard-swish


@pytest.mark.parametrize("opset", [14, 22])
def test_hard_swish_is_a_product_with_a_hard_sigmoid(opset: int, fires: Try) -> None:
    graph, skips = fires(of([node("HardSwish", "x", "y")], opset=opset), HardSwish(), IMAGE)
    assert (sorted(ops(graph)), skips) == (["HardSigmoid", "Mul"], [])


ADD, CLIP = node("Add", "x three", "a"), node("Clip", "a zero six", "c")
SPELLED: dict[str, tuple[list[onnx.NodeProto], list[str], tuple[float, float]]] = {
    "gate by Div": ([ADD, CLIP, node("Div", "c six", "y")], ["HardSigmoid"], (1 / 6, 0.5)),
    "gate by Mul": ([node("Add", "one x", "a"), CLIP, node("Mul", "sixth c", "y")], ["HardSigmoid"], (1 / 6, 0.5)),
    "other numbers": ([ADD, node("Clip", "a zero eight", "c"), node("Div", "c eight", "y")], ["HardSigmoid"],
                      (1 / 8, 3 / 8)),
    "product before": ([ADD, CLIP, node("Mul", "x c", "p"), node("Div", "p six", "y")], ["HardSigmoid", "Mul"],
                       (1 / 6, 0.5)),
    "product behind": ([ADD, CLIP, node("Mul", "c sixth", "g"), node("Mul", "g x", "y")], ["HardSigmoid", "Mul"],
                       (1 / 6, 0.5)),
}


@pytest.mark.parametrize("case", SPELLED)
def test_spelled_out_hard_sigmoids(case: str, fires: Try) -> None:
    nodes, wanted, (alpha, beta) = SPELLED[case]
    graph, skips = fires(of(nodes), HardSwish(), IMAGE)
    assert (sorted(ops(graph)), skips) == (wanted, [])
    gate = next(n for n in graph.nodes if n.op == "HardSigmoid")
    assert (gate.attrs["alpha"], gate.attrs["beta"]) == pytest.approx((alpha, beta))


NO_HARD_SIGMOID: dict[str, tuple[list[onnx.NodeProto], list[str], list[tuple[str, str]]]] = {
    "no Add": ([node("Clip", "x zero six", "c"), node("Div", "c six", "y")], ["y"], []),
    "an Add of numbers": ([node("Add", "x row", "a"), CLIP, node("Div", "c six", "y")], ["y"], []),
    "another divisor": ([ADD, CLIP, node("Div", "c eight", "y")], ["y"],
                        [("Clip_c", "what is clipped at 6 is not divided by it")]),
    "divided the other way": ([ADD, CLIP, node("Div", "six c", "y")], ["y"],
                              [("Clip_c", "what is clipped at 6 is not divided by it")]),
    "clipped above 0": ([ADD, node("Clip", "a three six", "c"), node("Div", "c six", "y")], ["y"], []),
    "the sum is read": ([ADD, CLIP, node("Div", "c six", "y")], ["y", "a"], []),
    "the clipped is read": ([ADD, CLIP, node("Div", "c six", "y")], ["y", "c"],
                            [("Clip_c", "what is clipped at 6 is not divided by it")]),
    "the product is read": ([ADD, CLIP, node("Mul", "x c", "p"), node("Div", "p six", "y")], ["y", "p"],
                            [("Clip_c", "what is clipped at 6 is not divided by it")]),
}


@pytest.mark.parametrize("case", NO_HARD_SIGMOID)
def test_what_is_no_hard_sigmoid(case: str, leaves: Try) -> None:
    nodes, outputs, wanted = NO_HARD_SIGMOID[case]
    _, skips = leaves(of(nodes, outputs), HardSwish(), IMAGE)
    assert skips == wanted


def test_a_gate_behind_a_conv_is_found_before_its_constant_becomes_a_bias(opened: Opener) -> None:
    model = make_model([node("Conv", "x w", "k"), node("Add", "k three", "a"), CLIP, node("Mul", "k c", "p"),
                        node("Div", "p six", "y")], PORTS, {"y": FREE}, {**NUMBERS, "w": random(4, 4, 1, 1)})
    assert sorted(ops(canonical(opened(model)))) == ["Conv", "HardSigmoid", "Mul"]
    gate = make_model([node("Conv", "x w", "k"), node("Add", "k three", "a"), CLIP, node("Div", "c six", "y")], PORTS,
                      {"y": FREE}, {**NUMBERS, "w": random(4, 4, 1, 1)})
    assert sorted(ops(canonical(opened(gate)))) == ["Conv", "HardSigmoid"]


# ------------------------------------------------------------------ prelu-to-leaky


@pytest.mark.parametrize("slope", [np.float32(0.2), np.full((4, 1, 1), -0.3, np.float32), np.array([1.5], np.float32)],
                         ids=["scalar", "the same for all channels", "steep"])
def test_prelu_of_one_slope(slope: Any, fires: Try) -> None:
    graph, skips = fires(of([node("PRelu", "x s", "y")], stored={"s": slope}), PReluToLeaky(), IMAGE)
    assert (ops(graph), skips) == (["LeakyRelu"], [])


def test_prelu_of_several_slopes_or_computed_ones(leaves: Try) -> None:
    model = of([node("PRelu", "x s", "y")], stored={"s": random(4, 1, 1)})
    assert leaves(model, PReluToLeaky(), IMAGE)[1] == [("PRelu_y", "it has a slope per channel")]
    model = of([node("ReduceMax", "x", "s"), node("PRelu", "x s", "y")])
    assert leaves(model, PReluToLeaky(), IMAGE)[1] == [("PRelu_y", "its slope is computed")]


# ------------------------------------------------------------------ affine-to-conv


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("factor", [(8, 1, 1), (1, 8, 1, 1), (), (1,)], ids=str)
def test_factors_go_into_the_weights_and_the_bias(factor: tuple[int, ...], bias: bool, fires: Try) -> None:
    stored = {"w": random(8, 4, 3, 3), "f": random(*factor) if factor else np.float32(0.3),
              **({"b": random(8)} if bias else {})}
    graph, skips = fires(of([node("Conv", "x w b" if bias else "x w", "c"), node("Mul", "f c", "y")], stored=stored),
                         AffineToConv(), IMAGE)
    assert (ops(graph), skips) == (["Conv"], [])
    assert len(graph.nodes[0].inputs) == 2 + bias


def test_a_chain_of_factors_and_terms_is_one_conv(fires: Try) -> None:
    stored = {"w": random(8, 4, 3, 3), "f": random(8, 1, 1), "a": random(8, 1, 1, seed=5), "g": np.float32(2)}
    graph, _ = fires(of([node("Conv", "x w", "c"), node("Mul", "c f", "d"), node("Add", "a d", "e"),
                         node("Mul", "e g", "y")], stored=stored), AffineToConv(), IMAGE)
    assert ops(graph) == ["Conv"]


def test_a_weight_that_two_convs_share_is_scaled_for_one(fires: Try) -> None:
    stored = {"w": random(4, 4, 3, 3), "f": random(4, 1, 1)}
    nodes = [node("Conv", "x w", "c", pads=[1] * 4), node("Mul", "c f", "d"), node("Conv", "d w", "y")]
    graph, _ = fires(of(nodes, stored=stored), AffineToConv(), IMAGE)
    assert ops(graph) == ["Conv", "Conv"]
    assert graph.nodes[0].inputs[1].name == "w.Mul_d.scaled"


def test_factors_that_are_not_per_channel(leaves: Try) -> None:
    model = of([node("Conv", "x w", "c"), node("Mul", "c f", "y")], stored={"w": random(8, 4, 3, 3), "f": random(4)})
    assert leaves(model, AffineToConv(), IMAGE)[1] == [
        ("Mul_y", "what it multiplies by is not one number per channel")]


# ------------------------------------------------------------------ all-axes


def axes_model(kind: str, inputs: str, stored: dict[str, Any], more: dict[str, Any] | None = None,
               ports: dict[str, Any] | None = None, **attrs: Any) -> onnx.ModelProto:
    return make_model([node(kind, inputs, "y", **attrs)], {**(ports or PORTS), **(more or {})}, {"y": FREE}, stored,
                      opset=18)


# name: model, the input that named some axes, what it holds for all
AXES: dict[str, tuple[onnx.ModelProto, int, list[float]]] = {
    "Pad": (axes_model("Pad", "x p _ a", {"p": np.array([1, 2, 0, 3]), "a": np.array([3, -2])}), 1,
            [0, 0, 2, 1, 0, 0, 3, 0]),
    "Pad with a value": (axes_model("Pad", "x p v a", {"p": np.array([2, 1]), "v": np.float32(7), "a": np.array([1])}),
                         1, [0, 2, 0, 0, 0, 1, 0, 0]),
    "Resize by scales": (axes_model("Resize", "x _ s", {"s": np.array([3, 2], np.float32)}, axes=[3, 2]), 2,
                         [1, 1, 2, 3]),
    "Resize to sizes": (axes_model("Resize", "x _ _ s", {"s": np.array([9, 3])}, axes=[-1, -2]), 3, [2, 4, 3, 9]),
}


@pytest.mark.parametrize("case", AXES)
def test_pad_and_resize_of_some_axes(case: str, fires: Try) -> None:
    model, index, wanted = AXES[case]
    graph, skips = fires(model, AllAxes(), IMAGE)
    assert skips == []
    item = graph.nodes[0]
    assert graph.read(item.inputs[index]).tolist() == wanted
    assert "axes" not in item.attrs
    assert item.op == "Resize" or graph.optional_input(item, 3) is None


SOME_AXES: dict[str, tuple[onnx.ModelProto, dict[str, Any], str]] = {
    "computed pads": (axes_model("Pad", "x p _ a", {"a": np.array([3])}, {"p": (TensorProto.INT64, [2])}),
                      {"p": np.array([1, 1])}, "its pads, its axes or the rank of what it pads is computed"),
    "computed scales": (axes_model("Resize", "x _ s", {}, {"s": [1]}, axes=[3]), {"s": np.array([2], np.float32)},
                        "its scales, sizes, region or the rank of what it resizes is computed"),
    "aspect ratio": (axes_model("Resize", "x _ _ s", {"s": np.array([9, 3])}, axes=[2, 3],
                                keep_aspect_ratio_policy="not_larger"), {}, "it keeps the aspect ratio of some axes"),
    "free sizes": (axes_model("Resize", "x _ _ s", {"s": np.array([9, 3])}, ports={"x": ["N", 4, 6, 6]}, axes=[2, 3]),
                   {}, "its other axes have no fixed size"),
}


@pytest.mark.parametrize("case", SOME_AXES)
def test_pad_and_resize_of_axes_that_stay(case: str, leaves: Try) -> None:
    model, feed, reason = SOME_AXES[case]
    _, skips = leaves(model, AllAxes(), {**IMAGE, **feed})
    assert [s[1] for s in skips] == [reason]


def test_axes_may_be_left_alone_where_there_are_none(opened: Opener) -> None:
    graph = opened(axes_model("Pad", "x p", {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1])}))
    assert apply(AllAxes(), graph) == (False, [])
