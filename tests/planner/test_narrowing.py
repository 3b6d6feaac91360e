"""Channels that are taken out: with all that makes and reads them, and others making up for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, make_model, node, random, run
from lowering_support import CPU, MODELS, canonical

import onnxq
from onnxq import Plan
from onnxq.calibration.readers import open_data
from onnxq.errors import RecipeError, UsageError
from onnxq.graph import Graph, load, save, shape_of
from onnxq.passes.manager import Context
from onnxq.passes.transform.remove_channels import RemoveChannels
from onnxq.plan import Narrowed
from onnxq.planner import narrowing
from onnxq.planner.narrowable import candidates
from onnxq.planner.pruning import Calibrated
from onnxq.recipe import Calibration
from onnxq.runtime.session import SessionOptions
from onnxq.sparsity import Sparsity

C = 64
Array = np.ndarray[Any, Any]


def gated() -> onnx.ModelProto:
    """x [n, 24] -> silu(x g + b) * (x u) w."""
    stored = {"g": random(24, C), "u": random(24, C, seed=1), "w": random(C, 12, seed=2), "b": random(C, seed=3)}
    nodes = [node("MatMul", "x g", "h"), node("Add", "h b", "a"), node("Sigmoid", "a", "s"), node("Mul", "a s", "k"),
             node("MatMul", "x u", "v"), node("Mul", "k v", "t"), node("MatMul", "t w", "y", name="down")]
    return make_model(nodes, {"x": ["n", 24]}, {"y": ["n", 12]}, stored)


def convs(groups: int = 1) -> onnx.ModelProto:
    """x [n, 3, 10, 10] through a Conv, a Relu, a depthwise Conv, a pool and a scale per channel to a last Conv."""
    stored = {"a": random(C, 3, 3, 3), "b": random(C, seed=1), "d": random(C, 1, 3, 3, seed=2),
              "e": random(C, seed=3), "g": random(1, C, 1, 1, seed=4), "w": random(8, C // groups, 2, 2, seed=5)}
    nodes = [node("Conv", "x a b", "h", name="first"), node("Relu", "h", "r"),
             node("Conv", "r d e", "q", name="depthwise", group=C),
             node("MaxPool", "q", "p", kernel_shape=[2, 2], strides=[2, 2]), node("Mul", "p g", "t"),
             node("Conv", "t w", "y", name="last", group=groups)]
    return make_model(nodes, {"x": ["n", 3, 10, 10]}, {"y": ["n", 8, 2, 2]}, stored)


FEEDS = {"gated": ("x", (64, 24)), "convs": ("x", (16, 3, 10, 10))}
FORMS = {"gated": (gated, "down", -1, 1), "convs": (convs, "last", 1, 4)}


def kept_only(form: str, kept: Array) -> onnx.ModelProto:
    """The model with the weights of other channels 0 in the layer that reads them."""
    model = FORMS[form][0]()
    for one in model.graph.initializer:
        if one.name == "w":
            values = onnx.numpy_helper.to_array(one).copy()
            gone = np.setdiff1d(np.arange(C), kept)
            values[(gone,) if form == "gated" else (slice(None), gone)] = 0
            one.CopyFrom(onnx.numpy_helper.from_array(values, "w"))
    return model


@pytest.mark.parametrize("form", FORMS)
def test_the_others_compute_what_they_did(opened: Opener, form: str, tmp_path: Path) -> None:
    make, layer, axis, _ = FORMS[form]
    kept = np.sort(np.random.default_rng(0).choice(C, 40, replace=False))
    graph = canonical(opened(make()))
    [last] = [n for n in graph.nodes if n.name == layer]
    weight = np.asarray(graph.read(last.inputs[1]))
    narrow = Narrowed(last.inputs[0].name, (layer,), C, kept, (weight.take(kept, axis=0 if axis < 0 else 1),),
                      (np.zeros(0, np.float32),))
    context = Context(CPU, Plan("", "", narrowed={narrow.tensor: narrow}))
    assert RemoveChannels().run(graph, context)
    assert not RemoveChannels().run(graph, context), "a second run edits nothing"
    save(graph, tmp_path / "narrow.onnx")
    onnx.checker.check_model(str(tmp_path / "narrow.onnx"), full_check=True)
    name, shape = FEEDS[form]
    x = random(*shape, seed=9)
    found, wanted = (run(one, {name: x})["y"] for one in (tmp_path / "narrow.onnx", kept_only(form, kept)))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert {40, C} & {d for n in graph.nodes for t in n.outputs for d in shape_of(t) or ()} == {40}


def names(graph: Graph, *spared: str) -> list[str]:
    """Tensors that lose channels."""
    return [one.readings[0].tensor for one in candidates(graph, frozenset(spared))[0]]


def test_what_is_read_elsewhere_or_spared_is_no_candidate(opened: Opener) -> None:
    graph = canonical(opened(gated()))
    assert names(graph) == ["t"]
    assert names(graph, "down") == []
    assert names(graph, "MatMul_v") == [], "a layer above is to stay"
    seen = gated()
    seen.graph.output.append(onnx.helper.make_empty_tensor_value_info("k"))
    assert names(canonical(opened(seen))) == []
    # the last Conv sees a part of the channels; the depthwise one is no layer that channels are taken from
    assert names(canonical(opened(convs(groups=2)))) == []
    assert len(names(canonical(opened(convs())))) == 1


@pytest.mark.parametrize(("channels", "share", "left"), [
    (64, 0.25, 48), (64, 0.3, 48), (64, 0.01, 64), (1536, 0.25, 1152), (10, 0.5, 5), (16, 0.25, 12), (20, 0.1, 20),
    (3, 0.99, 1)])
def test_what_stays_fills_lanes(channels: int, share: float, left: int) -> None:
    assert channels - narrowing._count(channels, share) == left


def saved(folder: Path, form: str) -> tuple[Path, Path]:
    name, shape = FEEDS[form]
    onnx.save(FORMS[form][0](), folder / "m.onnx")
    few = random(shape[0], 4, seed=5) @ random(4, int(np.prod(shape[1:])), seed=6)
    np.savez(folder / "calib.npz", **{name: few.reshape(shape) + 0.1 * random(*shape, seed=7)})
    return folder / "m.onnx", folder / "calib.npz"


@pytest.mark.parametrize("scheme", ["float", "w8a8", "w8a8-dynamic", "w4a16"])
@pytest.mark.parametrize("form", FORMS)
def test_half_the_channels_go_and_little_is_lost(tmp_path: Path, form: str, scheme: str) -> None:
    """Inputs of four dimensions: what they make takes few channels."""
    model, calib = saved(tmp_path, form)
    report = onnxq.compile(model, tmp_path / "q.onnx", scheme=scheme, calib=str(calib), prune_channels="50%",
                           measure=False, save_plan=tmp_path / "plan")
    assert report.ok, report.verdict.failures
    plan = Plan.load(tmp_path / "plan")
    [one] = plan.narrowed.values()
    assert (one.count, len(one.kept)) == (C, 32)
    assert [w.shape[0 if form == "gated" else 1] for w in one.weights] == [32]
    [row] = [n for n in report.nodes if n.name == FORMS[form][1]]
    assert "32 of the 64 channels of its input are taken out" in row.reason
    assert "32 of 64 channels are taken out, at 1 tensor" in report.verdict.notices
    x = np.load(calib)["x"]
    before, after = (run(path, {"x": x}, optimize=True)["y"] for path in (model, tmp_path / "q.onnx"))
    assert np.square(after - before).sum() < 0.02 * np.square(before).sum()
    onnxq.compile(model, tmp_path / "b.onnx", plan=tmp_path / "plan", measure=False, prune_channels="50%")
    assert (tmp_path / "q.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    model, calib = saved(tmp_path, "gated")
    onnxq.compile(model, tmp_path / "q.onnx", scheme="float", calib=str(calib), prune_channels="25%", measure=False,
                  save_plan=tmp_path / "plan")
    other = gated()
    for one in other.graph.node:
        one.input[:] = ["k" if name == "t" and one.name == "down" else name for name in one.input]
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(UsageError, match=r"'down' does not read 64 channels of 't' in this one"):
        onnxq.compile(tmp_path / "other.onnx", tmp_path / "o.onnx", plan=tmp_path / "plan", measure=False)


def test_nothing_to_take_out_is_said(tmp_path: Path) -> None:
    onnx.save(make_model([node("MatMul", "x w", "y")], {"x": ["n", 32]}, {"y": ["n", 32]}, {"w": random(32, 32)}),
              tmp_path / "m.onnx")
    np.savez(tmp_path / "calib.npz", x=random(8, 32))
    report = onnxq.compile(tmp_path / "m.onnx", tmp_path / "q.onnx", scheme="w8a8-dynamic", measure=False,
                           calib=str(tmp_path / "calib.npz"), prune_channels="25%")
    assert any(said.startswith("no channels can be taken out: no layer reads") for said in report.verdict.notices)


def test_data_are_needed_and_a_share_is_one(tmp_path: Path) -> None:
    model, _ = saved(tmp_path, "gated")
    with pytest.raises(UsageError, match="for which others make up; give --calib DATA"):
        onnxq.compile(model, tmp_path / "q.onnx", scheme="float", prune_channels="25%", measure=False)
    with pytest.raises(RecipeError, match=r"sparsity\.channels: '150%' is no share of channels"):
        Sparsity(channels="150%")


def test_the_projects_encoder_is_faster_by_products_that_are_gone(tmp_path: Path) -> None:
    """By their count, not by time: fewer weights, and outputs still alike."""
    folder = MODELS / "text_encoder"
    report = onnxq.compile(folder / "model.onnx", tmp_path / "q.onnx", scheme="float", calib=str(folder / "calib.npz"),
                           prune_channels="25%", measure=False)
    assert report.ok, report.verdict.failures
    assert report.size is not None
    assert report.size.ratio < 0.95
    assert report.accuracy is not None
    assert all(one.cosine > 0.9 for one in report.accuracy.outputs.values())


def test_constants_along_another_axis_are_no_channels_and_computed_biases_keep_them(opened: Opener) -> None:
    """A number for each place of 32 places, of 32 channels; what a Gemm adds that is computed."""
    along = make_model([node("Conv", "x a", "h", name="first"), node("Add", "h p", "r"), node("Relu", "r", "t"),
                        node("Conv", "t w", "y", name="last")], {"x": [1, 4, 32]}, {"y": None},
                       {"a": random(32, 4, 1), "p": random(32), "w": random(8, 32, 1)})
    graph = canonical(opened(along))
    [one] = candidates(graph, frozenset())[0]
    assert set(one.family.constants) == {("first", 1)}
    for nodes in ([node("Gemm", "x a c", "h"), node("Relu", "h", "t"), node("Gemm", "t w", "y")],
                  [node("Gemm", "x a", "h"), node("Relu", "h", "t"), node("Gemm", "t v t", "y")]):
        used = {name for n in nodes for name in n.input}
        stored = {"a": random(C, C), "w": random(C, 8), "v": random(C, C)}
        inputs = {"x": [3, C], "c": [3, C]}
        model = make_model(nodes, {k: v for k, v in inputs.items() if k in used}, {"y": None},
                           {k: v for k, v in stored.items() if k in used})
        assert names(canonical(opened(model))) == []


def test_what_was_narrowed_is_narrowed_again(tmp_path: Path) -> None:
    model, calib = saved(tmp_path, "gated")
    for before, after in ((model, "one.onnx"), (tmp_path / "one.onnx", "two.onnx")):
        onnxq.compile(before, tmp_path / after, scheme="float", calib=str(calib), prune_channels="50%", measure=False)
    sizes = [[list(t.dims) for t in onnx.load(tmp_path / name).graph.initializer if len(t.dims) == 2]
             for name in ("one.onnx", "two.onnx")]
    assert [32, 12] in sizes[0]
    assert [16, 12] in sizes[1]


def test_layers_beside_are_no_reason_to_forget_what_came_before(tmp_path: Path) -> None:
    """A tensor that two layers read, one of them on the way to the next tensor."""
    stored = {"a": random(24, C), "b": random(C, C, seed=1), "c": random(C, 8, seed=2), "d": random(C, 8, seed=3)}
    nodes = [node("MatMul", "x a", "h"), node("Relu", "h", "t"), node("MatMul", "t b", "u"), node("MatMul", "t d", "z"),
             node("Relu", "u", "v"), node("MatMul", "v c", "y")]
    onnx.save(make_model(nodes, {"x": ["n", 24]}, {"y": ["n", 8], "z": ["n", 8]}, stored), tmp_path / "m.onnx")
    np.savez(tmp_path / "calib.npz", x=random(256, 4) @ random(4, 24, seed=8))
    report = onnxq.compile(tmp_path / "m.onnx", tmp_path / "q.onnx", scheme="float", prune_channels="50%",
                           calib=str(tmp_path / "calib.npz"), measure=False)
    assert report.ok, report.verdict.failures
    assert "64 of 128 channels are taken out, at 2 tensors" in report.verdict.notices
    x = np.load(tmp_path / "calib.npz")["x"]
    for name in "yz":
        before, after = (run(tmp_path / path, {"x": x}, optimize=True)[name] for path in ("m.onnx", "q.onnx"))
        assert np.square(after - before).sum() < 0.02 * np.square(before).sum()


# ------------------------------------------------------------------ channels that several layers read


def residual() -> onnx.ModelProto:
    """x [n, 3, 8, 8]: a trunk of 32 channels, a block with 32 inside on it, behind that a pool and a Gemm."""
    stored = {"a": random(32, 3, 3, 3), "b": random(32, seed=1), "c": random(32, 32, 3, 3, seed=2) / 9,
              "d": random(32, 32, 1, 1, seed=3) / 4, "e": random(32, seed=4), "w": random(32, 5, seed=5)}
    nodes = [node("Conv", "x a b", "h", name="stem"), node("Relu", "h", "r"),
             node("Conv", "r c", "i", name="first", pads=[1] * 4), node("Relu", "i", "j"),
             node("Conv", "j d e", "k", name="second"), node("Add", "k r", "s"), node("Relu", "s", "t"),
             node("GlobalAveragePool", "t", "p"), node("Flatten", "p", "q"), node("Gemm", "q w", "y", name="head")]
    return make_model(nodes, {"x": ["n", 3, 8, 8]}, {"y": ["n", 5]}, stored)


def few_kinds(folder: Path, model: onnx.ModelProto) -> tuple[Path, Path]:
    """The model, and inputs of four dimensions."""
    onnx.save(model, folder / "m.onnx")
    few = random(96, 4, seed=5) @ random(4, 192, seed=6)
    np.savez(folder / "calib.npz", x=(few + 0.05 * random(96, 192, seed=7)).reshape(96, 3, 8, 8))
    return folder / "m.onnx", folder / "calib.npz"


@pytest.mark.parametrize("scheme", ["float", "w8a8"])
def test_a_trunk_loses_channels_with_all_that_write_and_read_it(tmp_path: Path, scheme: str) -> None:
    model, calib = few_kinds(tmp_path, residual())
    report = onnxq.compile(model, tmp_path / "q.onnx", scheme=scheme, calib=str(calib), prune_channels="50%",
                           measure=False, save_plan=tmp_path / "plan")
    assert report.ok, report.verdict.failures
    assert "32 of 64 channels are taken out, at 3 tensors" in report.verdict.notices
    trunk, inside = Plan.load(tmp_path / "plan").narrowed.values()
    assert (trunk.layers, inside.layers) == (("first", "head"), ("second",))
    assert [w.shape for w in (*trunk.weights, *inside.weights)] == [(32, 16, 3, 3), (16, 5), (16, 16, 1, 1)]
    reasons = {n.name: n.reason for n in report.nodes}
    assert all("16 of the 32 channels of its input are taken out" in reasons[name] for name in
               ("first", "second", "head"))
    assert "all channels of its input stay: 'x' is an input of the model" in reasons["stem"]
    x = np.load(calib)["x"]
    before, after = (run(path, {"x": x}, optimize=True)["y"] for path in (model, tmp_path / "q.onnx"))
    rest = after - before
    assert np.square(rest).sum() < 0.02 * np.square(before - before.mean(axis=0)).sum()
    onnxq.compile(model, tmp_path / "b.onnx", plan=tmp_path / "plan", measure=False, prune_channels="50%")
    assert (tmp_path / "q.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def narrowed(model: Path, calib: Path, share: str = "50%") -> tuple[narrowing.Narrowing, Graph]:
    """What goes, and the graph without it."""
    graph = canonical(load(model))
    by = Calibrated(open_data(str(calib), graph.ports()), SessionOptions(threads=1))
    found = narrowing.narrow(graph, Sparsity(channels=share), (), by, Calibration(samples=None))
    RemoveChannels().run(graph, Context(plan=Plan("", "", narrowed=found.rewrites)))
    return found, graph


def test_layers_are_fitted_again_to_what_goes_above_them_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head reads the trunk, which the block changes once channels inside it go."""
    model, calib = few_kinds(tmp_path, residual())
    x = np.load(calib)["x"]
    wanted, errors = run(model, {"x": x})["y"], []
    for again in (True, False):
        if not again:
            monkeypatch.setattr(narrowing, "refit", lambda graph, current, rewrites, *_: rewrites)
        save(narrowed(model, calib, "70%")[1], tmp_path / "narrow.onnx")
        errors.append(np.square(run(tmp_path / "narrow.onnx", {"x": x})["y"] - wanted).sum())
    assert errors[0] < 0.9 * errors[1]


