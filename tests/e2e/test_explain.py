"""explain(): one node's story from a float model, a report, and a compiled model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import body, make_model, node, random
from lowering_support import MODELS, ONE_THREAD
from onnx import TensorProto, numpy_helper

import onnxq
from onnxq.errors import ModelError, UsageError
from onnxq.graph import load, read_nodes
from onnxq.report import terminal
from onnxq.runtime.observe import executed, optimized

DIGITS, TEXT, RECURRENT = (MODELS / name / "model.onnx" for name in ("digits_cnn", "text_encoder", "recurrent"))
CONV, LINEAR, LSTM, GRU = "/inverted/body/body.2/body.2.0/Conv", "node_MatMul_24", "/lstm/LSTM", "/gru/GRU"


def made(folder: Path, model: Path, **options: Any) -> Path:
    """A folder with compiled.onnx and report.json of a model."""
    options = {"calib": model.parent / "calib.npz", "samples": 8, "measure": False, **options}
    onnxq.compile(model, folder / "compiled.onnx", **options).save(folder)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("digits"), DIGITS)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("recurrent"), RECURRENT)


def stored(model: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(model).graph.initializer}


def part(found: dict[str, Any], name: str) -> dict[str, Any]:
    """A tensor of an explanation."""
    [same] = [p for p in (*found["inputs"], *found["outputs"]) if p["name"] == name]
    return same


# ------------------------------------------------------------------ a float model


@pytest.mark.parametrize("model", [DIGITS, RECURRENT], ids=["digits_cnn", "recurrent"])
def test_verdicts_are_those_of_inspect(model: Path) -> None:
    wanted = {n["name"]: (n["op"], n["scheme"], n["lowering"], n["reason"]) for n in onnxq.inspect(model)["nodes"]}
    names = [n.name for n, _ in load(model).walk()]
    folded = 0
    for name in names:
        found = onnxq.explain(model, name)
        assert found["node"] == name
        assert found["source"] == "float model"
        if name in wanted:
            assert (found["op"], found["scheme"], found["lowering"], found["reason"]) == wanted[name]
            assert any("nothing was run or measured" in note for note in found["notes"])
        else:
            folded += 1
            assert (found["scheme"], found["summary"]) == ("folded", "is folded away before anything is planned")
        json.dumps(found, allow_nan=False)
    assert folded == len(names) - len(wanted)


def test_tensors_and_neighbours_of_a_float_model() -> None:
    found = onnxq.explain(DIGITS, CONV)
    assert found["summary"] == ("would run as QLinearConv under scheme w8a8; the same kernel computes "
                                "/inverted/body/body.3/Clip")
    assert found["computes"] == ["/inverted/body/body.3/Clip"]
    read = part(found, "/inverted/body/body.1/Clip_output_0")
    assert (read["dtype"], read["shape"]) == ("float32", ["batch", 64, 16, 16])
    assert (read["codes"], read["encoding"]) == (True, {"dtype": "uint8", "granularity": "tensor"})
    assert read["scale_found"] == "calibration"
    assert read["nodes"] == [{"node": "/inverted/body/body.1/Clip", "op": "Clip", "codes": False,
                              "fate": "in the kernel of /inverted/body/body.0/body.0.0/Conv"}]
    result = part(found, "/inverted/body/body.3/Clip_output_0")
    assert result["nodes"] == [{"node": "/inverted/body/body.4/body.4.0/Conv", "op": "Conv", "fate": "QLinearConv",
                                "codes": True}]
    assert part(found, "/inverted/body/body.3/Constant_1_output_0")["values"] == [6.0]
    assert found["attributes"]["group"] == 64


def test_statistics_of_a_weight() -> None:
    w = stored(TEXT)["val_25"].astype(np.float64)
    found = part(onnxq.explain(TEXT, LINEAR), "val_25")
    largest = np.abs(w).max(axis=0)
    statistics = found["statistics"]
    assert (statistics["min"], statistics["max"]) == (w.min(), w.max())
    assert (statistics["axis"], statistics["channels"], statistics["zero_channels"]) == (1, 96, 0)
    assert statistics["spread"] == pytest.approx(largest.max() / largest.min())
    assert statistics["median_channel"] == pytest.approx(np.median(largest))
    for key, scale in (("sqnr_db", largest / 127), ("sqnr_db_per_tensor", largest.max() / 127)):
        error = np.rint(w / scale) * scale - w
        assert statistics[key] == pytest.approx(10 * np.log10((w**2).sum() / (error**2).sum()), abs=0.01)
    assert found["encoding"]["greatest_scale"] == pytest.approx(largest.max() / 127, rel=1e-6)
    assert (found["encoding"]["float_bytes"], found["encoding"]["code_bytes"]) == (4 * 96 * 96, 96 * 96 + 4 * 96)


def test_spread_leaves_channels_of_zeros_out(tmp_path: Path) -> None:
    w = random(32, 16)
    w[:, 3] = 0
    w[:, 4] *= 100
    path = tmp_path / "m.onnx"
    onnx.save(make_model([node("MatMul", "x w", "y")], {"x": ["n", 32]}, {"y": None}, {"w": w}), path)
    statistics = part(onnxq.explain(path, "y"), "w")["statistics"]
    largest = np.delete(np.abs(w).max(axis=0), 3)
    assert (statistics["zero_channels"], statistics["least_channel"]) == (1, 0.0)
    assert statistics["spread"] == pytest.approx(largest.max() / largest.min(), rel=1e-6)


def test_a_scheme_is_heeded() -> None:
    per_token = onnxq.explain(TEXT, LINEAR, scheme="w8a8-dynamic")
    assert per_token["lowering"] == "MatMulIntegerToFloat"
    read = part(per_token, "layer_norm")
    assert (read["encoding"], read["scale_found"]) == ({"dtype": "uint8", "granularity": "token"}, "run time")
    assert part(per_token, "linear")["codes"] is False
    assert onnxq.explain(TEXT, LINEAR, scheme="w8a8-dynamic-tensor")["lowering"] == "DynamicQuantizeMatMul"


def test_the_name_may_be_a_tensor_of_the_file() -> None:
    assert onnxq.explain(DIGITS, f"{CONV}_output_0")["node"] == CONV  # made by another node once BatchNorm is folded
    assert onnxq.explain(DIGITS, "inverted.body.2.0.weight")["node"] == CONV
    assert onnxq.explain(DIGITS, "*last*first.1/Batch*")["node"] == "/last/first/first.1/BatchNormalization"
    with pytest.raises(UsageError, match=r"stands for 11 nodes of .*: /stem/stem.0/Conv, .* and 6 more; name one"):
        onnxq.explain(DIGITS, "*Conv")
    with pytest.raises(UsageError, match=r"has no node 'stem.0/Convv'.*near: .*/stem/stem.0/Conv"):
        onnxq.explain(DIGITS, "stem.0/Convv")


def test_nodes_in_bodies(tmp_path: Path) -> None:
    then = body([node("MatMul", "x w", "a", "inner")], {"a": None}, "then")
    other = body([node("Identity", "x", "b")], {"b": None}, "other")
    path = tmp_path / "m.onnx"
    onnx.save(make_model([node("Relu", "z", "x"), node("If", "c", "o", "branch", then_branch=then, else_branch=other)],
                         {"z": ["n", 32], "c": (TensorProto.BOOL, [])}, {"o": None}, {"w": random(32, 32)}), path)
    found = onnxq.explain(path, "inner")
    assert found["inside"] == "If branch"
    assert "in a body of If branch" in found["reason"]
    assert part(found, "x")["nodes"][0]["node"] == "Relu_x"
    assert part(found, "w")["encoding"]["axis"] == 1
    assert {"node": "inner", "op": "MatMul", "fate": "float, weights stored as int8", "codes": False} in part(
        onnxq.explain(path, "Relu_x"), "x")["nodes"]
    onnxq.compile(path, tmp_path / "q.onnx", scheme="w8a8-dynamic-tensor", measure=False).save(tmp_path)
    assert onnxq.explain(tmp_path, "inner")["scheme"] == "stored"
    assert onnxq.explain(tmp_path / "q.onnx", "inner")["inside"] == "If branch"


# ------------------------------------------------------------------ a report


def test_a_report_tells_the_scales_that_the_file_holds(digits: Path) -> None:
    report = json.loads((digits / "report.json").read_text(encoding="utf-8"))
    constants, checked = stored(digits / "compiled.onnx"), 0
    for row in report["nodes"]:
        found = onnxq.explain(digits, row["name"])
        assert (found["source"], found["reason"], found["ran_as"]) == ("report", row["reason"], row["ran_as"])
        for p in (*found["inputs"], *found["outputs"]):
            encoding = p["encoding"]
            if encoding is None:
                continue
            scale, zero = (constants[f"{p['name']}.{end}"] for end in ("scale", "zero_point"))
            assert np.float32(np.median(scale)) == np.float32(encoding["scale"])
            assert np.all(zero == encoding["zero_point"])
            checked += 1
            if p["role"] != "weight":
                low, high = (float(scale) * (code - float(zero)) for code in (0, 255))
                assert (encoding["low"], encoding["high"]) == pytest.approx((low, high), rel=1e-6)
                continue
            q = constants[f"{p['name']}.q"]
            assert (encoding["least_scale"], encoding["greatest_scale"]) == pytest.approx((scale.min(), scale.max()))
            assert (encoding["float_bytes"], encoding["code_bytes"]) == (4 * q.size, q.nbytes + scale.nbytes)
    assert checked > 40


def test_a_kernel_of_a_report(digits: Path) -> None:
    found = onnxq.explain(digits / "report.json", CONV)
    assert found["summary"].startswith("ran as QLinearConv on CPUExecutionProvider, ")
    assert found["summary"].endswith("; the same kernel computes /inverted/body/body.3/Clip")
    assert found["ms"] > 0
    clip = onnxq.explain(digits, "/inverted/body/body.3/Clip")
    assert clip["part_of"] == CONV
    assert clip["summary"] == f"is computed by QLinearConv, the kernel of {CONV}"
    assert part(clip, "/inverted/body/body.3/Clip_output_0")["codes"] is True
    folded = onnxq.explain(digits, "/inverted/body/body.2/body.2.1/BatchNormalization")
    assert folded["scheme"] == "folded"
    assert "fold-batchnorm" in folded["reason"]
    # what the folded node made is made by the Conv now
    assert onnxq.explain(digits, "/inverted/body/body.2/body.2.1/BatchNormalization_output_0")["node"] == CONV
    float_pool = onnxq.explain(digits, "/GlobalAveragePool")
    read = float_pool["inputs"][0]
    assert (read["codes"], read["encoding"]) == (False, None)
    assert float_pool["summary"].startswith("stays float and ran as GlobalAveragePool on CPUExecutionProvider, ")


def test_a_report_without_a_run(tmp_path: Path) -> None:
    nodes = [{"name": "a", "op": "MatMul", "scheme": "w8a8", "lowering": "QLinearMatMul", "ran_as": "", "provider": "",
              "reason": "constant weights", "ms": None, "later": 1}]
    path = tmp_path / "other.txt"
    path.write_text(json.dumps({"model": "m.onnx", "nodes": nodes}), encoding="utf-8")
    found = onnxq.explain(path, "a")
    assert found["summary"] == "is planned as QLinearMatMul under scheme w8a8"
    assert found["notes"] == ["the compiled model was not run: there is no word on which kernels ran",
                              "nothing in this model is stored as codes"]


@pytest.mark.parametrize(("text", "message"), [
    (None, "can't be read"), ("{", "is not JSON or is cut short"), ("[1]", "is no report of onnxq"),
    ("{}", "is no report of onnxq"), ('{"nodes": [{"name": "a"}]}', "is no report of onnxq")])
def test_what_is_no_report(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        onnxq.explain(tmp_path, "a")


def test_a_scheme_goes_with_a_float_model_only(digits: Path) -> None:
    for source in (digits, digits / "compiled.onnx"):
        with pytest.raises(UsageError, match="leave out --scheme"):
            onnxq.explain(source, CONV, scheme="w8a8")
    with pytest.raises(UsageError, match="no scheme 'w9'"):
        onnxq.explain(DIGITS, CONV, scheme="w9")
    with pytest.raises(UsageError, match="no target 'moon'"):
        onnxq.explain(DIGITS, CONV, target="moon")
    with pytest.raises(ModelError, match="does not exist"):
        onnxq.explain("none.onnx", "a")


# ------------------------------------------------------------------ a compiled model


def test_a_compiled_model_agrees_with_its_report(digits: Path) -> None:
    report, file = (onnxq.explain(digits / name, CONV) for name in ("report.json", "compiled.onnx"))
    assert (file["source"], file["op"], file["scheme"]) == ("compiled model", "QLinearConv", "w8a8")
    assert (file["ran_as"], file["provider"]) == (report["ran_as"], report["provider"])
    there = {p["name"].removesuffix(".q"): p["encoding"] for p in (*file["inputs"], *file["outputs"]) if p["encoding"]}
    assert there == {p["name"]: p["encoding"] for p in (*report["inputs"], *report["outputs"])}
    assert not {p["name"] for p in file["inputs"]} & {n for n in stored(digits / "compiled.onnx")
                                                      if n.endswith((".scale", ".zero_point"))}
    assert onnxq.explain(digits / "compiled.onnx", "/inverted/body/body.3/Clip_output_0")["node"] == CONV
    with pytest.raises(UsageError, match="told by the report of onnxq compile --report DIR"):
        onnxq.explain(digits / "compiled.onnx", "/inverted/body/body.3/Clip")


def test_the_qdq_form(tmp_path: Path) -> None:
    path = made(tmp_path, DIGITS, format="qdq") / "compiled.onnx"
    found = onnxq.explain(path, CONV)
    assert (found["op"], found["ran_as"].rpartition(".")[2]) == ("Conv", "QLinearConv")
    read = part(found, "/inverted/body/body.1/Clip_output_0")
    assert (read["dtype"], read["codes"], read["encoding"]["dtype"]) == ("float32", True, "uint8")
    assert part(found, "inverted.body.2.0.weight.bn.dq")["role"] == "weight"
    decode = onnxq.explain(path, "inverted.body.2.0.weight.bn/dequantize")
    assert CONV in decode["summary"]
    assert decode["outputs"][0]["encoding"] is None, "it is float again"


def test_codes_that_the_runtime_decodes_to_compute_in_float(tmp_path: Path) -> None:
    constants = {"s": np.float32(0.1), "z": np.uint8(3), "w": random(8, 8, 1, 1)}
    path = tmp_path / "m.onnx"
    onnx.save(make_model([node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "d"),
                          node("Conv", "d w", "y"), node("Relu", "y", "r")],
                         {"x": ["n", 8, 4, 4]}, {"r": None}, constants), path)
    found = onnxq.explain(path, "Conv_y")
    read = part(found, "d")
    assert read["encoding"] == {"dtype": "uint8", "granularity": "tensor", "scale": 0.1, "zero_point": 3,
                                "low": pytest.approx(-0.3), "high": pytest.approx(25.2)}
    assert found["notes"] == ["it computes in float, on decoded codes: the runtime took no integer kernel for it"]
    assert part(found, "w")["statistics"]["channels"] == 8


def test_stored_weights(recurrent: Path) -> None:
    planned, ran, file = (onnxq.explain(s, GRU) for s in (RECURRENT, recurrent, recurrent / "compiled.onnx"))
    assert planned["summary"] == "would compute in float, on weights stored as int8"
    assert ran["summary"].startswith("computes in float, on weights stored as int8: it ran as GRU on ")
    name = next(p["name"] for p in ran["inputs"] if p["role"] == "weight")
    encodings = [part(found, key)["encoding"]
                 for found, key in ((planned, name), (ran, name), (file, f"{name}.decoded"))]
    assert encodings[0] == encodings[1] == encodings[2]
    assert all(part(found, key)["codes"] is False for found, key in ((planned, name), (file, f"{name}.decoded")))


def test_a_kernel_with_two_weights(recurrent: Path) -> None:
    planned, ran, file = (onnxq.explain(s, LSTM) for s in (RECURRENT, recurrent, recurrent / "compiled.onnx"))
    assert planned["summary"] == "would run as DynamicQuantizeLSTM under scheme w8a8"
    assert (file["op"], ran["ran_as"]) == ("com.microsoft.DynamicQuantizeLSTM", file["ran_as"])
    names = [p["name"] for p in ran["inputs"] if p["role"] == "weight" and p["encoding"]]
    assert len(names) == 2
    for name in names:
        encodings = [part(ran, name)["encoding"], part(file, f"{name}.lstm.q")["encoding"]]
        assert [e.pop("axis") for e in encodings] == [1, 2], "the kernel wants them transposed"
        assert encodings[0] == encodings[1]
        assert onnxq.explain(recurrent / "compiled.onnx", name)["node"] == LSTM
    for found in (planned, ran, file):
        read = part(found, "/lstm/Transpose_output_0")
        assert (read["codes"], read["encoding"]) == (True, {"dtype": "uint8", "granularity": "tensor"})
        assert read["scale_found"] == "run time", "under a static scheme, too"


def test_a_model_that_random_inputs_can_not_feed(tmp_path: Path) -> None:
    """Rows of 8 can be regrouped by 7 only when there are 7 of them."""
    constants = {"s": np.float32(0.1), "z": np.uint8(0), "shape": np.array([-1, 7])}
    path = tmp_path / "m.onnx"
    nodes = [node("Reshape", "x shape", "r"), node("Relu", "r", "u"), node("QuantizeLinear", "u s z", "q")]
    onnx.save(make_model(nodes, {"x": ["n", 8]}, {"q": (TensorProto.UINT8, None)}, constants), path)
    found = onnxq.explain(path, "Reshape_r")
    assert found["summary"] == "onnxruntime runs it as Reshape"
    assert "names no provider" in found["notes"][0]


def test_the_optimized_graph_is_that_of_a_run(digits: Path) -> None:
    path = digits / "compiled.onnx"
    feed = {"image": np.zeros((1, 1, 16, 16), np.float32)}
    ran = executed(path, [feed], ONE_THREAD, read_nodes)
    assert [(e.name, e.op, e.inputs, e.outputs) for e in optimized(path, ONE_THREAD, read_nodes)] == [
        (e.name, e.op, e.inputs, e.outputs) for e in ran]


# ------------------------------------------------------------------ as text, as a command


def test_text_of_all_sources(digits: Path) -> None:
    text = {s: terminal.explanation(onnxq.explain(source, CONV)) for s, source in (
        ("model", DIGITS), ("report", digits), ("compiled", digits / "compiled.onnx"))}
    lines = text["report"].splitlines()
    assert lines[0] == f"{CONV}: Conv in the report on {DIGITS}"
    assert lines[2].startswith("why: its weights are stored in the model")
    assert "reads /inverted/body/body.1/Clip_output_0" in lines
    assert any(line.startswith("  as uint8 codes, scale 0.0235, zero point 0: from 0 to 6") for line in lines)
    assert any(line.startswith("  as int8 codes, 64 scales along axis 0 from ") and line.endswith("2.3 kB -> 832 B")
               for line in lines)
    assert "  read by /inverted/body/body.4/body.4.0/Conv (Conv, QLinearConv)" in lines
    assert "  as uint8 codes, one scale found by calibration" in text["model"].splitlines()
    assert "reads /inverted/body/body.1/Clip_output_0.q: uint8 [batch, 64, 16, 16]" in text["compiled"]
    assert all("None" not in t and "{" not in t for t in text.values())


def command(*args: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "onnxq", "explain", *args]
    return subprocess.run(call, capture_output=True, text=True, check=False)


def test_command() -> None:
    done = command(str(TEXT), LINEAR, "--scheme", "w8a8-dynamic", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == onnxq.explain(str(TEXT), LINEAR, scheme="w8a8-dynamic")
    shown = command(str(TEXT), LINEAR)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == terminal.explanation(onnxq.explain(str(TEXT), LINEAR)) + "\n"


def test_exit_statuses(tmp_path: Path) -> None:
    unknown = command(str(TEXT), "node_MatMul_9999")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "near: node_MatMul" in unknown.stderr
    assert unknown.stderr.count("\n") == 1
    assert command(str(tmp_path), "a").returncode == 3


@pytest.mark.parametrize(("scheme", "size"), [("w4a16", 32), ("w8a16", 128), ("w2a16", 32)])
def test_weights_that_would_be_in_blocks(scheme: str, size: int, tmp_path: Path) -> None:
    """As a compilation without data makes them."""
    found = onnxq.explain(TEXT, LINEAR, scheme=scheme)
    [name] = [p["name"] for p in found["inputs"] if p["role"] == "weight"]
    report = onnxq.compile(TEXT, tmp_path / "o.onnx", scheme=scheme, measure=False)
    assert part(found, name)["encoding"] == report.tensors[name].to_dict()
    assert part(found, name)["encoding"]["block_size"] == size
    table = next(n for n in report.nodes if n.op == "Gather" and n.weights)
    looked_up = onnxq.explain(TEXT, table.name, scheme=scheme)
    assert part(looked_up, table.weights[0])["encoding"] == report.tensors[table.weights[0]].to_dict()
    if scheme == "w2a16":
        assert looked_up["summary"] == "would compute in float, on weights stored as uint2"


def test_a_conv_of_a_weight_only_scheme_is_told_by_block() -> None:
    name = next(n["name"] for n in onnxq.inspect(DIGITS, scheme="w4a16")["nodes"] if n["scheme"] == "stored")
    found = onnxq.explain(DIGITS, name, scheme="w4a16")
    assert found["summary"] == "would compute in float, on weights stored as uint4"
    [weight] = [p for p in found["inputs"] if p["role"] == "weight"]
    assert (weight["encoding"]["dtype"], weight["encoding"]["granularity"]) == ("uint4", "block")
