"""compile() on the recurrent model: its LSTM runs in integers, its GRU on stored weights, and it stays that way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import body, make_model, node, random, run
from lowering_support import CPU, FORMATS, MODELS, bare
from onnx import TensorProto

import onnxq

FOLDER = MODELS / "recurrent"
SCHEMES = ("w8a8", "w8a8-dynamic-tensor")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_lstm_runs_in_integers_and_a_second_compilation_keeps_it(scheme: str, fmt: str, tmp_path: Path) -> None:
    source, data = FOLDER / "model.onnx", {"calib": str(FOLDER / "calib.npz"), "eval": str(FOLDER / "eval.npz")}
    report = onnxq.compile(source, tmp_path / "once.onnx", scheme=scheme, format=fmt, metric="top1", measure=False,
                           **data)
    assert report.ok, report.verdict.failures
    found = {row.op: row for row in report.nodes if row.op in ("LSTM", "GRU")}
    assert (found["LSTM"].lowering, bare(found["LSTM"].ran_as)) == ("DynamicQuantizeLSTM",) * 2
    assert (found["GRU"].lowering, found["GRU"].ran_as) == ("stored", "GRU")
    assert report.accuracy is not None
    assert report.accuracy.compiled == pytest.approx(0.9926, abs=0.005)
    assert report.accuracy.outputs["logits"].sqnr_db > 30
    assert report.size is not None
    assert report.size.ratio < 0.35

    again = onnxq.compile(tmp_path / "once.onnx", tmp_path / "twice.onnx", scheme=scheme, measure=False, **data)
    assert again.ok, again.verdict.failures
    given = next(row for row in again.nodes if row.op == "DynamicQuantizeLSTM")
    assert (given.scheme, given.reason) == ("given", "quantized already")
    ops = [sorted(n.op_type for n in onnx.load(tmp_path / name).graph.node) for name in ("once.onnx", "twice.onnx")]
    assert ops[0].count("DynamicQuantizeLSTM") == ops[1].count("DynamicQuantizeLSTM") == 1


def test_lstms_of_both_branches_share_their_codes(tmp_path: Path) -> None:
    size = CPU.least_hidden
    stored = {name: random(1, 4 * size, size, seed=k) / np.float32(size ** 0.5) for k, name in enumerate("wr")}
    outputs = {"y": ["s", 1, "n", size]}
    then = body([node("LSTM", "x w r", "a", hidden_size=size)], {"a": outputs["y"]}, "then")
    other = body([node("LSTM", "x w r", "b", hidden_size=size, direction="reverse")], {"b": outputs["y"]}, "other")
    model = make_model([node("If", "c", "y", then_branch=then, else_branch=other)],
                       {"c": (TensorProto.BOOL, []), "x": ["s", "n", size]}, outputs, stored)
    source, compiled = tmp_path / "m.onnx", tmp_path / "q.onnx"
    source.write_bytes(model.SerializeToString())
    report = onnxq.compile(source, compiled, scheme="w8a8-dynamic-tensor", measure=False)
    assert report.ok, report.verdict.failures
    kernels = {row.name: row.ran_as for row in report.nodes if row.lowering == "DynamicQuantizeLSTM"}
    assert kernels.keys() == {"LSTM_a", "LSTM_b"}
    ran, unseen = sorted(kernels, key=lambda name: not kernels[name])  # one branch is taken in a run
    assert (kernels[ran], kernels[unseen]) == ("DynamicQuantizeLSTM", "")
    assert f"no kernel was seen for {unseen}: the data take other branches" in report.verdict.notices
    assert compiled.stat().st_size < 0.3 * source.stat().st_size
    for flag in (True, False):
        given = {"c": np.array(flag), "x": random(5, 3, size, seed=2)}
        exact, found = run(source, given)["y"], run(compiled, given, optimize=True)["y"]
        error = np.square(exact - found).mean() / np.square(exact).mean()
        assert error < 10 ** -3, flag  # 30 dB


def test_both_weights_of_an_lstm_count_as_int8() -> None:
    found = onnxq.inspect(FOLDER / "model.onnx")
    assert found["int8_share"] == pytest.approx(4 * 96 * (64 + 96) * 4 / found["weight_bytes"]["float32"])
