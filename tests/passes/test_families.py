"""Repeated channels: columns of the layers above in every form, what must not be repeated, and outputs stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, apply, make_model, node, random
from smooth_support import layers, ops, smoothed

from onnxq.errors import GraphError
from onnxq.graph import Graph, shape_of
from onnxq.numerics.smoothing import split
from onnxq.passes.channels import Family
from onnxq.passes.families import plain
from onnxq.passes.manager import Context
from onnxq.passes.transform.smooth import Smooth
from onnxq.plan import Plan, Smoothing
from onnxq.planner.rules import verdicts
from onnxq.recipe import Fallback, Recipe
from onnxq.schemes import scheme

C, N = 12, 5
OUT = ["N", None, None]
FEED = {"x": random(2, 4, 8)}
SOURCE = split(np.zeros(C), np.arange(1, C + 1), 4)  # one copy more of each of the largest four


def model(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("y",), opset: int = 20, **stored: Any) -> onnx.ModelProto:
    """x [N, 4, 8] through nodes to the layer y = t w."""
    weights = {"w": random(C, N), "w0": random(8, C, seed=1), "b0": random(C, seed=2), "u0": random(8, C, seed=3),
               "g": random(C, seed=4), "root": np.float32(np.sqrt(2)), "one": np.float32(1), "half": np.float32(0.5),
               **stored}
    made = [*nodes, node("MatMul", "t w", "y")]
    used = {name for n in made for name in n.input}
    return make_model(made, {"x": ["N", 4, 8]}, dict.fromkeys(outputs, OUT),
                      {k: v for k, v in weights.items() if k in used}, opset=opset)


def found(graph: Graph) -> Family | None:
    of = layers(graph, "y")
    return plain(graph, [n.name for n in of.nodes], of.channels)


FIRST, SECOND = node("MatMul", "x w0", "h"), node("MatMul", "x u0", "u")
BIAS = node("Add", "h b0", "a")
GELU = [node("Div", "a root", "d"), node("Erf", "d", "e"), node("Add", "e one", "p"), node("Mul", "a p", "m"),
        node("Mul", "m half", "t")]
SILU = [node("Sigmoid", "h", "s"), node("Mul", "h s", "k")]

# the constants whose columns are repeated, and by what the factors are taken
FORMS: dict[str, tuple[onnx.ModelProto, set[tuple[str, int]], str]] = {
    "Gelu": (model(FIRST, BIAS, node("Gelu", "a", "t")), {("MatMul_h", 1), ("Add_a", 1)}, "Mul"),
    "Gelu in parts": (model(FIRST, BIAS, *GELU), {("MatMul_h", 1), ("Add_a", 1)}, "Mul"),
    "Relu": (model(FIRST, BIAS, node("Relu", "a", "t")), {("MatMul_h", 1), ("Add_a", 1)}, "above"),
    "Clip": (model(FIRST, node("Clip", "h zero", "t"), zero=np.float32(0)), {("MatMul_h", 1)}, "Mul"),
    "no bias": (model(FIRST, node("Sigmoid", "h", "t")), {("MatMul_h", 1)}, "Mul"),
    "the layer itself": (model(node("MatMul", "x w0", "t")), {("MatMul_t", 1)}, "above"),
    "gated MLP": (model(FIRST, *SILU, SECOND, node("Mul", "k u", "t")), {("MatMul_h", 1), ("MatMul_u", 1)}, "above"),
    "a gain per channel": (model(FIRST, node("Tanh", "h", "k"), node("Mul", "g k", "t")),
                           {("MatMul_h", 1), ("Mul_t", 0)}, "above"),
    "a bias per position": (model(FIRST, BIAS, node("Gelu", "a", "t"), b0=random(4, C)),
                            {("MatMul_h", 1), ("Add_a", 1)}, "Mul"),
    "what is moved": (model(FIRST, node("Transpose", "h", "m", perm=[0, 2, 1]), node("Sigmoid", "m", "k"),
                            node("Transpose", "k", "t", perm=[0, 2, 1])), {("MatMul_h", 1)}, "Mul"),
    "a factor for all": (model(node("MatMul", "x w0", "h"), SECOND, node("Mul", "h u", "t"), w0=random(8, 1)),
                         {("MatMul_u", 1)}, "above"),
    "one bias for two layers": (model(FIRST, SECOND, BIAS, node("Add", "u b0", "v"), node("Tanh", "a", "k"),
                                      node("Mul", "k v", "t")),
                                {("MatMul_h", 1), ("MatMul_u", 1), ("Add_a", 1), ("Add_v", 1)}, "above"),
}


@pytest.mark.parametrize("form", FORMS)
def test_columns_of_the_layers_above_are_repeated(form: str, opened: Opener, tmp_path: Path) -> None:
    made, constants, takes = FORMS[form]
    graph = opened(made)
    wide = found(graph)
    assert wide is not None
    assert set(wide.constants) == constants
    assert all(np.array_equal(part.ids, np.arange(C)) for part in wide.constants.values())
    before = ops(graph)
    graph, _ = smoothed(made, "y", FEED, opened, tmp_path, {"y": SOURCE})
    assert len(ops(graph)) == len(before) + (takes == "Mul")
    for tensor in (t for n in graph.nodes for t in n.outputs if t.name in wide.tensors):
        assert (shape_of(tensor) or ())[wide.tensors[tensor.name].axis] == SOURCE.size, "the shapes tell of it"
    kept = verdicts(graph, Recipe(scheme("w8a8"), fallback=Fallback(("w0",))))
    assert len(kept) == 1, "the weight keeps its name for globs"


def test_gemms(opened: Opener, tmp_path: Path) -> None:
    made = make_model([node("Gemm", "x w0 b0", "h"), node("Gelu", "h", "t"), node("Gemm", "t w", "y")],
                      {"x": ["N", 8]}, {"y": ["N", N]}, {"w0": random(8, C), "b0": random(C), "w": random(C, N)},
                      opset=20)
    wide = found(opened(made))
    assert wide is not None
    assert set(wide.constants) == {("Gemm_h", 1), ("Gemm_h", 2)}
    smoothed(made, "y", {"x": random(3, 8)}, opened, tmp_path, {"y": SOURCE})


def test_all_readers_get_the_copies(opened: Opener, tmp_path: Path) -> None:
    made = model(FIRST, BIAS, node("Gelu", "a", "t"), node("MatMul", "t k", "z"), outputs=("y", "z"), k=random(C, 3))
    assert found(opened(made)) is None, "of one reader alone they can't be"
    graph, _ = smoothed(made, "y z", FEED, opened, tmp_path, {"y z": SOURCE})
    assert [n.op for n in graph.nodes].count("Mul") == 1


def test_each_layer_repeats_a_shared_bias_by_itself(opened: Opener, tmp_path: Path) -> None:
    """Equal biases are one constant, but other channels are repeated."""
    made = make_model([FIRST, BIAS, node("Gelu", "a", "t"), node("MatMul", "t k", "z"), node("MatMul", "z w0", "i"),
                       node("Add", "i b0", "j"), node("Gelu", "j", "l"), node("MatMul", "l w", "y")],
                      {"x": ["N", 4, 8]}, {"y": OUT},
                      {"w0": random(8, C), "b0": random(C), "k": random(C, 8), "w": random(C, N)}, opset=20)
    other = split(np.zeros(C), np.arange(C, 0, -1), 4)
    graph, _ = smoothed(made, "z, y", FEED, opened, tmp_path, {"z": SOURCE, "y": other})
    assert [n.inputs[1].name for n in graph.nodes if n.op == "Add"] == ["b0.split", "b0.split.split"]


def test_many_copies_of_one_channel(opened: Opener, tmp_path: Path) -> None:
    source = np.sort(np.concatenate([np.arange(C), np.full(20, 3)]))
    graph, found_ = smoothed(FORMS["Gelu"][0], "y", FEED, opened, tmp_path, {"y": source})
    assert max(next(iter(found_.values())).copies) == 21
    weights = {n.inputs[1].name for n in graph.nodes if n.op == "MatMul"}
    assert weights == {"w0.split", "w.smoothed"}


# ------------------------------------------------------------------ near misses

STAYS: dict[str, onnx.ModelProto] = {
    "LayerNormalization": model(FIRST, BIAS, node("LayerNormalization", "a g", "t")),
    "Softmax": model(FIRST, BIAS, node("Softmax", "a", "t")),
    "a reduction": model(FIRST, node("ReduceMax", "h axes", "r"), node("Sub", "h r", "t"), axes=np.array([-1])),
    "a sum": model(FIRST, node("CumSum", "h axis", "t"), axis=np.array(2)),
    "a second reader": model(FIRST, BIAS, node("Gelu", "a", "t"), node("ReduceMax", "t axes", "z"),
                             outputs=("y", "z"), axes=np.array([-1])),
    "a second reader further up": model(FIRST, BIAS, node("Gelu", "a", "t"), node("ReduceMax", "a axes", "z"),
                                        outputs=("y", "z"), axes=np.array([-1])),
    "an output": model(FIRST, BIAS, node("Gelu", "a", "t"), outputs=("y", "t")),
    "an output further up": model(FIRST, BIAS, node("Gelu", "a", "t"), outputs=("y", "a")),
    "a residual": model(FIRST, node("LayerNormalization", "h g", "n"), SECOND, node("Add", "n u", "t")),
    "an input": model(node("Tanh", "x", "t"), w=random(8, N)),
    "a constant per pair of channels": model(
        FIRST, node("Reshape", "h pairs", "r"), node("Mul", "r two", "m"), node("Reshape", "m back", "t"),
        pairs=np.array([0, 0, C // 2, 2]), back=np.array([0, 0, C]), two=random(2)),
    "channels beside others": model(FIRST, SECOND, node("Concat", "h u", "t", axis=2), w=random(2 * C, N)),
    "channels twice": model(FIRST, node("Concat", "h h", "t", axis=2), w=random(2 * C, N)),
    "a computed matrix": model(node("Transpose", "x", "k", perm=[0, 2, 1]), node("MatMul", "x k", "t"),
                               w=random(4, N)),
    "the layer has a factor": make_model(
        [node("Gemm", "x w0", "h", alpha=0.5), node("Tanh", "h", "t"), node("MatMul", "t w", "y")], {"x": ["N", 8]},
        {"y": ["N", N]}, {"w0": random(8, C), "w": random(C, N)}),
}


@pytest.mark.parametrize("why", STAYS)
def test_what_is_not_repeated(why: str, opened: Opener) -> None:
    graph = opened(STAYS[why])
    assert found(graph) is None
    channels = layers(graph, "y").channels
    source = np.repeat(np.arange(channels), 2)
    wide = Smoothing("t", ("MatMul_y",), np.ones(source.size, np.float32), -1, False, source)
    with pytest.raises(GraphError, match="no columns above 't' can be repeated"):
        apply(Smooth(), graph, Context(plan=Plan("", "", smoothings={"t": wide})))
