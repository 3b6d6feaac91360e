"""Each canonical rewrite: when it fires, what it computes, when it does not and why, and what the graph looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import TOLERANCE, Opener, Try, apply, assert_same, body, make_model, node, random, run, save_checked, text
from onnx import TensorProto

from onnxq.graph import Graph, is_constant, shape_of
from onnxq.passes.canonicalize import canonicalize
from onnxq.passes.canonicalize.affine_to_conv import AffineToConv
from onnxq.passes.canonicalize.fold_batchnorm import FoldBatchNorm
from onnxq.passes.canonicalize.fold_constants import FoldConstants
from onnxq.passes.canonicalize.normal_gemm import NormalGemm
from onnxq.passes.canonicalize.remove_identity import RemoveIdentity
from onnxq.passes.canonicalize.share_duplicates import ShareDuplicates
from onnxq.passes.canonicalize.sum_to_add import SumToAdd
from onnxq.passes.manager import Context, PassManager

Golden = Callable[[str, str], None]


def ops(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes]


def statistics(channels: int, prefix: str = "") -> dict[str, Any]:
    """scale, bias, mean and variance of a BatchNormalization, named g b m v."""
    return {f"{prefix}g": random(channels, seed=11) + 1, f"{prefix}b": random(channels, seed=12),
            f"{prefix}m": random(channels, seed=13), f"{prefix}v": np.abs(random(channels, seed=14)) + 0.1}


IMAGE = {"x": random(2, 4, 6, 6)}


# ------------------------------------------------------------------ remove-identity


def test_identities_go(fires: Try) -> None:
    model = make_model([node("Identity", "x", "a"), node("Relu", "a", "b"), node("Identity", "b", "c"),
                        node("Identity", "c", "y")], {"x": [3]}, {"y": [3]})
    graph, skips = fires(model, RemoveIdentity(), {"x": random(3)})
    assert (ops(graph), skips) == (["Relu"], [])


@pytest.mark.parametrize("source", ["x", "w"])
def test_an_identity_between_the_ends_stays(leaves: Try, source: str) -> None:
    model = make_model([node("Identity", source, "y")], {"x": [3]}, {"y": [3]}, {"w": random(3, seed=1)})
    _, skips = leaves(model, RemoveIdentity(), {"x": random(3)})
    assert skips == [("Identity_y", "it joins a graph input or weight to an output")]


@pytest.mark.parametrize("inputs", ["x", "x ratio", "x ratio false", "x _ false"])
@pytest.mark.parametrize("outputs", ["d", "d mask"])
def test_dropout_goes(fires: Try, inputs: str, outputs: str) -> None:
    model = make_model([node("Dropout", inputs, outputs), node("Neg", "d", "y")], {"x": [3]}, {"y": [3]},
                       {k: v for k, v in {"ratio": np.float32(0.9), "false": np.bool_(False)}.items()
                        if k in inputs.split()})
    graph, skips = fires(model, RemoveIdentity(), {"x": random(3)})
    assert (ops(graph), skips) == (["Neg"], [])


@pytest.mark.parametrize("reader", ["node", "output", "body"])
def test_dropout_with_its_mask_read_stays(leaves: Try, reader: str) -> None:
    nodes = [node("Dropout", "x", "d mask"), node("Neg", "d", "y")]
    outputs: dict[str, Any] = {"y": [3]}
    if reader == "node":
        nodes.append(node("Cast", "mask", "z", to=1))
        outputs["z"] = [3]
    elif reader == "output":
        outputs["mask"] = (TensorProto.BOOL, [3])
    else:
        inner = body([node("Cast", "mask", "r", to=1)], {"r": [3]})
        nodes.append(node("If", "c", "z", then_branch=inner, else_branch=inner))
        outputs["z"] = [3]
    model = make_model(nodes, {"c": (TensorProto.BOOL, []), "x": [3]}, outputs)
    _, skips = leaves(model, RemoveIdentity(), {"c": np.array(True), "x": random(3)})
    assert skips == [("Dropout_d", "its mask is read")]


@pytest.mark.parametrize("training", ["stored", "computed"])
def test_dropout_that_may_train_stays(leaves: Try, training: str) -> None:
    stored = {"zero": np.float32(0), **({"t": np.bool_(True)} if training == "stored" else {})}
    model = make_model([node("Dropout", "x zero t", "d"), node("Neg", "d", "y")],
                       {"x": [3], **({"t": (TensorProto.BOOL, [])} if training == "computed" else {})}, {"y": [3]},
                       stored)
    feed = {"x": random(3), **({"t": np.array(False)} if training == "computed" else {})}
    _, skips = leaves(model, RemoveIdentity(), feed)
    assert skips == [("Dropout_d", "it may train")]


def test_casts_to_the_type_that_is_there_go(fires: Try) -> None:
    """Cast and CastLike; those that change a type stay, and the one between an input and an output."""
    model = make_model([node("Cast", "x", "a", to=1), node("Cast", "i", "j", to=TensorProto.INT64),
                        node("CastLike", "a j", "b"), node("CastLike", "b i", "c"), node("Add", "c j", "d"),
                        node("Cast", "a", "e", to=TensorProto.FLOAT16), node("Relu", "a", "y"),
                        node("Cast", "x", "z", to=1)],
                       {"x": [3], "i": (TensorProto.INT64, [3])},
                       {"y": [3], "d": (TensorProto.INT64, [3]), "e": (TensorProto.FLOAT16, [3]), "z": [3]})
    graph, skips = fires(model, RemoveIdentity(), {"x": random(3), "i": np.arange(3)})
    assert ops(graph) == ["CastLike", "Add", "Cast", "Relu", "Cast"]
    assert skips == [("Cast_z", "it joins a graph input or weight to an output")]


def test_a_name_that_a_removed_node_made_is_free(opened: Opener) -> None:
    graph = opened(make_model([node("Cast", "x", "a", to=1), node("Relu", "a", "y")], {"x": [3]}, {"y": [3]}))
    apply(RemoveIdentity(), graph)
    assert not graph.has("a")
    assert graph.variable("a", "float32", [3]).name == "a"


# ------------------------------------------------------------------ fold-constants


def reshape_chain(shape: list[int | str]) -> onnx.ModelProto:
    """x [N, 4, 6] -> [N, 24] as torch's script exporter writes view(x.size(0), -1)."""
    return make_model(
        [node("Relu", "x", "h"), node("Shape", "h", "s"), node("Gather", "s zero", "n", axis=0),
         node("Unsqueeze", "n axes", "u"), node("Concat", "u rest", "to", axis=0), node("Reshape", "h to", "y")],
        {"x": shape}, {"y": [shape[0], 24]},
        {"zero": np.int64(0), "axes": np.int64([0]), "rest": np.int64([-1])})


