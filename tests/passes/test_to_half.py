"""float32 to float16: each node reads and makes the types that its operator takes, and Casts stand in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from conftest import Opener, apply, assert_same, body, make_model, node, random, run, text, value
from onnx import TensorProto, numpy_helper

from onnxq.graph import Graph, dtype_of, element_types, load
from onnxq.passes.canonicalize import canonicalize
from onnxq.passes.canonicalize.widen_half import WidenHalf
from onnxq.passes.lower.to_half import ToHalf
from onnxq.passes.manager import Context, PassManager
from onnxq.plan import Plan
from onnxq.targets import TARGETS

Written = Callable[[Graph], Path]
Nodes = list[onnx.NodeProto]
MS = "com.microsoft"
F, H, I64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
CLOSE = 2e-3  # of the largest output: some roundings to 11 binary digits, each of up to 2**-12, about 2.4e-4
MODELS = Path(__file__).parents[2] / "models"


def halved(graph: Graph, wide: Mapping[str, str] | None = None, keep_ports: bool = True,
           limits: Mapping[str, float] | None = None) -> list[tuple[str, str]]:
    """Runs the pass, which has to edit, and once more, where it must not; gives the near misses of the first run."""
    plan = Plan("", "", wide=dict(wide or {}), limits=dict(limits or {}))
    edited, skips = apply(ToHalf(keep_ports), graph, Context(plan=plan))
    assert edited
    before = text(graph)
    assert apply(ToHalf(keep_ports), graph, Context(plan=plan))[0] is False, "a second run edits nothing"
    assert text(graph) == before
    return skips


def near(graph: Graph, written: Written, model: onnx.ModelProto, feed: Mapping[str, Any], rtol: float = CLOSE) -> None:
    assert_same(run(written(graph), feed), run(model, feed), rtol)


def casts(graph: Graph) -> list[str]:
    return sorted(f"{n.inputs[0].name} {n.outputs[0].name} {dtype_of(n.outputs[0])}" for n, _ in graph.walk()
                  if n.op == "Cast")


def types(graph: Graph) -> dict[str, str]:
    return {name: str(dtype) for name, dtype in element_types(graph).items()}


SIMPLE = [node("MatMul", "x w", "m"), node("Exp", "m", "e"), node("Add", "m e", "a"), node("Mul", "a k", "y")]


def simple() -> onnx.ModelProto:
    return make_model(SIMPLE, {"x": ["n", 4]}, {"y": ["n", 6]}, {"w": random(4, 6) * np.float32(0.3), "k": random(6)})


# ------------------------------------------------------------------ ports and nodes


def test_ports_keep_their_types(opened: Opener, written: Written, golden: Callable[[str, str], None]) -> None:
    graph = opened(simple())
    assert halved(graph) == []
    golden("to_half", text(graph))
    near(graph, written, simple(), {"x": random(3, 4)})


def test_ports_may_follow(opened: Opener, written: Written) -> None:
    graph = opened(simple())
    halved(graph, keep_ports=False)
    assert (casts(graph), set(types(graph).values())) == ([], {"float16"})
    x = random(3, 4)
    found = run(written(graph), {"x": x.astype(np.float16)})["y"]
    assert_same({"y": found.astype(np.float32)}, run(simple(), {"x": x}), CLOSE)


def test_wide_nodes_read_and_make_float32(opened: Opener, written: Written) -> None:
    """One Cast for each tensor where the type changes, whoever reads it."""
    graph = opened(simple())
    halved(graph, {"Exp_e": "so", "Add_a": "so"})
    assert casts(graph) == ["a a.half float16", "m m.float float32", "x x.half float16", "y.half y float32"]
    assert {k: types(graph)[k] for k in ("e", "a", "w", "k")} == {
        "e": "float32", "a": "float32", "w": "float16", "k": "float16"}
    near(graph, written, simple(), {"x": random(3, 4)})


@pytest.mark.parametrize("keep_ports", [True, False])
def test_wide_nodes_at_the_ports(keep_ports: bool, opened: Opener, written: Written) -> None:
    graph = opened(simple())
    halved(graph, {"MatMul_m": "so", "Mul_y": "so"}, keep_ports)
    kept, moved = ["a a.float float32", "m m.half float16"], ["x x.float float32", "y.float y float16"]
    assert casts(graph) == sorted(kept if keep_ports else kept + moved)
    written(graph)


def test_everything_wide(opened: Opener) -> None:
    graph = opened(simple())
    plan = Plan("", "", wide=dict.fromkeys((n.name for n in graph.nodes), "so"))
    assert apply(ToHalf(), graph, Context(plan=plan)) == (False, [])


def test_an_output_that_is_read_too(opened: Opener, written: Written) -> None:
    nodes = [node("Relu", "x", "y"), node("Exp", "y", "z"), node("Neg", "y", "t")]
    model = make_model(nodes, {"x": [3]}, {"y": [3], "z": [3], "t": [3]})
    graph = opened(model)
    halved(graph, {"Exp_z": "so"})
    assert casts(graph) == ["t.half t float32", "x x.half float16", "y.half y float32"]
    assert {n.op: n.inputs[0].name for n in graph.nodes if n.op in ("Exp", "Neg")} == {"Exp": "y", "Neg": "y.half"}
    near(graph, written, model, {"x": random(3)})


def test_what_is_no_float_stays(opened: Opener) -> None:
    graph = opened(make_model([node("Add", "x x", "y")], {"x": (I64, [3])}, {"y": (I64, [3])}))
    assert apply(ToHalf(), graph) == (False, [])


def test_an_input_that_is_an_output(opened: Opener, written: Written) -> None:
    model = make_model([node("Relu", "x", "y")], {"x": [3]}, {"y": [3], "x": [3]})
    graph = opened(model)
    halved(graph)
    assert casts(graph) == ["x x.half float16", "y.half y float32"]
    near(graph, written, model, {"x": random(3)})


# ------------------------------------------------------------------ Casts of the model


def test_casts_of_whole_numbers(opened: Opener, written: Written) -> None:
    """Each type is cast from the whole numbers themselves, not one from the other."""
    nodes = [node("Cast", "i", "f", to=F), node("Neg", "f", "g"), node("Exp", "f", "e"), node("Add", "e g", "s"),
             node("Cast", "s", "o", to=I64)]
    model = make_model(nodes, {"i": (I64, [3])}, {"o": (I64, [3])})
    graph = opened(model)
    halved(graph, {"Exp_e": "so"})
    assert casts(graph) == ["e e.half float16", "i f float32", "i f.half float16", "s o int64"]
    near(graph, written, model, {"i": np.asarray([1, 2, 3])})


def test_casts_that_lose_their_meaning_go(opened: Opener, written: Written) -> None:
    """Islands of float16 in a float32 model."""
    nodes = [node("Cast", "x", "h", to=H), node("Exp", "h", "e"), node("Cast", "e", "f", to=F), node("Neg", "f", "g"),
             node("Cast", "g", "y", to=H)]
    model = make_model(nodes, {"x": [3]}, {"y": (H, [3])})
    graph = opened(model)
    halved(graph)
    assert ([n.op for n in graph.nodes], casts(graph)) == (["Cast", "Exp", "Neg"], ["x h float16"])
    assert_same(run(written(graph), {"x": random(3)}), run(model, {"x": random(3)}))


def test_bfloat16_stays(opened: Opener) -> None:
    nodes = [node("Cast", "b", "f", to=F), node("Neg", "f", "g"), node("Cast", "g", "y", to=TensorProto.BFLOAT16)]
    graph = opened(make_model(nodes, {"b": (TensorProto.BFLOAT16, [3])}, {"y": (TensorProto.BFLOAT16, [3])}))
    halved(graph)
    assert casts(graph) == ["b f float16", "g y bfloat16"]


def test_bfloat16_models_become_float16(opened: Opener, written: Written) -> None:
    weights = {k: v.astype(ml_dtypes.bfloat16) for k, v in {"w": random(40, 60), "k": random(60)}.items()}
    stored = {k: numpy_helper.from_array(v, k) for k, v in weights.items()}
    ports = ({"x": (TensorProto.BFLOAT16, ["n", 40])}, {"y": (TensorProto.BFLOAT16, ["n", 60])})
    graph = opened(make_model(SIMPLE, *ports, stored))
    assert apply(WidenHalf(), graph, Context(TARGETS["cpu"]))[0]
    halved(graph)
    assert casts(graph) == ["x x.float float16", "y.float y bfloat16"]
    found = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(written(graph))).graph.initializer}
    assert_same(found, {k: v.astype(np.float16) for k, v in weights.items()})


def test_half_models_come_back_as_they_were(opened: Opener, written: Written) -> None:
    """Widened for what plans in float32, then halved: the same bits of weights, no Cast left."""
    weights = {"w": random(40, 60).astype(np.float16), "k": random(60).astype(np.float16)}
    model = make_model(SIMPLE, {"x": (H, ["n", 40])}, {"y": (H, ["n", 60])}, weights)
    graph = opened(model)
    assert apply(WidenHalf(), graph, Context(TARGETS["cpu"]))[0]
    halved(graph)
    assert (casts(graph), [n.op for n in graph.nodes]) == ([], ["MatMul", "Exp", "Add", "Mul"])
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(written(graph))).graph.initializer}
    assert_same(stored, weights)


# ------------------------------------------------------------------ operators of fixed types


def test_operators_without_float16(opened: Opener, written: Written) -> None:
    nodes = [node("Neg", "a", "b"), node("Range", "zero b one", "r"), node("Mul", "r w", "y")]
    model = make_model(nodes, {"a": []}, {"y": [3]}, {"zero": np.float32(0), "one": np.float32(1), "w": random(3)})
    graph = opened(model)
    halved(graph)
    assert casts(graph) == ["a a.half float16", "b b.float float32", "r r.half float16", "y.half y float32"]
    near(graph, written, model, {"a": np.asarray(-3, np.float32)})


def test_inputs_of_a_fixed_type(opened: Opener, written: Written) -> None:
    model = make_model([node("Resize", "x roi s", "y", mode="linear")], {"x": [1, 1, 3, 3]}, {"y": [1, 1, 6, 6]},
                       {"roi": np.float32([]), "s": np.float32([1, 1, 2, 2])})
    graph = opened(model)
    halved(graph)
    assert {k: types(graph)[k] for k in ("roi", "s", "y.half")} == {"roi": "float32", "s": "float32",
                                                                    "y.half": "float16"}
    near(graph, written, model, {"x": random(1, 1, 3, 3)})


CODES = {"q": np.arange(-6, 6, dtype=np.int8).reshape(3, 4), "s": np.float32(0.1), "z": np.int8(1)}


@pytest.mark.parametrize(("opset", "dtype"), [(13, "float32"), (19, "float16"), (23, "float16")])
def test_stored_codes(opset: int, dtype: str, opened: Opener, written: Written) -> None:
    """Scales are float16 from opset 19 on."""
    model = make_model([node("DequantizeLinear", "q s z", "w"), node("MatMul", "x w", "y")], {"x": [2, 3]},
                       {"y": [2, 4]}, CODES, opset, ir_version=10)
    graph = opened(model)
    halved(graph)
    assert {types(graph)[k] for k in ("s", "w")} == {dtype}
    assert casts(graph) == sorted(["x x.half float16", "y.half y float32",
                                   *(["w w.half float16"] if opset < 19 else [])])
    near(graph, written, model, {"x": random(2, 3)})


def test_codes_decoded_to_a_named_type(opened: Opener, written: Written) -> None:
    model = make_model([node("DequantizeLinear", "q s z", "w", output_dtype=F), node("MatMul", "x w", "y")],
                       {"x": [2, 3]}, {"y": [2, 4]}, CODES, 23, ir_version=10)
    graph = opened(model)
    halved(graph)
    assert graph.nodes[0].attrs == {"output_dtype": H}
    near(graph, written, model, {"x": random(2, 3)})


def test_types_in_attributes(opened: Opener, written: Written) -> None:
    """What names no type, and what onnxruntime can't make in float16, is float32 all the same, and cast."""
    filled = numpy_helper.from_array(np.float32([0.5]))
    nodes = [node("ConstantOfShape", "d", "a", value=filled), node("ConstantOfShape", "d", "b"),
             node("EyeLike", "x", "c", dtype=F), node("EyeLike", "x", "e"),
             node("RandomNormal", "", "f", shape=[3, 3], dtype=F, scale=1e-9),
             node("RandomNormalLike", "x", "g", scale=1e-9), node("Sum", "a b c e f g x", "y")]
    model = make_model(nodes, {"d": (I64, [2]), "x": [3, 3]}, {"y": [3, 3]})
    graph = opened(model)
    halved(graph)
    assert {k: types(graph)[k] for k in "abcefg"} == {"a": "float16", **dict.fromkeys("bcefg", "float32")}
    near(graph, written, model, {"d": np.asarray([3, 3]), "x": random(3, 3)})