def test_biases_stand_in_for_what_hardly_moves(tmp_path: Path) -> None:
    """Half of the channels are constant: nothing but a bias is needed in their stead."""
    stored = {"a": np.where(np.arange(C) % 2, random(24, C), np.float32(0)), "b": np.float32(3) + random(C, seed=1),
              "w": random(C, 8, seed=2), "c": random(8, seed=3)}
    nodes = [node("Gemm", "x a b", "h"), node("Relu", "h", "t"), node("Gemm", "t w c", "y", name="last")]
    onnx.save(make_model(nodes, {"x": ["n", 24]}, {"y": ["n", 8]}, stored), tmp_path / "m.onnx")
    np.savez(tmp_path / "calib.npz", x=random(256, 24, seed=9))
    found, graph = narrowed(tmp_path / "m.onnx", tmp_path / "calib.npz")
    [one] = found.taken
    assert one.rewrite.kept.tolist() == list(range(1, C, 2))
    np.testing.assert_allclose(one.rewrite.weights[0], stored["w"][1::2], rtol=0, atol=1e-5)
    np.testing.assert_allclose(one.rewrite.shifts[0], np.maximum(stored["b"][::2], 0) @ stored["w"][::2], rtol=1e-5)
    save(graph, tmp_path / "narrow.onnx")
    x = random(32, 24, seed=8)
    made, wanted = (run(tmp_path / name, {"x": x})["y"] for name in ("narrow.onnx", "m.onnx"))
    np.testing.assert_allclose(made, wanted, rtol=0, atol=1e-3)


