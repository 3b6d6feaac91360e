"""Targets as they are asked for: schemes, formats, and older onnxruntimes."""

from __future__ import annotations

import onnxruntime
import pytest
from conftest import make_model, node

from onnxq import aiming
from onnxq.errors import UsageError
from onnxq.recipe import Recipe
from onnxq.schemes import scheme
from onnxq.targets import ON_ARM, TARGETS, WITHOUT_VNNI, runtimes


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_has_its_own_auto_schemes(name):
    target = TARGETS[name]
    for given in (target.scheme, target.scheme_without_data):
        assert given in aiming.schemes_of(target)


@pytest.mark.parametrize(("target", "given", "why"), [
    ("cuda", "w8a8", "multiplies no integers"), ("cann", "w8a8", "multiplies no integers"),
    ("cuda", "w8a8-dynamic", "finds no scales at run time, per token"),
    ("tensorrt", "w8a8-dynamic-tensor", "finds no scales at run time, per tensor"),
    ("tensorrt", "w4a8", "finds no scales at run time")])
def test_a_scheme_without_kernels_is_refused_with_those_that_have_some(target, given, why):
    with pytest.raises(UsageError, match=why) as caught:
        aiming.aim(Recipe(scheme(given)), TARGETS[target])
    assert ("w8a8" if target == "tensorrt" else "w4a16") in str(caught.value)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("given", ["w4a16", "w8a16", "w2a16"])
def test_weight_only_schemes_run_where_weights_are_decoded(name, given):
    if not TARGETS[name].decodes:
        with pytest.raises(UsageError, match="decodes no weights"):
            aiming.aim(Recipe(scheme(given)), TARGETS[name])
        return
    assert aiming.aim(Recipe(scheme(given)), TARGETS[name]).scheme == scheme(given)


def test_activations_take_the_type_of_the_target():
    spec = aiming.aim(Recipe(scheme("w8a8")), TARGETS["tensorrt"]).scheme.activations
    assert (spec.dtype, spec.symmetric) == ("int8", True)
    assert aiming.aim(Recipe(scheme("w8a8")), TARGETS["cpu"]).scheme == scheme("w8a8")


def test_one_cpu_target_by_processor(monkeypatch):
    monkeypatch.setattr("onnxq.runtime.machine.saturates", lambda: True)
    assert aiming.target_for("cpu").padded_window == WITHOUT_VNNI.padded_window > 0
    monkeypatch.setattr("onnxq.runtime.machine.saturates", lambda: False)
    assert (aiming.target_for("cpu").saturates, aiming.target_for("cpu").machines) == (False, TARGETS["cpu"].machines)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert aiming.target_for("cpu").machines == ON_ARM.machines
    assert aiming.target_for("cpu").name == "cpu"


def test_cpu_portable_is_the_same_whatever_the_processor(monkeypatch):
    found = []
    for here in (True, False):
        monkeypatch.setattr("onnxq.runtime.machine.saturates", lambda here=here: here)
        found.append(aiming.target_for("cpu-portable"))
    assert found[0] == found[1]
    assert found[0].saturates


@pytest.mark.parametrize("name", ["portable", "tensorrt"])
def test_targets_of_pairs_refuse_fused_operators(name):
    assert aiming.target_for(name, "qdq").portable
    with pytest.raises(UsageError, match="leave --format out"):
        aiming.target_for(name, "qoperator")


def test_an_unknown_target_names_those_that_there_are():
    with pytest.raises(UsageError, match=r"cpu-portable.*onnxq targets"):
        aiming.target_for("cpu2")


class TestOlder:
    @pytest.mark.parametrize(("version", "opset", "ir_version"), [
        ("1.19", 21, 10), ("1.20.1", 21, 10), ("1.22", 22, 10), ("1.23.2", 23, 11), ("1.24", 25, 13), ("1.30", 26, 13),
        ("1.32", 27, 14), ("2.0", 27, 14)])
    def test_opsets(self, version, opset, ir_version):
        found = aiming.target_for("cpu", runtime=version)
        assert (found.opset, found.ir_version) == (opset, ir_version)

    def test_kernels_that_came_later_are_left_out(self):
        old, new = (aiming.target_for("cpu", runtime=v).lowerings for v in ("1.20", "1.23"))
        assert set(new) - set(old) == {("DepthToSpace", "int"), ("Gather", "blocks")}
        assert new == aiming.target_for("cpu").lowerings

    def test_without_a_version_it_is_the_installed_one(self, monkeypatch):
        assert aiming.target_for("cpu") == aiming.target_for("cpu", runtime=onnxruntime.__version__)
        monkeypatch.setattr("onnxruntime.__version__", "1.22.1")
        assert aiming.target_for("cpu").since == "1.22"
        assert not aiming.target_for("cpu").code_bits

    def test_rows_of_an_odd_number_of_blocks(self):
        found = {v: aiming.target_for("cpu", runtime=v).odd_tables for v in ("1.23", "1.26.0", "1.27", "1.32")}
        assert found == {"1.23": False, "1.26.0": False, "1.27": True, "1.32": True}

    @pytest.mark.parametrize(("version", "blocks", "codes"), [
        ("1.19", {4}, set()), ("1.22", {4, 8}, set()), ("1.23", {4, 8}, {4}), ("1.24", {2, 4, 8}, {2, 4})])
    def test_bits(self, version, blocks, codes):
        found = aiming.target_for("cpu", runtime=version)
        assert (found.block_bits, found.code_bits) == (blocks, codes)

    def test_the_oldest(self):
        with pytest.raises(UsageError, match=r"1\.19 is the oldest"):
            aiming.target_for("cpu", runtime="1.18.1")

    @pytest.mark.parametrize("version", ["", "new", "1", "1.x", "v1.20"])
    def test_what_is_no_version(self, version):
        with pytest.raises(UsageError, match="is no version"):
            aiming.target_for("cpu", runtime=version)

    def test_tables_are_in_order(self):
        versions = [since for since, _, _ in runtimes.OPSETS]
        assert versions == sorted(versions)
        assert versions[0] == runtimes.OLDEST

    def test_a_model_of_a_later_opset_is_one_of_an_earlier_one_where_that_means_the_same(self, opened):
        graph = opened(make_model([node("Relu", "x", "y")], {"x": [2, 3]}, {"y": [2, 3]}, opset=22))
        aiming.lower(graph, aiming.target_for("cpu", runtime="1.20"))
        assert graph.opset == 21

    def test_what_came_later_can_not_be_lowered(self, opened):
        model = make_model([node("Gelu", "x", "y")], {"x": [2, 3]}, {"y": [2, 3]}, opset=20)
        aiming.lower(opened(model), aiming.target_for("cpu", runtime="1.19"))
        with pytest.raises(UsageError, match=r"opset 20.* takes 18 at most, but Gelu 'Gelu_y' is not of opset 18"):
            aiming.lower(opened(model), TARGETS["ascend"])


def test_operators_that_a_target_lacks_are_named(opened):
    graph = opened(make_model([node("Einsum", "x x", "y", equation="ij,ij->ij"), node("Relu", "y", "z")],
                              {"x": [2, 3]}, {"z": [2, 3]}))
    assert aiming.foreign(graph, TARGETS["cpu"]) == ""
    assert aiming.foreign(graph, TARGETS["cann"]) == "cann has no 1 Einsum: onnxq check tells where these run"
