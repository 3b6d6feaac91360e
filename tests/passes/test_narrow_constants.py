"""Constants of a half model stored in half again: exact, folded by onnxruntime, and only where they came so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Opener, apply, assert_same, body, make_model, node, random, run, text
from half_support import HALVES, stored_types, to_half
from onnx import TensorProto

from onnxq.graph import Graph, load, save
from onnxq.graph.names import with_bodies
from onnxq.passes.canonicalize import canonicalize
from onnxq.passes.lower.narrow_constants import NarrowConstants
from onnxq.passes.manager import Context, PassManager
from onnxq.runtime.session import Session, SessionOptions
from onnxq.targets import TARGETS

Written = Callable[[Graph], Path]
each_half = pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
PLAIN = SessionOptions(threads=1, optimize=False)
FLOAT = TensorProto.FLOAT


def canonical(graph: Graph) -> Graph:
    PassManager(canonicalize()).run(graph, Context(TARGETS["cpu"]))
    return graph


def narrowed(graph: Graph) -> bool:
    return apply(NarrowConstants(), graph)[0]


def model() -> onnx.ModelProto:
    """A table, a Gemm whose weight is turned, a weight that two bodies read too, a small bias."""
    then = body([node("MatMul", "f w", "a")], {"a": None}, "then")
    other = body([node("Mul", "f k", "b")], {"b": None}, "other", {"k": random(32, 64, seed=5)})
    return make_model(
        [node("Gather", "table ids", "e"), node("MatMul", "e w", "m"), node("Gemm", "m v bias", "f", transB=1),
         node("If", "c", "y", then_branch=then, else_branch=other)],
        {"ids": (TensorProto.INT64, [32]), "c": (TensorProto.BOOL, [])}, {"y": [32, 64]},
        {"table": random(50, 64), "w": random(64, 64), "v": random(64, 64, seed=1), "bias": random(64)})


FEEDS = [{"ids": np.arange(32), "c": np.array(choice)} for choice in (True, False)]


@each_half
def test_what_came_in_half_is_stored_in_half(opened: Opener, written: Written, tmp_path: Path, dtype: int) -> None:
    graph = canonical(opened(to_half(model(), dtype)))
    wide = written(graph)
    wanted = [Session(wide, PLAIN).run(feed) for feed in FEEDS]
    assert narrowed(graph)
    narrow = written(graph)
    assert stored_types(narrow) == {"table": dtype, "w": dtype, "v.kn": dtype, "k": dtype, "bias": FLOAT}
    assert set(stored_types(wide).values()) == {FLOAT}
    assert narrow.stat().st_size < 0.6 * wide.stat().st_size
    for feed, outputs in zip(FEEDS, wanted, strict=True):
        assert_same(Session(narrow, PLAIN).run(feed), outputs)
    found = text(graph)
    assert not narrowed(graph)
    assert text(graph) == found
    saved = tmp_path / "optimized.onnx"
    Session(narrow, SessionOptions(threads=1), optimized_path=str(saved))
    optimized = onnx.load(saved, load_external_data=False)
    casts = [n for n in optimized.graph.node if n.op_type == "Cast"]
    assert [n.output[0] for n in casts] == ["y"], "the others were folded as the model was loaded"


@each_half
def test_a_narrowed_file_narrows_to_itself(opened: Opener, written: Written, dtype: int) -> None:
    graph = canonical(opened(to_half(model(), dtype)))
    narrowed(graph)
    once = written(graph)
    again = canonical(load(once))
    assert narrowed(again)
    assert stored_types(written(again)) == stored_types(once)
    assert text(again) == text(load(once))


@each_half
def test_values_that_half_does_not_hold_stay_float32(opened: Opener, written: Written, dtype: int) -> None:
    """BatchNormalization is folded into the first weight; the second is the model's own."""
    stats = {k: np.abs(random(64, seed=i)) + 0.1 for i, k in enumerate("gbmv")}
    graph = canonical(opened(to_half(make_model(
        [node("Conv", "x w", "c"), node("BatchNormalization", "c g b m v", "n"), node("Conv", "n u", "y")],
        {"x": [1, 64, 2, 2]}, {"y": [1, 32, 2, 2]},
        {"w": random(64, 64, 1, 1), "u": random(32, 64, 1, 1), **stats}), dtype)))
    assert narrowed(graph)
    assert {k: v for k, v in stored_types(written(graph)).items() if k[0] in "wu"} == {"w.bn": FLOAT, "u": dtype}


