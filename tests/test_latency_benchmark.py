"""The latency table: what models are fed, who is timed and how often, the guard, texts from made-up results."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

sys.path.append(str(Path(__file__).parents[1]))  # the package stands beside the tests and is not installed

from benchmarks import goals, guard, kept, latency, latency_layout, latency_runs, loads, models, runs, worker
from benchmarks.worker import DYNAMIC, LINEARS, ONNXQ, OPENVINO, OPENVINO_HALF, OPENVINO_INT8, STATIC, UNSIGNED

SETTINGS = runs.Settings.make(1, quick=True)
WHERE = {"processor": "P", "cores": 2, "cpu_flags": ["avx2"], "onnxq": "1", "onnxruntime": "2", "onnx": "3",
         "python": "4"}
ALL_TOOLS = [*latency_runs.QUANTIZERS, ONNXQ, *worker.OPENVINOS]


def digits() -> models.Case:
    return next(case for case in models.own() if case.name == "digits_cnn")


def speed(ratio: float, spread: float = 0.1) -> dict[str, Any]:
    return {"float_ms": 3.0, "ms": 3.0 / ratio, "ratio": ratio, "low": ratio * (1 - spread / 2),
            "high": ratio * (1 + spread / 2), "shapes": {"x": [8, 64]}}


def row(tool: str, value: float = 0.8, speeds: dict[str, float] | None = None, model: str = "m", **made: Any,
        ) -> runs.Row:
    score = {"float": 0.8, "value": value, "drop": 0.8 - value, "ratio": value / 0.8, "rows": 9, "cosine": 0.99,
             "sqnr_db": 30.0}
    return runs.Row(model, tool, "top1", 4, 1, made, score,
                    speeds={load: speed(ratio) for load, ratio in (speeds or {}).items()})


# ------------------------------------------------------------------ what is fed


def test_joined_rows_stand_behind_one_another_with_their_padding() -> None:
    data = {"ids": np.array([[1, 0], [2, 3], [4, 0], [5, 6], [7, 8]]),
            "mask": np.array([[1, 0], [1, 1], [1, 0], [1, 1], [1, 1]])}
    case = models.Case("c", Path(), Path(), Path(), "spearman", ("y",), {"ids": "batch", "mask": "batch"})
    feed = loads.Load(2, joined=2).feed(case, data)
    assert feed["ids"].tolist() == [[1, 0, 2, 3], [4, 0, 5, 6]]
    assert feed["mask"].tolist() == [[1, 0, 1, 1], [1, 0, 1, 1]]
    assert loads.name(feed) == "2 x 4"
    assert loads.Load(3).feed(case, data)["ids"].tolist() == data["ids"][:3].tolist()
    fixed = dataclasses.replace(case, max_batch=1)
    assert loads.name(loads.Load(3).feed(fixed, data)) == "1 x 2"
    assert len(loads.of(dataclasses.replace(case, name="minilm"))) == 3
    assert loads.of(case) == (loads.Load(),)


class Counted:
    """A model that tells how often it ran."""

    def __init__(self, broken: bool = False) -> None:
        self.runs, self.broken = 0, broken

    def run(self, feed: Any, outputs: Any = None) -> dict[str, Any]:
        self.runs += 1
        if self.broken:
            raise OSError("full")
        return {name: feed["x"] + place for place, name in enumerate(outputs)}


def test_float_answers_are_computed_once(tmp_path: Path) -> None:
    model, path = Counted(), tmp_path / "answers"
    feeds = [{"x": np.arange(3) * k} for k in range(4)]
    answers = []
    with pytest.raises(OSError, match="full"), kept.Kept(path, lambda: Counted(broken=True)) as broken:
        broken.run(feeds[0], ["a"])
    for _ in range(2):
        with kept.Kept(path, lambda: model) as reference:
            answers.append([reference.run(feed, ["a", "b"]) for feed in feeds])
    assert model.runs == 4
    np.testing.assert_equal(answers[0], answers[1])


def test_steps_score_and_clock_what_a_tool_made(tmp_path: Path) -> None:
    case, path = digits().to_dict(), str(tmp_path / "q.onnx")
    runs.call("make", tmp_path, SETTINGS, case=case, tool=LINEARS, output=path, threads=1, samples=8)
    given = {"case": case, "tool": LINEARS, "model": path, "threads": 1}
    found = [runs.call("score", tmp_path, SETTINGS, **given, kept=str(tmp_path / "kept"), limit=40) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0]["score"]["rows"] == 40
    timed = runs.call("clock", tmp_path, SETTINGS, **given, wanted=None, rounds=1, block_seconds=0.001)
    assert list(timed["speeds"]) == ["8 x 1 x 16 x 16"]
    assert timed["speeds"]["8 x 1 x 16 x 16"]["ratio"] > 0
    assert runs.call("clock", tmp_path, SETTINGS, **given, wanted=["other"], rounds=1, block_seconds=0.001) == {
        "speeds": {}}


def test_steps_are_started_by_a_launcher_with_more_variables(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, launcher=("sh", "-c", 'echo "$CACHE $0" >&2; exit 3'))
    assert runs.call("score", tmp_path, settings, environment={"CACHE": "here"}, python="other/python") == {
        "error": "here other/python"}


# ------------------------------------------------------------------ a run


class Steps:
    """Answers of benchmarks.worker: how accurate and fast each tool is; all calls in order."""

    def __init__(self) -> None:
        self.drops = {STATIC: 0.3, UNSIGNED: 0.001}
        self.ratios = {UNSIGNED: 1.1, LINEARS: 1.2, DYNAMIC: 0.5, ONNXQ: 2.0}
        self.done: list[tuple[str, str, Any]] = []

    def __call__(self, step: str, folder: Path, settings: runs.Settings, **given: Any) -> dict[str, Any]:
        tool = given["tool"]
        self.done.append((step, tool, given.get("rounds")))
        if step == "make":
            Path(given["output"]).write_bytes(digits().model.read_bytes())
            cold = not given["output"].endswith("warm.onnx")
            return {"seconds": 1.0, "stages": {"measure": 2.0, goals.KERNEL_STAGE: 7.0 if cold else 0.5}}
        if tool == OPENVINO_HALF:
            return {"error": "ValueError: this processor has no bf16"}
        if step == "score":
            drop = self.drops.get(tool, 0.0)
            return {"score": {"float": 1.0, "value": 1.0 - drop, "drop": drop, "ratio": 1 - drop, "rows": 4,
                              "cosine": 1.0, "sqnr_db": 20.0}}
        return {"speeds": {"8 x 1": speed(self.ratios.get(tool, 1.0))}}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    made = Steps()
    monkeypatch.setattr(latency_runs, "call", made)
    return made


def test_only_the_fastest_setting_that_keeps_its_accuracy_is_timed_in_full(steps: Steps) -> None:
    wanted = goals.of_latency([*goals.read(), goals.Goal("digits_cnn", goals.WARM, "w", most=5)], ["digits_cnn"])
    rows = latency_runs.CaseRuns(digits(), wanted, SETTINGS, "python", False, lambda text: None).run()
    assert [r.tool for r in rows] == ALL_TOOLS
    timed = [(tool, rounds) for step, tool, rounds in steps.done if step == "clock"]
    trials = [(tool, 1) for tool in (UNSIGNED, LINEARS, DYNAMIC)]  # static lost its accuracy
    assert timed == [*trials, *((tool, SETTINGS.rounds) for tool in (LINEARS, ONNXQ, OPENVINO, OPENVINO_INT8))]
    made = [tool for step, tool, _ in steps.done if step == "make"]
    assert made == [*latency_runs.QUANTIZERS, ONNXQ, ONNXQ, OPENVINO_INT8]
    met = {o.goal.figure: (o.found, o.met) for o in goals.check(wanted, rows, [])}
    assert met == {"drop": (0.0, True), goals.LATENCY: (2.0, True), goals.WARM: (0.5, True)}


def test_a_run_from_the_models_to_the_files_and_on_from_there(steps: Steps, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "markdown", "yaml")}
    options = ["--models", str(tmp_path), "--threads", "1", "--json", str(files["json"])]
    assert latency.main([*options, "--only", "digits_cnn", "--markdown", str(files["markdown"]), "--record",
                         str(files["yaml"])]) == 0
    text = files["markdown"].read_text()
    assert text in capsys.readouterr().out
    assert "| digits_cnn, 8 x 1: top-1 100.00 % | 3 ms | linears: 100.00 %, 1.20x | 100.00 %, 2.00x |" in text
    assert "| digits_cnn | 9.0 s | 7.0 s | 2.0 s |  |  |" in text
    assert json.loads(files["json"].read_text())["rows"][4]["tool"] == ONNXQ
    before = len(steps.done)
    alone = [*options, "--resume", "--only", "digits_cnn", "--guard", str(files["yaml"])]
    assert latency.main(alone) == 0
    assert len(steps.done) == before
    steps.ratios = {ONNXQ: 1.7}
    assert latency.main([*alone[:-1], str(files["yaml"]), "--onnxq-only", "--quick"]) == 0  # a smoke run never fails
    assert {tool for _, tool, _ in steps.done[before:]} == {ONNXQ}
    files["json"].unlink()
    assert latency.main(alone) == 1
    assert "| digits_cnn, 8 x 1 | 2.00x | 1.70x | 10 % | WORSE |" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--resume"], ["--record", "none/there.yaml"], ["--guard", "none.yaml"],
                                   ["--only", "nope"], ["--peers-python", "no-such-python"],
                                   ["--peers-python", sys.executable]])
def test_wrong_usage(wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        latency.main(["--models", str(tmp_path), *wrong])
    if wrong[0] == "--peers-python":
        assert "pip install . -r benchmarks/peers/requirements.txt" in capsys.readouterr().err


def test_the_fastest_is_chosen_for_each_load() -> None:
    slow, fast = speed(1.0), speed(2.0)
    assert latency_runs.fastest({"a": {"x": slow, "y": fast}, "b": {"x": fast, "y": slow}, "c": {"x": slow}}) == {
        "b": ["x"], "a": ["y"]}
    assert latency_runs.fastest({}) == {}


# ------------------------------------------------------------------ goals and guard


def test_latency_goals_are_of_a_load_or_of_the_slowest() -> None:
    found = row(ONNXQ, speeds={"8 x 64": 3.0, "1 x 64": 2.0}, model="a")
    every = goals.Goal(goals.EVERY, goals.LATENCY, "floor", least=0.97)
    wanted = [goals.Goal("a", goals.LATENCY, "at", least=3.0, at="8 x 64"),
              goals.Goal("a", goals.LATENCY, "slowest", least=2.5), goals.Goal("a", goals.LATENCY, "no", at="9"), every,
              goals.Goal("a", goals.COLD, "cold", most=60), goals.Goal("a", "size", "of the table", most=1),
              goals.Goal("a", "drop", "per token", tool="onnxq per token", most=0),
              goals.Goal("c", "drop", "not run", most=0)]
    kept_goals = goals.of_latency(wanted, ["a", "b"])
    outcomes = goals.check(kept_goals, [found, row(ONNXQ, speeds={"8": 1.0}, model="b")], [])
    assert [(o.goal.goal, o.goal.model, o.met) for o in outcomes] == [
        ("at", "a", True), ("slowest", "a", False), ("no", "a", None), ("cold", "a", None), ("floor", "b", True)]
    assert [g.goal for g in goals.of_table(wanted)] == ["of the table", "per token", "not run"]


def test_accuracy_holds_within_what_is_asked_of_onnxq() -> None:
    wanted = [goals.Goal("m", "drop", "d", most=0.01), goals.Goal("m", "drop", "p", most=-1, tool="onnxq per token"),
              goals.Goal("m", goals.LATENCY, "l", least=9.0)]
    assert goals.holds(wanted, row(DYNAMIC, 0.795))
    assert not goals.holds(wanted, row(DYNAMIC, 0.785))
    assert goals.holds([], row(DYNAMIC, 0.0))


def test_the_guard_tells_losses_from_noise(tmp_path: Path) -> None:
    path = tmp_path / "record.yaml"
    rows = [row(ONNXQ, speeds={"8": 2.0, "1": 1.0}), row(LINEARS, speeds={"8": 5.0}),
            row(ONNXQ, speeds={"8": 1.5}, model="other")]
    guard.record(path, rows, WHERE, 2)
    guard.record(path, [row(ONNXQ, speeds={"8": 1.6}, model="other")], WHERE, 2)
    record = yaml.safe_load(path.read_text())
    assert record["speedups"] == {"m": {"8": {"ratio": 2.0, "spread": 0.1}, "1": {"ratio": 1.0, "spread": 0.1}},
                                  "other": {"8": {"ratio": 1.6, "spread": 0.1}}}
    now = row(ONNXQ, speeds={"8": 1.81, "1": 0.89, "2": 0.93})
    noisy = row(ONNXQ, speeds={"8": 1.3}, model="other")
    noisy.speeds["8"] = speed(1.3, spread=0.4)  # the root of 0.2 and 0.05 squared is more than a tenth
    failed = dataclasses.replace(row(ONNXQ, model="new"), error="killed by SIGSEGV")
    same, found = guard.compare(path, [now, noisy, failed, rows[1]], WHERE, 2, 0.97)
    assert same
    assert [f.worse for f in found] == [False, True, False, False, True]  # 0.93 is within 5 % of noise below 0.97
    assert found[3].tolerance == pytest.approx(np.hypot(0.2, 0.05))
    text = guard.markdown(same, found).splitlines()
    assert text[3:] == ["| m, 1 | 1.00x | 0.89x | 10 % | WORSE |",
                        "| m, 2 | 0.97x | 0.93x | 5 % | holds (asked of every model) |",
                        "| other, 8 | 1.60x | 1.30x | 21 % | holds |", "| new | 0.97x |  | 0 % | killed by SIGSEGV |"]


@pytest.mark.parametrize("other", [{"cpu_flags": ["avx2", "avx512_vnni"]}, {"processor": "Q"}, {"cores": 3}])
def test_another_machine_is_held_against_the_floor_alone(other: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "record.yaml"
    guard.record(path, [row(ONNXQ, speeds={"8": 4.0}), row(ONNXQ, speeds={"8": 4.0}, model="other")], WHERE, 2)
    there = {**WHERE, **other}
    rows = [row(ONNXQ, speeds={"8": 1.2}), row(ONNXQ, speeds={"8": 0.8}, model="other")]
    same, found = guard.compare(path, rows, there, 2, guard.floor(goals.read()))
    assert not same
    assert [(f.worse, f.recorded) for f in found] == [(False, 0.97), (True, 0.97)]
    assert guard.markdown(same, found).startswith("The record is of another machine or number of threads: only")
    guard.record(path, rows[:1], there, 2)  # nothing is taken over from another machine
    assert list(yaml.safe_load(path.read_text())["speedups"]) == ["m"]


def test_the_committed_record_is_readable() -> None:
    rows = [row(ONNXQ, speeds={"8 x 64": 4.0}, model="minilm")]
    assert guard.compare(guard.RECORD, rows, WHERE, 2, 0.97)[0] is False


# ------------------------------------------------------------------ texts


def canned() -> list[runs.Row]:
    lost = [row(tool, 0.5) for tool in (STATIC, UNSIGNED)]
    both = {"8 x 64": 2.0, "1 x 64": 1.5}
    failed = runs.Row("m", OPENVINO_HALF, "top1", 4, failed="run", error="ValueError: this processor has no bf16")
    alone = dataclasses.replace(row(ONNXQ, speeds={"8": 1.0}, model="n", left_float=True, stages={"measure": 1.0}))
    unquantized = row(LINEARS, speeds={"8": 1.0}, model="n")
    unquantized.score["sqnr_db"] = None
    broken = [dataclasses.replace(row(tool, model="o"), error="e") for tool in (*latency_runs.QUANTIZERS, ONNXQ)]
    return [*lost, row(LINEARS, 0.79, {"1 x 64": 1.2}), row(DYNAMIC, 0.8, {"8 x 64": 1.3}),
            row(ONNXQ, 0.8, both, stages={"measure": 6.0, goals.KERNEL_STAGE: 50.0},
                warm_stages={"measure": 6.0, goals.KERNEL_STAGE: 2.0}), row(OPENVINO, 0.8, both), failed,
            *(row(tool, 0.1, model="n") for tool in (STATIC, UNSIGNED, DYNAMIC)), unquantized, alone, *broken]


def test_the_summary_has_a_line_per_load() -> None:
    assert latency_layout.summary(canned()[:7]).splitlines() == [
        "| model, input: metric of float | float | onnxruntime.quantization's best | onnxq | OpenVINO float "
        "| OpenVINO bf16 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| m, 1 x 64: top-1 80.00 % | 3 ms | linears: 79.00 %, 1.20x | 80.00 %, 1.50x | 80.00 %, 1.50x "
        "| fails: this processor has no bf16 |",
        "| m, 8 x 64 | 3 ms | dynamic: 80.00 %, 1.30x | 2.00x | 2.00x | fails |"]
    rest = latency_layout.summary(canned()[7:]).splitlines()[2:]
    assert rest == [
        "| n, 8: top-1 80.00 % | 3 ms | linears: 80.00 %, 1.00x (unchanged) | 80.00 %, 1.00x (left float) |",
        "| o: top-1 80.00 % |  | fails | fails: e |"]
    lost = [*canned()[:2], row(ONNXQ, 0.8, {"8": 2.0})]
    assert "| m, 8: top-1 80.00 % | 3 ms | accuracy lost | 80.00 %, 2.00x |" in latency_layout.summary(lost)


def test_costs_and_conditions() -> None:
    lines = latency_layout.cost(canned()).splitlines()
    assert lines[2:] == ["| m | 56.0 s | 50.0 s | 6.0 s | 8.0 s | 2.0 s |", "| n | 1.0 s |  | 1.0 s |  |  |"]
    peers = {"onnxruntime": "2", "openvino": "5", "nncf": "6"}
    text = latency_layout.markdown(canned(), [], SETTINGS, WHERE, peers)
    assert "figures mean nothing" in text
    assert "OpenVINO 5" in text
    assert "P, 2 cores (avx2); onnxq 1" in text
    assert "OpenVINO" not in latency_layout.conditions(runs.Settings.make(2, quick=False), WHERE, {})


# ------------------------------------------------------------------ OpenVINO, where it is installed


def test_openvino_runs_and_quantizes_the_digits(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    from benchmarks import peers_openvino

    case, output = digits(), tmp_path / "q.xml"
    peers_openvino.quantize(case, output, 8)
    feed = loads.Load().feed(case, models.read(case.evaluation))
    answers = {}
    for name, path in (("float", case.model), ("int8", output)):
        model = peers_openvino.Compiled(path, 1, peers_openvino.FLOAT)
        model.runner(feed)()
        answers[name] = model.run(feed, case.scored)[case.scored[0]]
    assert 0 < np.abs(answers["int8"] - answers["float"]).max() < 0.2 * np.abs(answers["float"]).max()
