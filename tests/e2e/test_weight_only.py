"""compile() under weight-only schemes on the project's models: accuracy, kernels, size, and everything else promised.

`pytest --regen` writes the figures of tests/e2e/reference.yaml anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from conftest import make_model, node, random, run
from half_support import HALVES, to_half
from lowering_support import MODELS, ONE_THREAD
from onnx import TensorProto

import onnxq
from onnxq import Plan
from onnxq.errors import UsageError
from onnxq.graph import read_nodes
from onnxq.recipe import Match, Recipe, Rule
from onnxq.report.report import Report
from onnxq.runtime.observe import optimized
from onnxq.schemes import scheme as named_scheme

REFERENCE = Path(__file__).parent / "reference.yaml"
DECODER, TEXT = MODELS / "decoder", MODELS / "text_encoder"
SCHEMES = ("w4a16", "w8a16", "w2a16")
# of perplexity: kernels round activations by the machine's vectors, and 2 bits leave little between tokens
TOLERANCE = {"w8a16": 0.002, "w4a16": 0.01, "w2a16": 0.05}
FORMATS = {"w4a16": ("uint4", 32), "w8a16": ("int8", 128), "w2a16": ("uint2", 32)}
SIZES = {"w4a16": 0.19, "w8a16": 0.34, "w2a16": 0.14}  # of the float file's


def compiled(folder: Path, output: Path, scheme: str = "w4a16", **options: Any) -> Report:
    """A model, without timing and data unless given."""
    given = {"scheme": scheme, "measure": False, "force": True, **options}
    return onnxq.compile(folder / "model.onnx", output, **given)


def lowerings(report: Report) -> Counter[tuple[str, str]]:
    return Counter((n.op, n.lowering) for n in report.nodes if n.scheme not in ("float", "folded"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Report]]:
    """The decoder by scheme and way: qoperator, qdq, or `calibrated`; with the folder of its plan."""
    folder = tmp_path_factory.mktemp("decoder")

    @cache
    def make(scheme: str, way: str) -> tuple[Path, Report]:
        output = folder / f"{scheme}.{way}.onnx"
        data = {"calib": str(DECODER / "calib.npz"), "samples": 64} if way == "calibrated" else {}
        return output, compiled(DECODER, output, scheme, eval=str(DECODER / "eval.npz"), metric="perplexity",
                                format="qdq" if way == "qdq" else "auto", save_plan=output.with_suffix(".plan"), **data)

    return make


Make = Callable[[str, str], tuple[Path, Report]]
each_way = pytest.mark.parametrize("way", ["qoperator", "qdq", "calibrated"])
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@each_scheme
@each_way
def test_perplexity_and_kernels_are_those_of_the_reference(scheme: str, way: str, decoder: Make,
                                                           request: pytest.FixtureRequest) -> None:
    report = decoder(scheme, way)[1]
    assert report.accuracy is not None
    kernels = Counter(n.lowering for n in report.nodes if n.scheme not in ("float", "folded"))
    found = {"float": round(float(report.accuracy.float or 0), 4), "compiled": round(report.accuracy.compiled, 4),
             "kernels": dict(sorted(kernels.items()))}
    known = yaml.safe_load(REFERENCE.read_text(encoding="utf-8"))
    if request.config.getoption("--regen"):
        known.setdefault("decoder", {}).setdefault(scheme, {})[way] = found
        REFERENCE.write_text(yaml.safe_dump(known, sort_keys=True), encoding="utf-8")
    wanted = known["decoder"][scheme][way]
    assert found["float"] == pytest.approx(wanted["float"], rel=1e-4)
    assert found["compiled"] == pytest.approx(wanted["compiled"], rel=TOLERANCE[scheme])
    assert found["kernels"] == wanted["kernels"]


@each_scheme
@each_way
def test_every_check_holds(scheme: str, way: str, decoder: Make) -> None:
    path, report = decoder(scheme, way)
    assert report.ok, report.verdict.failures
    layers = [n for n in report.nodes if n.lowering == "MatMulNBits"]
    assert len(layers) == 22
    for row in layers:
        assert (row.op, row.scheme, row.ran_as) == ("MatMul", scheme, "com.microsoft.MatMulNBits")
        assert row.provider == "CPUExecutionProvider"
    [table] = [n for n in report.nodes if n.op == "Gather" and n.weights]
    kernel = way != "qdq" and scheme != "w2a16"
    assert table.ran_as == ("com.microsoft.GatherBlockQuantized" if kernel else "Gather")
    assert table.lowering == ("GatherBlockQuantized" if kernel else "stored")
    assert report.semantic is not None
    for db in (report.semantic.twin_sqnr_db, report.semantic.runtime_sqnr_db):  # kernels round activations to int8
        assert db is None or db > 30
    onnx.checker.check_model(str(path), full_check=True)


@each_scheme
@each_way
def test_rows_say_type_and_block_size(scheme: str, way: str, decoder: Make) -> None:
    dtype, size = FORMATS[scheme]
    report = decoder(scheme, way)[1]
    for row in report.nodes:
        if row.lowering in ("MatMulNBits", "GatherBlockQuantized", "stored"):
            assert row.reason.startswith(f"{dtype} weights in blocks of {size}"), row
    weights = [name for row in report.nodes for name in row.weights]
    assert len(weights) == 23
    for name in weights:
        encoding = report.tensors[name]
        assert (encoding.dtype, encoding.granularity, encoding.block_size) == (dtype, "block", size)
        assert encoding.code_bytes is not None
        assert encoding.float_bytes is not None
        assert encoding.code_bytes < 0.45 * encoding.float_bytes
    assert not any(row.codes_in or row.codes_out for row in report.nodes), "activations stay float"


@each_scheme
@each_way
def test_the_file_is_as_small_as_its_bits(scheme: str, way: str, decoder: Make) -> None:
    size = decoder(scheme, way)[1].size
    assert size is not None
    assert size.ratio < SIZES[scheme] + (0.04 if way == "qdq" else 0.0)  # a table of 8 bits is filled up to blocks


@pytest.mark.parametrize("scheme", ["w4a16", "w2a16"])
def test_data_bring_it_nearer_to_float(scheme: str, decoder: Make) -> None:
    losses = []
    for way in ("qoperator", "calibrated"):
        accuracy = decoder(scheme, way)[1].accuracy
        assert accuracy is not None
        losses.append(np.log(accuracy.compiled / float(accuracy.float or 0)))
    assert losses[1] < 0.7 * losses[0]


@each_scheme
@each_way
def test_the_same_plan_gives_the_same_bytes(scheme: str, way: str, tmp_path: Path) -> None:
    fmt = "qdq" if way == "qdq" else "auto"
    data = {"calib": str(TEXT / "calib.npz"), "samples": 16} if way == "calibrated" else {}
    compiled(TEXT, tmp_path / "a.onnx", scheme, format=fmt, save_plan=tmp_path / "plan", **data)
    plan = Plan.load(tmp_path / "plan")
    assert plan.blocks == {}
    assert plan.rounded.keys() == plan.weights.keys()
    sample = {"samples": 16} if data else {}  # the recipe is in the file, too
    compiled(TEXT, tmp_path / "b.onnx", scheme, format=fmt, plan=tmp_path / "plan", **sample)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    props = {p.key: p.value for p in onnx.load(tmp_path / "b.onnx").metadata_props}
    assert props["onnxq.plan"] == plan.digest()
    assert json.loads(props["onnxq.recipe"])["scheme"]["name"] == scheme


def test_a_plan_for_weights_of_another_shape_is_refused(tmp_path: Path) -> None:
    for name, width in (("a", 32), ("b", 48)):
        onnx.save(make_model([node("MatMul", "x w", "y")], {"x": ["n", 64]}, {"y": ["n", width]},
                             {"w": random(64, width)}), tmp_path / f"{name}.onnx")
    onnxq.compile(tmp_path / "a.onnx", tmp_path / "o.onnx", scheme="w4a16", measure=False, save_plan=tmp_path / "plan")
    with pytest.raises(UsageError, match=r"another model: the weights 'w' are \[64, 48\], whose blocks have \[2, 48\] "
                                         r"scales and not \[2, 32\]"):
        onnxq.compile(tmp_path / "b.onnx", tmp_path / "q.onnx", plan=tmp_path / "plan", measure=False)


@each_scheme
@pytest.mark.parametrize("way", ["qoperator", "qdq"])
def test_a_compiled_model_compiles_to_itself(scheme: str, way: str, decoder: Make, tmp_path: Path) -> None:
    once, _ = decoder(scheme, way)
    report = onnxq.compile(once, tmp_path / "twice.onnx", scheme=scheme, measure=False,
                           format="qdq" if way == "qdq" else "auto")
    assert report.ok, report.verdict.failures
    assert {row.scheme for row in report.nodes} <= {"given", "float", "folded"}
    files = [onnx.load(path).graph for path in (once, tmp_path / "twice.onnx")]
    ops = [Counter(n.op_type.replace("Sum", "Add") for n in f.node) for f in files]  # of two, they are the same
    assert ops[0] == ops[1]
    stored = [{t.name: t.SerializeToString() for t in f.initializer} for f in files]
    assert stored[0] == stored[1]


# ------------------------------------------------------------------ the portable form


def test_the_portable_form_is_of_standard_operators_and_runs_by_the_same_kernels(decoder: Make) -> None:
    path, _ = decoder("w4a16", "qdq")
    model = onnx.load(path)
    assert {n.domain for n in model.graph.node} <= {"", "ai.onnx"}
    assert {o.domain: o.version for o in model.opset_import}[""] == 21
    blocks = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    assert len(blocks) == 22
    assert {(a.name, a.i) for n in blocks for a in n.attribute} == {("axis", 0), ("block_size", 32)}
    ran = Counter(e.op for e in optimized(path, ONE_THREAD, read_nodes))
    assert ran["com.microsoft.MatMulNBits"] == 22
    assert not ran["DequantizeLinear"]


def test_both_forms_mean_the_same(decoder: Make) -> None:
    with np.load(DECODER / "eval.npz") as data:
        wanted = {i.name for i in onnx.load(DECODER / "model.onnx").graph.input}
        feed = {k: data[k][:2] for k in data.files if k in wanted}
    feed |= {i.name: np.zeros((2, 2, 0, 16), np.float32)
             for i in onnx.load(DECODER / "model.onnx").graph.input if i.name not in feed}
    found = [run(decoder("w4a16", way)[0], feed)["logits"] for way in ("qoperator", "qdq")]
    exact = run(DECODER / "model.onnx", feed)["logits"]
    apart, off = (np.square(a - b).mean() for a, b in ((found[0], found[1]), (found[0], exact)))
    assert apart < 0.05 * off, "unoptimized, one rounds activations to int8 and the other does not"


def test_an_opset_that_cannot_be_raised_leaves_weights_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxq import compiler
    from onnxq.errors import GraphError

    def refuse(graph: Any, version: int) -> Any:
        raise GraphError("onnx can't raise the model")

    monkeypatch.setattr(compiler, "raise_opset", refuse)
    report = compiled(TEXT, tmp_path / "o.onnx", format="qdq")
    assert report.ok, report.verdict.failures
    assert "weights in blocks are decoded as the model is loaded: onnx can't raise the model" in report.verdict.notices
    assert "codes of weights that are decoded at load take 8 bits each: onnx can't raise the model" in (
        report.verdict.notices)
    reasons = {n.reason for n in report.nodes if n.op == "MatMul" and n.scheme == "stored"}
    assert len(reasons) == 1
    assert reasons.pop().endswith("DequantizeLinear takes blocks of uint4 from opset 21 on")
    assert not {"MatMulNBits", "DequantizeLinear"} & {n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node}
    assert "MatMulNBits" not in {n.ran_as.rpartition(".")[2] for n in report.nodes}


def test_other_schemes_keep_their_opset_in_that_form(tmp_path: Path) -> None:
    compiled(TEXT, tmp_path / "o.onnx", "w8a8-dynamic", format="qdq")
    versions = [{o.domain: o.version for o in onnx.load(path).opset_import}[""]
                for path in (TEXT / "model.onnx", tmp_path / "o.onnx")]
    assert versions[0] == versions[1]


# ------------------------------------------------------------------ options


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_encoder_keeps_its_accuracy(scheme: str, tmp_path: Path) -> None:
    report = compiled(TEXT, tmp_path / "o.onnx", scheme, eval=str(TEXT / "eval.npz"), metric="top1")
    assert report.ok, report.verdict.failures
    assert lowerings(report)["MatMul", "MatMulNBits"] == 12
    assert report.accuracy is not None
    assert report.accuracy.drop is not None
    assert report.accuracy.drop < {"w8a16": 0.005, "w4a16": 0.02, "w2a16": 0.5}[scheme]


def test_rules_mix_schemes(tmp_path: Path) -> None:
    rules = (Rule(Match(name="node_MatMul_24"), "w8a16", "the first"), Rule(Match(op="Gather"), "float"))
    chosen = Recipe(named_scheme("w4a16"), rules=rules)
    report = onnxq.compile(TEXT / "model.onnx", tmp_path / "o.onnx", recipe=chosen, measure=False)
    assert report.ok, report.verdict.failures
    rows = {n.name: n for n in report.nodes}
    assert (rows["node_MatMul_24"].scheme, rows["node_MatMul_24"].lowering) == ("w8a16", "MatMulNBits")
    assert rows["node_MatMul_24"].reason.startswith("int8 weights in blocks of 128")
    assert Counter(n.scheme for n in report.nodes if n.lowering == "MatMulNBits" and n.op == "MatMul") == {
        "w8a16": 1, "w4a16": 11}
    assert {n.scheme for n in report.nodes if n.op == "Gather"} <= {"float", "folded"}


def test_what_is_kept_float(tmp_path: Path) -> None:
    named = compiled(TEXT, tmp_path / "a.onnx", keep_float=["node_MatMul_24"])
    row = next(n for n in named.nodes if n.name == "node_MatMul_24")
    assert (row.scheme, row.reason, row.ran_as) == ("float", "kept float as asked (node_MatMul_24)", "MatMul")
    ranked = compiled(TEXT, tmp_path / "b.onnx", fallback=2, calib=str(TEXT / "calib.npz"), samples=16)
    assert ranked.ok, ranked.verdict.failures
    kept = [n.reason.partition(" (")[0] for n in ranked.nodes if n.reason.startswith("kept float: ")]
    assert sorted(kept) == [f"kept float: {k} most sensitive by range_parm" for k in ("1st", "2nd")]
    assert lowerings(ranked)["MatMul", "MatMulNBits"] == 10


def test_analyze_tells_what_each_layer_costs(tmp_path: Path) -> None:
    found = onnxq.analyze(TEXT / "model.onnx", calib=TEXT / "calib.npz", samples=16, scheme="w4a16")
    assert [layer["kernel"] for layer in found["layers"]] == ["MatMulNBits"] * 12
    for layer in found["layers"]:
        assert 15 < layer["accumulated_db"] <= layer["sqnr_db"] + 1
        assert layer["scale"] is layer["clipped"] is None
    finer = onnxq.analyze(TEXT / "model.onnx", calib=TEXT / "calib.npz", samples=16, scheme="w8a16")
    for coarse, fine in zip(found["layers"], finer["layers"], strict=True):
        assert fine["sqnr_db"] > coarse["sqnr_db"] + 15, "four bits more, by 6 dB each, in larger blocks"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("fmt", ["auto", "qdq"])
def test_half_models(dtype: int, fmt: str, tmp_path: Path) -> None:
    onnx.save(to_half(onnx.load(TEXT / "model.onnx"), dtype), tmp_path / "model.onnx")
    report = compiled(tmp_path, tmp_path / "o.onnx", format=fmt, eval=str(TEXT / "eval.npz"), metric="top1")
    assert report.ok, report.verdict.failures
    assert lowerings(report)["MatMul", "MatMulNBits"] == 12
    assert report.accuracy is not None
    assert abs(report.accuracy.drop or 0) < 0.02
    scales = [t for t in onnx.load(tmp_path / "o.onnx").graph.initializer if t.name.endswith("block_scales")]
    assert {t.data_type for t in scales} == {TensorProto.FLOAT}, "kernels compute in float32 here"


def test_a_conv_network_is_stored(tmp_path: Path) -> None:
    report = compiled(MODELS / "digits_cnn", tmp_path / "o.onnx")
    assert report.ok, report.verdict.failures
    assert {n.scheme for n in report.nodes if n.op == "Conv" and n.weights} == {"stored"}


def test_measuring_decides_kernel_by_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is decoded at load: as small, and as fast as float."""
    from onnxq import settling
    from onnxq.planner.choice import Choice

    def choose(graph: Any, prices: Any, tie: float) -> Choice:
        assert {u.kernel for u in prices.units} <= {"MatMulNBits", "GatherBlockQuantized"}
        return Choice({u.name: "slower here" for u in prices.units if u.op == "MatMul"}, frozenset())

    monkeypatch.setattr(settling, "choose", choose)
    monkeypatch.setattr(settling.Settling, "_faster", lambda *_: True)
    monkeypatch.setattr(settling.Settling, "_pays", lambda *_: True)
    monkeypatch.setattr(settling.Settling, "_beside_the_file", lambda *_: None)
    report = compiled(TEXT, tmp_path / "o.onnx", measure=True)
    assert report.ok, report.verdict.failures
    rows = [n for n in report.nodes if n.op == "MatMul" and n.weights]
    assert {(n.scheme, n.reason.rpartition(": ")[2]) for n in rows} == {("stored", "slower here")}
    assert report.size is not None
    assert report.size.ratio < 0.25
    codes = [t for t in onnx.load(tmp_path / "o.onnx").graph.initializer if t.name.endswith((".q", ".q.packed"))]
    assert [t.data_type for t in codes] == [TensorProto.UINT4] * 12


