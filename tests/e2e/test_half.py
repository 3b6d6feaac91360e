"""float16 and bfloat16 models, made from the project's own, through compile, verify, inspect and bench."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from conftest import body, make_model, node, random, run
from half_support import HALVES, nearest, stored_types, to_half
from lowering_support import MODELS
from onnx import TensorProto

import onnxq
from onnxq import verification
from onnxq.errors import DataError
from onnxq.plan import FLOAT, STORED
from onnxq.report.report import Latency, Report
from onnxq.runtime.session import Session, SessionOptions
from onnxq.verification import is_integer

TOLERANCE = 0.005  # of top1: three rows of 600
STATIC, TOKEN = "w8a8", "w8a8-dynamic"
FLOAT16, BFLOAT16 = HALVES
NAMES = {FLOAT16: "float16", BFLOAT16: "bfloat16"}
CASES = [(name, dtype, scheme) for name in ("digits_cnn", "text_encoder") for dtype in HALVES
         for scheme in (STATIC, TOKEN)]
each_case = pytest.mark.parametrize(("name", "dtype", "scheme"), CASES,
                                    ids=[f"{n}-{NAMES[d]}-{s}" for n, d, s in CASES])
each_half = pytest.mark.parametrize("dtype", HALVES, ids=NAMES.values())
MOVES = {"Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


@dataclass
class Result:
    source: Path
    output: Path
    report: Report


def compiled(source: Path, output: Path, name: str, **options: Any) -> Result:
    folder = MODELS / name
    given = {"calib": str(folder / "calib.npz"), "eval": str(folder / "eval.npz"), "metric": "top1", "measure": False}
    return Result(source, output, onnxq.compile(source, output, **{**given, **options}))


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """The file of one of the project's models in a half type."""
    folder = tmp_path_factory.mktemp("half")

    @cache
    def make(name: str, dtype: int) -> Path:
        path = folder / f"{name}.{NAMES[dtype]}.onnx"
        onnx.save(to_half(onnx.load(MODELS / name / "model.onnx"), dtype), path)
        return path

    return make


@pytest.fixture(scope="module")
def result(halved: Callable[[str, int], Path],
           tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, str], Result]:
    folder = tmp_path_factory.mktemp("compiled")

    @cache
    def make(name: str, dtype: int, scheme: str) -> Result:
        source = halved(name, dtype) if dtype in HALVES else MODELS / name / "model.onnx"
        return compiled(source, folder / f"{name}.{dtype}.{scheme}.onnx", name, scheme=scheme)

    return make


Make = Callable[[str, int, str], Result]


def planned(report: Report) -> Counter[str]:
    return Counter(row.lowering for row in report.nodes if row.scheme not in (FLOAT, "folded"))


# ------------------------------------------------------------------ as good as the float32 model


@each_case
def test_accuracy_and_kernels_are_those_of_the_float32_model(name: str, dtype: int, scheme: str, result: Make) -> None:
    made, like = result(name, dtype, scheme).report, result(name, TensorProto.FLOAT, scheme).report
    assert made.verdict.failures == []
    assert made.accuracy is not None
    assert like.accuracy is not None
    assert abs(made.accuracy.compiled - like.accuracy.compiled) <= TOLERANCE
    assert abs((made.accuracy.float or 0) - (like.accuracy.float or 0)) <= TOLERANCE
    assert planned(made) == planned(like)
    for row in made.nodes:
        if row.scheme == scheme:
            assert is_integer(row.ran_as) or row.op in MOVES, row
        elif row.scheme in (FLOAT, STORED) and row.op not in MOVES:
            assert not is_integer(row.ran_as), row
    assert made.semantic is not None
    assert made.semantic.twin_sqnr_db is None or made.semantic.twin_sqnr_db > 40


@each_case
def test_the_file_is_smaller_and_its_ports_are_the_same(name: str, dtype: int, scheme: str, result: Make) -> None:
    made = result(name, dtype, scheme)
    size = made.report.size
    assert size is not None
    assert size.compiled_bytes == made.output.stat().st_size < 0.65 * made.source.stat().st_size
    before, after = onnx.load(made.source).graph, onnx.load(made.output).graph
    assert [(v.name, v.type) for v in after.input] == [(v.name, v.type) for v in before.input]
    assert [(v.name, v.type) for v in after.output] == [(v.name, v.type) for v in before.output]
    onnx.checker.check_model(str(made.output), full_check=True)


