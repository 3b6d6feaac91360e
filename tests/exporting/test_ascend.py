"""export --format ascend: what ATC takes, its command line, and how it is checked without a chip."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from exporting_support import MODELS, compiled, rows

import onnxq
from onnxq.errors import ModelError, UsageError
from onnxq.exporting import export, verify_bundle

CNN, TEXT = "digits_cnn", "text_encoder"
SIZES = {CNN: {"batch": 4}, TEXT: {"batch": 2, "seq": 64}}


def for_ascend(folder: Path, name: str) -> Path:
    output = folder / f"{name}.onnx"
    onnxq.compile(MODELS / name / "model.onnx", output, target="ascend", calib=MODELS / name / "calib.npz",
                  shapes=SIZES[name], batch=SIZES[name]["batch"], measure=False)
    return output


@pytest.fixture(scope="module", params=[CNN, TEXT])
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ascend")
    data = np.load(MODELS / request.param / "eval.npz")
    count = SIZES[request.param]["batch"]
    np.savez(folder / "sample.npz", **{k: v[:count] for k, v in data.items() if k != "labels"})
    found = export(for_ascend(folder, request.param), folder / "out", format="ascend", soc="Ascend310P3",
                   sample=folder / "sample.npz")
    return request.param, folder / "out", found


def test_the_deploy_graph_computes_what_the_pairs_do(written):
    """By the operators' contracts, in operators of ONNX that are made of the deploy graph alone."""
    _, folder, found = written
    assert found["ok"], found["failures"]
    assert [r["file"] for r in found["models"]] == ["model.onnx", "standard.onnx"]
    manifest = json.loads((folder / "manifest.json").read_text())
    layers = {CNN: 12, TEXT: 13}[written[0]]
    assert manifest["models"][1]["details"]["int8_layers"] == layers
    assert manifest["models"][1]["details"]["float_layers"] == {}
    assert set(manifest["files"]) >= {"deploy.onnx", "qat.onnx", "atc.sh", "model.onnx", "standard.onnx"}
    model = onnx.load(folder / "deploy.onnx")
    ops = [n.op_type for n in model.graph.node]
    assert ops.count("AscendDequant") == layers
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(ops)
    assert next(o.version for o in model.opset_import if o.domain == "") <= 18


def test_what_amct_converts_has_its_granularities(written):
    model = onnx.load(written[1] / "qat.onnx")
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    makers = {o: n for n in model.graph.node for o in n.output}
    for layer in [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm")]:
        maker = makers.get(layer.input[1])
        if maker is not None and maker.op_type == "DequantizeLinear":
            assert stored[maker.input[1]].shape == ()
    onnx.checker.check_model(model, full_check=True)


def test_the_command_line_of_atc(written):
    name, folder, _ = written
    text = (folder / "atc.sh").read_text()
    sizes = {CNN: "image:4,1,16,16", TEXT: "input_ids:2,64;attention_mask:2,64"}[name]
    for part in ("--framework=5", "--model=deploy.onnx", '--soc_version="${1:-Ascend310P3}"',
                 f'--input_shape="{sizes}"', f"--input_format={'NCHW' if name == CNN else 'ND'}",
                 "--precision_mode_v2=fp16"):
        assert part in text
    fake = folder.parent / "bin"
    fake.mkdir(exist_ok=True)
    (fake / "atc").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (fake / "atc").chmod(0o755)
    done = subprocess.run(["sh", str(folder / "atc.sh"), "Ascend910B1"], capture_output=True, text=True, check=True,
                          env={"PATH": f"{fake}:/usr/bin:/bin"})
    assert "--soc_version=Ascend910B1" in done.stdout.splitlines()
    assert f"--input_shape={sizes}" in done.stdout.splitlines()


def test_it_moves(written, tmp_path):
    moved = shutil.copytree(written[1], tmp_path / "moved")
    assert verify_bundle(moved)["ok"]


def test_without_a_chip_the_script_asks_for_it(tmp_path):
    export(for_ascend(tmp_path, CNN), tmp_path / "out", format="ascend")
    done = subprocess.run(["sh", str(tmp_path / "out" / "atc.sh")], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "name the chip" in done.stderr


def test_other_models_are_refused_with_the_remedy(tmp_path):
    for_cpu = compiled(tmp_path, CNN)
    with pytest.raises(ModelError, match=r"QLinearConv.*--target ascend"):
        export(for_cpu, tmp_path / "out", format="ascend", sample=rows(CNN))
    assert not (tmp_path / "out").exists()
    pairs = tmp_path / "pairs.onnx"
    onnxq.compile(MODELS / CNN / "model.onnx", pairs, target="portable", calib=MODELS / CNN / "calib.npz",
                  measure=False)
    with pytest.raises(ModelError, match=r"free axes batch.*--shape batch=N"):
        export(pairs, tmp_path / "out", format="ascend")
    floats = tmp_path / "floats.onnx"
    onnxq.compile(MODELS / CNN / "model.onnx", floats, target="ascend", shapes={"batch": 1}, measure=False)
    with pytest.raises(ModelError, match="no int8 layers"):
        export(floats, tmp_path / "out", format="ascend")


def test_wrong_calls(tmp_path):
    with pytest.raises(UsageError, match="--soc names an Ascend chip"):
        export(tmp_path / "m.onnx", format="bundle", soc="Ascend310P3")
    with pytest.raises(UsageError, match="not for cpu"):
        export(tmp_path / "m.onnx", format="ascend", target="cpu")
    with pytest.raises(ModelError, match="no name of a chip"):
        export(for_ascend(tmp_path, CNN), tmp_path / "out", format="ascend", soc="a b")
