"""Heads that are taken out of an attention in small operators: shapes, values, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, make_model, node, random
from lowering_support import MODELS, canonical
from test_channel_rules import check

import onnxq
from onnxq import Plan
from onnxq.graph import Graph
from onnxq.passes.channels import Family
from onnxq.passes.families import family
from onnxq.planner.narrowable import candidates

H, D, S = 6, 8, 5
C = H * D
Array = np.ndarray[Any, Any]


def attention(*extra: onnx.NodeProto, masked: bool = False, order: str = "qkv", steps: int = S,
              across: bool = False, **stored: Array) -> onnx.ModelProto:
    """x [2, steps, C] through one attention of H heads and its output layer `o`; `extra` nodes go behind it."""
    weights = {f"w{k}": random(C, C, seed=i) / 4 for i, k in enumerate(order)}
    weights |= {"bq": random(C, seed=7), "wo": random(C, 20, seed=9), "split": np.int64([0, 0, H, D]),
                "join": np.int64([0, 0, C]), "root": np.float32(D ** -0.5), **stored}
    nodes = [node("MatMul", "x wq", "q0"), node("Add", "q0 bq", "q1"), node("MatMul", "x wk", "k0"),
             node("MatMul", "x wv", "v0")]
    for name, source in (("q", "q1"), ("k", "k0"), ("v", "v0")):
        perm = {(False, "k"): [0, 2, 3, 1], (True, "k"): [0, 1, 3, 2], (True, "q"): [0, 1, 2, 3],
                (True, "v"): [0, 1, 2, 3]}.get((across, name), [0, 2, 1, 3])
        nodes += [node("Reshape", f"{source} split", f"{name}s"), node("Transpose", f"{name}s", f"{name}t", perm=perm)]
    nodes += [node("MatMul", "qt kt", "z0"), node("Mul", "z0 root", "z1"),
              node("Add", "z1 mask", "z2") if masked else node("Identity", "z1", "z2"),
              node("Softmax", "z2", "p"), node("MatMul", "p vt", "a0"),
              node("Transpose", "a0", "a1", perm=[0, 1, 2, 3] if across else [0, 2, 1, 3]),
              node("Reshape", "a1 join", "a"),
              node("MatMul", "a wo", "y", name="o"), *extra]
    inputs: dict[str, Any] = {"x": [2, steps, C]}
    if masked:
        inputs["mask"] = [2, 1, steps, steps]
    outputs = {"y": [2, steps, 20]} | {n.output[0]: None for n in extra}
    used = {name for n in nodes for name in n.input}
    return make_model(nodes, inputs, outputs, {k: v for k, v in weights.items() if k in used})


def found(opened: Opener, model: onnx.ModelProto, grouped: bool = False) -> tuple[Graph, Family]:
    graph = canonical(opened(model))
    [last] = [n for n in graph.nodes if n.name == "o"]
    attended = family(graph, last, grouped)
    assert attended is not None
    return graph, attended


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("kept", "steps"), [([1], S), ([0, 2, 5], S), ([0, 1, 2, 3, 4], S), ([0, 2], H), ([0, 2], C),
                                             ([1, 2], 2)])
def test_the_other_heads_compute_what_they_did(opened: Opener, tmp_path: Path, masked: bool, kept: list[int],
                                               steps: int) -> None:
    """Also where there are as many positions as heads, columns, or rows of a batch."""
    model = attention(masked=masked, steps=steps)
    graph, attended = found(opened, model)
    assert (attended.count, attended.fixed, attended.attends) == (H, {}, True)
    assert set(attended.constants) == {(f"MatMul_{n}0", 1) for n in "qkv"} | {("Add_q1", 1)}
    for part in (*attended.constants.values(), attended.tensors["a"]):
        assert part.ids.tolist() == np.repeat(np.arange(H), D).tolist()
    feed = {"x": random(2, steps, C, seed=3)} | ({"mask": random(2, 1, steps, steps, seed=4)} if masked else {})
    check(graph, model, attended, np.array(kept), feed, tmp_path)


@pytest.mark.parametrize(("model", "why"), [
    (attention(node("Neg", "p", "seen")), "'seen' is an output of the model"),  # the weights of attention
    (attention(node("Neg", "kt", "seen")), "'seen' is an output of the model"),  # as are keys of a cache
    (attention(node("Softmax", "a0", "seen", axis=1)), "its statistics are those of all channels"),
], ids=["weights seen", "keys seen", "a norm over heads"])
def test_what_else_sees_heads_keeps_them(opened: Opener, model: onnx.ModelProto, why: str) -> None:
    attended = found(opened, model)[1]
    assert len(attended.fixed) == attended.count
    assert any(why in reason for reason in attended.fixed.values())


def test_queries_that_look_at_other_heads_go_alone(opened: Opener, tmp_path: Path) -> None:
    """Products over the axis of the heads, as where a Transpose was forgotten: each reads keys and values of all."""
    model = attention(across=True)
    graph, attended = found(opened, model)
    assert set(attended.constants) == {("MatMul_q0", 1), ("Add_q1", 1)}
    check(graph, model, attended, np.array([0, 3, 4]), {"x": random(2, S, C, seed=3)}, tmp_path)


def test_a_number_for_each_head_goes_with_it(opened: Opener, tmp_path: Path) -> None:
    model = attention(root=random(1, H, 1, 1))
    graph, attended = found(opened, model)
    assert attended.constants["Mul_z1", 1].axis == 1
    check(graph, model, attended, np.array([0, 3, 4]), {"x": random(2, S, C, seed=3)}, tmp_path)


def test_as_many_heads_as_columns_are_told_by_their_place(opened: Opener) -> None:
    attended = found(opened, attention(split=np.int64([0, 0, D, H]), join=np.int64([0, 0, C])))[1]
    assert (attended.count, attended.fixed) == (D, {})


G, R = 3, 2  # groups, and query heads in each


def grouped(cached: bool = False, groups: int = G) -> onnx.ModelProto:
    """x [2, S, C] through an attention of G heads of keys and values that H/G query heads each share; with a cache of
    them [2, G, 4, D]."""
    wide = groups * D
    weights = {"wq": random(C, C) / 4, "wk": random(C, wide, seed=1) / 4, "wv": random(C, wide, seed=2) / 4,
               "wo": random(C, 20, seed=9), "many": np.int64([0, 0, H, D]), "few": np.int64([0, 0, groups, D]),
               "join": np.int64([0, 0, C]), "root": np.float32(D ** -0.5), "two": np.int64([2]),
               "copies": np.int64([1, 1, H // groups, 1, 1]), "merge": np.int64([0, H, -1, D])}
    nodes = []
    for name, parts in (("q", "many"), ("k", "few"), ("v", "few")):
        nodes += [node("MatMul", f"x w{name}", f"{name}0"), node("Reshape", f"{name}0 {parts}", f"{name}1"),
                  node("Transpose", f"{name}1", f"{name}2", perm=[0, 2, 1, 3])]
    for name in "kv":
        nodes += [node("Concat", f"past_{name} {name}2", f"present_{name}", axis=2) if cached
                  else node("Identity", f"{name}2", f"present_{name}"),
                  node("Unsqueeze", f"present_{name} two", f"{name}3"), node("Expand", f"{name}3 copies", f"{name}4"),
                  node("Reshape", f"{name}4 merge", f"{name}5")]
    nodes += [node("Transpose", "k5", "k6", perm=[0, 1, 3, 2]), node("MatMul", "q2 k6", "z0"),
              node("Mul", "z0 root", "z1"), node("Softmax", "z1", "p"),
              node("MatMul", "p v5", "a0"), node("Transpose", "a0", "a1", perm=[0, 2, 1, 3]),
              node("Reshape", "a1 join", "a"), node("MatMul", "a wo", "y", name="o")]
    past = {f"past_{name}": [2, groups, 4, D] for name in "kv"} if cached else {}
    present = {f"present_{name}": [2, groups, 4 + S, D] for name in "kv"} if cached else {}
    used = {name for n in nodes for name in n.input}
    return make_model(nodes, {"x": [2, S, C], **past}, {"y": [2, S, 20], **present},
                      {k: v for k, v in weights.items() if k in used})


@pytest.mark.parametrize("whole", [False, True], ids=["shared", "copied"])
@pytest.mark.parametrize("kept", [[0], [0, 2], [1, 2]])
def test_groups_go_with_their_keys_and_values(opened: Opener, tmp_path: Path, kept: list[int], whole: bool) -> None:
    """Where one MatMul has the heads of a group below one another, and where keys are repeated for each."""
    model = grouped()
    if whole:
        graph = opened(model)
        [last] = [n for n in graph.nodes if n.name == "o"]
        attended = family(graph, last)
        assert attended is not None
    else:
        graph, attended = found(opened, model)
        assert any(n.name.endswith("/group") for n in graph.nodes)
    assert (attended.count, attended.fixed, attended.attends) == (G, {}, True)
    assert attended.constants["MatMul_q0", 1].ids.tolist() == np.repeat(np.arange(G), R * D).tolist()
    check(graph, model, attended, np.array(kept), {"x": random(2, S, C, seed=3)}, tmp_path)


@pytest.mark.parametrize("whole", [False, True], ids=["shared", "copied"])
@pytest.mark.parametrize(("groups", "kept"), [(G, [0]), (G, [1]), (1, [0, 3, 5]), (2, [0, 2])])
def test_cached_keys_stay_and_queries_go(opened: Opener, tmp_path: Path, groups: int, kept: list[int],
                                         whole: bool) -> None:
    """The shapes that callers feed are the same; of each group the query heads at one place go."""
    model, each = grouped(True, groups), H // groups
    graph = opened(model) if whole else canonical(opened(model))
    [last] = [n for n in graph.nodes if n.name == "o"]
    if groups > 1:
        stays = family(graph, last)
        assert stays is not None
        assert len(stays.fixed) == stays.count
        assert any("'present_" in why and "is an output of the model" in why for why in stays.fixed.values())
    [goes], _ = candidates(graph, frozenset())
    assert (goes.family.count, goes.family.fixed, goes.family.attends) == (each, {}, True)
    assert goes.grouped == (groups > 1 or not whole), "copies of one head are the same for all"
    assert set(goes.family.constants) == {("MatMul_q0", 1)}
    ids = goes.family.constants["MatMul_q0", 1].ids
    assert ids.tolist() == np.tile(np.repeat(np.arange(each), D), groups).tolist()
    feed = {"x": random(2, S, C, seed=3)} | {f"past_{k}": random(2, groups, 4, D, seed=4) for k in "kv"}
    check(graph, model, goes.family, np.array(kept), feed, tmp_path, goes.grouped)


def test_the_projects_encoder_loses_heads_and_channels(tmp_path: Path) -> None:
    folder = MODELS / "text_encoder"
    report = onnxq.compile(folder / "model.onnx", tmp_path / "q.onnx", scheme="w8a8", calib=str(folder / "calib.npz"),
                           prune_heads="25%", prune_channels="25%", measure=False, save_plan=tmp_path / "plan")
    assert report.ok, report.verdict.failures
    plan = Plan.load(tmp_path / "plan")
    assert {(n.count, len(n.kept)) for n in plan.narrowed.values() if n.heads} == {(4, 3)}
    [said] = [s for s in report.verdict.notices if " heads are taken out" in s]
    assert "channels are taken out" in said
    rows = [n for n in report.nodes if "1 of the 4 heads of its input are taken out" in n.reason]
    assert len(rows) == sum(n.heads for n in plan.narrowed.values()) > 0
    assert report.accuracy is not None
    assert all(one.cosine > 0.9 for one in report.accuracy.outputs.values())
    onnxq.compile(folder / "model.onnx", tmp_path / "b.onnx", plan=tmp_path / "plan", measure=False, prune_heads="25%",
                  prune_channels="25%")
    assert (tmp_path / "q.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