@each_case
def test_a_compiled_half_model_compiles_to_itself(name: str, dtype: int, scheme: str, result: Make,
                                                  tmp_path: Path) -> None:
    once = result(name, dtype, scheme)
    twice = compiled(once.output, tmp_path / "twice.onnx", name, scheme=scheme, metric=None)
    assert twice.report.ok
    assert {row.scheme for row in twice.report.nodes} <= {"given", FLOAT, "folded"}
    assert twice.report.accuracy is not None
    assert twice.report.accuracy.outputs["logits"].max_abs < 1e-5
    ops = [Counter(n.op_type for n in onnx.load(path).graph.node) for path in (once.output, twice.output)]
    assert ops[0] == ops[1]
    kept = [{k for k, v in stored_types(path).items() if v == dtype} for path in (once.output, twice.output)]
    assert kept[0] == kept[1]


@each_half
def test_the_notices_say_what_was_done(dtype: int, result: Make) -> None:
    notices = result("text_encoder", dtype, STATIC).report.verdict.notices
    name = NAMES[dtype]
    assert f"the model is {name}, which cpu does not compute in: what is not int8 runs in float32" in notices
    stands_in = f"onnxruntime does not run the {name} model itself: everything is compared with its float32 form"
    assert (stands_in in notices) is (dtype == BFLOAT16)
    assert not any("float16" in n for n in result("text_encoder", TensorProto.FLOAT, STATIC).report.verdict.notices)


# ------------------------------------------------------------------ what stays float


@each_half
def test_what_is_kept_float_stays_in_half(dtype: int, halved: Callable[[str, int], Path], tmp_path: Path) -> None:
    """Every weight from 1024 elements on; onnxruntime folds the Casts, so that it runs what float32 runs."""
    source = halved("text_encoder", dtype)
    made = compiled(source, tmp_path / "kept.onnx", "text_encoder", keep_float=["*"], metric=None)
    assert made.output.stat().st_size < 1.02 * made.source.stat().st_size
    large = {t.name: t.data_type for t in onnx.load(made.output).graph.initializer if np.prod(t.dims) >= 1024}
    assert len(large) > 10
    assert set(large.values()) == {dtype}
    assert made.report.accuracy is not None
    assert made.report.accuracy.compiled > 0.9999
    single = compiled(MODELS / "text_encoder" / "model.onnx", tmp_path / "single.onnx", "text_encoder",
                      keep_float=["*"], metric=None)
    operators = [executed_types(path, tmp_path) for path in (made.output, single.output)]
    operators[0]["Cast"] -= 1  # of the output
    assert operators[0] == operators[1]


def executed_types(path: Path, folder: Path) -> Counter[str]:
    saved = folder / "optimized.onnx"
    Session(path, SessionOptions(threads=1), optimized_path=str(saved))
    return Counter(n.op_type for n in onnx.load(saved, load_external_data=False).graph.node)


@pytest.mark.parametrize(("dtype", "against"), [(FLOAT16, ["float", "model"]), (BFLOAT16, ["float"])],
                         ids=NAMES.values())