def test_a_layer_that_reads_what_it_makes(tmp_path: Path) -> None:
    """y = x + conv(x): its filters and its inputs are the same channels."""
    stored = {"a": random(32, 3, 1, 1), "c": random(32, 32, 1, 1, seed=2) / 6, "e": random(32, seed=4),
              "w": random(4, 32, 1, 1, seed=5)}
    nodes = [node("Conv", "x a", "h", name="stem"), node("Conv", "h c e", "i", name="block"), node("Add", "i h", "t"),
             node("Conv", "t w", "y", name="last")]
    model, calib = few_kinds(tmp_path, make_model(nodes, {"x": ["n", 3, 8, 8]}, {"y": ["n", 4, 8, 8]}, stored))
    found, graph = narrowed(model, calib)
    [one] = found.taken
    assert one.rewrite.layers == ("block", "last")
    assert [(w.shape, s.size) for w, s in zip(one.rewrite.weights, one.rewrite.shifts, strict=True)] == [
        ((16, 16, 1, 1), 16), ((4, 16, 1, 1), 4)]
    save(graph, tmp_path / "narrow.onnx")
    x = np.load(calib)["x"]
    made, wanted = (run(tmp_path / name, {"x": x})["y"] for name in ("narrow.onnx", "m.onnx"))
    assert np.square(made - wanted).sum() < 1e-3 * np.square(wanted).sum()  # of three dimensions


