"""compile() and check() for each target: legal by the target's tables, and as accurate as float where it runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random
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


@pytest.fixture(scope="module")
def for_tensorrt(tmp_path_factory) -> onnx.ModelProto:
    output = tmp_path_factory.mktemp("tensorrt") / "out.onnx"
    compiled(CNN, output, "tensorrt")
    return onnx.load(output)


class TestTensorRT:
    def test_codes_are_int8_around_zero(self, for_tensorrt):
        stored = {t.name: numpy_helper.to_array(t) for t in for_tensorrt.graph.initializer}
        pairs = [n for n in for_tensorrt.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        assert len(pairs) > 20
        for pair in pairs:
            zero = stored[pair.input[2]]
            assert zero.dtype == np.int8
            assert not zero.any()

    def test_biases_are_float(self, for_tensorrt):
        stored = {t.name: t.data_type for t in for_tensorrt.graph.initializer}
        biases = [n.input[2] for n in for_tensorrt.graph.node if n.op_type == "Conv" and len(n.input) > 2]
        assert biases
        assert {stored[name] for name in biases} == {onnx.TensorProto.FLOAT}

    def test_a_relu_stays_before_the_pair(self, for_tensorrt):
        made = {t: n for n in for_tensorrt.graph.node for t in n.output}
        before = Counter(made[n.input[0]].op_type for n in for_tensorrt.graph.node
                         if n.op_type == "QuantizeLinear" and n.input[0] in made)
        assert before["Relu"] >= 3
        assert "Relu" in {n.op_type for n in for_tensorrt.graph.node}


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


# ------------------------------------------------------------------ small models


def layers_of(opset: int = 21, axis: str | None = "n"):
    """Two products with a Relu, a LayerNormalization and a Gelu between them."""
    return make_model([node("MatMul", "x a", "b"), node("Relu", "b", "c"), node("LayerNormalization", "c s", "d"),
                       node("Gelu", "d", "e"), node("MatMul", "e f", "y")], {"x": [axis, 64]}, {"y": [axis, 64]},
                      {"a": random(64, 64), "s": random(64), "f": random(64, 64, seed=1)}, opset=opset)


def opset_of(path: Path) -> int:
    return next(o.version for o in onnx.load(path).opset_import if o.domain == "")


@pytest.mark.parametrize(("target", "runtime"), [("cpu", "1.20"), ("portable", None), ("cuda", None),
                                                 ("cann", None), ("ascend", None)])
def test_a_model_that_is_not_run_is_made_as_legal_as_one_that_is(tmp_path, target, runtime):
    given = {"scheme": "w4a16", "target": target, "runtime": runtime, "measure": False, "threads": 1,
             "shapes": {"n": 4} if TARGETS[target].static else {}}
    onnx.save(layers_of(22), tmp_path / "m.onnx")
    made = []
    for name, memory in (("whole", None), ("streamed", "10KB")):
        onnxq.compile(tmp_path / "m.onnx", tmp_path / f"{name}.onnx", max_memory=memory, **given)
        model = onnx.load(tmp_path / f"{name}.onnx")
        operators = Counter(n.op_type for n in model.graph.node)
        made.append((opset_of(tmp_path / f"{name}.onnx"), model.ir_version, operators))
    assert made[0] == made[1]


def test_codes_of_4_bits_do_not_lead_out_of_the_opsets_of_a_target(tmp_path):
    given = {"target": "ascend", "scheme": "w4a16", "measure": False, "shapes": {"n": 4}, "threads": 1}
    onnx.save(layers_of(20), tmp_path / "m.onnx")
    onnxq.compile(tmp_path / "m.onnx", tmp_path / "out.onnx", **given)
    assert opset_of(tmp_path / "out.onnx") == 18
    with pytest.raises(UsageError, match=r"opset 21 on, which ascend does not take; leave --pack out$"):
        onnxq.compile(tmp_path / "m.onnx", tmp_path / "packed.onnx", pack=True, **given)


def test_a_target_that_decodes_no_weights_gets_no_packed_ones(tmp_path):
    onnx.save(layers_of(), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="tensorrt decodes none; leave --pack out"):
        onnxq.compile(tmp_path / "m.onnx", tmp_path / "out.onnx", target="tensorrt", scheme="float", pack=True)


def test_axes_without_a_name_are_no_axes_to_name(tmp_path):
    onnx.save(layers_of(axis=None), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="some of x have no name; export the model with names for them"):
        onnxq.compile(tmp_path / "m.onnx", target="cann")
    assert any("for each size of x: export the model with names" in n for n in check(tmp_path / "m.onnx",
                                                                                     target="cann")["notices"])


@pytest.mark.parametrize(("target", "name"), [("ascend", "ascend"), ("web", "web"), ("cuda", "CUDAExecutionProvider")])
def test_check_says_what_is_not_here(target, name):
    if is_here(target_here(target)):
        pytest.skip("it is here")
    assert f"{name} is not here: nothing was run to compare with" in check(CNN / "model.onnx", target=target)["notices"]


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w8a8"])
@pytest.mark.parametrize("op", ["Relu", "Clip"])
@pytest.mark.parametrize("layer", ["MatMul", "MatMul Add", "Gemm"])
def test_portable_layers_in_front_of_a_clamp_run_in_integers(tmp_path, layer, op, scheme):
    """Which the runtime fuses with no DequantizeLinear unless something stands between."""
    linear = [node("Gemm", "x a bias", "b")] if layer == "Gemm" else [node("MatMul", "x a", "b")]
    linear += [node("Add", "b bias", "c")] if layer == "MatMul Add" else [node("Identity", "b", "c")]
    model = make_model([*linear, node(op, "c low" if op == "Clip" else "c", "d"), node("Sigmoid", "d", "e"),
                        node("MatMul", "e f", "y")], {"x": ["n", 64]}, {"y": ["n", 64]},
                       {"a": random(64, 64), "bias": random(64), "f": random(64, 64, seed=1),
                        **({"low": np.float32(0)} if op == "Clip" else {})}, opset=21)
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "calib.npz", x=random(16, 64, seed=2))
    report = onnxq.compile(tmp_path / "m.onnx", tmp_path / "out.onnx", target="portable", scheme=scheme, measure=False,
                           calib=tmp_path / "calib.npz", threads=1)
    assert report.ok, report.verdict.failures
    assert sum(n.scheme == scheme and n.op in ("Gemm", "MatMul") for n in report.nodes) == 2


def test_passes_of_a_target_can_be_dumped(tmp_path):
    onnx.save(layers_of(), tmp_path / "m.onnx")
    for name in ("to-half", "spell-out-norms"):
        onnxq.compile(tmp_path / "m.onnx", tmp_path / "out.onnx", target="cann", shapes={"n": 4}, measure=False,
                      force=True, dump=tmp_path / name, dump_after=name, threads=1)
        assert [p.name.split("-", 1)[1] for p in (tmp_path / name).iterdir()] == [f"{name}.onnx"]
    with pytest.raises(UsageError, match="there is no pass 'to-half'"):
        onnxq.compile(tmp_path / "m.onnx", tmp_path / "o.onnx", scheme="float", dump=tmp_path / "d",
                      dump_after="to-half")
