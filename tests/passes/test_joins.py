"""What joins int8 regions against numpy, code by code, in both formats; and the forms that passes write for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, make_model, node, random, text
from lowering_support import BOTH_FORMATS, CPU, UNOPTIMIZED, Array, Made, canonical, codes_of, make, recipe, requantized

from onnxq.passes.lower import lower
from onnxq.passes.manager import Context, PassManager
from onnxq.passes.quantize import quantize
from onnxq.planner.outline import outline
from onnxq.planner.scales import finish
from onnxq.runtime.session import Session

OPTIMIZED = pytest.mark.parametrize("optimize", [True, False], ids=["optimized", "plain"])
SHAPE = [2, 8, 6, 6]
EYE = np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1)
TWICE = np.array([1, 1, 2, 2], np.float32)
# both are codes exactly, at scales of 0.003 and 0.01
GAMMA = np.array([255, 90, 77, 200, 128, 101, 66, 254], np.float32).reshape(1, 8, 1, 1) * np.float32(0.003)
BETA = (np.array([0, 90, 77, 200, 128, 255, 66, 254], np.float32).reshape(8, 1, 1) - 100) * np.float32(0.01)
STORED: dict[str, Any] = {
    "two": TWICE, "border": np.array([0, 0, 1, 2, 0, 0, 0, 1]), "zero": np.array([0]), "four": np.array([4]),
    "rows": np.array([2]), "order": np.array([7, 6, 5, 4, 3, 2, 1, 0]), "number": np.float32(-0.37), "gamma": GAMMA,
    "beta": BETA, "low": np.float32(-0.2), "high": np.float32(1.1), "parts": np.array([3, 5]),
    "slope": np.array([0.2], np.float32), "full": np.array([2, 8, 6, 6]), "ax": np.array([2, 3])}


def region(tmp_path: Path, fmt: str, nodes: list[onnx.NodeProto], opset: int = 17) -> Made:
    """x -> Conv by 1 -> a, Conv by -0.3141 -> b; nodes make j of them; Conv by 1 -> y; a, b, j are outputs, too."""
    read = {t for n in nodes for t in n.input}
    made = {t for n in nodes for t in n.output}
    convs = [node("Conv", "x eye", "a"), node("Conv", "x third", "b")]
    outputs = [t for t in ("a", "b", "j", "y") if t in "jy" or t in read]
    stored = {k: v for k, v in STORED.items() if k in read - made}
    model = make_model([*(c for c in convs if c.output[0] in read), *nodes, node("Conv", "j eye", "y")], {"x": SHAPE},
                       {t: [None] * 4 for t in outputs},
                       {**stored, "eye": EYE, **({"third": np.float32(-0.3141) * EYE} if "b" in read else {})}, opset)
    return make(model, tmp_path, [{"x": random(*SHAPE, seed=4)}], fmt)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def same_codes(made: Made, found: Array, wanted: Array) -> None:
    codes = codes_of(made, "j", found)
    assert codes.shape == wanted.shape
    assert np.abs(codes - wanted).max() <= 1
    assert np.mean(codes != wanted) < 0.02, "more than a tie here and there"


# kernel: nodes from a and b to j, what they compute
ARITHMETIC: dict[str, tuple[list[onnx.NodeProto], Callable[[Array, Array], Array]]] = {
    "QLinearMul": ([node("Mul", "a b", "j", "join")], lambda a, b: a * b),
    "QLinearMul, square": ([node("Mul", "a a", "j", "join")], lambda a, b: a * a),
    "QLinearMul, by a number": ([node("Mul", "a number", "j", "join")], lambda a, b: a * np.float32(-0.37)),
    "QLinearMul, per channel": ([node("Mul", "gamma a", "j", "join")], lambda a, b: a * GAMMA),
    "QLinearMul, Relu": ([node("Mul", "a b", "i", "join"), node("Relu", "i", "j")],
                         lambda a, b: np.maximum(a * b, 0)),
    "QLinearAdd, per channel": ([node("Add", "a beta", "j", "join")], lambda a, b: a + BETA),
    "QLinearSigmoid": ([node("Sigmoid", "a", "j", "join")], lambda a, b: sigmoid(a)),
    "QLinearLeakyRelu": ([node("LeakyRelu", "a", "j", "join", alpha=0.1)], lambda a, b: np.where(a < 0, 0.1 * a, a)),
    "QLinearLeakyRelu, PRelu": ([node("PRelu", "a slope", "j", "join")], lambda a, b: np.where(a < 0, 0.2 * a, a)),
    "QLinearAdd, HardSigmoid": ([node("HardSigmoid", "a", "j", "join")], lambda a, b: np.clip(0.2 * a + 0.5, 0, 1)),
    "QLinearAdd, steep": ([node("HardSigmoid", "a", "j", "join", alpha=2.0, beta=-0.5)],
                          lambda a, b: np.clip(2 * a - 0.5, 0, 1)),
    "QLinearAdd, through 0": ([node("HardSigmoid", "a", "j", "join", alpha=0.5, beta=0.0)],
                              lambda a, b: np.clip(0.5 * a, 0, 1)),
    "QLinearGlobalAveragePool": ([node("ReduceMean", "a", "j", "join", axes=[2, 3])],
                                 lambda a, b: a.mean((2, 3), keepdims=True)),
    "QLinearGlobalAveragePool, flat": (
        [node("ReduceMean", "a", "f", "join", axes=[-1, 2], keepdims=0), node("Unsqueeze", "f ax", "j")],
        lambda a, b: a.mean((2, 3), keepdims=True)),
}


@OPTIMIZED
@BOTH_FORMATS
@pytest.mark.parametrize("case", ARITHMETIC)
def test_arithmetic_on_codes(case: str, fmt: str, optimize: bool, tmp_path: Path) -> None:
    nodes, function = ARITHMETIC[case]
    made = region(tmp_path, fmt, nodes)
    assert made.skips == []
    assert made.ran("join") == [case.split(",")[0]]
    assert {"Relu", "HardSigmoid", "ReduceMean"}.isdisjoint(made.ops())
    found = made.run(made.compiled, optimize=optimize)
    a, b = (found[n].astype(np.float64) if n in found else None for n in "ab")
    assert a is not None
    same_codes(made, found["j"], requantized(made, "j", function(a, a if b is None else b)))


def nearest(a: Array, b: Array) -> Array:
    return a.repeat(2, axis=2).repeat(2, axis=3)


def shuffled(a: Array, b: Array) -> Array:
    """[2, 32, 6, 6] to [2, 8, 12, 12]; the reference of DepthToSpace-13 in its DCR mode."""
    x = np.concatenate([a, b, a, b], 1).reshape(2, 2, 2, 8, 6, 6)
    return x.transpose(0, 3, 4, 1, 5, 2).reshape(2, 8, 12, 12)


MOVEMENT: dict[str, tuple[list[onnx.NodeProto], Callable[[Array, Array], Array]]] = {
    "Resize": ([node("Resize", "a _ two", "j", "join", mode="nearest", nearest_mode="floor",
                     coordinate_transformation_mode="asymmetric")], nearest),
    "Resize, half pixels": ([node("Resize", "a _ two", "j", "join")], nearest),
    "Pad": ([node("Pad", "a border", "j", "join")], lambda a, b: np.pad(a, ((0, 0), (0, 0), (1, 0), (2, 1)))),
    "Pad, reflected": ([node("Pad", "a border", "j", "join", mode="reflect")],
                       lambda a, b: np.pad(a, ((0, 0), (0, 0), (1, 0), (2, 1)), "reflect")),
    "Pad, edge": ([node("Pad", "a border", "j", "join", mode="edge")],
                  lambda a, b: np.pad(a, ((0, 0), (0, 0), (1, 0), (2, 1)), "edge")),
    "Slice": ([node("Slice", "a zero four rows", "j", "join")], lambda a, b: a[:, :, :4]),
    "Split": ([node("Split", "a parts", "s t", "join", axis=1), node("Concat", "t s", "j", axis=1)],
              lambda a, b: np.concatenate([a[:, 3:], a[:, :3]], 1)),
    "Gather": ([node("Gather", "a order", "j", "join", axis=1)], lambda a, b: a[:, ::-1]),
    "Expand": ([node("MaxPool", "a", "t", kernel_shape=[6, 6]), node("Expand", "t full", "j", "join")],
               lambda a, b: np.broadcast_to(a.max((2, 3), keepdims=True), a.shape)),
    "DepthToSpace": ([node("Concat", "a b a b", "c", axis=1), node("DepthToSpace", "c", "j", "join", blocksize=2)],
                     shuffled),
    "Clip, Relu": ([node("Relu", "a", "r", "join"), node("Concat", "r a", "c", axis=2),
                    node("Slice", "c zero four rows", "j")], lambda a, b: np.maximum(a, 0)[:, :, :4]),
    "Clip": ([node("Clip", "a low high", "r", "join"), node("Concat", "r a", "c", axis=2),
              node("Slice", "c zero four rows", "j")], lambda a, b: np.clip(a, -0.2, 1.1)[:, :, :4]),
}


@OPTIMIZED
@BOTH_FORMATS
@pytest.mark.parametrize("case", MOVEMENT)
def test_movement_of_codes(case: str, fmt: str, optimize: bool, tmp_path: Path) -> None:
    """Where no scale changes on the way, results are the very numbers that came in."""
    nodes, function = MOVEMENT[case]
    made = region(tmp_path, fmt, nodes)
    assert made.skips == []
    kernel = case.split(",")[0]
    assert made.plan.nodes["join"].lowering == kernel
    if fmt == "qoperator":
        assert made.ran("join") == [kernel]
        assert "Relu" not in made.stored()
        assert made.stored().count("QuantizeLinear") == 1  # of x
    found = made.run(made.compiled, optimize=optimize)
    a = found["a"]
    wanted = requantized(made, "j", function(a, found.get("b", a)).astype(np.float64))
    same_codes(made, found["j"], wanted)
    if made.plan.activations["a"].scale == made.plan.activations["j"].scale:
        np.testing.assert_array_equal(codes_of(made, "j", found["j"]), wanted)


@BOTH_FORMATS
@pytest.mark.parametrize("case", [*ARITHMETIC, *MOVEMENT])
def test_the_compiled_graph_gives_the_bits_of_its_qdq_form(case: str, fmt: str, tmp_path: Path) -> None:
    made = region(tmp_path, fmt, {**ARITHMETIC, **MOVEMENT}[case][0])
    twin, compiled = (Session(p, UNOPTIMIZED).run(made.feeds[0]) for p in (made.twin, made.compiled))
    for name, wanted in twin.items():
        off = np.abs(compiled[name] - wanted) / float(made.plan.activations[name].scale)
        if case in MOVEMENT:
            np.testing.assert_array_equal(off, 0)
        assert off.max() < 1.01  # a product or a mean half way between two codes goes either way
        assert np.mean(off > 0.01) < 0.02


@pytest.mark.parametrize("opset", [13, 18, 21, 26])
def test_operators_whose_form_changed_between_opsets(opset: int, tmp_path: Path) -> None:
    """Axes became an input of ReduceMean, Pad got axes and Split num_outputs."""
    stored = {"pads": np.array([1, 0, 0, 1]), "ax": np.array([2, 3])}
    padded = node("Pad", "s pads _ ax", "p") if opset >= 18 else node("Pad", "s full", "p")
    split = node("Split", "a", "s t", axis=1, **({"num_outputs": 2} if opset >= 18 else {}))
    pool = node("ReduceMean", "t ax", "m") if opset >= 18 else node("ReduceMean", "t", "m", axes=[2, 3])
    nodes = [node("Conv", "x eye", "a"), split, padded, pool, node("Mul", "p m", "q"), node("Conv", "q four", "y")]
    made = make(make_model(nodes, {"x": SHAPE}, {"y": None}, {
        "eye": EYE, "four": random(4, 4, 1, 1), **(stored if opset >= 18 else {
            "full": np.array([0, 0, 1, 0, 0, 0, 0, 1])})}, opset), tmp_path, [{"x": random(*SHAPE)}])
    assert made.skips == []
    assert made.stored() == ["QuantizeLinear", "QLinearConv", "Split", "QLinearGlobalAveragePool", "Pad", "QLinearMul",
                             "QLinearConv", "DequantizeLinear"]
    wanted, found = made.run(made.source)["y"], made.run(made.compiled)["y"]
    assert np.square(found - wanted).sum() < 1e-2 * np.square(wanted).sum()


def test_golden_gate(opened: Opener, golden: Callable[[str, str], None]) -> None:
    """Squeeze and excite with its hard sigmoid, a Split and a stored factor."""
    model = make_model([
        node("Conv", "x eye", "a"), node("ReduceMean", "a", "m", axes=[2, 3], keepdims=0),
        node("Unsqueeze", "m ax", "u"), node("Conv", "u eye", "g"), node("HardSigmoid", "g", "h", alpha=0.25),
        node("Mul", "a h", "p"), node("Split", "p parts", "s t", axis=1), node("Concat", "t s", "c", axis=1),
        node("Mul", "c gamma", "j"), node("Relu", "j", "r"), node("Add", "r j", "k"), node("Conv", "k eye", "y")],
        {"x": SHAPE}, {"y": SHAPE}, {"eye": EYE, "ax": STORED["ax"], "gamma": GAMMA, "parts": STORED["parts"]})
    graph = canonical(opened(model))
    found = outline(graph, recipe(), CPU)
    context = Context(CPU, finish(found, graph, dict.fromkeys(found.ranges_of, (-1.0, 2.0)), recipe(), CPU))
    PassManager(quantize()).run(graph, context)
    golden("quantize-gate", text(graph))
    PassManager(lower("qoperator")).run(graph, context)
    golden("lower-gate", text(graph))
    assert context.skips == []