def test_types_that_a_kernel_computes_in_stay(opened: Opener) -> None:
    nodes = [node("LayerNormalization", "x g", "n _ d", axis=-1, stash_type=1), node("Mul", "n d", "y")]
    graph = opened(make_model(nodes, {"x": [2, 4]}, {"y": [2, 4]}, {"g": random(4)}))
    halved(graph)
    assert graph.nodes[1].attrs == {"axis": -1, "stash_type": 1}
    assert casts(graph) == ["d d.half float16", "x x.half float16", "y.half y float32"]


def test_what_tells_of_a_tensor_reads_either_type(opened: Opener) -> None:
    nodes = [node("Exp", "x", "e"), node("Shape", "e", "s"), node("IsNaN", "e", "n"), node("ArgMax", "e", "i"),
             node("Relu", "x", "r")]
    outputs = {"s": (I64, [1]), "n": (TensorProto.BOOL, [3]), "i": (I64, [1]), "r": [3]}
    graph = opened(make_model(nodes, {"x": [3]}, outputs))
    halved(graph, {"Exp_e": "so"})
    assert casts(graph) == ["r.half r float32", "x x.half float16"]


# ------------------------------------------------------------------ onnxruntime's operators


def test_weights_in_blocks(opened: Opener, written: Written) -> None:
    """Codes stay, scales and the bias follow."""
    rng = np.random.default_rng(0)
    stored = {"table": rng.integers(0, 256, (50, 32), np.uint8), "ts": np.abs(random(50, 2)) * np.float32(0.1),
              "b": rng.integers(0, 256, (24, 2, 16), np.uint8), "s": np.abs(random(24, 2)) * np.float32(0.1),
              "bias": random(24)}
    nodes = [node("GatherBlockQuantized", "table i ts", "e", domain=MS, bits=4, block_size=32, quantize_axis=1),
             node("MatMulNBits", "e b s _ _ bias", "y", domain=MS, bits=4, block_size=32, K=64, N=24)]
    model = make_model(nodes, {"i": (I64, [5])}, {"y": [5, 24]}, stored, 21, {MS: 1}, 10)
    model.graph.value_info.append(value("e", [5, 64]))
    graph = opened(model)
    assert halved(graph) == []
    assert {k: types(graph)[k] for k in ("ts", "s", "bias", "e")} == dict.fromkeys(("ts", "s", "bias", "e"), "float16")
    assert graph.nodes[1].attrs == {"bits": 4, "block_size": 32, "K": 64, "N": 24}
    assert casts(graph) == ["y.half y float32"]
    near(graph, written, model, {"i": np.arange(5)})


