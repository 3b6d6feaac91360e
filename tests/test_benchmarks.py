"""The benchmark package: figures against independent sums, the peers on a small model, texts from made-up results."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import make_model, node

sys.path.append(str(Path(__file__).parents[1]))  # the package stands beside the tests and is not installed

from benchmarks import (
    cost,
    detections,
    goals,
    layout,
    light,
    memory,
    models,
    peers_ort,
    runs,
    scoring,
    table,
    worker,
)
from onnxq.runtime.session import Session, SessionOptions

ONE_THREAD = SessionOptions(threads=1)
SETTINGS = runs.Settings.make(1, quick=True)


def digits() -> models.Case:
    return next(case for case in models.own() if case.name == "digits_cnn")


# ------------------------------------------------------------------ models


def test_own_models_come_from_the_manifest_and_survive_json() -> None:
    cases = models.own()
    assert [case.name for case in cases] == ["digits_cnn", "text_encoder", "recurrent", "decoder"]
    for case in cases:
        assert case.model.is_file()
        assert models.read(case.evaluation).keys() == {*case.stored, models.LABELS}
        assert models.Case.from_dict(json.loads(json.dumps(case.to_dict()))) == case


def recurrent_folder(folder: Path) -> Path:
    """s' = 0.5 s + x, p = s', over two sequences of 3 and 2 rows; the stored states of later rows are nonsense."""
    model = make_model([node("Mul", "s half", "h"), node("Add", "h x", "t"), node("Identity", "t", "p")],
                       {"x": [1, 1], "s": [1, 1]}, {"p": [1, 1], "t": [1, 1]}, {"half": np.array([0.5], np.float32)})
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    x = np.array([[1], [0], [0], [0.2], [0.9]], np.float32)
    s = np.array([[[0]], [[99]], [[99]], [[1]], [[99]]], np.float32)
    np.savez(folder / "eval.npz", x=x, s=s, labels=np.array([1, 0, -1, 1, 0]))
    np.savez(folder / "calib.npz", x=x, s=s)
    meta = {"name": "loop", "metric": "frame_accuracy", "metric_definition": "2 border pixels left out",
            "higher_is_better": True, "scored_outputs": ["p"], "max_batch": 1, "recurrent": {"s": "t"},
            "sequences": [[0, 3], [3, 5]], "inputs": {"x": {"stored": "batch"}, "s": {"stored": "leading"}}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_complete_folders_are_cases_and_unknown_names_are_refused(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.from_folder(recurrent_folder(tmp_path / "loop"))
    (tmp_path / "unfinished").mkdir()
    assert models.folder_cases(tmp_path) == [case]
    monkeypatch.chdir(tmp_path)
    assert models.folder_cases(Path()) == [case]  # absolute, as the steps run elsewhere
    assert (case.border, case.sequences, case.batch(8)) == (2, ((0, 3), (3, 5)), 1)
    assert models.Case.from_dict(json.loads(json.dumps(case.to_dict()))) == case
    with pytest.raises(ValueError, match=r"no model nope; there are digits_cnn, .*, decoder, loop, .*light_vgg19"):
        models.find(tmp_path, ["loop", "nope"], tmp_path)
    assert [c.name for c in models.find(tmp_path, ["loop"], tmp_path)] == ["loop"]
    for wrong in (["--only", "nope"], ["--models", str(tmp_path / "none")], ["--json", str(tmp_path / "none" / "f")]):
        with pytest.raises(SystemExit, match="2"):
            table.main(["--models", str(tmp_path), *wrong])


@pytest.mark.parametrize(("name", "layers"), [
    ("light_densenet121", {"Conv": 121, "BatchNormalization": 121, "Concat": 58}),
    ("light_inception_v1", {"Conv": 57, "LRN": 2, "Gemm": 1}),  # its Gemm's weights are reshaped
    ("light_inception_v2", {"Conv": 69, "BatchNormalization": 69, "AveragePool": 8}),
    ("light_resnet50", {"Conv": 53, "BatchNormalization": 53, "Sum": 16}),
    ("light_shufflenet", {"Conv": 49, "BatchNormalization": 49, "Transpose": 16}),
    ("light_squeezenet", {"Conv": 26, "Concat": 8}),  # no normalization
])
def test_light_networks_run_and_stay_within_bounds(name: str, layers: dict[str, int], tmp_path: Path) -> None:
    light.write(name, tmp_path, calib_rows=1, eval_rows=4)
    case = models.from_folder(tmp_path)
    model = onnx.load(case.model)
    onnx.checker.check_model(model, full_check=True)
    assert [i.name for i in model.graph.input] == list(case.stored)
    ops = Counter(n.op_type for n in model.graph.node)
    assert {op: ops[op] for op in layers} == layers
    assert ops["ConstantOfShape"] == 0
    last = max(k for k, n in enumerate(model.graph.node) if n.op_type in ("Conv", "Gemm"))
    inner = [n.output[0] for n in list(model.graph.node)[:last] if n.op_type in ("Relu", "Sum")]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in inner)
    evaluation = models.read(case.evaluation)
    session = Session(model.SerializeToString(), ONE_THREAD)
    runs = [session.run(case.feed(evaluation, row, row + 1)) for row in range(4)]
    for tensor in inner:
        found = np.stack([r[tensor] for r in runs])
        assert 0.2 < found.std() < 10, tensor
        assert found.std(axis=0).mean() > 0.3 * found.std(), tensor  # images differ all the way
    scores = np.stack([r[case.scored[0]].ravel() for r in runs])
    assert np.isfinite(scores).all()
    assert len(set(scores.argmax(axis=1))) > 1
    if "Softmax" in ops:
        assert scores.sum(axis=1) == pytest.approx(np.ones(4), abs=1e-5)
        assert 0.0015 < scores.max() < 0.95  # a thousandth each would be no choice


def test_light_images_and_names() -> None:
    assert np.array_equal(light.images(1, 5), light.images(1, 5))
    first, second = light.images(2, 5)
    assert not np.array_equal(first, second)
    assert {light.IN_TABLE, "light_bvlc_alexnet", "light_vgg19", "light_zfnet512"} <= set(light.NAMES)


def test_the_table_has_one_light_network_and_others_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(name: str, folder: Path) -> None:
        recurrent_folder(folder.parent / f"{name}.loop").rename(folder / "f")
        for path in (folder / "f").iterdir():
            path.rename(folder / path.name)
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, "name": name}))

    monkeypatch.setattr(light, "write", write)
    for number, (only, names) in enumerate([([], [light.IN_TABLE]), (["light_vgg19"], ["light_vgg19"])]):
        (tmp_path / str(number)).mkdir()
        found = [c.name for c in models.find(None, only, tmp_path / str(number))]
        assert [n for n in found if n.startswith("light_")] == names


# ------------------------------------------------------------------ scoring


def test_recurrent_models_are_scored_in_closed_loop(tmp_path: Path) -> None:
    case = models.from_folder(recurrent_folder(tmp_path / "loop"))
    session = Session(case.model, ONE_THREAD)
    # p by hand: 1, 0.5, 0.25 | 0.5 + 0.2, 0.35 + 0.9; above 0.5: yes, no, (no label), yes, yes against 1, 0, -, 1, 0
    assert scoring.score(case, scoring.Data(case), session)["value"] == pytest.approx(3 / 4)
    cut = scoring.score(case, scoring.Data(case, limit=4), session, session)
    assert (cut["value"], cut["rows"], cut["sqnr_db"], cut["cosine"]) == (1.0, 4, None, pytest.approx(1.0))


def test_a_model_against_a_worse_one(tmp_path: Path) -> None:
    """Scores x and -x on rows that the float model has right: everything is lost, outputs are opposite."""
    paths = {}
    for name, op in (("good", "Identity"), ("bad", "Neg")):
        onnx.save(make_model([node(op, "x", "y")], {"x": ["n", 3]}, {"y": ["n", 3]}), tmp_path / f"{name}.onnx")
        paths[name] = tmp_path / f"{name}.onnx"
    x = np.eye(3, dtype=np.float32)[[0, 1, 2, 1]] + 0.1
    np.savez(tmp_path / "eval.npz", x=x, labels=np.array([0, 1, 2, 1]))
    case = models.Case("c", paths["good"], tmp_path, tmp_path / "eval.npz", "top1", ("y",), {"x": "batch"})
    found = scoring.score(case, scoring.Data(case), *(Session(p, ONE_THREAD) for p in paths.values()))
    assert (found["float"], found["value"], found["drop"], found["cosine"]) == (1.0, 0.0, 1.0, pytest.approx(-1.0))
    assert found["sqnr_db"] == pytest.approx(-20 * math.log10(2))
    same = dataclasses.replace(case, metric="agreement", agreement="top1")
    assert scoring.score(same, scoring.Data(same), *(Session(p, ONE_THREAD) for p in paths.values()))["drop"] == 1.0


def test_psnr_leaves_the_border_out() -> None:
    truth = np.full((2, 1, 8, 8), 51, np.uint8)
    image = np.full((2, 1, 8, 8), 0.3, np.float32)
    image[..., [0, -1], :] = image[..., [0, -1]] = 1.0
    metric = scoring.CroppedPsnr("y", 1)
    metric.update({"y": image}, truth, {})
    assert metric.result() == pytest.approx(20.0, abs=1e-4)  # an error of 0.1 everywhere


def test_pooled_cosine_counts_masked_positions_out() -> None:
    a = np.array([[[1, 0], [3, 0], [9, 9]]], np.float32)
    b = np.array([[[0, 2], [2, 0], [-7, 5]]], np.float32)
    pooled = scoring.PooledCosine("y")
    pooled.update({"y": a}, {"y": b}, np.array([[1, 1, 0]]))
    assert pooled.values == [pytest.approx(math.sqrt(0.5))]


def test_first_rows_of_pairs_are_cut_from_both_halves(tmp_path: Path) -> None:
    np.savez(tmp_path / "eval.npz", x=np.arange(8), labels=np.arange(4))
    case = models.Case("c", tmp_path, tmp_path, tmp_path / "eval.npz", "spearman", ("y",), {"x": "batch"})
    data = scoring.Data(case, limit=4)
    (step,) = data.steps()
    assert step.feed["x"].tolist() == [0, 1, 4, 5]
    assert step.labels is not None
    assert step.labels.tolist() == [0, 1]


def test_faces_are_matched_by_overlap() -> None:
    box = np.array([[0, 0, 2, 2], [1, 0, 3, 2], [5, 5, 6, 6]], np.float64)
    assert detections.overlap(box, box)[0].tolist() == pytest.approx([1, 1 / 3, 0])
    scores = np.array([[0, 0.8], [0, 0.9], [0, 0.69]])
    assert detections.faces(scores, box).tolist() == [[1, 0, 3, 2]]  # the first overlaps a better one, the last is weak
    moved = box[[2, 0]] + 0.1
    assert detections.matches(box, moved) == 2
    assert detections.matches(box, np.zeros((0, 4))) == 0
    assert detections.matches(box[:1], np.repeat(box[:1], 3, axis=0)) == 1
    f1 = detections.FaceF1()
    f1.update({"scores": scores[None], "boxes": box[None]}, {"scores": scores[None, [1, 2, 2]], "boxes": box[None]})
    assert f1.result() == 0.0  # one face each, with an overlap of a third


# ------------------------------------------------------------------ peers and processes


def ops(path: Path) -> Counter[str]:
    return Counter(n.op_type for n in onnx.load(path).graph.node)


@pytest.mark.parametrize("tool", [peers_ort.static_default, peers_ort.static_unsigned, peers_ort.static_linears,
                                  peers_ort.dynamic])
def test_peers_quantize_the_digits(tool: object, tmp_path: Path) -> None:
    case = digits()
    path = tmp_path / "q.onnx"
    assert callable(tool)
    tool(case, path, 32)
    found, plain = ops(path), ops(case.model)
    if tool is peers_ort.dynamic:
        assert found["ConvInteger"] == plain["Conv"]
    else:
        assert found["Conv"] == plain["Conv"]
        assert (found["DequantizeLinear"] > found["Conv"]) == (tool is not peers_ort.static_linears)
    stored = [t for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert len(stored) >= (plain["Gemm"] if tool is peers_ort.static_linears else plain["Conv"] + plain["Gemm"])
    scored = scoring.score(case, scoring.Data(case, 100), Session(case.model, ONE_THREAD), Session(path, ONE_THREAD))
    assert scored["float"] >= 0.98
    assert scored["drop"] < 0.05
    assert 10 < scored["sqnr_db"] < 80


def test_calibration_feeds_are_batches_of_the_first_rows(tmp_path: Path) -> None:
    reader = peers_ort.Rows(digits(), 20)
    feeds = list(iter(reader.get_next, None))
    calib = models.read(digits().calib)["image"]
    assert [len(f["image"]) for f in feeds] == [8, 8, 4]
    assert np.array_equal(np.concatenate([f["image"] for f in feeds]), calib[:20])
    loop = models.from_folder(recurrent_folder(tmp_path / "loop"))
    assert [f["s"].shape for f in iter(peers_ort.Rows(loop, 2).get_next, None)] == [(1, 1), (1, 1)]


def test_rows_repeat_for_the_memory_run() -> None:
    case = digits()
    stored = models.read(case.calib)["image"]
    feeds = [feed["image"] for feed in memory.repeated(case, 2 * len(stored))()]
    assert np.array_equal(np.concatenate(feeds), np.concatenate([stored, stored]))


def test_steps_run_in_processes_of_their_own(tmp_path: Path) -> None:
    case, path = digits().to_dict(), str(tmp_path / "q.onnx")
    made = runs.call("make", tmp_path, SETTINGS, case=case, tool=worker.DYNAMIC, output=path, threads=1, samples=8)
    assert made["seconds"] > 0
    assert 2e7 < made["peak_bytes"] < 2e9
    found = runs.call("judge", tmp_path, SETTINGS, case=case, model=path, threads=1, limit=50, rounds=1,
                      block_seconds=0.001)
    assert found["score"]["rows"] == 50
    assert found["speed"]["low"] <= found["speed"]["ratio"] <= found["speed"]["high"]
    assert found["speed"]["shapes"] == {"image": [8, 1, 16, 16]}


def test_a_step_that_fails_leaves_its_reason(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    found = runs.call("judge", tmp_path, SETTINGS, case=digits().to_dict(), model=str(tmp_path / "broken.onnx"),
                      threads=1, limit=8, rounds=1, block_seconds=0.001)
    assert found["error"].startswith("ModelError: onnxruntime can't load")
    assert runs.call("make", tmp_path, dataclasses.replace(SETTINGS, step_timeout_seconds=0.01), case={}) == {
        "error": "took more than 0 s"}


def test_one_run_from_the_models_to_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    """Steps answer at once: the dynamic quantizer dies, int8 does not pay, a figure is not finite."""
    done: list[tuple[str, str]] = []

    def answer(step: str, folder: Path, settings: runs.Settings, **given: object) -> dict[str, object]:
        done.append((step, str(given.get("tool", given.get("model") and "compiled"))))
        if step == "make":
            (folder / "compiled.onnx").write_bytes(digits().model.read_bytes())
            slower = given["tool"] == worker.ONNXQ
            dies = given["tool"] == worker.DYNAMIC
            return {"error": "killed by SIGSEGV"} if dies else {"int8_slower": slower, "left_float": slower}
        score = {"float": 1.0, "value": 1.0, "drop": 0.0, "ratio": 1.0, "rows": 4, "cosine": 0.0, "sqnr_db": -math.inf}
        speed = {"float_ms": 2.0, "ms": 1.0, "ratio": 2.0, "low": 1.5, "high": 2.5, "shapes": {"image": [8, 1]}}
        return {"score": score, "speed": speed}

    monkeypatch.setattr(runs, "call", answer)
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "markdown")}
    options = ["--models", str(tmp_path), "--only", "digits_cnn", "--threads", "1"]
    assert table.main([*options, "--json", str(files["json"]), "--markdown", str(files["markdown"])]) == 0
    tools = [worker.STATIC, worker.LINEARS, worker.DYNAMIC, worker.PER_TOKEN, worker.ONNXQ, worker.UNMEASURED]
    assert [tool for step, tool in done if step == "make"] == tools
    assert [tool for step, tool in done if step == "judge"] == ["None", *["compiled"] * 5]
    found = json.loads(files["json"].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [row["tool"] for row in found["rows"]] == [runs.FLOAT, *tools]
    assert found["rows"][3]["error"] == "killed by SIGSEGV"
    assert found["rows"][1]["score"]["sqnr_db"] is None
    assert (found["settings"]["threads"], found["memory"]) == (1, [])
    assert [(goal["goal"]["goal"], goal["met"]) for goal in found["goals"]] == [("top-1 drop <= 0.5 points", True)]
    assert found["environment"]["numpy"] == np.__version__
    text = files["markdown"].read_text()
    assert "fails (quantizing) | 100.00 %, 2.00x | left float (int8: 100.00 %, 2.00x) |" in text
    printed = capsys.readouterr()
    assert text in printed.out
    assert "killed by SIGSEGV" in printed.out
    assert "onnxq --no-measure: scoring and timing" in printed.err


# ------------------------------------------------------------------ goals and texts


def canned() -> list[runs.Row]:
    def row(tool: str, value: float, noise: float | None, ratio: float, **made: object) -> runs.Row:
        score = {"float": 0.8, "value": value, "drop": 0.8 - value, "ratio": value / 0.8, "rows": 9, "cosine": 0.99,
                 "sqnr_db": noise}
        speed = {"float_ms": 2.0, "ms": 2.0 / ratio, "ratio": ratio, "low": ratio - 0.1, "high": ratio + 0.1,
                 "shapes": {"x": [8, 3], "s": []}}
        return runs.Row("m", tool, "top1", 4_000_000, 1_000_000, {"seconds": 1.25, "peak_bytes": 210_000_000, **made},
                        score, speed)

    reason = "ModelError: onnxruntime can't load /t/q.onnx: Load model from /t/q.onnx failed:a | b" + "c" * 90
    failed = runs.Row("m", worker.LINEARS, "top1", 4_000_000, failed="run", error=reason)
    return [row(runs.FLOAT, 0.8, None, 1.0), row(worker.STATIC, 0.5, 8.0, 0.5), failed,
            row(worker.DYNAMIC, 0.8, None, 1.0), row(worker.PER_TOKEN, 0.8, 50.0, 1.5),
            row(worker.ONNXQ, 0.8, None, 1.0, left_float=True, int8_slower=True),
            row(worker.UNMEASURED, 0.79, 30.0, 0.9)]


def test_the_summary_has_a_cell_per_tool() -> None:
    lines = layout.summary(canned()).splitlines()
    assert lines[0] == ("| model: metric of float | onnxruntime static | onnxruntime linears | onnxruntime dynamic "
                        "| onnxq per token | onnxq |")
    assert lines[2] == ("| m: top-1 80.00 % | 50.00 %, 0.50x | fails (to run) | 80.00 %, 1.00x (unchanged) "
                        "| 80.00 %, 1.50x | left float (int8: 79.00 %, 0.90x) |")
    assert len(lines) == 3


def test_details_have_every_figure() -> None:
    lines = layout.details(canned()).splitlines()
    assert lines[0] == "**m (top-1, 9 rows; timed at 8x3, scalar)**"
    assert lines[5] == ("| onnxruntime static | 50.00 % | 30.00 pt | 0.9900 | 8.0 | 0.50x | 0.40 - 0.60 | 0.25x | 1.2 "
                        "| 210 |  |")
    assert lines[6].endswith("| result fails: a / b" + "c" * 54 + "… |")
    assert lines[9].endswith("| nothing pays, left float |")
    assert {line.count("|") for line in lines[2:]} == {len(layout.HEADINGS) + 1}


def test_goals_are_met_missed_or_not_measured() -> None:
    rows = canned()
    measured = runs.Memory("m", 8, peak_bytes=100, peak_bytes_tenfold=130)
    wanted = [goals.Goal("m", "drop", "a", most=0.0), goals.Goal("m", "speedup", "b", least=1.5),
              goals.Goal("m", "pooled_cosine", "c", least=0.9), goals.Goal("other", "drop", "d", most=1),
              goals.Goal("m", "peak_growth", "e", most=1.3), goals.Goal("m", "peak_bytes", "f", most=129),
              goals.Goal("m", "speedup", "g", least=1.5, tool=worker.PER_TOKEN), goals.Goal("m", "size", "h", most=0.2)]
    outcomes = goals.check(wanted, rows, [measured])
    assert [o.met for o in outcomes] == [True, False, None, None, True, False, True, False]
    assert layout.goals(outcomes).splitlines()[2:] == [
        "| m | a | 0.0000 | met |", "| m | b | 1.00x | missed |", "| m | c |  | not measured |",
        "| other | d |  | not run |", "| m | e | 1.30x | met |", "| m | f | 0.00013 MB | missed |",
        "| m | g | 1.50x | met |", "| m | h | 0.25x | missed |"]
    rows[5].score["drop"] = math.nan
    assert goals.check(wanted[:1], rows, [])[0].met is False
    rows[5].error = "killed by SIGKILL"
    assert goals.check(wanted[:1], rows, [])[0] == goals.Outcome(wanted[0], None, False, "killed by SIGKILL")


def test_the_goals_file_is_readable_and_complete(tmp_path: Path) -> None:
    read = goals.read()
    assert {g.model for g in read} == {
        "decoder", "digits_cnn", "light_densenet121", "light_inception_v2", "light_resnet50", "light_shufflenet",
        "light_squeezenet", "light_vgg19", "magika", "minilm", "mnist12", "pylm", "recurrent", "resnet20", "silero_vad",
        "stories260k", "superres", "text_encoder", "ultraface", goals.EVERY}
    assert {(g.model, g.figure) for g in goals.of_table(read)} >= {("minilm", "speedup"), ("light_resnet50", "speedup")}
    assert set(goals.of_memory(read)) == {"minilm", "pylm", "magika"}
    assert all(math.isfinite(g.least) != math.isfinite(g.most) for g in read)
    (tmp_path / "g.yaml").write_text("- {model: m, figure: beauty, most: 1, goal: x}")
    with pytest.raises(ValueError, match="there is no figure 'beauty'"):
        goals.read(tmp_path / "g.yaml")


def test_the_whole_text_names_its_conditions() -> None:
    where = {"processor": "P", "cores": 2, "cpu_flags": ["avx2"], "onnxq": "1", "onnxruntime": "2", "onnx": "3",
             "python": "4"}
    text = layout.markdown(canned(), [runs.Memory("m", 8, error="OSError: full")], [], SETTINGS, where)
    assert "figures mean nothing" in text
    assert "the first 64 evaluation rows" in text
    assert "P, 2 cores (avx2); onnxq 1, onnxruntime 2, onnx 3, Python 4." in text
    assert "| m | 8 | fails: OSError: full |  |  |  |  |" in text
    assert "figures mean nothing" not in layout.conditions(runs.Settings.make(2, quick=False), where)


# ------------------------------------------------------------------ cost


def test_cost_of_every_way_to_find_ranges_with_its_stages(tmp_path: Path) -> None:
    found = cost.costs(digits(), 0.01, 1, tmp_path)
    assert [c.ranges for c in found] == list(cost.BOUNDS)
    for c in found:
        assert c.rows >= 64
        assert c.rows % 8 == 0
        assert {"calibrate", "scales", "verify", "accuracy"} <= set(c.stages)
        assert c.stages["calibrate"] < c.file_seconds
        assert c.check_seconds == c.stages["verify"] + c.stages["accuracy"]
        assert c.float_seconds > 0
    held = dataclasses.replace(found[0], float_seconds=2.0, file_seconds=6.0)
    assert held.held
    assert not dataclasses.replace(held, file_seconds=6.01).held
    assert cost.table(found).row_count == len(found)
