"""compile() and check() for each target: legal by the target's tables, and as accurate as float where it runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from lowering_support import MODELS
from onnx import numpy_helper

import onnxq
from onnxq.errors import UsageError
from onnxq.placement import check
from onnxq.runtime.machine import is_here, saturates, target_here
from onnxq.targets import TARGETS

CNN, TEXT = MODELS / "digits_cnn", MODELS / "text_encoder"


SIZES = {CNN: {"batch": 10}, TEXT: {"batch": 8, "seq": 64}}


def compiled(folder: Path, output: Path, target: str, **options):
    if TARGETS[target].static:
        options |= {"shapes": SIZES[folder], "batch": SIZES[folder]["batch"]}
    return onnxq.compile(folder / "model.onnx", output, target=target, calib=folder / "calib.npz",
                         eval=folder / "eval.npz", metric="top1", max_drop="1pt", measure=False, **options)


@pytest.mark.parametrize("folder", [CNN, TEXT], ids=lambda f: f.name)
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_keeps_the_accuracy_and_is_legal_by_its_tables(tmp_path, target, folder):
    output = tmp_path / "out.onnx"
    report = compiled(folder, output, target)
    assert report.ok, report.verdict.failures
    onnx.checker.check_model(str(output), full_check=target not in ("cpu", "cpu-portable", "cpu-arm64", "web", "cuda"))
    aim = target_here(target)
    noted = [n for n in report.verdict.notices if "nothing was timed" in n]
    assert bool(noted) is not is_here(aim)
    if aim.operators is not None:
        placed = check(output, target=target)
        away = [n for n in placed["nodes"] if n["provider"] == "CPUExecutionProvider"
                and "sizes" not in n["reason"]]
        assert away == []
        assert placed["advice"] == []


@pytest.mark.parametrize("target", ["ascend", "cann"])
def test_targets_of_fixed_sizes_ask_for_them(target):
    with pytest.raises(UsageError, match="--shape batch=N --shape seq=N"):
        onnxq.compile(TEXT / "model.onnx", target=target, scheme="float", shapes={})


def test_portable_models_hold_operators_of_onnx_alone(tmp_path):
    for folder in (CNN, TEXT, MODELS / "recurrent"):
        output = tmp_path / f"{folder.name}.onnx"
        compiled(folder, output, "portable")
        assert {n.domain for n in onnx.load(output).graph.node} <= {"", "ai.onnx"}


class TestTensorRT:
    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory) -> onnx.ModelProto:
        output = tmp_path_factory.mktemp("tensorrt") / "out.onnx"
        compiled(CNN, output, "tensorrt")
        return onnx.load(output)

    def test_codes_are_int8_around_zero(self, model):
        stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        pairs = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        assert len(pairs) > 20
        for pair in pairs:
            zero = stored[pair.input[2]]
            assert zero.dtype == np.int8
            assert not zero.any()

    def test_biases_are_float(self, model):
        stored = {t.name: t.data_type for t in model.graph.initializer}
        biases = [n.input[2] for n in model.graph.node if n.op_type == "Conv" and len(n.input) > 2]
        assert biases
        assert {stored[name] for name in biases} == {onnx.TensorProto.FLOAT}

    def test_a_relu_stays_before_the_pair(self, model):
        made = {t: n for n in model.graph.node for t in n.output}
        before = Counter(made[n.input[0]].op_type for n in model.graph.node
                         if n.op_type == "QuantizeLinear" and n.input[0] in made)
        assert before["Relu"] >= 3
        assert "Relu" in {n.op_type for n in model.graph.node}


def test_tensorrt_gets_no_weights_that_a_cast_decodes(tmp_path):
    """The text encoder's table would be stored as int8 elsewhere."""
    output = tmp_path / "out.onnx"
    compiled(TEXT, output, "tensorrt")
    model = onnx.load(output)
    stored = {t.name: t.data_type for t in model.graph.initializer}
    users = {n.op_type for n in model.graph.node for name in n.input if stored.get(name) == onnx.TensorProto.INT8}
    assert users == {"DequantizeLinear", "QuantizeLinear"}