def test_rotary_embeddings_and_sums_that_are_normalised(opened: Opener, written: Written) -> None:
    stored = {"cos": np.cos(random(8, 3)), "sin": np.sin(random(8, 3)), "g": random(6), "b": random(6, seed=1)}
    nodes = [node("RotaryEmbedding", "x p cos sin", "r", domain=MS), node("Reshape", "r to", "f"),
             node("SkipLayerNormalization", "f s g b", "y _ _ t", domain=MS), node("Add", "t y", "z")]
    model = make_model(nodes, {"x": [1, 2, 5, 6], "p": (I64, [1, 5]), "s": [2, 5, 6]}, {"y": [2, 5, 6], "z": [2, 5, 6]},
                       {**stored, "to": np.int64([2, 5, 6])}, 17, {MS: 1})
    for name, dims in (("r", [1, 2, 5, 6]), ("t", [2, 5, 6])):
        model.graph.value_info.append(value(name, dims))
    graph = opened(model)
    assert halved(graph) == []
    assert casts(graph) == ["s s.half float16", "x x.half float16", "y.half y float32", "z.half z float32"]
    near(graph, written, model, {"x": random(1, 2, 5, 6), "p": np.arange(5)[None], "s": random(2, 5, 6)})


def test_other_operators_stay_float32(opened: Opener, written: Written) -> None:
    rng = np.random.default_rng(0)
    stored = {"w": rng.integers(-9, 9, (4, 6), np.int8), "s": np.float32([0.1]), "v": random(3, 4)}
    nodes = [node("MatMul", "x v", "m"), node("DynamicQuantizeMatMul", "m w s", "y", domain=MS)]
    model = make_model(nodes, {"x": [2, 3]}, {"y": [2, 6]}, stored, domains={MS: 1})
    graph = opened(model)
    halved(graph)
    assert casts(graph) == ["m m.float float32", "x x.half float16"]
    assert (types(graph)["s"], types(graph)["v"]) == ("float32", "float16")
    near(graph, written, model, {"x": random(2, 3)}, 2e-2)  # one code more or less of 255 in what is read


