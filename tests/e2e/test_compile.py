"""compile() on the project's models: accuracy against reference figures, and everything that a result promises.

`pytest --regen` writes tests/e2e/reference.yaml anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from conftest import run
from lowering_support import MODELS, bare

import onnxq
from onnxq.errors import OutputError, UsageError
from onnxq.graph import load
from onnxq.plan import FLOAT, STORED
from onnxq.report.report import Latency, Report
from onnxq.verification import is_integer

REFERENCE = Path(__file__).parent / "reference.yaml"
TOLERANCE = 0.005  # of top1: three rows of 600; kernels round differently from one CPU to the next
NAMES = ("digits_cnn", "text_encoder")
STATIC, DYNAMIC = "w8a8", "w8a8-dynamic-tensor"
CASES = [(name, scheme, fmt) for name in NAMES for scheme in (STATIC, DYNAMIC) for fmt in ("qdq", "qoperator")]
MOVES = {"Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
each_case = pytest.mark.parametrize(("name", "scheme", "fmt"), CASES, ids=["-".join(c) for c in CASES])


@dataclass
class Result:
    source: Path
    output: Path
    report: Report


def compiled(name: str, output: Path, **options: Any) -> Result:
    """The model of that name with its data, without timing."""
    folder = MODELS / name
    given = {"calib": str(folder / "calib.npz"), "eval": str(folder / "eval.npz"), "metric": "top1", "measure": False}
    return Result(folder / "model.onnx", output, onnxq.compile(folder / "model.onnx", output, **{**given, **options}))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Result]:
    folder = tmp_path_factory.mktemp("compiled")

    @cache
    def make(name: str, scheme: str, fmt: str) -> Result:
        return compiled(name, folder / f"{name}.{scheme}.{fmt}.onnx", scheme=scheme, format=fmt)

    return make


Make = Callable[[str, str, str], Result]


# ------------------------------------------------------------------ accuracy and kernels


def figures(report: Report) -> dict[str, Any]:
    assert report.accuracy is not None
    kernels = [row.lowering for row in report.nodes if row.scheme not in (FLOAT, "folded")]
    return {"float": round(float(report.accuracy.float or 0), 4), "compiled": round(report.accuracy.compiled, 4),
            "kernels": {k: kernels.count(k) for k in sorted(set(kernels))}}


@each_case
def test_accuracy_and_kernels_are_those_of_the_reference(name: str, scheme: str, fmt: str, result: Make,
                                                         request: pytest.FixtureRequest) -> None:
    found = figures(result(name, scheme, fmt).report)
    known = yaml.safe_load(REFERENCE.read_text(encoding="utf-8")) if REFERENCE.exists() else {}
    if request.config.getoption("--regen"):
        known.setdefault(name, {}).setdefault(scheme, {})[fmt] = found
        REFERENCE.write_text(yaml.safe_dump(known, sort_keys=True), encoding="utf-8")
    wanted = known[name][scheme][fmt]
    assert abs(found["float"] - wanted["float"]) <= TOLERANCE
    assert abs(found["compiled"] - wanted["compiled"]) <= TOLERANCE
    assert found["kernels"] == wanted["kernels"], "what is planned does not depend on the machine"


@each_case
def test_every_planned_node_ran_as_planned(name: str, scheme: str, fmt: str, result: Make) -> None:
    report = result(name, scheme, fmt).report
    assert report.verdict.failures == []
    assert report.ok
    assert all(row.reason for row in report.nodes)
    for row in report.nodes:
        if row.scheme == scheme:
            assert is_integer(row.ran_as) or row.op in MOVES, row
            assert row.provider == "CPUExecutionProvider" or not row.ran_as or row.op in MOVES, row
        elif row.scheme == FLOAT and row.op not in MOVES:
            assert not is_integer(row.ran_as), row
    names = [row.name for row in report.nodes]
    assert len(names) == len(set(names))
    added = {name for name in names if name.endswith("/smooth")}  # Muls that divide channels
    assert set(names) - added == {n.name for n in load(result(name, scheme, fmt).source).nodes}


@each_case
def test_deployed_agrees_with_its_qdq_form(name: str, scheme: str, fmt: str, result: Make) -> None:
    report = result(name, scheme, fmt).report
    assert report.semantic is not None
    for db in (report.semantic.twin_sqnr_db, report.semantic.runtime_sqnr_db):
        assert db is None or db > 40


# ------------------------------------------------------------------ the file


@each_case
def test_the_file_is_smaller_and_says_how_it_was_made(name: str, scheme: str, fmt: str, result: Make) -> None:
    made = result(name, scheme, fmt)
    size = made.report.size
    assert size is not None
    assert (size.float_bytes, size.compiled_bytes) == (made.source.stat().st_size, made.output.stat().st_size)
    assert size.compiled_bytes < size.float_bytes
    assert size.ratio < 0.35
    props = {p.key: p.value for p in onnx.load(made.output).metadata_props}
    assert props["onnxq.version"] == onnxq.__version__
    assert json.loads(props["onnxq.recipe"]) == json.loads(json.dumps(made.report.recipe))
    assert json.loads(props["onnxq.recipe"])["scheme"]["name"] == scheme
    assert len(props["onnxq.plan"]) == 64


@each_case
def test_ports_are_those_of_the_source(name: str, scheme: str, fmt: str, result: Make) -> None:
    made = result(name, scheme, fmt)
    before, after = onnx.load(made.source).graph, onnx.load(made.output).graph
    stored = {t.name for t in before.initializer}
    assert [(v.name, v.type) for v in after.input] == [(v.name, v.type) for v in before.input if v.name not in stored]
    assert [(v.name, v.type) for v in after.output] == [(v.name, v.type) for v in before.output]


@each_case
def test_the_checker_passes_and_any_batch_runs(name: str, scheme: str, fmt: str, result: Make) -> None:
    made = result(name, scheme, fmt)
    onnx.checker.check_model(str(made.output), full_check=True)
    with np.load(MODELS / name / "eval.npz") as data:
        for rows in (1, 5):
            feed = {i.name: data[i.name][:rows] for i in onnx.load(made.output).graph.input}
            wanted = run(made.source, feed, optimize=True)["logits"]
            assert run(made.output, feed, optimize=True)["logits"].shape == wanted.shape


@pytest.mark.parametrize(("name", "fmt"), [("digits_cnn", "qdq"), ("text_encoder", "qoperator")])
def test_the_same_call_gives_the_same_bytes(name: str, fmt: str, result: Make, tmp_path: Path) -> None:
    again = compiled(name, tmp_path / "again.onnx", scheme=STATIC, format=fmt)
    assert again.output.read_bytes() == result(name, STATIC, fmt).output.read_bytes()


@each_case
def test_a_compiled_model_compiles_to_itself(name: str, scheme: str, fmt: str, result: Make, tmp_path: Path) -> None:
    """Never quantized twice: the same operators in the same number, and the same outputs."""
    once = result(name, scheme, fmt)
    report = onnxq.compile(once.output, tmp_path / "twice.onnx", scheme=scheme, format=fmt, measure=False,
                           calib=str(MODELS / name / "calib.npz"))
    assert report.ok
    assert {row.scheme for row in report.nodes} <= {"given", FLOAT, "folded"}
    assert report.accuracy is not None
    assert report.accuracy.outputs["logits"].max_abs < 1e-5
    ops = [sorted(n.op_type for n in onnx.load(path).graph.node) for path in (once.output, tmp_path / "twice.onnx")]
    assert [op for op in ops[0] if is_integer(op)] == [op for op in ops[1] if is_integer(op)]
    assert any("were quantized already and are kept" in n for n in report.verdict.notices)


# ------------------------------------------------------------------ the report


def test_report_json_has_the_fields_that_the_issue_lists(result: Make) -> None:
    data = json.loads(result("digits_cnn", STATIC, "qoperator").report.to_json())
    assert set(data["size"]) == {"float_bytes", "compiled_bytes", "ratio"}
    assert data["latency"] is None  # measure=False
    assert {"metric", "float", "compiled", "drop", "outputs"} <= set(data["accuracy"])
    assert data["accuracy"]["metric"] == "top1"
    assert set(data["accuracy"]["outputs"]["logits"]) == {"sqnr_db", "cosine", "max_abs"}
    assert data["accuracy"]["rows"] == 500
    assert data["accuracy"]["note"] == ""
    for row in data["nodes"]:
        assert {"name", "op", "scheme", "lowering", "ran_as", "provider", "reason"} <= set(row)
    assert {"failures", "notices", "ok"} <= set(data["verdict"])
    assert {"onnxq", "target", "onnxruntime", "python", "processor", "cores"} <= set(data["environment"])
    assert data["recipe"]["scheme"]["name"] == STATIC
    stages = ["load", "canonicalize", "plan", "calibrate", "scales", "rewrite", "verify", "accuracy", "save"]
    assert [s["name"] for s in data["stages"] if s["name"] in stages] == stages
    assert all(s["seconds"] >= 0 for s in data["stages"])


def test_folded_nodes_are_in_the_report(result: Make) -> None:
    rows = {r.name: r for r in result("digits_cnn", STATIC, "qoperator").report.nodes}
    folded = [r for r in rows.values() if r.scheme == "folded"]
    assert {r.op for r in folded} >= {"BatchNormalization"}
    assert {(r.op, r.reason.rpartition(" ")[2]) for r in folded} == {
        ("BatchNormalization", "(fold-batchnorm)"), ("Identity", "(remove-identity)")}


def test_stages_are_told_to_the_progress(tmp_path: Path) -> None:
    class Heard:
        def __init__(self) -> None:
            self.stages: list[str] = []
            self.steps: dict[str, list[int]] = {}
            self.totals: dict[str, int | None] = {}

        def stage(self, name: str) -> None:
            self.stages.append(name)

        def total(self, steps: int | None) -> None:
            self.totals[self.stages[-1]] = steps

        def step(self, done: int) -> None:
            self.steps.setdefault(self.stages[-1], []).append(done)

    heard = Heard()
    made = compiled("digits_cnn", tmp_path / "o.onnx", samples=20, batch=8, progress=heard)
    assert list(dict.fromkeys(heard.stages)) == [s.name for s in made.report.stages]
    assert heard.stages.count("plan") == 2, "again on the graph with channels scaled"
    assert (heard.totals["calibrate"], heard.steps["calibrate"]) == (20, [8, 16, 20])
    assert heard.totals["accuracy"] == heard.steps["accuracy"][-1] == 500


def test_without_eval_the_report_says_that_it_is_agreement(tmp_path: Path) -> None:
    report = compiled("digits_cnn", tmp_path / "o.onnx", eval=None, metric=None, samples=24).report
    assert report.accuracy is not None
    assert (report.accuracy.metric, report.accuracy.float, report.accuracy.rows) == ("cosine", 1.0, 24)
    assert 0.99 < report.accuracy.compiled < 1
    assert report.accuracy.note.startswith("agreement with float on the calibration data")


# ------------------------------------------------------------------ defaults and choices


def test_auto_without_data_is_dynamic_beside_the_model_and_says_what_it_left_out(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes((MODELS / "digits_cnn" / "model.onnx").read_bytes())
    report = onnxq.compile(model, measure=False)
    assert report.scheme == "w8a8-dynamic"
    assert (tmp_path / "model.w8a8-dynamic.onnx").exists()
    assert report.accuracy is None
    notices = " ".join(report.verdict.notices)
    assert "MatMul, Gemm only, 11 Conv compute in float; --calib DATA brings static int8" in notices
    assert "no data were given" in notices
    with pytest.raises(OutputError, match="exists; give --force"):
        onnxq.compile(model, measure=False)
    assert onnxq.compile(model, measure=False, force=True).ok


@pytest.mark.parametrize(("speeds", "scheme"), [
    ((1.5, 2.2), "w8a8-dynamic"), ((1.5, 2.3), "w8a8-dynamic-tensor"), ((0.9, 1.05), "w8a8-dynamic-tensor"),
    ((1.5, 1.2), "w8a8-dynamic")])
def test_auto_without_data_takes_the_coarser_scheme_only_where_it_is_clearly_faster(
        speeds: tuple[float, float], scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxq import verification

    def timed(reference: Path, made: Path, *args: Any, **more: Any) -> Latency:
        ops = {n.op_type for n in onnx.load(made).graph.node}
        ratio = speeds["DynamicQuantizeMatMul" in ops]
        return Latency(1.0, 1 / ratio, ratio, ratio - 0.01, ratio + 0.01, {}, 0, "random inputs")

    monkeypatch.setattr(verification, "latency", timed)
    report = onnxq.compile(MODELS / "text_encoder" / "model.onnx", tmp_path / "o.onnx")
    assert report.ok
    assert report.scheme == report.recipe["scheme"]["name"] == scheme
    props = {p.key: p.value for p in onnx.load(tmp_path / "o.onnx").metadata_props}
    assert json.loads(props["onnxq.recipe"])["scheme"]["name"] == scheme
    assert ("DynamicQuantizeMatMul" in {n.lowering for n in report.nodes}) == (scheme == "w8a8-dynamic-tensor")
    assert report.latency is not None
    assert report.latency.speedup == speeds[scheme == "w8a8-dynamic-tensor"]
    chosen = [n for n in report.verdict.notices if "was chosen" in n]
    assert len(chosen) == (scheme == "w8a8-dynamic-tensor")


def test_auto_with_data_is_static_and_for_the_cpu_lowered(tmp_path: Path) -> None:
    made = compiled("digits_cnn", tmp_path / "o.onnx", samples=16, eval=None, metric=None)
    assert made.report.scheme == STATIC
    assert "QLinearConv" in {n.op_type for n in onnx.load(made.output).graph.node}


def test_random_data_only_when_asked_for_and_said_so(tmp_path: Path) -> None:
    report = compiled("digits_cnn", tmp_path / "o.onnx", calib="random", eval=None, metric=None).report
    assert any("random data, as asked" in n for n in report.verdict.notices)


def test_keep_float_and_the_size_of_what_is_kept(tmp_path: Path, result: Make) -> None:
    rows = {r.name: r for r in result("digits_cnn", STATIC, "qoperator").report.nodes if r.op == "Conv"}
    kept = next(iter(rows))
    report = compiled("digits_cnn", tmp_path / "o.onnx", keep_float=[kept.replace("/", ".")]).report
    assert report.ok
    row = next(r for r in report.nodes if r.name == kept)
    assert row.scheme == FLOAT
    assert row.reason.startswith("kept float as asked")
    assert bare(row.ran_as) in ("Conv", "FusedConv")


def test_dumped_graphs_load_and_one_can_be_picked(tmp_path: Path) -> None:
    compiled("digits_cnn", tmp_path / "a.onnx", samples=8, eval=None, metric=None, dump=tmp_path / "all")
    files = sorted((tmp_path / "all").iterdir())
    assert len(files) > 10
    assert [f.name[:2] for f in files] == [f"{k:02d}" for k in range(1, len(files) + 1)]
    for path in files:
        load(path)
    compiled("digits_cnn", tmp_path / "b.onnx", samples=8, eval=None, metric=None, dump=tmp_path / "one",
             dump_after="quantize-activations")
    assert [f.name.partition("-")[2] for f in (tmp_path / "one").iterdir()] == ["quantize-activations.onnx"]
    with pytest.raises(UsageError, match="--dump DIR"):
        compiled("digits_cnn", tmp_path / "c.onnx", dump_after="quantize-activations")


# ------------------------------------------------------------------ budgets


METRIC = """
values = {values}
def metric(outputs, labels, inputs):
    assert outputs["logits"].shape == (16, 10) and labels.shape == (16,) and inputs["image"].shape == (16, 1, 16, 16)
    return values.pop(0)