@pytest.mark.skipif(not saturates(), reason="int8 products don't saturate on this processor")
def test_what_would_saturate_here_is_judged_by_its_pairs(tmp_path):
    report = compiled(CNN, tmp_path / "out.onnx", "cpu-arm64")
    assert report.ok
    assert any("int8 saturates on this processor" in n for n in report.verdict.notices)
    assert all(not n.ran_as for n in report.nodes)


class TestCheck:
    @pytest.mark.parametrize("folder", [CNN, TEXT, MODELS / "recurrent", MODELS / "decoder"], ids=lambda f: f.name)
    def test_expected_kernels_are_those_that_ran(self, tmp_path, folder):
        output = tmp_path / "out.onnx"
        onnxq.compile(folder / "model.onnx", output, calib=folder / "calib.npz", measure=False)
        found = check(output, data=folder / "calib.npz")
        agreed = found["agreement"]
        assert agreed["nodes"] == len(found["nodes"]) > 10
        assert agreed["provider"] == agreed["nodes"]
        assert agreed["kernel"] >= 0.98 * agreed["nodes"]
        assert (found["cuts"], found["copies"], found["advice"]) == (0, 0, [])

    def test_int8_for_the_cpu_is_no_model_for_cuda(self, tmp_path):
        output = tmp_path / "out.onnx"
        compiled(CNN, output, "cpu")
        found = check(output, target="cuda")
        ran = Counter((n["op"], n["provider"]) for n in found["nodes"])
        assert ran["QLinearConv", "CPUExecutionProvider"] == 11
        assert ran["Gemm", "CUDAExecutionProvider"] == 1
        assert found["cuts"] > 0
        assert found["copies"] > 0
        assert found["agreement"] is None
        assert "11 QLinearConv run on the CPU: the provider has no QLinearConv" in found["advice"]
        assert "--target cuda" in found["advice"][-1]

    def test_tensorrt_takes_no_uint8(self, tmp_path):
        output = tmp_path / "out.onnx"
        compiled(CNN, output, "portable")
        found = check(output, target="tensorrt")
        assert any("takes int8 codes, not uint8" in said for said in found["advice"])

    def test_sizes_are_computed_on_the_cpu_at_no_cost(self):
        found = check(TEXT / "model.onnx", target="cuda")
        away = [n for n in found["nodes"] if n["provider"] == "CPUExecutionProvider"]
        assert {n["reason"] for n in away} == {"it computes sizes, which are read on the CPU"}
        assert (found["cuts"], found["copies"]) == (0, 0)


@pytest.mark.parametrize("version", ["1.19", "1.22", "1.23"])
@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w4a16", "w2a16", "w4a8"])
def test_older_runtimes_get_what_they_have(tmp_path, scheme, version):
    output, folder = tmp_path / "out.onnx", MODELS / "decoder"
    onnxq.compile(folder / "model.onnx", output, scheme=scheme, runtime=version, measure=False)
    model = onnx.load(output)
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    types = {t.data_type for t in model.graph.initializer}
    assert opset <= {"1.19": 21, "1.22": 22, "1.23": 23}[version]
    assert model.ir_version <= {"1.19": 10, "1.22": 10, "1.23": 11}[version]
    if version != "1.23":
        assert not types & {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
        assert "GatherBlockQuantized" not in {n.op_type for n in model.graph.node}
    assert not types & {onnx.TensorProto.INT2, onnx.TensorProto.UINT2}
    bits = {a.i for n in model.graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "bits"}
    assert bits <= ({4} if version == "1.19" else {4, 8})


@pytest.mark.parametrize(("version", "kernel"), [("1.26", "stored"), ("1.27", "GatherBlockQuantized")])
def test_tables_of_an_odd_number_of_blocks_are_decoded_where_their_kernel_errs(tmp_path, version, kernel):
    """The text encoder's rows have 96 columns: 3 blocks of 32 with zero points of 4 bits."""
    report = onnxq.compile(TEXT / "model.onnx", tmp_path / "out.onnx", scheme="w4a16", runtime=version, measure=False)
    [verdict] = [n for n in report.nodes if n.op == "Gather" and n.scheme not in ("float", "folded")]
    assert verdict.lowering == kernel