def test_int8_has_to_beat_float32_and_is_told_against_the_model(
        dtype: int, against: list[str], halved: Callable[[str, int], Path], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 that is slower than float32 is not shipped, however slow the half model itself is."""
    source, seen = halved("digits_cnn", dtype), []

    def timed(reference: Path, made: Path, feeds: Any, options: Any, data: str, **more: Any) -> Latency:
        seen.append("model" if reference == source else "float")
        integer = any(is_integer(n.op_type) for n in onnx.load(made).graph.node)
        float_ms = 9.0 if reference == source else 1.0
        made_ms = 2.0 if integer else 1.0
        ratio = float_ms / made_ms
        return Latency(float_ms, made_ms, ratio, ratio, ratio, {"image": [8, 1, 16, 16]}, 0, data)

    monkeypatch.setattr(verification, "latency", timed)
    report = compiled(source, tmp_path / "o.onnx", "digits_cnn", measure=True).report
    assert seen == ["float", *against]
    assert "nothing pays, left float: int8 ran at 0.50x float here (2 against 1 ms)" in " ".join(report.verdict.notices)
    assert report.latency is not None
    assert report.latency.speedup == (9.0 if dtype == FLOAT16 else 1.0)
    assert not any(is_integer(n.op_type) for n in onnx.load(tmp_path / "o.onnx").graph.node)
    assert (tmp_path / "o.onnx").stat().st_size < source.stat().st_size


# ------------------------------------------------------------------ data


@each_half
@pytest.mark.parametrize("given", [np.float16, np.float32, np.float64])
def test_data_of_any_float_type_feed_a_half_input(dtype: int, given: type, halved: Callable[[str, int], Path],
                                                  tmp_path: Path) -> None:
    with np.load(MODELS / "digits_cnn" / "eval.npz") as data:
        np.savez(tmp_path / "some.npz", image=data["image"][:64].astype(given), labels=data["labels"][:64])
    made = compiled(halved("digits_cnn", dtype), tmp_path / "o.onnx", "digits_cnn", calib=str(tmp_path / "some.npz"),
                    eval=str(tmp_path / "some.npz"))
    assert made.report.ok
    assert made.report.accuracy is not None
    assert made.report.accuracy.compiled >= 0.98


def test_feeds_of_bfloat16_arrays(halved: Callable[[str, int], Path], tmp_path: Path) -> None:
    with np.load(MODELS / "digits_cnn" / "calib.npz") as data:
        feeds = [{"image": data["image"][:8].astype(ml_dtypes.bfloat16)}]
    made = compiled(halved("digits_cnn", BFLOAT16), tmp_path / "o.onnx", "digits_cnn", calib=feeds)
    assert made.report.ok


def test_values_beyond_float16_are_refused(halved: Callable[[str, int], Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "large.npz", image=np.full((8, 1, 16, 16), 1e5, np.float32))
    with pytest.raises(DataError, match="values beyond the range of float16"):
        compiled(halved("digits_cnn", FLOAT16), tmp_path / "o.onnx", "digits_cnn", calib=str(tmp_path / "large.npz"))


@each_half
def test_random_data_and_none(dtype: int, halved: Callable[[str, int], Path], tmp_path: Path) -> None:
    random_data = compiled(halved("digits_cnn", dtype), tmp_path / "r.onnx", "digits_cnn", calib="random", eval=None,
                           metric=None).report
    assert random_data.ok
    assert planned(random_data)["QLinearConv"] > 0
    none = compiled(halved("text_encoder", dtype), tmp_path / "n.onnx", "text_encoder", calib=None, eval=None,
                    metric=None).report
    assert any("timed on random inputs" in n for n in none.verdict.notices)
    assert any(is_integer(row.ran_as) for row in none.nodes)


# ------------------------------------------------------------------ verify, inspect, bench


@each_half
def test_verify(dtype: int, result: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = verification.measure.compare_models
    monkeypatch.setattr(verification.measure, "compare_models",
                        lambda a, b, feeds, **more: real(a, b, feeds, **{**more, "block_seconds": 0.01, "rounds": 1}))
    made = result("text_encoder", dtype, STATIC)
    report = onnxq.verify(made.source, made.output, data=str(MODELS / "text_encoder" / "eval.npz"), metric="top1",
                          layers=True, samples=64)
    assert report.ok
    assert any("does not run the bfloat16 model itself" in n for n in report.verdict.notices) is (dtype == BFLOAT16)
    assert report.accuracy is not None
    assert report.accuracy.outputs["logits"].cosine > 0.999
    assert len(report.layers) > 20
    assert {layer.op for layer in report.layers} >= {"LayerNormalization", "MatMul", "Softmax"}
    assert report.size is not None
    assert report.size.float_bytes == made.source.stat().st_size


@each_half
def test_inspect(dtype: int, halved: Callable[[str, int], Path], result: Make) -> None:
    found = onnxq.inspect(halved("digits_cnn", dtype))
    like = onnxq.inspect(MODELS / "digits_cnn" / "model.onnx")
    assert found["inputs"] == {"image": f"{NAMES[dtype]} [batch, 1, 16, 16]"}
    assert found["operators"] == like["operators"]
    assert {**found["weight_bytes"], NAMES[dtype]: 2 * found["weight_bytes"][NAMES[dtype]]} == {
        NAMES[dtype] if k == "float32" else k: v for k, v in like["weight_bytes"].items()}
    assert found["int8_share"] == like["int8_share"]
    verdicts = {n["name"]: (n["scheme"], n["lowering"], n["reason"]) for n in found["nodes"]}
    made = result("digits_cnn", dtype, STATIC).report
    planned = {n.name: (n.scheme, n.lowering, n.reason.partition("; its input's outliers")[0]) for n in made.nodes}
    assert verdicts == {name: verdict for name, verdict in planned.items() if verdict[0] != "folded"}


def test_bench_of_a_compiled_bfloat16_model(result: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["onnxq.bench"], "BLOCK_SECONDS", 0.01)  # the package has a function of that name
    found = onnxq.bench(result("digits_cnn", BFLOAT16, STATIC).output, threads=1)
    assert found["a_ms"] > 0
    assert found["peak_memory_bytes"]["a"] > 0


# ------------------------------------------------------------------ other graphs


def made_of(model: onnx.ModelProto, folder: Path, **options: Any) -> Result:
    source = folder / "half.onnx"
    onnx.save(model, source)
    return Result(source, folder / "o.onnx", onnxq.compile(source, folder / "o.onnx", measure=False, **options))


@each_half
def test_a_mixed_precision_export(dtype: int, tmp_path: Path) -> None:
    """LayerNormalization in float32 with Casts around it: they vanish, and int8 kernels stand on both sides."""
    stored = {"w": random(32, 64), "v": random(64, 32)}
    model = to_half(make_model(
        [node("MatMul", "x w", "m"), node("Identity", "m", "m32"), node("LayerNormalization", "m32 g b", "n32"),
         node("Identity", "n32", "n"), node("MatMul", "n v", "y")],
        {"x": ["rows", 32]}, {"y": ["rows", 32]}, stored), dtype)
    for index, to in ((1, TensorProto.FLOAT), (3, dtype)):
        model.graph.node[index].op_type = "Cast"
        model.graph.node[index].attribute.append(onnx.helper.make_attribute("to", to))
    for name in "gb":
        model.graph.initializer.append(onnx.numpy_helper.from_array(random(64, seed=3), name))
    made = made_of(model, tmp_path, calib=[{"x": random(16, 32)}])
    assert made.report.ok
    kernels = {r.name: r.ran_as for r in made.report.nodes if r.op in ("MatMul", "LayerNormalization")}
    int8 = "com.microsoft.MatMulIntegerToFloat"
    assert kernels == {"MatMul_m": int8, "MatMul_y": int8, "LayerNormalization_n32": "LayerNormalization"}
    casts = [n for n in onnx.load(made.output).graph.node if n.op_type == "Cast"]
    assert [(n.input[0], n.output[0]) for n in casts] == [("x", "x.float"), ("y.float", "y")]


@each_half
def test_an_if_body(dtype: int, tmp_path: Path) -> None:
    """int8 outside, weights of bodies stored small, and every branch computes what it did."""
    then = body([node("MatMul", "m k", "a")], {"a": None}, "then", {"k": random(32, 48, seed=5)})
    other = body([node("Mul", "m h", "b"), node("MatMul", "b j", "d")], {"d": None}, "other",
                 {"h": random(32, seed=6), "j": random(32, 48, seed=7)})
    model = make_model([node("MatMul", "x w", "m"), node("If", "c", "y", then_branch=then, else_branch=other)],
                       {"x": [16, 32], "c": (TensorProto.BOOL, [])}, {"y": [16, 48]}, {"w": random(32, 32)})
    feeds = [{"x": nearest(random(16, 32), dtype), "c": np.array(choice)} for choice in (True, False)]
    made = made_of(to_half(model, dtype), tmp_path, calib=feeds)
    assert made.report.ok
    assert {r.name: r.scheme for r in made.report.nodes}["MatMul_m"] == "w8a8"
    assert made.output.stat().st_size < made.source.stat().st_size
    session = Session(made.output)
    for feed in feeds:
        given = {"x": feed["x"].astype(session.inputs[0].dtype), "c": feed["c"]}
        got, wanted = session.run(given)["y"].astype(np.float32), run(model, feed)["y"]
        assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()


@each_half
def test_an_operator_of_an_unknown_domain_is_left_untouched(dtype: int, tmp_path: Path) -> None:
    """onnxruntime can't run it, so nothing is compared; made Identity, the file runs, and its types fit."""
    model = to_half(make_model(
        [node("MatMul", "x w", "a"), node("Op", "a", "b", domain="custom", level=3), node("MatMul", "b v", "y")],
        {"x": [4, 32]}, {"y": [4, 16]}, {"w": random(32, 64), "v": random(64, 16)}, domains={"custom": 1}), dtype)
    made = made_of(model, tmp_path, scheme=TOKEN)
    assert made.report.ok
    notices = made.report.verdict.notices
    assert any("does not run on random inputs: nothing was timed" in n for n in notices)
    assert not any("compared with its float32 form" in n for n in notices)
    compiled_model = onnx.load(made.output)
    nodes = {n.output[0]: n for n in compiled_model.graph.node}
    left = next(n for n in compiled_model.graph.node if n.domain == "custom")
    assert (left.op_type, list(left.output), [a.i for a in left.attribute]) == ("Op", ["b"], [3])
    cast = nodes[left.input[0]]
    assert (cast.op_type, cast.attribute[0].i) == ("Cast", dtype)
    readers = [n for n in compiled_model.graph.node if "b" in n.input]
    assert [(n.op_type, n.attribute[0].i) for n in readers] == [("Cast", TensorProto.FLOAT)]
    inferred = onnx.shape_inference.infer_shapes(compiled_model, check_type=True, strict_mode=True)
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    assert (types[left.input[0]], types[cast.input[0]]) == (dtype, TensorProto.FLOAT)
    left.op_type, left.domain = "Identity", ""
    del left.attribute[:]
    x = nearest(random(4, 32), dtype)
    session = Session(compiled_model.SerializeToString())
    got = session.run({"x": x.astype(session.inputs[0].dtype)})["y"].astype(np.float32)
    wanted = x @ nearest(random(32, 64), dtype) @ nearest(random(64, 16), dtype)
    assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()


def test_a_half_model_without_half_weights(tmp_path: Path) -> None:
    """float32 weights behind a Cast of the input stay float32: they did not come in half."""
    model = make_model([node("Cast", "x", "f", to=TensorProto.FLOAT), node("MatMul", "f w", "m"),
                        node("Cast", "m", "y", to=FLOAT16)],
                       {"x": (FLOAT16, [4, 64])}, {"y": (FLOAT16, [4, 64])}, {"w": random(64, 64)})
    made = made_of(model, tmp_path, calib="random", keep_float=["*"])
    assert made.report.ok
    assert stored_types(made.output) == {"w": TensorProto.FLOAT}


@pytest.mark.parametrize("memory", [None, "10KB"])
def test_blocks_whose_scales_float16_does_not_hold_stay_float32(tmp_path: Path, memory: str | None) -> None:
    """Scales of 1e-6 / 127 and less are 0 in float16, or close to it."""
    onnx.save(make_model([node("MatMul", "x w", "a", name="small"), node("Mul", "a k", "b"),
                          node("MatMul", "b v", "y", name="usual")], {"x": ["n", 64]}, {"y": ["n", 64]},
                         {"w": random(64, 64) * np.float32(1e-6), "k": np.float32(1e5), "v": random(64, 64, seed=1)}),
              tmp_path / "m.onnx")
    report = onnxq.compile(tmp_path / "m.onnx", tmp_path / "o.onnx", scheme="w8a16", target="cuda", measure=False,
                           max_memory=memory, threads=1)
    reasons = {n.name: n.reason for n in report.nodes}
    assert reasons["small"].endswith("float32: the scales of its weights have too few digits in float16")
    assert "float32" not in reasons["usual"]
    feed = {"x": random(4, 64, seed=2)}
    wanted = run(tmp_path / "m.onnx", feed)["y"]
    error = run(tmp_path / "o.onnx", feed, optimize=True)["y"] - wanted
    assert np.square(error).sum() < 1e-3 * np.square(wanted).sum()
