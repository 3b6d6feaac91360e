"""Channels divided by factors: what above a tensor takes them in every form, what must not, and outputs stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, apply, make_model, node, random, run
from smooth_support import Constants, layers, ops, smoothed, smoothing

from onnxq.errors import GraphError
from onnxq.passes.absorbing import absorber
from onnxq.passes.manager import Context
from onnxq.passes.transform.smooth import Smooth, scaled
from onnxq.plan import Plan, Smoothing
from onnxq.planner.rules import verdicts
from onnxq.recipe import Fallback, Recipe
from onnxq.schemes import scheme

C, N = 12, 5  # channels that are divided; of the output
X, IMAGE = ["N", 4, 8], ["N", 3, 9, 9]
OUT, MAP = ["N", None, None], ["N", None, None, None]
FEED, IMAGES = {"x": random(2, 4, 8)}, {"x": random(2, 3, 9, 9)}
LN = "LayerNormalization"
ONE = np.float32(1)


def linear(*nodes: onnx.NodeProto, opset: int = 17, outputs: tuple[str, ...] = ("y",),
           **stored: Any) -> onnx.ModelProto:
    """x [N, 4, 8] through nodes to the layer y = t w."""
    weights = {"w": random(C, N), "w0": random(8, C, seed=1), "b0": random(C, seed=2), "g": random(C, seed=3),
               "b": random(C, seed=4), "u0": random(8, C, seed=5), **stored}
    made = [*nodes, node("MatMul", "t w", "y")]
    used = {name for n in made for name in n.input}
    return make_model(made, {"x": X}, dict.fromkeys(outputs, OUT),
                      {k: v for k, v in weights.items() if k in used}, opset=opset)


def convolved(*nodes: onnx.NodeProto, group: int = 1, **stored: Any) -> onnx.ModelProto:
    """x [N, 3, 9, 9] through nodes to the layer y = Conv(t, w)."""
    weights = {"w": random(2 * group, C // group, 3, 3), "w0": random(C, 3, 3, 3, seed=1), "b0": random(C, seed=2),
               "g": random(C, seed=3), "b": random(C, seed=4), "m": random(C, seed=5),
               "v": np.abs(random(C, seed=6)) + ONE, **stored}
    made = [*nodes, node("Conv", "t w", "y", group=group)]
    used = {name for n in made for name in n.input}
    return make_model(made, {"x": IMAGE}, {"y": MAP}, {k: v for k, v in weights.items() if k in used})


FIRST = node("MatMul", "x w0", "h")
FIRST_CONV = node("Conv", "x w0 b0", "h", pads=[1, 1, 1, 1])
RMS = [node("Mul", "h h", "q"), node("ReduceMean", "q", "v", axes=[-1]), node("Add", "v eps", "e"),
       node("Sqrt", "e", "r"), node("Reciprocal", "r", "i"), node("Mul", "h i", "n")]
GATE = [node("MatMul", "x u0", "z"), node("Sigmoid", "z", "o"), node("Mul", "z o", "s")]
EPS = {"eps": np.float32(1e-5)}

ABSORBED: dict[str, tuple[onnx.ModelProto, Constants]] = {
    "LayerNormalization": (linear(FIRST, node(LN, "h g b", "t")), {(f"{LN}_t", 1, 0), (f"{LN}_t", 2, 0)}),
    "LayerNormalization, no bias": (linear(FIRST, node(LN, "h g", "t", axis=2)), {(f"{LN}_t", 1, 0)}),
    "RMS norm in parts": (linear(FIRST, *RMS, node("Mul", "n g", "t"), **EPS), {("Mul_t", 1, -1)}),
    "RMS norm in parts, gain first": (linear(FIRST, *RMS, node("Mul", "g n", "t"), **EPS), {("Mul_t", 0, -1)}),
    "gain of rank 3": (linear(FIRST, *RMS, node("Mul", "n g", "t"), **EPS, g=random(1, 1, C)), {("Mul_t", 1, -1)}),
    "MatMul": (linear(node("MatMul", "x w0", "t")), {("MatMul_t", 1, -1)}),
    "MatMul, bias": (linear(FIRST, node("Add", "b0 h", "t")), {("MatMul_h", 1, -1), ("Add_t", 0, -1)}),
    "MatMul, bias, Relu": (linear(FIRST, node("Add", "h b0", "a"), node("Relu", "a", "t")),
                           {("MatMul_h", 1, -1), ("Add_a", 1, -1)}),
    "two biases": (linear(FIRST, node("Add", "h b0", "a"), node("Add", "a b", "t")),
                   {("MatMul_h", 1, -1), ("Add_a", 1, -1), ("Add_t", 1, -1)}),
    "a bias per position": (linear(FIRST, node("Add", "h b0", "t"), b0=random(4, C)),
                            {("MatMul_h", 1, -1), ("Add_t", 1, -1)}),
    "LeakyRelu": (linear(FIRST, node("LeakyRelu", "h", "t", alpha=0.2)), {("MatMul_h", 1, -1)}),
    "a factor of all": (linear(FIRST, node("Mul", "h two", "t"), two=np.float32(-2)), {("MatMul_h", 1, -1)}),
    "gated MLP": (linear(*GATE, FIRST, node("Mul", "s h", "t")), {("MatMul_h", 1, -1)}),
    "gated MLP, up first": (linear(*GATE, FIRST, node("Mul", "h s", "t")), {("MatMul_h", 1, -1)}),
    "Conv": (convolved(node("Conv", "x w0 b0", "t")), {("Conv_t", 1, 0), ("Conv_t", 2, 0)}),
    "Conv, no bias": (convolved(node("Conv", "x w0", "t")), {("Conv_t", 1, 0)}),
    "Conv, Relu": (convolved(FIRST_CONV, node("Relu", "h", "t")), {("Conv_h", 1, 0), ("Conv_h", 2, 0)}),
    "Conv, MaxPool": (convolved(FIRST_CONV, node("MaxPool", "h", "t", kernel_shape=[2, 2])),
                      {("Conv_h", 1, 0), ("Conv_h", 2, 0)}),
    "Conv, LeakyRelu, AveragePool": (convolved(
        FIRST_CONV, node("LeakyRelu", "h", "a"),
        node("AveragePool", "a", "t", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)),
        {("Conv_h", 1, 0), ("Conv_h", 2, 0)}),
    "BatchNormalization": (convolved(FIRST_CONV, node("BatchNormalization", "h g b m v", "t")),
                           {("BatchNormalization_t", 1, 0), ("BatchNormalization_t", 2, 0)}),
    "into groups": (convolved(FIRST_CONV, node("Relu", "h", "t"), group=3), {("Conv_h", 1, 0), ("Conv_h", 2, 0)}),
    "into a depthwise Conv": (convolved(node("Conv", "x w0", "t"), group=C), {("Conv_t", 1, 0)}),
    "from groups": (convolved(node("Conv", "x w0 b0", "t", group=3), w0=random(C, 1, 3, 3)),
                    {("Conv_t", 1, 0), ("Conv_t", 2, 0)}),
}


@pytest.mark.parametrize("form", ABSORBED)
def test_constants_above_take_the_factors(form: str, opened: Opener, tmp_path: Path) -> None:
    model, wanted = ABSORBED[form]
    graph = opened(model)
    assert layers(graph, "y").constants() == wanted
    before = ops(graph)
    graph, _ = smoothed(model, "y", IMAGES if "Conv" in before else FEED, opened, tmp_path)
    assert ops(graph) == before, "no node is added"


def test_gemms(opened: Opener, tmp_path: Path) -> None:
    model = make_model([node("Gemm", "x w0 b0", "h"), node("Relu", "h", "t"), node("Gemm", "t w b", "y")],
                       {"x": ["N", 8]}, {"y": ["N", N]},
                       {"w0": random(8, C), "b0": random(C), "w": random(C, N), "b": random(N)})
    assert layers(opened(model), "y").constants() == {("Gemm_h", 1, -1), ("Gemm_h", 2, -1)}
    smoothed(model, "y", {"x": random(3, 8)}, opened, tmp_path)


@pytest.mark.parametrize(("op", "opset"), [("RMSNormalization", 23), ("SimplifiedLayerNormalization", 17)])
def test_an_rms_normalization_operator(op: str, opset: int, opened: Opener) -> None:
    """onnx.checker knows the one, onnxruntime the other."""
    graph = opened(linear(FIRST, node(op, "h g", "t", axis=-1), opset=opset))
    assert layers(graph, "y").constants() == {(f"{op}_t", 1, 0)}
    found = smoothing(layers(graph, "y"))
    assert apply(Smooth(), graph, Context(plan=Plan("", "", smoothings={found.tensor: found}))) == (True, [])
    changed = {t.name: graph.read(t) for n in graph.nodes for t in n.inputs if hasattr(t, "_values")}
    np.testing.assert_allclose(changed["g.absorbed"] * found.factors, random(C, seed=3), rtol=1e-6)
    np.testing.assert_allclose(changed["w.smoothed"], random(C, N) * found.factors[:, None], rtol=1e-6)


def test_several_layers_read_one_tensor(opened: Opener, tmp_path: Path) -> None:
    model = linear(FIRST, node(LN, "h g b", "t"), node("MatMul", "t k", "z"), outputs=("y", "z"), k=random(C, 3))
    graph, found = smoothed(model, "y z", FEED, opened, tmp_path)
    assert [s.layers for s in found.values()] == [("MatMul_y", "MatMul_z")]
    assert ops(graph).count("Mul") == 0


SHARED = [FIRST, node(LN, "h g b", "t"), node("MatMul", "t w", "k"), node("Add", "x k", "r"),
          node("MatMul", "r w0", "i"), node(LN, "i g b", "j"), node("MatMul", "j v", "z")]


def test_constants_that_several_layers_share_are_divided_for_each(opened: Opener, tmp_path: Path) -> None:
    """Equal ones, such as biases of zeros, became one constant."""
    stored = {"w": random(C, 8), "w0": random(8, C), "v": random(C, N), "g": np.ones(C, np.float32),
              "b": np.zeros(C, np.float32)}
    model = make_model(SHARED, {"x": X}, {"z": OUT}, stored)
    graph, _ = smoothed(model, "k, z", FEED, opened, tmp_path)
    gains = [n.inputs[1].name for n in graph.nodes if n.op == LN]
    assert gains == ["g.absorbed", "g.absorbed.absorbed"]


@pytest.mark.parametrize("names", ["y z, u", "u, y z"])
def test_smoothings_of_a_chain(names: str, opened: Opener, tmp_path: Path) -> None:
    """w takes the factors of what it reads and those of what it makes."""
    model = linear(FIRST, node(LN, "h g b", "t"), node("MatMul", "t k", "z"), node("Mul", "s y", "p"),
                   node("Sigmoid", "z", "s"), node("MatMul", "p v", "u"), outputs=("u",), k=random(C, N),
                   v=random(N, 3))
    model.graph.node.insert(3, model.graph.node.pop())  # y is read further on
    graph, _ = smoothed(model, names, FEED, opened, tmp_path)
    assert "Mul" in ops(graph)


# ------------------------------------------------------------------ near misses

STAYS: dict[str, onnx.ModelProto] = {
    "a residual Add reads it": linear(FIRST, node("Relu", "h", "t"), node("Add", "t h", "z"), outputs=("y", "z")),
    "it is an output": linear(FIRST, node(LN, "h g b", "t"), outputs=("y", "t")),
    "what is above is an output": linear(FIRST, node("Relu", "h", "t"), outputs=("y", "h")),
    "what is above has a second reader": linear(FIRST, node("Relu", "h", "t"), node("Neg", "h", "z"),
                                                outputs=("y", "z")),
    "Softmax": linear(FIRST, node("Softmax", "h", "t")),
    "Clip": linear(FIRST, node("Clip", "h zero six", "t"), zero=np.float32(0), six=np.float32(6)),
    "Gelu in parts": linear(FIRST, node("Erf", "h", "t")),
    "a residual Add": linear(FIRST, node("MatMul", "x u0", "z"), node("Add", "h z", "t")),
    "a square": linear(FIRST, node("Relu", "h", "r"), node("Mul", "r r", "t")),
    "a bias that is one number": linear(FIRST, node("Add", "h one", "t"), one=ONE),
    "a bias of the LayerNormalization is computed": linear(FIRST, node("ReduceMax", "x", "m", axes=[0, 1, 2],
                                                                       keepdims=0),
                                                           node("Expand", "m c", "k"), node(LN, "h g k", "t"),
                                                           c=np.array([C])),
    "LayerNormalization over two axes": linear(FIRST, node(LN, "h g", "t", axis=1), g=random(4, C)),
    "LayerNormalization that tells its mean": linear(FIRST, node(LN, "h g b", "t mean"), node("Neg", "mean", "z"),
                                                     outputs=("y", "z")),
    "an input": linear(node("Relu", "x", "t"), w=random(8, N)),
    "another type": linear(FIRST, node("Cast", "h", "d", to=11), node("Cast", "d", "t", to=1)),
    "MatMul by a computed matrix": linear(FIRST, node("Transpose", "h", "k", perm=[0, 2, 1]),
                                          node("MatMul", "k h", "t")),
    "Conv, Sigmoid": convolved(FIRST_CONV, node("Sigmoid", "h", "t")),
    "Conv, Mul per channel": convolved(FIRST_CONV, node("Mul", "h g", "t"), g=random(C, 1, 1)),
    "MaxPool that tells places": convolved(FIRST_CONV, node("MaxPool", "h", "t places", kernel_shape=[2, 2])),
}


@pytest.mark.parametrize("why", STAYS)
def test_nothing_above_takes_them(why: str, opened: Opener, tmp_path: Path) -> None:
    model = STAYS[why]
    graph = opened(model)
    found = layers(graph, "y")
    assert found.constants() is None
    plan = Plan("", "", smoothings={"t": Smoothing("t", ("MatMul_y",), np.ones(C, np.float32), -1, True)})
    if found.axis == -1:
        with pytest.raises(GraphError, match="nothing above 't' takes the factors"):
            apply(Smooth(), graph, Context(plan=plan))
        graph, _ = smoothed(model, "y", FEED, opened, tmp_path)
        muls = [n for n in graph.nodes if n.name == "t/smooth"]
        assert [(n.op, n.outputs[0].name, n.inputs[1].name) for n in muls] == [("Mul", "t.smooth", "t.smooth.factors")]


def test_only_all_readers_may_agree(opened: Opener) -> None:
    model = linear(FIRST, node(LN, "h g b", "t"), node("MatMul", "t k", "z"), outputs=("y", "z"), k=random(C, 3))
    graph = opened(model)
    assert layers(graph, "y").constants() is None
    assert layers(graph, "z").constants() is None
    assert layers(graph, "y z").constants() is not None


def test_sizes_have_to_be_those_of_the_channels(opened: Opener) -> None:
    """A gain of one number that serves all channels, a vector whose product has rows where channels would be."""
    graph = opened(linear(FIRST, node("Mul", "h g", "t"), g=random(1)))
    assert layers(graph, "y").constants() == {("MatMul_h", 1, -1)}, "one number lets the walk go on"
    graph = opened(linear(FIRST, node("Mul", "h g", "t"), g=random(4, 1)))
    assert layers(graph, "y").constants() is None
    vector = make_model([node("MatMul", "x v", "t"), node("MatMul", "t w", "y")], {"x": [2, C, C]}, {"y": None},
                        {"v": random(C), "w": random(C, N)})
    assert layers(opened(vector), "y").constants() is None
    graph = opened(linear(node("MatMul", "x w0", "t")))
    assert absorber(graph, graph.nodes[1].inputs[0], frozenset({"MatMul_y"}), C + 1, -1) is None


def test_a_mul_at_run_time_serves_all_layers(opened: Opener, tmp_path: Path) -> None:
    model = linear(FIRST, node("Softmax", "h", "t"), node("MatMul", "t k", "z"), outputs=("y", "z", "t"),
                   k=random(C, 3))
    graph, _ = smoothed(model, "y z", FEED, opened, tmp_path)
    assert ops(graph).count("Mul") == 1
    assert {n.inputs[0].name for n in graph.nodes if n.op == "MatMul"} == {"x", "t.smooth"}


def test_an_input_of_the_graph_can_be_scaled(opened: Opener, tmp_path: Path) -> None:
    model = make_model([node("MatMul", "x w", "y")], {"x": X}, {"y": OUT}, {"w": random(8, N)})
    graph, _ = smoothed(model, "y", FEED, opened, tmp_path)
    assert ops(graph) == ["Mul", "MatMul"]


# ------------------------------------------------------------------ names, weights


@pytest.mark.parametrize("name", ["w", "w0", "b0", "MatMul_y"])
def test_weights_keep_their_names_for_globs(name: str, opened: Opener, tmp_path: Path) -> None:
    model = linear(FIRST, node("Add", "h b0", "t"))
    graph, _ = smoothed(model, "y, h", FEED, opened, tmp_path)
    kept = verdicts(graph, Recipe(scheme("w8a8"), fallback=Fallback((name,))))
    assert list(kept) == {"w": ["MatMul_y"], "w0": ["MatMul_h"], "b0": ["Add_t"], "MatMul_y": ["MatMul_y"]}[name]


@pytest.mark.parametrize("group", [1, 3, C])
def test_weights_of_groups_are_scaled_by_the_channels_that_they_read(group: int) -> None:
    weight, s = random(2 * group, C // group, 3, 3), np.exp(random(C, seed=1))
    model = make_model([node("Conv", "x w", "y", group=group)], {"x": ["N", C, 5, 5]}, {"y": None}, {"w": weight})
    feed = random(2, C, 5, 5)

    class Reader:
        op, attrs = "Conv", {"group": group}

    model_scaled = make_model([node("Conv", "x w", "y", group=group)], {"x": ["N", C, 5, 5]}, {"y": None},
                              {"w": scaled(weight, s, Reader)})  # type: ignore[arg-type]
    wanted, got = run(model, {"x": feed})["y"], run(model_scaled, {"x": feed / s[:, None, None]})["y"]
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())
