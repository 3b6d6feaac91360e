"""The report as plain data and as files."""

import json
import math

import pytest

from onnxq.errors import OutputError
from onnxq.report.report import Accuracy, Encoding, Latency, NodeRow, OutputAccuracy, Report, Semantic, Size, Stage


def full_report():
    return Report(
        "in.onnx", "out.onnx", "w8a8",
        size=Size(4000, 1000),
        latency=Latency(4.0, 2.0, 2.0, 1.9, 2.1, {"x": [8, 64]}, 2, "calib.npz"),
        accuracy=Accuracy("top1", 0.9, math.nan, math.inf, {"y": OutputAccuracy(None, 1.0, 0.0)}, "eval.npz", 500),
        semantic=Semantic(None, -math.inf, 8),
        nodes=[NodeRow("a", "MatMul", "w8a8", "QLinearMatMul", "QLinearMatMul", "CPUExecutionProvider", "weights")],
        environment={"cores": 2, "cpu_flags": ("avx2",)},
        recipe={"scheme": {"name": "w8a8"}},
        stages=[Stage("load", 0.5)])


def test_the_keys_that_the_command_line_promises():
    data = full_report().to_dict()
    assert data["size"] == {"float_bytes": 4000, "compiled_bytes": 1000, "ratio": 0.25}
    assert {"float_ms", "compiled_ms", "speedup", "shapes", "threads"} <= data["latency"].keys()
    assert {"metric", "float", "compiled", "drop", "outputs"} <= data["accuracy"].keys()
    assert {"sqnr_db", "cosine", "max_abs"} == data["accuracy"]["outputs"]["y"].keys()
    assert {"name", "op", "scheme", "lowering", "ran_as", "provider", "reason"} <= data["nodes"][0].keys()
    assert data["verdict"] == {"ok": True, "failures": [], "notices": []}
    assert data["stages"] == [{"name": "load", "seconds": 0.5}]
    assert {"environment", "recipe"} <= data.keys()


def test_json_has_no_word_for_infinity():
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    data = json.loads(full_report().to_json(), parse_constant=refuse)
    assert data["accuracy"]["drop"] is None
    assert data["accuracy"]["compiled"] is None
    assert data["accuracy"]["outputs"]["y"]["sqnr_db"] is None
    assert data["semantic"] == {"twin_sqnr_db": None, "runtime_sqnr_db": None, "rows": 8}
    assert data["environment"] == {"cores": 2, "cpu_flags": ["avx2"]}


def test_nodes_and_tensors_are_compact():
    """A model has thousands of nodes: what most of them lack is left out."""
    report = full_report()
    report.nodes.append(NodeRow("b", "Conv", "w8a8", "QLinearConv", "", "", "", inputs=["x"], outputs=["y"],
                                codes_in=["x"], codes_out="r", weights=["w"], part_of="a"))
    report.tensors = {"x": Encoding("uint8", "token"), "y": Encoding("uint8", "tensor", 0.5, 0, 0.0, 127.5)}
    data = report.to_dict()
    assert set(data["nodes"][0]) == {"name", "op", "scheme", "lowering", "ran_as", "provider", "reason", "ms"}
    assert data["nodes"][1]["codes_out"] == "r"
    assert [NodeRow(**node) for node in data["nodes"]] == report.nodes
    assert data["tensors"]["x"] == {"dtype": "uint8", "granularity": "token"}
    assert data["tensors"]["y"]["zero_point"] == 0, "zero is something"
    assert {name: Encoding(**found) for name, found in data["tensors"].items()} == report.tensors


def test_what_was_not_measured_is_null():
    data = Report("in.onnx", None, "w8a8").to_dict()
    assert [data[key] for key in ("output", "size", "latency", "accuracy", "semantic")] == [None] * 5


def test_a_failure_makes_the_verdict():
    report = full_report()
    assert report.ok
    report.verdict.notices.append("by the way")
    assert report.ok
    report.verdict.failures.append("too slow")
    assert not report.ok
    assert report.to_dict()["verdict"] == {"ok": False, "failures": ["too slow"], "notices": ["by the way"]}


def test_save_makes_the_folder_and_both_files(tmp_path):
    folder = tmp_path / "new" / "report"
    full_report().save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == full_report().to_dict()
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_save_into_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another --report folder"):
        full_report().save(tmp_path / "file" / "report")


def test_save_over_a_folder_of_that_name(tmp_path):
    (tmp_path / "report.json").mkdir()
    with pytest.raises(OutputError, match=r"can't be written"):
        full_report().save(tmp_path)