metric.higher_is_better = {better}
"""


@pytest.fixture
def scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """Compiles digits_cnn under a metric that says `values`: of the float model, then of the compiled one."""
    with np.load(MODELS / "digits_cnn" / "eval.npz") as data:
        np.savez(tmp_path / "few.npz", **{k: data[k][:16] for k in data.files})
    monkeypatch.chdir(tmp_path)
    count = iter(range(100))

    def call(values: list[float], max_drop: str | None, better: bool = True) -> Report:
        module = f"metric_{tmp_path.name}_{next(count)}"
        Path(f"{module}.py").write_text(METRIC.format(values=values, better=better))
        output = tmp_path / f"{module}.onnx"
        report = compiled("digits_cnn", output, samples=8, eval="few.npz", metric=f"{module}:metric",
                          max_drop=max_drop).report
        assert output.exists(), "written whatever the verdict"
        return report

    return call


@pytest.mark.parametrize(("max_drop", "ok"), [
    ("0.5%", True), ("0.3%", False),  # of 0.8: 0.004 and 0.0024
    ("0.5pt", True), ("0.2pt", False),  # 0.005 and 0.002
    ("0.005", True), ("0.002", False)])
def test_the_forms_of_a_budget(max_drop: str, ok: bool, scored: Callable[..., Report]) -> None:
    report = scored([0.8, 0.797], max_drop)
    assert report.accuracy is not None
    assert report.accuracy.drop == pytest.approx(0.003)
    assert report.ok is ok
    if not ok:
        assert "went from 0.8 to 0.797 on few.npz, a drop of 0.003, above the" in report.verdict.failures[0]
        assert json.loads(report.to_json())["verdict"]["ok"] is False


def test_lower_may_be_better_and_a_gain_is_no_drop(scored: Callable[..., Report]) -> None:
    assert not scored([10.0, 10.2], "1%", better=False).ok
    assert scored([10.0, 10.05], "1%", better=False).ok
    assert scored([10.0, 9.0], "0%", better=False).ok
    assert scored([0.8, 0.9], "0", better=True).ok


def test_a_budget_on_agreement(tmp_path: Path) -> None:
    report = compiled("digits_cnn", tmp_path / "o.onnx", eval=None, metric=None, samples=16, max_drop="0").report
    assert not report.ok
    assert report.verdict.failures[0].startswith("cosine went from 1 to 0.99")


# ------------------------------------------------------------------ never slower


def test_a_model_that_int8_slows_down_is_left_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxq import verification

    seen: list[set[str]] = []

    def slow(reference: Path, made: Path, feeds: Any, options: Any, data: str, **more: Any) -> Latency:
        seen.append({n.op_type for n in onnx.load(made).graph.node})
        return Latency(1.0, 2.0, 0.5, 0.4, 0.6, {"image": [8, 1, 16, 16]}, 0, data) if len(seen) == 1 else \
            Latency(1.0, 1.0, 1.0, 0.9, 1.1, {"image": [8, 1, 16, 16]}, 0, data)

    monkeypatch.setattr(verification, "latency", slow)
    made = compiled("digits_cnn", tmp_path / "o.onnx", measure=True)
    report = made.report
    assert report.ok
    assert "nothing pays, left float: int8 ran at 0.50x float here" in report.verdict.notices[0]
    assert "QLinearConv" in seen[0]
    assert not seen[1] & {"QLinearConv", "QuantizeLinear"}  # what is shipped is what was timed last
    assert not {n.op_type for n in onnx.load(made.output).graph.node} & {"QLinearConv", "QuantizeLinear"}
    assert {r.scheme for r in report.nodes} == {FLOAT, STORED, "folded"}
    assert any("int8 does not pay here: 2 against 1 ms in float" in r.reason for r in report.nodes)
    assert report.size is not None
    assert report.size.ratio < 0.4  # its weights are int8 all the same
    assert report.accuracy is not None
    assert report.accuracy.outputs["logits"].cosine > 0.999
    assert report.latency is not None
    assert report.latency.speedup == 1.0


def test_timing_is_of_the_shapes_and_threads_that_the_report_names(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxq import verification

    real = verification.measure.compare_models
    monkeypatch.setattr(verification.measure, "compare_models",
                        lambda a, b, feeds, **more: real(a, b, feeds, **{**more, "block_seconds": 0.01, "rounds": 3}))
    latency = compiled("text_encoder", tmp_path / "o.onnx", measure=True, samples=8, batch=4, threads=1).report.latency
    assert latency is not None
    assert latency.low <= latency.speedup <= latency.high
    assert min(latency.float_ms, latency.compiled_ms) > 0
    assert (latency.shapes["input_ids"][0], latency.threads, latency.data) == (4, 1, "eval.npz")
