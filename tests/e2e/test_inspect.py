"""inspect(): what is in a model and what would become of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import body, make_model, node, random
from lowering_support import MODELS
from onnx import TensorProto

import onnxq
from onnxq.errors import ModelError, UsageError


def test_verdicts_are_those_of_a_compilation(tmp_path: Path) -> None:
    model = MODELS / "digits_cnn" / "model.onnx"
    found = onnxq.inspect(model)
    made = onnxq.compile(model, tmp_path / "q.onnx", calib=MODELS / "digits_cnn" / "calib.npz", measure=False,
                         outliers="none")
    verdicts = {n["name"]: (n["scheme"], n["lowering"], n["reason"]) for n in found["nodes"]}
    assert verdicts == {n.name: (n.scheme, n.lowering, n.reason) for n in made.nodes if n.scheme != "folded"}
    assert found["inputs"] == {"image": "float32 [batch, 1, 16, 16]"}
    assert found["operators"]["BatchNormalization"] == 11  # as the exporter wrote it


def test_weights_are_counted_once_and_by_dtype(tmp_path: Path) -> None:
    then = body([node("MatMul", "x w", "a")], {"a": None}, "then")
    other = body([node("Identity", "x", "b")], {"b": None}, "other")
    model = make_model([node("MatMul", "x w", "y"), node("MatMul", "x v", "u"), node("Gather", "x i", "z"),
                        node("If", "c", "o", then_branch=then, else_branch=other)],
                       {"x": ["n", 32], "c": (TensorProto.BOOL, [])}, {"y": None, "u": None, "z": None, "o": None},
                       {"w": random(32, 32), "v": random(32, 8), "i": np.array([0, 1])})
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    found = onnxq.inspect(path)
    assert found["weight_bytes"] == {"float32": 4 * (32 * 32 + 32 * 8), "int64": 16}
    assert found["int8_share"] == pytest.approx(32 * 32 / (32 * 32 + 32 * 8))  # v has N = 8
    assert found["operators"]["MatMul"] == 3


def test_bad_calls(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        onnxq.inspect(tmp_path / "none.onnx")
    model = MODELS / "digits_cnn" / "model.onnx"
    with pytest.raises(UsageError, match="no scheme 'w8a9'"):
        onnxq.inspect(model, scheme="w8a9")
    with pytest.raises(UsageError, match="no target 'moon'"):
        onnxq.inspect(model, target="moon")


@pytest.mark.parametrize("as_json", [False, True])
def test_command(as_json: bool) -> None:
    model = str(MODELS / "text_encoder" / "model.onnx")
    done = subprocess.run([sys.executable, "-m", "onnxq", "inspect", model, *(["--json"] if as_json else [])],
                          capture_output=True, text=True, check=True)
    if as_json:
        assert json.loads(done.stdout) == onnxq.inspect(model)
    else:
        assert "12 MatMul -> MatMulIntegerToFloat\n" in done.stdout
        assert "float: 2 Softmax: Softmax stays float: 8 bits are too coarse for its exponentials" in done.stdout
    assert done.stderr == ""
