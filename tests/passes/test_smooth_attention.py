"""Factors of what an output projection reads go through attention into the projection of the values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, apply, make_model, node, random
from smooth_support import layers, smoothed

from onnxq.graph import save
from onnxq.passes.canonicalize.share_kv_heads import ShareKVHeads

S, D, HEADS, WIDE = 8, 4, 6, 16  # positions, columns of a head, heads, channels of x
X, OUT, MAP = ["N", S, WIDE], ["N", S, 7], ["N", None, None, None]
FEED = {"x": random(3, S, WIDE)}
SCORES = [node("MatMul", "qh kt", "s"), node("Softmax", "s", "p", axis=-1)]
MERGE = [node("Transpose", "o", "om", perm=[0, 2, 1, 3]), node("Reshape", "om flat", "t")]


def heads(name: str, count: int, perm: tuple[int, ...] = (0, 2, 1, 3), bias: bool = True) -> list[onnx.NodeProto]:
    """x -> [N, count, S, D], or as `perm` has it."""
    added = [node("Add", f"{name}l {name}b", name)] if bias else []
    return [node("MatMul", f"x {name}w", f"{name}l" if bias else name), *added,
            node("Reshape", f"{name} by{count}", f"{name}r"), node("Transpose", f"{name}r", f"{name}h", perm=perm)]


def repeated(name: str, count: int, result: str) -> list[onnx.NodeProto]:
    """[N, count, S, D] -> [N, HEADS, S, D], each head several times, one after the other."""
    return [node("Unsqueeze", f"{name}h two", f"{name}u"), node("Expand", f"{name}u times", f"{name}e"),
            node("Reshape", f"{name}e all", result)]


def attention(nodes: list[onnx.NodeProto], kv: int = HEADS, outputs: tuple[str, ...] = ("y",),
              **more: Any) -> onnx.ModelProto:
    stored = {"qw": random(WIDE, HEADS * D), "qb": random(HEADS * D), "kw": random(WIDE, kv * D, seed=1),
              "kb": random(kv * D), "vw": random(WIDE, kv * D, seed=2), "vb": random(kv * D, seed=3),
              "w": random(HEADS * D, 7), f"by{kv}": np.array([0, 0, kv, D]), f"by{HEADS}": np.array([0, 0, HEADS, D]),
              "flat": np.array([0, 0, HEADS * D]), "two": np.array([2]), "all": np.array([0, HEADS, S, D]),
              "times": np.array([1, 1, HEADS // kv, 1, 1]), **more}
    nodes = [*nodes, node("MatMul", "t w", "y")]
    used = {name for n in nodes for name in n.input}
    ports = {"y": OUT, **dict.fromkeys(outputs[1:], MAP)}
    return make_model(nodes, {"x": X}, ports, {k: v for k, v in stored.items() if k in used})


PLAIN = [*heads("q", HEADS), *heads("k", HEADS, (0, 2, 3, 1)), *heads("v", HEADS)]
KEYS = [node("Identity", "kh", "kt")]
PRODUCT = [node("MatMul", "p vh", "o")]


def grouped(kv: int) -> onnx.ModelProto:
    return attention([*heads("q", HEADS), *heads("k", kv), *heads("v", kv), *repeated("k", kv, "ke2"),
                      node("Transpose", "ke2", "kt", perm=[0, 1, 3, 2]), *SCORES, *repeated("v", kv, "vr2"),
                      node("MatMul", "p vr2", "o"), *MERGE], kv)


def test_plain_heads(opened: Opener, tmp_path: Path) -> None:
    model = attention([*PLAIN, *KEYS, *SCORES, *PRODUCT, *MERGE])
    found = layers(opened(model), "y")
    assert found.constants() == {("MatMul_vl", 1, -1), ("Add_v", 1, -1)}
    above = found.absorber()
    assert above is not None
    assert above.tie is None
    graph, _ = smoothed(model, "y", FEED, opened, tmp_path)
    assert "Mul" not in [n.op for n in graph.nodes]


def test_values_without_a_bias(opened: Opener, tmp_path: Path) -> None:
    model = attention([*heads("q", HEADS), *heads("k", HEADS, (0, 2, 3, 1)), *heads("v", HEADS, bias=False), *KEYS,
                       *SCORES, *PRODUCT, *MERGE])
    assert layers(opened(model), "y").constants() == {("MatMul_v", 1, -1)}
    smoothed(model, "y", FEED, opened, tmp_path)


def test_heads_as_rows_of_the_batch(opened: Opener, tmp_path: Path) -> None:
    """[N * H, S, D] on both sides of the products."""
    rows = [node("Reshape", f"{a}h flat_{a}", f"{a}3") for a in "qkv"]
    model = attention([*PLAIN, *rows, node("MatMul", "q3 k3", "s"), node("Softmax", "s", "p", axis=-1),
                       node("MatMul", "p v3", "o3"), node("Reshape", "o3 all", "o"), *MERGE],
                      flat_q=np.array([-1, S, D]), flat_v=np.array([-1, S, D]), flat_k=np.array([-1, D, S]),
                      all=np.array([-1, HEADS, S, D]))
    assert layers(opened(model), "y").constants() == {("MatMul_vl", 1, -1), ("Add_v", 1, -1)}
    smoothed(model, "y", FEED, opened, tmp_path)


@pytest.mark.parametrize("kv", [1, 2, 3])
@pytest.mark.parametrize("shared", [False, True], ids=["repeated", "as one product"])
def test_grouped_heads_share_factors(kv: int, shared: bool, opened: Opener, tmp_path: Path) -> None:
    """Query heads of one group read the same columns of the values, so that these take one factor for all."""
    model = grouped(kv)
    graph = opened(model)
    if shared:
        assert apply(ShareKVHeads(), graph)[0]
        save(graph, tmp_path / "shared.onnx")
        model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "shared.onnx"))
    found = layers(graph, "y")
    assert found.constants() == {("MatMul_vl", 1, -1), ("Add_v", 1, -1)}
    above = found.absorber()
    assert above is not None
    assert above.tie is not None
    columns = np.arange(kv * D).reshape(kv, 1, D)
    np.testing.assert_array_equal(above.tie, np.broadcast_to(columns, (kv, HEADS // kv, D)).reshape(-1))
    _, made = smoothed(model, "y", FEED, opened, tmp_path)
    (one,) = made.values()
    by_head = one.factors.reshape(kv, HEADS // kv, D)
    assert (by_head == by_head[:, :1]).all()


def test_a_matrix_of_weights_without_heads(opened: Opener, tmp_path: Path) -> None:
    """Rows of a layer's result mixed by what was computed, as in a layer on a graph's nodes."""
    model = attention([node("MatMul", "x vw", "v"), node("MatMul", "x xt", "s"), node("Softmax", "s", "p"),
                       node("MatMul", "p v", "t"), node("Transpose", "x", "xt", perm=[0, 2, 1])])
    model.graph.node.insert(0, model.graph.node.pop(4))
    assert layers(opened(model), "y").constants() == {("MatMul_v", 1, -1)}
    smoothed(model, "y", FEED, opened, tmp_path)


# ------------------------------------------------------------------ near misses

TILED = {"two": np.array([1]), "times": np.array([1, HEADS // 2, 1, 1, 1])}
ACROSS = [*heads("q", HEADS, (0, 2, 3, 1)), *heads("k", HEADS), *heads("v", HEADS, (0, 2, 3, 1))]
STAYS: dict[str, onnx.ModelProto] = {
    "the values are an output": attention([*PLAIN, *KEYS, *SCORES, *PRODUCT, *MERGE], outputs=("y", "vh")),
    "the values have a second reader": attention([*PLAIN, *KEYS, *SCORES, *PRODUCT, *MERGE, node("Neg", "vh", "z")],
                                                 outputs=("y", "z")),
    "the weights come from the values": attention([*PLAIN, node("Transpose", "vh", "kt", perm=[0, 1, 3, 2]), *SCORES,
                                                   *PRODUCT, *MERGE]),
    "the product has a second reader": attention([*PLAIN, *KEYS, *SCORES, *PRODUCT, *MERGE, node("Neg", "o", "z")],
                                                 outputs=("y", "z")),
    "earlier values are put before": attention([*PLAIN, *KEYS, node("Concat", "kt kt", "k2", axis=-1),
                                                node("Concat", "vh vh", "v2", axis=2), node("MatMul", "qh k2", "s"),
                                                node("Softmax", "s", "p"), node("MatMul", "p v2", "o"), *MERGE]),
    "columns are mixed, not positions": attention([
        *ACROSS, node("MatMul", "qh kh2", "s"), node("Transpose", "kh", "kh2", perm=[0, 1, 2, 3]),
        node("Softmax", "s", "p", axis=-1), node("MatMul", "p vh", "o"),
        node("Transpose", "o", "om", perm=[0, 3, 1, 2]), node("Reshape", "om flat", "t")]),
    "groups of heads are repeated as a whole": attention([
        *heads("q", HEADS), *heads("k", HEADS, (0, 2, 3, 1)), *KEYS, *heads("v", 2), *SCORES, *repeated("v", 2, "r"),
        node("MatMul", "p r", "o"), *MERGE], 2, kw=random(WIDE, HEADS * D, seed=1), kb=random(HEADS * D), **TILED),
    "heads are merged column by column": attention([
        *PLAIN, *KEYS, *SCORES, *PRODUCT, node("Transpose", "o", "om", perm=[0, 2, 3, 1]),
        node("Reshape", "om flat", "t")]),
}


@pytest.mark.parametrize("why", STAYS)
def test_values_that_take_no_factors(why: str, opened: Opener, tmp_path: Path) -> None:
    model = STAYS[why]
    done = {"x"} | {t.name for t in model.graph.initializer}
    ordered: list[onnx.NodeProto] = []
    waiting = list(model.graph.node)
    while waiting:  # forms are written as they read best
        ready = next(n for n in waiting if set(n.input) <= done)
        ordered.append(ready)
        waiting.remove(ready)
        done |= set(ready.output)
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    assert layers(opened(model), "y").constants() is None
    graph, _ = smoothed(model, "y", FEED, opened, tmp_path)
    assert [n.name for n in graph.nodes if n.op == "Mul"] == ["t/smooth"]