def test_nodes_with_tensors_of_unknown_type_stay_float32(opened: Opener) -> None:
    nodes = [node("Relu", "x", "r"), node("Odd", "r", "u", domain="odd"), node("SequenceConstruct", "r r", "q"),
             node("Odd", "q", "y", domain="odd")]
    graph = opened(make_model(nodes, {"x": [3]}, {"y": [3]}, domains={"odd": 1}))
    assert halved(graph) == [("Odd_u", "nothing tells the type of u, so that it stays float32"),
                             ("SequenceConstruct_q", "nothing tells the type of q, so that it stays float32"),
                             ("Odd_y", "nothing tells the type of q, so that it stays float32")]
    assert casts(graph) == ["r r.float float32", "x x.half float16"]


# ------------------------------------------------------------------ constants


def test_constants_that_are_read_in_both_types(opened: Opener, written: Written) -> None:
    """Stored twice, each type once."""
    nodes = [node("Mul", "x w", "a"), node("Exp", "w", "e"), node("Mul", "a w", "b"), node("Add", "b e", "y")]
    model = make_model(nodes, {"x": [3]}, {"y": [3]}, {"w": random(3)})
    graph = opened(model)
    halved(graph, {"Exp_e": "so"})
    stored = {t.name: t.data_type for t in onnx.load(str(written(graph))).graph.initializer}
    assert stored == {"w": F, "w.half": H}
    near(graph, written, model, {"x": random(3)})


