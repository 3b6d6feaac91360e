"""Canonical rewrites around Convs: leftover BatchNormalizations, pools in front of 1x1 Convs, channel shuffles."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, Try, make_model, node, random, value
from lowering_support import canonical

from onnxq.graph import Graph
from onnxq.passes.canonicalize.affine_to_batchnorm import AffineToBatchNorm
from onnxq.passes.canonicalize.batchnorm_to_conv import BatchNormToConv
from onnxq.passes.canonicalize.conv_before_pool import ConvBeforePool
from onnxq.passes.canonicalize.shuffle_to_gather import ShuffleToGather

IMAGE = {"x": random(2, 16, 6, 6) * np.float32(3)}
FREE = [None] * 4
STATISTICS = {"gamma": random(16), "beta": random(16, seed=1), "mean": random(16, seed=2),
              "var": np.abs(random(16, seed=3)) + np.float32(0.1)}
STORED = {**STATISTICS, "c": random(16, 1, 1), "cc": random(1, 16, 1, 1), "two": np.float32(2), "row": random(6),
          "w": random(8, 16, 1, 1), "wide": random(32, 16, 1, 1), "w3": random(8, 16, 3, 3), "b": random(8),
          "wg": random(8, 8, 1, 1)}


def of(nodes: list[onnx.NodeProto], outputs: list[str] | None = None, stored: dict[str, Any] | None = None,
       ) -> onnx.ModelProto:
    read = {t for n in nodes for t in n.input}
    known = {**STORED, **(stored or {})}
    return make_model(nodes, {"x": [2, 16, 6, 6]}, dict.fromkeys(outputs or ["y"], FREE),
                      {k: v for k, v in known.items() if k in read})


def ops(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes]


# ------------------------------------------------------------------ affine-to-batchnorm

NORM = node("BatchNormalization", "x gamma beta mean var", "n")


@pytest.mark.parametrize("behind", [
    [node("Mul", "n c", "y")], [node("Add", "cc n", "y")], [node("Mul", "two n", "m"), node("Add", "m c", "y")],
], ids=["Mul", "Add from the left", "both"])
def test_affine_behind_a_batchnorm(behind: list[onnx.NodeProto], fires: Try) -> None:
    graph, skips = fires(of([NORM, *behind]), AffineToBatchNorm(), IMAGE)
    assert (ops(graph), skips) == (["BatchNormalization"], [])


NOT_AFFINE: dict[str, tuple[list[onnx.NodeProto], list[str], list[tuple[str, str]]]] = {
    "per column": ([NORM, node("Mul", "n row", "y")], ["y"],
                   [("Mul_y", "what it multiplies by is not one number per channel")]),
    "read elsewhere": ([NORM, node("Add", "n c", "y"), node("Relu", "n", "z")], ["y", "z"],
                       [("Add_y", "the result of BatchNormalization_n is read elsewhere too")]),
    "computed beta": ([node("Relu", "beta", "g"), node("BatchNormalization", "x gamma g mean var", "n"),
                       node("Mul", "n c", "y")], ["y"],
                      [("Mul_y", "the BatchNormalization's gamma or beta is computed")]),
    "another operator": ([node("Relu", "x", "r"), node("Mul", "r c", "y")], ["y"], []),
    "two computed": ([NORM, node("Mul", "n x", "y")], ["y"], []),
}


@pytest.mark.parametrize("case", NOT_AFFINE)
def test_what_a_batchnorm_does_not_take_in(case: str, leaves: Try) -> None:
    nodes, outputs, wanted = NOT_AFFINE[case]
    _, skips = leaves(of(nodes, outputs), AffineToBatchNorm(), IMAGE)
    assert skips == wanted


# ------------------------------------------------------------------ batchnorm-to-conv

RELU = node("Relu", "x", "r")


def test_a_batchnorm_behind_a_relu_is_a_conv(fires: Try) -> None:
    graph, skips = fires(of([RELU, node("BatchNormalization", "r gamma beta mean var", "y", epsilon=1e-3)]),
                         BatchNormToConv(), IMAGE)
    assert (ops(graph), skips) == (["Relu", "Conv"], [])
    assert graph.nodes[1].attrs["group"] == 16


def norm_of(channels: int) -> onnx.ModelProto:
    stored = {k: v[:channels] for k, v in STATISTICS.items()}
    return of([node("Slice", "x starts ends axes", "r"), node("BatchNormalization", "r gamma beta mean var", "y")],
              stored={**stored, "starts": np.array([0]), "ends": np.array([channels]), "axes": np.array([1])})


@pytest.mark.parametrize(("model", "reason"), [
    (of([node("BatchNormalization", "x gamma beta mean var", "y")]),
     "it reads an input of the model, or a layer that other nodes read, too"),
    (of([RELU, node("Relu", "beta", "g"), node("BatchNormalization", "r gamma g mean var", "y")]),
     "its statistics are computed"),
    (norm_of(8), "what it reads is not [N, C, H, W] with C a multiple of 16"),
], ids=["of an input", "computed", "8 channels"])
def test_batchnorms_that_stay(model: onnx.ModelProto, reason: str, leaves: Try) -> None:
    assert leaves(model, BatchNormToConv(), IMAGE)[1] == [("BatchNormalization_y", reason)]


def test_caffe_scales_behind_a_concat_end_up_in_one_conv(opened: Opener) -> None:
    model = of([node("Concat", "x x", "k", axis=1), node("BatchNormalization", "k gamma beta mean var", "n"),
                node("Mul", "n c", "m"), node("Add", "m c", "a"), node("Relu", "a", "y")],
               stored={k: np.concatenate([v, v]) for k, v in STORED.items() if k in (*STATISTICS, "c")})
    assert ops(canonical(opened(model))) == ["Concat", "Conv", "Relu"]


# ------------------------------------------------------------------ conv-before-pool

POOL = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}


@pytest.mark.parametrize("conv", [node("Conv", "p w b", "y"), node("Conv", "p w", "y")], ids=["bias", "no bias"])
@pytest.mark.parametrize("how", [POOL, {"kernel_shape": [2, 3]}, {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}],
                         ids=["pads", "no pads", "auto_pad"])
def test_a_narrow_conv_runs_before_the_pool(conv: onnx.NodeProto, how: dict[str, Any], fires: Try) -> None:
    graph, skips = fires(of([node("AveragePool", "x", "p", **how), conv]), ConvBeforePool(), IMAGE)
    assert (ops(graph), skips) == (["Conv", "AveragePool"], [])
    assert [t.name for t in graph.outputs] == ["y"]


def test_a_pool_that_counts_padding_has_no_mean_of_biases(fires: Try, leaves: Try) -> None:
    pool = node("AveragePool", "x", "p", count_include_pad=1, **POOL)
    fires(of([pool, node("Conv", "p w", "y")]), ConvBeforePool(), IMAGE)
    assert leaves(of([pool, node("Conv", "p w b", "y")]), ConvBeforePool(), IMAGE)[1] == [
        ("AveragePool_p", "it counts padding, to which Conv_y adds no bias")]


@pytest.mark.parametrize(("pool", "conv", "reason"), [
    ({}, node("Conv", "p w3", "y"), "Conv_y is no Conv of 1x1 whose weights are stored"),
    ({}, node("Conv", "p wg", "y", group=2), "Conv_y is no Conv of 1x1 whose weights are stored"),
    ({}, node("Conv", "p w", "y", strides=[2, 2]), "Conv_y has strides or pads"),
    ({}, node("Conv", "p w", "y", pads=[0, 1, 0, 0]), "Conv_y has strides or pads"),
    ({"strides": [2, 2]}, node("Conv", "p w", "y"), "its stride spares Conv_y work"),
    ({}, node("Conv", "p wide", "y"), "Conv_y makes more channels than it reads"),
], ids=["3x3", "grouped", "stride", "pads", "pool's stride", "wide"])
def test_pools_that_stay_in_front(pool: dict[str, Any], conv: onnx.NodeProto, reason: str, leaves: Try) -> None:
    model = of([node("AveragePool", "x", "p", **POOL, **pool), conv])
    assert leaves(model, ConvBeforePool(), IMAGE)[1] == [("AveragePool_p", reason)]


def test_a_pool_with_other_readers_stays(leaves: Try) -> None:
    pool = node("AveragePool", "x", "p", **POOL)
    assert leaves(of([pool, node("Conv", "p w", "y"), node("Relu", "p", "z")], ["y", "z"]), ConvBeforePool(),
                  IMAGE)[1] == []


# ------------------------------------------------------------------ shuffle-to-gather

SHAPES = {"apart": np.array([2, 4, 4, 6, 6]), "together": np.array([2, 16, 6, 6]), "rows": np.array([2, 4, 4, 36])}


def shuffle(perm: list[int], apart: str = "apart", more: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    nodes = [node("Reshape", f"x {apart}", "a"), node("Transpose", "a", "t", perm=perm),
             node("Reshape", "t together", "y"), *(more or [])]
    model = of(nodes, ["y", *(n.output[0] for n in more or [])], SHAPES)
    model.graph.output[0].CopyFrom(value("y", [2, 16, 6, 6]))
    return model


def test_a_channel_shuffle_is_a_gather(fires: Try) -> None:
    graph, skips = fires(shuffle([0, 2, 1, 3, 4]), ShuffleToGather(), IMAGE)
    assert (ops(graph), skips) == (["Gather"], [])
    assert graph.read(graph.nodes[0].inputs[1])[:5].tolist() == [0, 4, 8, 12, 1]


def test_other_transposes_stay(leaves: Try) -> None:
    assert leaves(shuffle([0, 1, 2, 4, 3]), ShuffleToGather(), IMAGE)[1] == []
    read = [node("ReduceMax", "a", "z", axes=[2], keepdims=0)]
    assert leaves(shuffle([0, 2, 1, 3, 4], more=read), ShuffleToGather(), IMAGE)[1] == [
        ("Transpose_t", "the result of Reshape_a is read elsewhere too")]
    assert leaves(shuffle([0, 2, 1, 3], apart="rows"), ShuffleToGather(), IMAGE)[1] == []