def test_a_shape_chain_with_fixed_dimensions_folds(fires: Try, golden: Golden) -> None:
    graph, skips = fires(reshape_chain([2, 4, 6]), FoldConstants(), {"x": random(2, 4, 6)})
    assert (ops(graph), skips) == (["Relu", "Reshape"], [])
    np.testing.assert_array_equal(graph.read(graph.nodes[1].inputs[1]), np.int64([2, -1]), strict=True)
    golden("fold_constants_reshape", text(graph))


def test_a_shape_chain_with_a_free_dimension_stays(leaves: Try) -> None:
    _, skips = leaves(reshape_chain(["n", 4, 6]), FoldConstants(), {"x": random(2, 4, 6)})
    assert skips == []


def test_results_that_nobody_reads_go_along(fires: Try) -> None:
    model = make_model([node("Relu", "x", "y"), node("Neg", "x", "a"), node("Exp", "a", "dead")], {"x": [3]},
                       {"y": [3]})
    graph, _ = fires(model, FoldConstants(), {"x": random(3)})
    assert ops(graph) == ["Relu"]


def test_a_large_result_of_unknown_shape_is_left_too(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = opened(make_model([node("Neg", "w", "h"), node("Add", "x h", "y")], {"x": [3]}, {"y": [3]},
                              {"w": random(3)}))
    graph.nodes[0].outputs[0].shape = None
    reason = "its result is larger than 11 bytes"
    assert apply(FoldConstants(max_bytes=11), graph) == (False, [("Neg_h", reason)])
    assert apply(FoldConstants(max_bytes=12), graph) == (True, [])


def test_shape_with_bounds_and_of_a_weight(fires: Try) -> None:
    model = make_model([node("Shape", "x", "s", start=-1), node("Shape", "w", "t", start=1),
                        node("ConstantOfShape", "t", "c"), node("ReduceSum", "c", "k", keepdims=0),
                        node("Shape", "x", "r", end=1), node("Add", "s r", "a"), node("Cast", "a", "f", to=1),
                        node("Add", "f k", "y")], {"x": ["n", 3]}, {"y": [1]}, {"w": random(4, 5)})
    graph, skips = fires(model, FoldConstants(), {"x": random(2, 3)})
    assert (ops(graph), skips) == (["Shape", "Add", "Cast", "Add"], [])
    assert (graph.scalar(graph.nodes[1].inputs[0]), graph.scalar(graph.nodes[3].inputs[1])) == (3.0, 0.0)


def test_folded_values_are_those_of_the_runtime(fires: Try) -> None:
    """A sample of what exporters leave behind, bit for bit."""
    nodes = [
        node("Cast", "i", "a", to=TensorProto.FLOAT), node("Sqrt", "p", "b"), node("Div", "a b", "c"),
        node("Where", "m c w", "d"), node("Slice", "d st en ax", "e"), node("Transpose", "e", "f", perm=[1, 0]),
        node("Pow", "f two", "g"), node("Expand", "g to", "h"), node("Range", "r0 r1 r2", "k"),
        node("Gather", "h k", "l", axis=1), node("Equal", "i i", "eq"), node("Not", "eq", "ne"),
        node("Cast", "ne", "nf", to=TensorProto.FLOAT), node("Mul", "x l", "n"), node("ReduceMean", "nf", "q"),
        node("Add", "n q", "y")]
    stored = {"i": np.int64([[1, -2, 3], [4, 5, 6]]), "p": np.abs(random(2, 3)), "w": random(2, 3, seed=3),
              "m": np.array([[True, False, True]] * 2), "st": np.int64([1]), "en": np.int64([2**62]),
              "ax": np.int64([1]), "two": np.float32(2), "to": np.int64([2, 2, 2]), "r0": np.int64(0),
              "r1": np.int64(2), "r2": np.int64(1)}
    model = make_model(nodes, {"x": [2, 2, 2]}, {"y": [2, 2, 2]}, stored)
    graph, skips = fires(model, FoldConstants(), {"x": random(2, 2, 2)})
    assert (ops(graph), skips) == (["Mul", "Add"], [])


def test_what_must_stay_visible_or_random_is_not_folded(leaves: Try) -> None:
    model = make_model([node("QuantizeLinear", "w s z", "q"), node("DequantizeLinear", "q s z", "d"),
                        node("RandomNormal", "", "r", shape=[3]), node("Mul", "r none", "r0"), node("Add", "d r0", "e"),
                        node("Add", "e x", "y")], {"x": [3]}, {"y": [3]},
                       {"w": random(3), "s": np.float32(0.1), "z": np.int8(0), "none": np.float32(0)})
    _, skips = leaves(model, FoldConstants(), {"x": random(3)})
    assert skips == []


def test_an_output_and_a_branch_are_not_folded(leaves: Try) -> None:
    inner = body([node("Neg", "w", "r")], {"r": [3]})
    model = make_model([node("Neg", "w", "y"), node("If", "true", "z", then_branch=inner, else_branch=inner)],
                       {"x": [3]}, {"y": [3], "z": [3]}, {"w": random(3), "true": np.bool_(True)})
    leaves(model, FoldConstants(), {"x": random(3)})


@pytest.mark.parametrize("how", ["ConstantOfShape", "Expand", "Tile", "MatMul"])
def test_large_results_are_left_to_the_runtime(leaves: Try, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """What is too large is seen before it is computed."""
    monkeypatch.setattr(Graph, "evaluate", lambda self, item: pytest.fail(f"{item.name} was computed"))
    stored = {"shape": np.int64([40, 50]), "one": np.float32([[1.0]]), "col": random(40, 1), "row": random(1, 50)}
    nodes = {"ConstantOfShape": node("ConstantOfShape", "shape", "big"), "Expand": node("Expand", "one shape", "big"),
             "Tile": node("Tile", "one shape", "big"), "MatMul": node("MatMul", "col row", "big")}
    model = make_model([nodes[how], node("Add", "x big", "y")], {"x": [40, 50]}, {"y": [40, 50]}, stored)
    _, skips = leaves(model, FoldConstants(max_bytes=40 * 50 * 4 - 1), {"x": random(40, 50)})
    assert skips == [(f"{nodes[how].op_type}_big", "its result is larger than 7999 bytes")]


def test_the_bound_counts_small_types_too(fires: Try, leaves: Try) -> None:
    """An int16 result of 2,000 elements is 4,000 bytes, not twice as many."""
    model = make_model([node("Cast", "w", "q", to=TensorProto.INT16), node("Cast", "q", "f", to=1),
                        node("Add", "x f", "y")], {"x": [2000]}, {"y": [2000]}, {"w": random(2000) * 100})
    graph, skips = fires(model, FoldConstants(max_bytes=4000), {"x": random(2000)})
    assert ops(graph) == ["Cast", "Add"]
    assert skips == [("Cast_f", "its result is larger than 4000 bytes")]


ODD_TYPE = "its result is text or of a type that NumPy lacks"
NO_TENSOR = "the reference implementation can't run it: its result is no tensor"


def test_texts_sequences_and_odd_types_are_not_folded(leaves: Try) -> None:
    nodes = [node("Constant", "", "k", value_strings=["a", "b"]), node("Concat", "k k", "t", axis=0),
             node("SequenceConstruct", "w w", "s"), node("ConcatFromSequence", "s", "c", axis=0),
             node("SequenceEmpty", "", "none"), node("SequenceInsert", "none x", "one"),
             node("SequenceAt", "one zero", "z"), node("Identity", "t", "words"), node("Add", "c x", "y"),
             node("Cast", "w", "b", to=TensorProto.BFLOAT16), node("Cast", "b", "v", to=1)]
    model = make_model(nodes, {"x": [1]}, {"y": [6], "z": [1], "v": [3], "words": (TensorProto.STRING, [4])},
                       {"w": random(3), "zero": np.int64(0)})
    _, skips = leaves(model, FoldConstants(), {"x": random(1)})
    assert dict(skips) == {
        "Constant_k": ODD_TYPE, "Cast_b": ODD_TYPE, "SequenceConstruct_s": NO_TENSOR, "SequenceEmpty_none": NO_TENSOR}


def test_a_reference_of_another_type_is_not_trusted(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = opened(make_model([node("Neg", "w", "h"), node("Add", "x h", "y")], {"x": [3]}, {"y": [3]},
                              {"w": random(3)}))
    monkeypatch.setattr(Graph, "evaluate", lambda self, item: [np.zeros(3)])
    reason = "the reference implementation gives float64, not float32"
    assert apply(FoldConstants(), graph) == (False, [("Neg_h", reason)])


def test_what_the_reference_cannot_run_stays(opened: Opener) -> None:
    graph = opened(make_model([node("Vanished", "w", "h"), node("Custom", "w", "i", domain="custom"),
                               node("Sum", "x h i", "y")], {"x": [3]}, {"y": [3]}, {"w": random(3)},
                              domains={"custom": 1}))
    edited, ((name, reason),) = apply(FoldConstants(), graph)
    assert edited is False
    assert name == "Vanished_h"
    assert reason.startswith("the reference implementation can't run it: ")


def test_readers_in_bodies_take_the_folded_value(fires: Try) -> None:
    inner = body([node("Add", "x k", "r")], {"r": [3]})
    model = make_model([node("Neg", "w", "k"), node("If", "c", "y", then_branch=inner, else_branch=inner)],
                       {"c": (TensorProto.BOOL, []), "x": [3]}, {"y": [3]}, {"w": random(3)})
    graph, _ = fires(model, FoldConstants(), {"c": np.array(True), "x": random(3)})
    assert ops(graph) == ["If"]


# ------------------------------------------------------------------ fold-batchnorm

FREE = [None] * 4
BATCHNORM = node("BatchNormalization", "c g b m v", "y", epsilon=1e-3)
CONVS = {
    "plain": (node("Conv", "x w k", "c", pads=[1, 1, 1, 1]), (8, 4, 3, 3), 8),
    "no bias": (node("Conv", "x w", "c"), (8, 4, 3, 3), 8),
    "omitted bias": (node("Conv", "x w _", "c"), (8, 4, 3, 3), 8),
    "grouped": (node("Conv", "x w k", "c", group=2), (6, 2, 3, 3), 6),
    "depthwise": (node("Conv", "x w", "c", group=4), (4, 1, 3, 3), 4),
    "transposed": (node("ConvTranspose", "x w k", "c", strides=[2, 2]), (4, 5, 3, 3), 5),
    "transposed, no bias": (node("ConvTranspose", "x w", "c"), (4, 5, 2, 2), 5),
}


@pytest.mark.parametrize("kind", CONVS)
def test_batchnorm_folds_into_convolutions(fires: Try, kind: str) -> None:
    conv, shape, channels = CONVS[kind]
    stored = {"w": random(*shape), **statistics(channels)}
    if "k" in conv.input:
        stored["k"] = random(channels, seed=1)
    model = make_model([conv, BATCHNORM], {"x": ["n", 4, 6, 6]}, {"y": ["n", channels, None, None]}, stored)
    graph, skips = fires(model, FoldBatchNorm(), IMAGE)
    assert (ops(graph), skips) == ([conv.op_type], [])
    assert graph.read(graph.nodes[0].inputs[1]).dtype == np.float32
    assert shape_of(graph.nodes[0].inputs[2]) == (channels,)


GEMM_BIASES = {"none": None, "[N]": (5,), "[1, N]": (1, 5), "scalar": (), "[1]": (1,), "[1, 1]": (1, 1),
               "[M, 1]": (3, 1), "[M, N]": (3, 5), "[N, 1] of N rows": (5, 1)}


@pytest.mark.parametrize("bias", GEMM_BIASES)
@pytest.mark.parametrize("attrs", [{}, {"transB": 1}, {"beta": 0.5}, {"transA": 1, "transB": 1, "beta": 2.0}])
def test_batchnorm_folds_into_gemm(fires: Try, bias: str, attrs: dict[str, Any]) -> None:
    shape = GEMM_BIASES[bias]
    rows = 5 if shape == (5, 1) else 3
    stored = {"w": random(*((5, 7) if "transB" in attrs else (7, 5))), **statistics(5)}
    if shape is not None:
        stored["k"] = random(*shape, seed=1)
    model = make_model([node("Gemm", "x w" if shape is None else "x w k", "c", **attrs), BATCHNORM],
                       {"x": [7, rows] if "transA" in attrs else [rows, 7]}, {"y": [rows, 5]}, stored)
    graph, skips = fires(model, FoldBatchNorm(), {"x": random(*((7, rows) if "transA" in attrs else (rows, 7)))})
    assert (ops(graph), skips) == (["Gemm"], [])


def test_batchnorm_of_doubles_stays_double(fires: Try) -> None:
    stored = {k: v.astype(np.float64) for k, v in {"w": random(7, 5), **statistics(5)}.items()}
    model = make_model([node("Gemm", "x w", "c"), BATCHNORM], {"x": (TensorProto.DOUBLE, [3, 7])},
                       {"y": (TensorProto.DOUBLE, [3, 5])}, stored)
    graph, _ = fires(model, FoldBatchNorm(), {"x": random(3, 7).astype(np.float64)})
    assert {graph.read(t).dtype for t in graph.nodes[0].inputs[1:]} == {np.dtype(np.float64)}


def test_convs_that_share_a_weight_get_one_each(fires: Try, golden: Golden) -> None:
    model = make_model(
        [node("Conv", "x w", "c1"), node("BatchNormalization", "c1 1g 1b 1m 1v", "n1"),
         node("Conv", "x w", "c2"), node("BatchNormalization", "c2 2g 2b 2m 2v", "n2"), node("Add", "n1 n2", "y")],
        {"x": [2, 4, 6, 6]}, {"y": [2, 8, 4, 4]},
        {"w": random(8, 4, 3, 3), **statistics(8, "1"), **{k: v * 0.7 for k, v in statistics(8, "2").items()}})
    graph, skips = fires(model, FoldBatchNorm(), IMAGE)
    assert (ops(graph), skips) == (["Conv", "Conv", "Add"], [])
    golden("fold_batchnorm_shared", text(graph))


def test_two_batchnorms_in_a_row_fold(fires: Try) -> None:
    model = make_model([node("Conv", "x w", "c"), node("BatchNormalization", "c g b m v", "n"),
                        node("BatchNormalization", "n 2g 2b 2m 2v", "y")], {"x": [2, 4, 6, 6]}, {"y": [2, 8, 4, 4]},
                       {"w": random(8, 4, 3, 3), **statistics(8), **statistics(8, "2")})
    graph, skips = fires(model, FoldBatchNorm(), IMAGE)
    assert (ops(graph), skips) == (["Conv"], [])


def test_a_channel_of_zeros_folds_to_a_constant_channel(fires: Try) -> None:
    stored = {"w": random(8, 4, 3, 3), **statistics(8)}
    stored["w"][3] = 0
    stored["v"][5] = 0
    stored["g"][6] = 0
    model = make_model([node("Conv", "x w", "c"), BATCHNORM], {"x": [2, 4, 6, 6]}, {"y": [2, 8, 4, 4]}, stored)
    fires(model, FoldBatchNorm(), IMAGE)


def conv_bn(conv: onnx.NodeProto, *more: onnx.NodeProto, outputs: Mapping[str, Any] | None = None,
            channels: int = 8, batchnorm: onnx.NodeProto = BATCHNORM, **stored: Any) -> onnx.ModelProto:
    weights = {"w": random(8, 4, 3, 3), **statistics(channels), **stored}
    used = {n for item in (conv, batchnorm, *more) for n in item.input}
    return make_model([conv, batchnorm, *more], {"x": [2, 4, 6, 6]}, {"y": FREE, **(outputs or {})},
                      {k: v for k, v in weights.items() if k in used and v is not None})


PLAIN = node("Conv", "x w", "c")
KEPT = {
    "read elsewhere": (conv_bn(PLAIN, node("Neg", "c", "z"), outputs={"z": FREE}),
                       "the result of Conv_c is read elsewhere too"),
    "output": (conv_bn(PLAIN, outputs={"c": FREE}), "the result of Conv_c is read elsewhere too"),
    "no weights": (conv_bn(node("Relu", "x", "c"), channels=4), "what feeds it has no weights to fold into"),
    "input": (make_model([node("BatchNormalization", "x g b m v", "y")], {"x": [2, 4, 6, 6]}, {"y": FREE},
                         statistics(4)), "what feeds it has no weights to fold into"),
    "grouped": (conv_bn(node("ConvTranspose", "x w", "c", group=2), w=random(4, 3, 2, 2), channels=6),
                "a grouped ConvTranspose interleaves its channels"),
}


@pytest.mark.parametrize("case", KEPT)
def test_batchnorms_that_stay(leaves: Try, case: str) -> None:
    model, reason = KEPT[case]
    _, skips = leaves(model, FoldBatchNorm(), IMAGE)
    assert skips == [("BatchNormalization_y", reason)]


def test_batchnorm_of_a_scaled_gemm_stays(leaves: Try) -> None:
    model = make_model([node("Gemm", "x w", "c", alpha=0.5), BATCHNORM], {"x": [3, 7]}, {"y": [3, 5]},
                       {"w": random(7, 5), **statistics(5)})
    _, skips = leaves(model, FoldBatchNorm(), {"x": random(3, 7)})
    assert skips == [("BatchNormalization_y", "the Gemm scales its product")]


@pytest.mark.parametrize("computed", ["w", "k", "g", "v"])
def test_batchnorm_with_a_computed_part_stays(leaves: Try, computed: str) -> None:
    stored = {"w": random(8, 4, 3, 3), "k": random(8), **statistics(8)}
    model = make_model([node("Conv", "x w k", "c"), BATCHNORM],
                       {"x": [2, 4, 6, 6], computed: list(stored[computed].shape)}, {"y": [2, 8, 4, 4]},
                       {k: v for k, v in stored.items() if k != computed})
    _, skips = leaves(model, FoldBatchNorm(), {**IMAGE, computed: stored[computed]})
    assert skips == [("BatchNormalization_y", "weights or statistics are computed")]


@pytest.mark.parametrize("attrs", [{"training_mode": 1}, {}])
def test_batchnorm_that_trains_stays(opened: Opener, attrs: dict[str, int]) -> None:
    outputs = "y" if not attrs else "y rm rv"
    model = conv_bn(PLAIN, batchnorm=node("BatchNormalization", "c g b m v", outputs, **attrs))
    graph = opened(model)
    edited, skips = apply(FoldBatchNorm(), graph)
    if attrs:
        assert (edited, skips) == (False, [("BatchNormalization_y", "it trains")])
    else:
        assert (edited, skips) == (True, [])


@pytest.mark.parametrize("seed", range(8))
def test_random_chains_of_conv_and_batchnorm(fires: Try, seed: int) -> None:
    """Conv, an activation or none, BatchNormalization, in any number and form."""
    rng = np.random.default_rng(seed)
    nodes, stored, channels, source = [], {}, 4, "x"
    for k in range(int(rng.integers(2, 5))):
        group = int(rng.choice([1, channels])) if k else 1
        wide = channels if group > 1 else int(rng.integers(2, 9))
        side = int(rng.choice([1, 3]))
        bias = bool(rng.integers(2))
        transposed = group == 1 and rng.random() < 0.3
        shape = (channels, wide, side, side) if transposed else (wide, channels // group, side, side)
        stored[f"w{k}"] = (rng.standard_normal(shape) / np.sqrt(channels * side * side)).astype(np.float32)
        if bias:
            stored[f"k{k}"] = rng.standard_normal(wide).astype(np.float32)
        nodes.append(node("ConvTranspose" if transposed else "Conv", f"{source} w{k}" + (f" k{k}" if bias else ""),
                          f"c{k}", group=group, pads=[side // 2] * 4))
        between = f"c{k}"
        if rng.random() < 0.25:
            nodes.append(node("Relu", f"c{k}", f"r{k}"))
            between = f"r{k}"
        stored |= {f"{k}{n}": v.astype(np.float32) for n, v in {
            "g": rng.uniform(0.5, 2, wide), "b": rng.standard_normal(wide), "m": rng.standard_normal(wide),
            "v": rng.uniform(0.1, 3, wide)}.items()}
        nodes.append(node("BatchNormalization", f"{between} {k}g {k}b {k}m {k}v", f"n{k}",
                          epsilon=float(rng.choice([1e-5, 1e-3]))))
        source, channels = f"n{k}", wide
    if all(n.op_type != "Relu" for n in nodes[:3]):
        nodes.append(node("Relu", source, "y"))
    else:  # at least one has to fold
        nodes += [node("Conv", f"{source} wz", "cz"), node("BatchNormalization", "cz zg zb zm zv", "y")]
        stored |= {"wz": random(3, channels, 1, 1), **statistics(3, "z")}
        channels = 3
    model = make_model(nodes, {"x": ["n", 4, 6, 6]}, {"y": FREE}, stored)
    graph, skips = fires(model, FoldBatchNorm(), IMAGE)
    blocked = sum(n.op_type == "Relu" and n.output[0] != "y" for n in nodes)
    assert ops(graph).count("BatchNormalization") == len(skips) == blocked


# ------------------------------------------------------------------ affine-to-conv


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1, 1), (1,), (1, 1, 1), ()])
@pytest.mark.parametrize("bias", ["", " _", " k"])
@pytest.mark.parametrize("order", ["c a", "a c"])
def test_an_add_becomes_the_bias(fires: Try, shape: tuple[int, ...], bias: str, order: str) -> None:
    model = make_model([node("Conv", "x w" + bias, "c"), node("Add", order, "y")], {"x": [2, 4, 6, 6]},
                       {"y": [2, 8, 4, 4]}, {"w": random(8, 4, 3, 3), "a": random(*shape, seed=3),
                                             **({"k": random(8)} if "k" in bias else {})})
    graph, skips = fires(model, AffineToConv(), IMAGE)
    assert (ops(graph), skips) == (["Conv"], [])
    assert shape_of(graph.nodes[0].inputs[2]) == (8,)


def test_two_adds_become_one_bias(fires: Try) -> None:
    model = make_model([node("Conv", "x w", "c"), node("Add", "c a1", "d"), node("Add", "a2 d", "y")],
                       {"x": [2, 4, 6, 6]}, {"y": [2, 8, 4, 4]},
                       {"w": random(8, 4, 3, 3), "a1": random(8, 1, 1), "a2": random(1, 8, 1, 1, seed=4)})
    graph, _ = fires(model, AffineToConv(), IMAGE)
    assert ops(graph) == ["Conv"]


def test_an_add_behind_a_conv_over_one_dimension(fires: Try) -> None:
    model = make_model([node("Conv", "x w", "c"), node("Add", "c a", "y")], {"x": [2, 4, 6]}, {"y": [2, 8, 4]},
                       {"w": random(8, 4, 3), "a": random(8, 1)})
    fires(model, AffineToConv(), {"x": random(2, 4, 6)})


@pytest.mark.parametrize("own", ["", " k"])
def test_the_bias_of_a_double_conv_is_double(opened: Opener, own: str) -> None:
    """onnxruntime has no such kernel on the CPU, so only the types can be looked at."""
    model = make_model([node("Conv", "x w" + own, "c"), node("Add", "c a", "y")],
                       {"x": (TensorProto.DOUBLE, [2, 4, 6])}, {"y": (TensorProto.DOUBLE, [2, 8, 4])},
                       {n: random(*s).astype(np.float64) for n, s in {"w": (8, 4, 3), "a": (8, 1), "k": (8,)}.items()})
    graph = opened(model)
    assert apply(AffineToConv(), graph) == (True, [])
    bias = graph.read(graph.nodes[0].inputs[2])
    wanted = random(8, 1).astype(np.float64).reshape(-1) + (random(8).astype(np.float64) if own else 0)
    np.testing.assert_array_equal(bias, wanted, strict=True)


NOT_A_BIAS = "what it adds is not one number per channel"
ADDS: dict[str, tuple[dict[str, Any], tuple[str, str] | None]] = {
    "per column": ({"a": random(4)}, ("Add_y", NOT_A_BIAS)),
    "per position": ({"a": random(1, 8, 4, 4)}, ("Add_y", NOT_A_BIAS)),
    "of other channels": ({"w": random(1, 4, 3, 3), "a": random(8, 1, 1)}, ("Add_y", NOT_A_BIAS)),
    "per image": ({"a": random(2, 1, 1, 1)}, ("Add_y", NOT_A_BIAS)),
    "computed": ({}, None),
}


@pytest.mark.parametrize("case", ADDS)
def test_adds_that_are_no_bias(leaves: Try, case: str) -> None:
    stored, skip = ADDS[case]
    ports: dict[str, Any] = {"x": [2, 4, 6, 6], **({} if stored else {"a": [8, 1, 1]})}
    model = make_model([node("Conv", "x w", "c"), node("Add", "c a", "y")], ports, {"y": FREE},
                       {"w": random(8, 4, 3, 3), **stored})
    _, skips = leaves(model, AffineToConv(), {**IMAGE, **({} if stored else {"a": random(8, 1, 1)})})
    assert skips == ([skip] if skip else [])


def test_an_add_that_raises_the_rank_is_no_bias(leaves: Try) -> None:
    model = make_model([node("Conv", "x w", "c"), node("Add", "c a", "y")], {"x": [2, 4, 6, 6]}, {"y": [1, 2, 8, 4, 4]},
                       {"w": random(8, 4, 3, 3), "a": random(1, 1, 8, 1, 1)})
    _, skips = leaves(model, AffineToConv(), IMAGE)
    assert skips == [("Add_y", NOT_A_BIAS)]


def test_adds_behind_a_conv_that_others_read(leaves: Try) -> None:
    model = make_model([node("Conv", "x w", "c"), node("Add", "c a", "y")], {"x": [2, 4, 6, 6]},
                       {"y": FREE, "c": FREE}, {"w": random(8, 4, 3, 3), "a": random(8, 1, 1)})
    _, skips = leaves(model, AffineToConv(), IMAGE)
    assert skips == [("Add_y", "the result of Conv_c is read elsewhere too")]


def test_adds_behind_a_conv_with_a_computed_bias(leaves: Try) -> None:
    model = make_model([node("Conv", "x w k", "c"), node("Add", "c a", "y")], {"x": [2, 4, 6, 6], "k": [8]},
                       {"y": FREE}, {"w": random(8, 4, 3, 3), "a": random(8, 1, 1)})
    _, skips = leaves(model, AffineToConv(), {**IMAGE, "k": random(8)})
    assert skips == [("Add_y", "the Conv's own bias is computed")]


# ------------------------------------------------------------------ sum-to-add


def test_a_sum_of_two_is_an_add(fires: Try) -> None:
    model = make_model([node("Sum", "x w", "y")], {"x": [2, 3]}, {"y": [2, 3]}, {"w": random(3)})
    graph, skips = fires(model, SumToAdd(), {"x": random(2, 3)})
    assert (ops(graph), skips) == (["Add"], [])


@pytest.mark.parametrize("count", [1, 3])
def test_other_sums_stay(leaves: Try, count: int) -> None:
    model = make_model([node("Sum", "x w w"[:2 * count], "y")], {"x": [2, 3]}, {"y": [2, 3]},
                       {"w": random(3)} if count > 1 else {})
    _, skips = leaves(model, SumToAdd(), {"x": random(2, 3)})
    assert skips == [("Sum_y", f"it adds {count} tensors")]


def test_a_sum_before_layer_normalization_stays(leaves: Try) -> None:
    model = make_model([node("Sum", "x w", "s"), node("Relu", "s", "z"), node("LayerNormalization", "s g", "y")],
                       {"x": [2, 3]}, {"y": [2, 3], "z": [2, 3]}, {"w": random(3), "g": random(3, seed=1)})
    _, skips = leaves(model, SumToAdd(), {"x": random(2, 3)})
    assert skips == [("Sum_s", "as an Add before LayerNormalization it would be slower")]


# ------------------------------------------------------------------ normal-gemm

BIASES = {"none": None, "[N]": (5,), "[1, N]": (1, 5), "scalar": (), "[1]": (1,), "[1, 1]": (1, 1)}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("attrs", [{"transB": 1}, {"alpha": 0.25}, {"beta": 2.0},
                                   {"alpha": 0.3, "beta": -1.7, "transB": 1}, {"alpha": 1.0, "transA": 0}])
def test_gemms_take_one_form(fires: Try, bias: str, attrs: dict[str, Any]) -> None:
    shape = BIASES[bias]
    stored = {"w": random(*((5, 7) if "transB" in attrs else (7, 5)))}
    if shape is not None:
        stored["k"] = random(*shape, seed=1)
    model = make_model([node("Gemm", "x w" if shape is None else "x w k", "y", **attrs)], {"x": ["n", 7]},
                       {"y": ["n", 5]}, stored)
    graph, skips = fires(model, NormalGemm(), {"x": random(3, 7)})
    (gemm,) = graph.nodes
    assert (skips, dict(gemm.attrs)) == ([], {})
    assert shape_of(gemm.inputs[1]) == (7, 5)
    if shape is not None:
        assert shape_of(gemm.inputs[2]) == (5,)


def test_a_normal_gemm_is_left_alone(leaves: Try) -> None:
    model = make_model([node("Gemm", "x w k", "y")], {"x": [3, 7]}, {"y": [3, 5]}, {"w": random(7, 5), "k": random(5)})
    _, skips = leaves(model, NormalGemm(), {"x": random(3, 7)})
    assert skips == []


def test_a_weight_that_gemms_share_is_turned_once(fires: Try, golden: Golden) -> None:
    model = make_model([node("Gemm", "x w k", "a", transB=1), node("Gemm", "x w", "b", transB=1),
                        node("Gemm", "x w", "c", transB=1, alpha=0.5), node("Sum", "a b c", "y")],
                       {"x": [3, 7]}, {"y": [3, 5]}, {"w": random(5, 7), "k": random(1, 5)})
    graph, _ = fires(model, NormalGemm(), {"x": random(3, 7)})
    one, two, scaled, _ = graph.nodes
    assert one.inputs[1] is two.inputs[1]
    assert scaled.inputs[1] is not one.inputs[1]
    golden("normal_gemm_shared", text(graph))


GEMMS: dict[str, tuple[onnx.ModelProto, str]] = {
    "transA": (make_model([node("Gemm", "x w", "y", transA=1, transB=1)], {"x": [7, 3]}, {"y": [3, 5]},
                          {"w": random(5, 7)}), "its activation is transposed"),
    "computed weight": (make_model([node("Neg", "w", "v"), node("Gemm", "x v", "y", transB=1)],
                                   {"x": [3, 7], "w": [5, 7]}, {"y": [3, 5]}), "its weights are computed"),
    "computed bias": (make_model([node("Gemm", "x w k", "y", transB=1)], {"x": [3, 7], "k": [5]}, {"y": [3, 5]},
                                 {"w": random(5, 7)}), "its weights are computed"),
    "bias per row": (make_model([node("Gemm", "x w k", "y", transB=1)], {"x": [3, 7]}, {"y": [3, 5]},
                                {"w": random(5, 7), "k": random(3, 1)}), "its bias is not one number per column"),
    "bias per row, square": (make_model([node("Gemm", "x w k", "y", transB=1)], {"x": [5, 7]}, {"y": [5, 5]},
                                        {"w": random(5, 7), "k": random(5, 1)}),
                             "its bias is not one number per column"),
    "full bias": (make_model([node("Gemm", "x w k", "y", transB=1)], {"x": [3, 7]}, {"y": [3, 5]},
                             {"w": random(5, 7), "k": random(3, 5)}), "its bias is not one number per column"),
    "doubles": (make_model([node("Gemm", "x w", "y", transB=1)], {"x": (TensorProto.DOUBLE, [3, 7])},
                           {"y": (TensorProto.DOUBLE, [3, 5])}, {"w": random(5, 7).astype(np.float64)}),
                "its weights are float64"),
}


@pytest.mark.parametrize("case", GEMMS)
def test_gemms_that_stay(leaves: Try, case: str) -> None:
    model, reason = GEMMS[case]
    feed = {i.name: random(*(d.dim_value for d in i.type.tensor_type.shape.dim)) for i in model.graph.input}
    if case == "doubles":
        feed = {k: v.astype(np.float64) for k, v in feed.items()}
    _, skips = leaves(model, NormalGemm(), feed)
    assert skips == [("Gemm_y", reason)]


# ------------------------------------------------------------------ share-duplicates


def test_duplicates_become_one(fires: Try) -> None:
    model = make_model([node("MatMul", "x w1", "a"), node("MatMul", "a w2", "b"), node("MatMul", "b w3", "y")],
                       {"x": [2, 16]}, {"y": [2, 16]},
                       {"w1": random(16, 16), "w2": random(16, 16), "w3": random(16, 16, seed=1)})
    graph, _ = fires(model, ShareDuplicates(), {"x": random(2, 16)})
    assert [n.inputs[1].name for n in graph.nodes] == ["w1", "w1", "w3"]


@pytest.mark.parametrize("difference", ["size", "shape", "type", "sign of zero", "one bit"])
def test_near_duplicates_stay(leaves: Try, difference: str) -> None:
    one = np.arange(256, dtype=np.float32).reshape(16, 16)
    two = {"size": one[:15, :15], "shape": one.reshape(8, 32), "type": one.view(np.int32), "one bit": one + 0,
           "sign of zero": one + 0}[difference].copy()
    if difference == "sign of zero":
        two[0, 0] = -0.0
    if difference == "one bit":
        two[3, 3] = np.nextafter(two[3, 3], np.float32(0))
    if difference == "size":
        one = one[:15, :15].copy()
    model = make_model([node("Shape", "one", "a"), node("Shape", "two", "b"), node("Concat", "a b x", "y", axis=0)],
                       {"x": (TensorProto.INT64, [1])}, {"y": (TensorProto.INT64, [5])}, {"one": one, "two": two})
    _, skips = leaves(model, ShareDuplicates(), {"x": np.int64([1])})
    assert skips == []


def test_weights_that_differ_at_their_ends_are_not_read(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of gigabytes has many weights of each shape; of these, two have one end in common each."""
    first, last, other = random(16, 16), random(16, 16), random(16, 16, seed=1)
    first[1:], last[:15] = other[1:], other[:15]
    graph = opened(make_model([node("MatMul", "x w1", "a"), node("MatMul", "a w2", "b"), node("MatMul", "b w3", "y")],
                              {"x": [2, 16]}, {"y": [2, 16]}, {"w1": random(16, 16), "w2": first, "w3": last}))
    read: list[str] = []
    monkeypatch.setattr(type(graph), "read", lambda _, tensor: read.append(tensor.name))
    assert apply(ShareDuplicates(), graph) == (False, [])
    assert read == []


def test_equal_bytes_of_other_types_stay(leaves: Try) -> None:
    """float8 of two kinds are no numpy type to the graph library, yet they are not alike."""
    kinds = ("FLOAT8E4M3FN", "FLOAT8E5M2")
    stored = {}
    for kind in kinds:
        stored[kind] = onnx.TensorProto(name=kind, data_type=getattr(TensorProto, kind), dims=[256],
                                        raw_data=bytes(range(100)) * 2 + bytes(56))
    model = make_model([node("Cast", kind, f"y{k}", to=1) for k, kind in enumerate(kinds)], {},
                       {"y0": [256], "y1": [256]}, stored, opset=21, ir_version=10)
    leaves(model, ShareDuplicates(), {})


def test_texts_stay(leaves: Try) -> None:
    stored = {n: onnx.helper.make_tensor(n, TensorProto.STRING, [256], [b"same"] * 256) for n in ("a", "b")}
    stored["b"].string_data[:] = [b"else"] * 256
    model = make_model([node("Equal", "a b", "y")], {}, {"y": (TensorProto.BOOL, [256])}, stored, opset=19,
                       ir_version=9)
    leaves(model, ShareDuplicates(), {})


def test_duplicates_in_bodies_and_at_outputs(fires: Try) -> None:
    """A body reads the outer twin; a weight that is an output stays, and serves the others."""
    same = random(16, 16)
    then = body([node("MatMul", "x inner", "r")], {"r": [2, 16]}, "then", {"inner": same})
    other = body([node("MatMul", "x inner", "r")], {"r": [2, 16]}, "else", {"inner": same})
    model = make_model([node("If", "c", "i", then_branch=then, else_branch=other), node("MatMul", "i a", "j"),
                        node("MatMul", "j out", "y")],
                       {"c": (TensorProto.BOOL, []), "x": [2, 16]}, {"out": [16, 16], "y": [2, 16]},
                       {"a": same, "out": same})
    for c in (True, False):
        graph, _ = fires(model, ShareDuplicates(), {"c": np.array(c), "x": random(2, 16)})
        read = {t.name for n, _ in graph.walk() for t in n.inputs if is_constant(t)}
        assert read == {"a", "out"}, "as an output, `out` keeps its own storage"


def test_duplicates_in_bodies_alone(fires: Try) -> None:
    same = random(16, 16)
    then = body([node("MatMul", "x inner", "r")], {"r": [2, 16]}, "then", {"inner": same})
    other = body([node("Gemm", "x inner", "r")], {"r": [2, 16]}, "else", {"inner": same})
    model = make_model([node("If", "c", "y", then_branch=then, else_branch=other)],
                       {"c": (TensorProto.BOOL, []), "x": [2, 16]}, {"y": [2, 16]})
    for c in (True, False):
        fires(model, ShareDuplicates(), {"c": np.array(c), "x": random(2, 16)})


# ------------------------------------------------------------------ all together


def small_net() -> onnx.ModelProto:
    """What exporters write: BatchNormalization, an Add as bias, Dropout, Sum, a shape chain, Gemm with transB."""
    return make_model(
        [node("Conv", "x w1", "c1", pads=[1, 1, 1, 1]), node("BatchNormalization", "c1 g b m v", "n1"),
         node("Relu", "n1", "r1"), node("Conv", "r1 w2", "c2", pads=[1, 1, 1, 1]), node("Add", "c2 a2", "n2"),
         node("Sum", "n2 r1", "s"), node("Relu", "s", "r2"), node("GlobalAveragePool", "r2", "p"),
         node("Shape", "w3", "sh"), node("Gather", "sh one", "k"), node("Unsqueeze", "k zero", "u"),
         node("Concat", "minus u", "to", axis=0), node("Reshape", "p to", "f"), node("Dropout", "f", "d"),
         node("Gemm", "d w3 k3", "y", transB=1, alpha=1.0, beta=1.0)],
        {"x": ["n", 4, 6, 6]}, {"y": ["n", 5]},
        {"w1": random(8, 4, 3, 3), **statistics(8), "w2": random(8, 8, 3, 3), "a2": random(8, 1, 1),
         "w3": random(5, 8), "k3": random(1, 5), "one": np.int64(1), "zero": np.int64([0]), "minus": np.int64([-1])})


def test_canonical_form(opened: Opener, tmp_path: Path, golden: Golden) -> None:
    model = small_net()
    graph = opened(model)
    golden("small_net", text(graph))
    context = Context()
    assert PassManager(canonicalize()).run(graph, context)
    golden("small_net_canonical", text(graph))
    save_checked(graph, tmp_path / "out.onnx")
    assert_same(run(tmp_path / "out.onnx", IMAGE), run(model, IMAGE), TOLERANCE)
    assert_same(run(tmp_path / "out.onnx", IMAGE, optimize=True), run(model, IMAGE, optimize=True), TOLERANCE)
    assert context.skips == []
    assert PassManager(canonicalize()).run(graph, context) is False, "one round is enough"
