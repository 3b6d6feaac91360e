"""Heads that are taken out of an attention in small operators: shapes, values, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, make_model, node, random, run
from lowering_support import MODELS, canonical

import onnxq
from onnxq import Plan
from onnxq.graph import Graph, save, shape_of
from onnxq.passes.heads import Heads, heads
from onnxq.passes.manager import Context
from onnxq.passes.transform.remove_channels import RemoveChannels
from onnxq.plan import Narrowed

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


def found(opened: Opener, model: onnx.ModelProto) -> tuple[Graph, Heads | None]:
    graph = canonical(opened(model))
    [last] = [n for n in graph.nodes if n.name == "o"]
    return graph, heads(graph, last.inputs[0], frozenset({"o"}))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("kept", "steps"), [([1], S), ([0, 2, 5], S), ([0, 1, 2, 3, 4], S), ([0, 2], H), ([0, 2], C),
                                             ([1, 2], 2)])
def test_the_other_heads_compute_what_they_did(opened: Opener, tmp_path: Path, masked: bool, kept: list[int],
                                               steps: int) -> None:
    """Also where there are as many positions as heads, columns, or rows of a batch."""
    model = attention(masked=masked, steps=steps)
    graph, attended = found(opened, model)
    assert attended is not None
    assert (attended.count, attended.size) == (H, D)
    assert {(c.node, c.axis) for c in attended.constants} == {(f"MatMul_{n}0", -1) for n in "qkv"} | {("Add_q1", -1)}
    stay = (np.array(kept)[:, None] * D + np.arange(D)).reshape(-1)
    weight = random(C, 20, seed=9)
    [last] = [n for n in graph.nodes if n.name == "o"]
    narrow = Narrowed(last.inputs[0].name, ("o",), -1, H, np.array(kept), (weight[stay],), D)
    context = Context(plan=Plan("", "", narrowed={narrow.tensor: narrow}))
    assert RemoveChannels().run(graph, context)
    assert not RemoveChannels().run(graph, context), "a second run edits nothing"
    save(graph, tmp_path / "narrow.onnx")
    onnx.checker.check_model(str(tmp_path / "narrow.onnx"), full_check=True)
    feed = {"x": random(2, steps, C, seed=3)} | ({"mask": random(2, 1, steps, steps, seed=4)} if masked else {})
    silenced = np.where(np.isin(np.arange(C), stay)[:, None], weight, 0)
    wanted = run(attention(masked=masked, steps=steps, wo=silenced.astype(np.float32)), feed)["y"]
    np.testing.assert_allclose(run(tmp_path / "narrow.onnx", feed)["y"], wanted, rtol=0, atol=1e-4)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "narrow.onnx"), strict_mode=True)
    for one in inferred.graph.value_info:
        told = [t for n in graph.nodes for t in n.outputs if t.name == one.name]
        assert all(list(shape_of(t) or ()) == [d.dim_value for d in one.type.tensor_type.shape.dim] for t in told)


@pytest.mark.parametrize("model", [
    attention(node("Neg", "p", "seen")),  # the weights of attention are an output
    attention(node("Neg", "kt", "seen")),  # as are keys of a cache
    attention(wk=random(C, C, seed=1), root=random(1, H, 1, 1)),  # a number for each head
    attention(split=np.int64([0, 0, D, H]), join=np.int64([0, 0, C])),
], ids=["weights seen", "keys seen", "a factor per head", "other heads"])
def test_what_else_sees_heads_keeps_them(opened: Opener, model: onnx.ModelProto) -> None:
    attended = found(opened, model)[1]
    assert attended is None or attended.count == D


def test_heads_that_look_at_one_another_stay(opened: Opener) -> None:
    """Softmax and products over the axis of the heads, as where a Transpose was forgotten."""
    assert found(opened, attention(across=True))[1] is None


def test_the_projects_encoder_loses_heads_and_channels(tmp_path: Path) -> None:
    folder = MODELS / "text_encoder"
    report = onnxq.compile(folder / "model.onnx", tmp_path / "q.onnx", scheme="w8a8", calib=str(folder / "calib.npz"),
                           prune_heads="25%", prune_channels="25%", measure=False, save_plan=tmp_path / "plan")
    assert report.ok, report.verdict.failures
    plan = Plan.load(tmp_path / "plan")
    assert {(n.channels, len(n.kept)) for n in plan.narrowed.values() if n.size > 1} == {(4, 3)}
    [said] = [s for s in report.verdict.notices if " heads are taken out" in s]
    assert "channels are taken out" in said
    rows = [n for n in report.nodes if "1 of the 4 heads of its input are taken out" in n.reason]
    assert len(rows) == sum(n.size > 1 for n in plan.narrowed.values()) > 0
    assert report.accuracy is not None
    assert all(one.cosine > 0.9 for one in report.accuracy.outputs.values())
    onnxq.compile(folder / "model.onnx", tmp_path / "b.onnx", plan=tmp_path / "plan", measure=False, prune_heads="25%",
                  prune_channels="25%")
    assert (tmp_path / "q.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