def test_what_the_projects_models_lose(tmp_path: Path) -> None:
    """A residual, a Concat and two heads of a picture classifier; heads of queries that share a cached one."""
    report = onnxq.compile(MODELS / "digits_cnn" / "model.onnx", tmp_path / "c.onnx", scheme="float", measure=False,
                           calib=str(MODELS / "digits_cnn" / "calib.npz"), prune_channels="40%")
    assert report.ok, report.verdict.failures
    [said] = [s for s in report.verdict.notices if "channels are taken out" in s]
    assert int(said.split("at ")[1].split()[0]) >= 6
    folder = MODELS / "decoder"
    report = onnxq.compile(folder / "model.onnx", tmp_path / "d.onnx", scheme="float", measure=False,
                           calib=str(folder / "calib.npz"), prune_heads="34%")
    assert report.ok, report.verdict.failures
    assert "6 of 18 heads are taken out, at 3 tensors" in report.verdict.notices, "one of three in each of two groups"
    shapes = [[[(t.name, [d.dim_value or d.dim_param for d in t.type.tensor_type.shape.dim]) for t in ports]
               for ports in (one.graph.input, one.graph.output)]
              for one in (onnx.load(folder / "model.onnx"), onnx.load(tmp_path / "d.onnx"))]
    assert shapes[0] == shapes[1]