def test_command_line_and_exit_status(tmp_path: Path) -> None:
    def command(*more: str) -> tuple[int, dict[str, Any]]:
        call = [sys.executable, "-m", "onnxq", "compile", str(TEXT / "model.onnx"), "-o", str(tmp_path / "o.onnx"),
                "--eval", str(TEXT / "eval.npz"), "--metric", "top1", "--no-measure", "--force", "--json", *more]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout)

    status, found = command("--scheme", "w8a16", "--max-drop", "1%")
    assert (status, found["verdict"]["ok"], found["scheme"]) == (0, True, "w8a16")
    status, found = command("--scheme", "w2a16", "--max-drop", "0")
    assert (status, found["verdict"]["ok"]) == (1, False)
    assert found["verdict"]["failures"][0].startswith("top1 went from ")


# ------------------------------------------------------------------ explanations


def test_explaining_a_float_model_a_report_and_a_file(decoder: Make, tmp_path: Path) -> None:
    layer = "/layers.0/attention/q_proj/MatMul"
    path, report = decoder("w4a16", "qoperator")
    report.save(tmp_path)

    def weight(found: dict[str, Any]) -> dict[str, Any]:
        [one] = [p for p in found["inputs"] if p["role"] == "weight"]
        return dict(one["encoding"])

    planned = onnxq.explain(DECODER / "model.onnx", layer, scheme="w4a16")
    assert planned["summary"].startswith("would run as MatMulNBits under scheme w4a16")
    told, ran = onnxq.explain(tmp_path, layer), onnxq.explain(path, layer)
    assert told["summary"].startswith("ran as MatMulNBits on CPUExecutionProvider")
    assert told["scheme"] == "w4a16"
    assert told["reason"] == "uint4 weights in blocks of 32, decoded as they are multiplied"
    plan = Plan.load(path.with_suffix(".plan"))
    [name] = [n.weight for n in plan.nodes.values() if n.node == layer]
    params = plan.weights[str(name)]
    same = ("dtype", "granularity", "block_size", "scales")
    assert [{k: weight(found)[k] for k in same} for found in (planned, told, ran)] == 3 * [
        {"dtype": "uint4", "granularity": "block", "block_size": 32, "scales": params.scale.size}]
    for key in ("least_scale", "greatest_scale", "scale", "low", "high"):
        assert weight(told)[key] == weight(ran)[key]
    assert np.float32(weight(told)["greatest_scale"]) == params.scale.max()
    assert weight(planned)["float_bytes"] == weight(told)["float_bytes"] == weight(ran)["float_bytes"]


def test_inspecting_a_float_model_and_a_file(decoder: Make) -> None:
    found = onnxq.inspect(DECODER / "model.onnx", scheme="w4a16")
    assert found["int8_share"] > 0.95
    assert Counter(n["lowering"] for n in found["nodes"])["MatMulNBits"] == 22
    for way, kernel in (("qoperator", "com.microsoft.MatMulNBits"), ("qdq", "DequantizeLinear")):
        path = decoder("w4a16", way)[0]
        found = onnxq.inspect(path, scheme="w4a16")
        assert found["operators"][kernel] == 22
        assert not [n for n in found["nodes"] if n["scheme"] == "w4a16"], "nothing is quantized twice"
        held = Counter[str]()
        for tensor in onnx.load(path).graph.initializer:
            held[TensorProto.DataType.Name(tensor.data_type).lower().replace("float", "float32")] += len(
                tensor.raw_data)
        for kind in ("uint4", "uint8"):
            assert found["weight_bytes"].get(kind, 0) == held[kind]