def test_a_float_model_stays_float32(opened: Opener) -> None:
    stored = np.ones((64, 64), np.float32)  # a half type would hold them
    graph = canonical(opened(make_model([node("MatMul", "x w", "y")], {"x": [2, 64]}, {"y": [2, 64]}, {"w": stored})))
    assert not narrowed(graph)


def test_odd_values_and_too_large_ones(opened: Opener, written: Written) -> None:
    """Infinities, NaN and negative zeros are values of a half type; 70000 is none of float16."""
    odd = np.tile(np.array([np.inf, -np.inf, np.nan, -0.0], np.float16), 512)
    graph = opened(make_model([node("Mul", "x odd", "y"), node("Mul", "y large", "z")],
                              {"x": (TensorProto.FLOAT16, [2048])}, {"z": (TensorProto.FLOAT16, [2048])},
                              {"odd": odd, "large": np.full(2048, 2, np.float16)}))
    canonical(graph)
    large = graph.constant("larger", np.full(2048, 70000, np.float32))
    graph.replace_input(next(n for n in graph.nodes if n.name == "Mul_z"), 1, large)
    assert narrowed(graph)
    path = written(graph)
    stored = {t.name: t for t in onnx.load(path).graph.initializer}
    assert (stored["odd"].data_type, stored["larger"].data_type) == (TensorProto.FLOAT16, FLOAT)
    assert stored["odd"].raw_data == odd.tobytes()


@each_half
def test_a_copied_graph_narrows_too(opened: Opener, written: Written, dtype: int) -> None:
    graph = canonical(opened(to_half(model(), dtype))).copy()
    assert narrowed(graph)
    assert stored_types(written(graph))["v.kn"] == dtype


def test_a_weight_that_a_body_hands_out_stays(opened: Opener, written: Written) -> None:
    """Where the body ends, its type is that of the If."""
    then = body([node("Relu", "k", "unused")], {"k": None}, "then", {"k": random(32, 64)})
    other = body([node("MatMul", "x w", "b")], {"b": None}, "other")
    model = make_model([node("If", "c", "y", then_branch=then, else_branch=other)],
                       {"c": (TensorProto.BOOL, []), "x": [32, 64]}, {"y": [32, 64]}, {"w": random(64, 64)})
    graph = canonical(opened(to_half(model, TensorProto.FLOAT16)))
    assert narrowed(graph)
    path = written(graph)
    half = [t.name for g in with_bodies(onnx.load(path).graph) for t in g.initializer
            if t.data_type == TensorProto.FLOAT16]
    assert half == ["w"]
    got = run(path, {"c": np.array(True), "x": np.zeros((32, 64), np.float16)})["y"]
    np.testing.assert_array_equal(got, random(32, 64).astype(np.float16))


def test_a_name_that_is_taken_is_left_alone(opened: Opener) -> None:
    graph = canonical(opened(to_half(make_model(
        [node("MatMul", "x w", "w.float"), node("Relu", "w.float", "y")], {"x": [2, 64]}, {"y": [2, 64]},
        {"w": random(64, 64)}), TensorProto.FLOAT16)))
    assert not narrowed(graph)


@pytest.mark.parametrize("outside", [True, False])
def test_external_weights(tmp_path: Path, outside: bool) -> None:
    """Read by mapping, written to one data file or into the model, wide or narrow."""
    half = to_half(model(), TensorProto.FLOAT16)
    wanted = run(half, FEEDS[0])
    onnx.save(half, tmp_path / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0)
    graph = canonical(load(tmp_path / "in.onnx"))
    limit = 0 if outside else 1 << 30
    for name, kind in (("wide", FLOAT), ("narrow", TensorProto.FLOAT16)):
        if name == "narrow":
            assert narrowed(graph)
        save(graph, tmp_path / f"{name}.onnx", external_above=limit)
        assert (tmp_path / f"{name}.onnx.data").exists() is outside
        assert stored_types(tmp_path / f"{name}.onnx")["table"] == kind
        assert_same(run(tmp_path / f"{name}.onnx", FEEDS[0]), wanted, 2e-3)
    if outside:
        assert (tmp_path / "narrow.onnx.data").stat().st_size < 0.6 * (tmp_path / "wide.onnx.data").stat().st_size