def test_why_heads_stay_is_said_where_heads_are_asked_for(tmp_path: Path) -> None:
    """Each head has a key of its own in a cache."""
    stored = {"q": random(16, 16), "o": random(16, 4), "split": np.int64([0, 0, 2, 8]), "join": np.int64([0, 0, 16])}
    nodes = [node("MatMul", "x q", "a"), node("Reshape", "a split", "b"),
             node("Transpose", "b", "c", perm=[0, 2, 1, 3]),
             node("MatMul", "c keys", "d"), node("Softmax", "d", "p"), node("MatMul", "p values", "e"),
             node("Transpose", "e", "f", perm=[0, 2, 1, 3]), node("Reshape", "f join", "g"),
             node("MatMul", "g o", "y", name="out")]
    inputs = {"x": [1, 3, 16], "keys": [1, 2, 8, 5], "values": [1, 2, 5, 8]}
    onnx.save(make_model(nodes, inputs, {"y": [1, 3, 4]}, stored), tmp_path / "m.onnx")
    np.savez(tmp_path / "calib.npz", **{name: random(8, *shape[1:]) for name, shape in inputs.items()})
    said = "all heads of its input stay: 'values' is an input of the model"
    for asked, expected in (({"prune_heads": "50%"}, True), ({"prune_channels": "50%"}, False)):
        report = onnxq.compile(tmp_path / "m.onnx", tmp_path / f"{expected}.onnx", scheme="float", measure=False,
                               calib=str(tmp_path / "calib.npz"), **asked)
        [row] = [n for n in report.nodes if n.name == "out"]
        assert (said in row.reason) == expected