def test_constants_are_made_as_they_are_saved(opened: Opener, written: Written) -> None:
    made = []

    def compute() -> np.ndarray[Any, Any]:
        made.append("w")
        return random(40, 60)

    graph = opened(make_model([node("MatMul", "x v", "y")], {"x": [2, 40]}, {"y": [2, 60]}, {"v": random(40, 60)}))
    graph.replace_input(graph.nodes[0], 1, graph.computed("w", np.float32, (40, 60), compute))
    halved(graph)
    assert made == []
    (stored,) = onnx.load(str(written(graph))).graph.initializer
    assert made == ["w"]
    np.testing.assert_array_equal(numpy_helper.to_array(stored), random(40, 60).astype(np.float16))


def test_numbers_beyond_the_range(opened: Opener) -> None:
    """Finite ones stay finite, those of a mask small enough to be added up; infinity stays."""
    low = np.float32([-3.4e38, 1e9, -np.inf, 65519, 1])
    graph = opened(make_model([node("Max", "x a", "m"), node("Add", "m b", "y")], {"x": [5]}, {"y": [5]},
                              {"a": low, "b": low}))
    halved(graph, limits={"b": 32752.0})
    first, second = (graph.read(t).tolist() for n in graph.nodes for t in n.inputs if t.name in ("a", "b"))
    assert first == [-65504, 65504, -np.inf, 65504, 1]
    assert second == [-32752, 32752, -np.inf, 32752, 1]


def test_a_constant_that_is_an_output(opened: Opener, written: Written) -> None:
    nodes = [node("Add", "x w", "y"), node("Constant", "", "k", value=numpy_helper.from_array(np.float32([1, 2])))]
    model = make_model(nodes, {"x": [2]}, {"y": [2], "k": [2]}, {"w": random(2)})
    graph = opened(model)
    halved(graph)
    near(graph, written, model, {"x": random(2)})


# ------------------------------------------------------------------ bodies


def test_branches(opened: Opener, written: Written) -> None:
    """They read outer tensors of either type and a weight; a wide node in one, a wide branch node in the other."""
    then = body([node("MatMul", "h w", "a"), node("Exp", "a", "b"), node("Add", "b h", "c")], {"c": None}, "then")
    other = body([node("Mul", "h k", "d"), node("Exp", "d", "e")], {"e": None}, "other", {"k": random(4)})
    model = make_model([node("Tanh", "x", "h"), node("If", "p", "r", then_branch=then, else_branch=other),
                        node("Neg", "r", "y")], {"x": [2, 4], "p": (TensorProto.BOOL, [])}, {"y": [2, 4]},
                       {"w": random(4, 4)})
    graph = opened(model)
    halved(graph, {"Exp_b": "so", "Exp_e": "so"})
    assert casts(graph) == ["a a.float float32", "b b.half float16", "d d.float float32", "e e.half float16",
                            "x x.half float16", "y.half y float32"]
    for choice in (True, False):
        near(graph, written, model, {"x": random(2, 4), "p": np.asarray(choice)})


def test_a_wide_choice(opened: Opener, written: Written) -> None:
    then = body([node("Exp", "h", "a")], {"a": None}, "then")
    other = body([node("Neg", "h", "b")], {"b": None}, "other")
    model = make_model([node("Tanh", "x", "h"), node("If", "p", "r", "choice", then_branch=then, else_branch=other),
                        node("Neg", "r", "y")], {"x": [2, 4], "p": (TensorProto.BOOL, [])}, {"y": [2, 4]})
    graph = opened(model)
    halved(graph, {"choice": "so"})
    assert casts(graph) == ["h h.float float32", "r r.half float16", "x x.half float16", "y.half y float32"]
    near(graph, written, model, {"x": random(2, 4), "p": np.asarray(True)})


@pytest.mark.parametrize("wide", [{}, {"Exp_e": "so"}, {"loop": "so"}], ids=["half", "a node", "all"])
def test_loops(wide: dict[str, str], opened: Opener, written: Written) -> None:
    step = onnx.helper.make_graph(
        [node("Identity", "go", "on"), node("Exp", "s", "e"), node("Mul", "e k", "t"), node("Neg", "t", "o")], "step",
        [value("i", [], I64), value("go", [], TensorProto.BOOL), value("s", [3])],
        [value("on", [], TensorProto.BOOL), value("t", [3]), value("o", [3])])
    model = make_model([node("Loop", "n yes x", "last all", "loop", body=step), node("Add", "last all", "y")],
                       {"x": [3]}, {"y": [4, 3]}, {"n": np.int64(4), "yes": np.asarray(True), "k": np.float32(0.3)})
    graph = opened(model)
    halved(graph, wide)
    near(graph, written, model, {"x": random(3)})


def test_scans(opened: Opener, written: Written) -> None:
    step = onnx.helper.make_graph(
        [node("Add", "s v", "t"), node("Tanh", "t", "o")], "step",
        [value("s", [3]), value("v", [3])], [value("t", [3]), value("o", [3])])
    model = make_model([node("Scan", "a x", "last all", body=step, num_scan_inputs=1), node("Add", "last all", "y")],
                       {"a": [3], "x": [4, 3]}, {"y": [4, 3]})
    graph = opened(model)
    halved(graph, {"Tanh_o": "so"})
    near(graph, written, model, {"a": random(3), "x": random(4, 3)})


# ------------------------------------------------------------------ whole models


@pytest.mark.parametrize("name", ["text_encoder", "digits_cnn", "decoder", "recurrent"])
def test_models(name: str, written: Written) -> None:
    """Of the outputs no more is lost than float16 loses; only the ports are float32."""
    path = MODELS / name / "model.onnx"
    graph = load(path)
    PassManager(canonicalize()).run(graph, Context(TARGETS["cpu"]))
    halved(graph)
    with np.load(MODELS / name / "eval.npz") as data:
        feed = {t.name: data[t.name][:16] for t in graph.inputs}
    found, wanted = run(written(graph), feed), run(path, feed)
    for key, right in wanted.items():
        if right.dtype == np.float32 and right.size:
            left = found[key].astype(np.float64)
            assert np.sum(left * right) / np.linalg.norm(left) / np.linalg.norm(right) > 0.9999
    stored = {t.name for t in onnx.load(str(written(graph))).graph.initializer if t.data_type == F}
    assert stored == set()
