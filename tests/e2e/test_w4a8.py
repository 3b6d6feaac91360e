"""compile() with 4-bit weights that integer kernels read as int8, on the project's decoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import onnx
import pytest
from lowering_support import MODELS

import onnxq
from onnxq import Plan
from onnxq.report.report import Report

DECODER, TEXT = MODELS / "decoder", MODELS / "text_encoder"
Make = Callable[[bool], tuple[Path, Report]]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The decoder, with calibration data or without."""
    folder = tmp_path_factory.mktemp("w4a8")

    @cache
    def make(calibrated: bool) -> tuple[Path, Report]:
        output = folder / f"{calibrated}.onnx"
        data = {"calib": str(DECODER / "calib.npz"), "samples": 64} if calibrated else {}
        return output, onnxq.compile(DECODER / "model.onnx", output, scheme="w4a8", measure=False,
                                     eval=str(DECODER / "eval.npz"), metric="perplexity", **data)

    return make


def loss(report: Report) -> float:
    assert report.accuracy is not None
    return report.accuracy.compiled / float(report.accuracy.float or 0)


def test_perplexity_and_size(decoder: Make) -> None:
    """Times float's: 1.020 with data, 1.028 without (w4a16 in blocks of 16, with data: 1.013)."""
    assert loss(decoder(True)[1]) < 1.03
    assert loss(decoder(True)[1]) < loss(decoder(False)[1]) < 1.04
    for calibrated in (True, False):
        report = decoder(calibrated)[1]
        assert report.ok, report.verdict.failures
        assert report.size is not None
        assert report.size.ratio < 0.24


def test_every_layer_runs_in_integers_and_the_table_by_its_kernel(decoder: Make) -> None:
    path, report = decoder(True)
    assert Counter(n.ran_as for n in report.nodes if n.weights) == {
        "com.microsoft.MatMulIntegerToFloat": 22, "com.microsoft.GatherBlockQuantized": 1}
    layers = [n for n in report.nodes if n.op == "MatMul" and n.weights]
    assert {n.reason for n in layers} == {
        "int4 weights in blocks of 16, which the kernel reads as int8; what it reads is quantized at run time, a scale "
        "per token"}
    for node in layers:
        encoding = report.tensors[node.weights[0]]
        assert (encoding.dtype, encoding.granularity, encoding.block_size) == ("int4", "block", 16)
        assert encoding.code_bytes is not None
        assert encoding.float_bytes is not None
        assert encoding.code_bytes < 0.15 * encoding.float_bytes
    onnx.checker.check_model(str(path), full_check=True)


def test_a_compiled_model_compiles_to_itself(decoder: Make, tmp_path: Path) -> None:
    once = decoder(True)[0]
    report = onnxq.compile(once, tmp_path / "twice.onnx", scheme="w4a8", measure=False)
    assert report.ok, report.verdict.failures
    assert {row.scheme for row in report.nodes} <= {"given", "float", "folded"}
    stored = [{t.name: t.SerializeToString() for t in onnx.load(path).graph.initializer}
              for path in (once, tmp_path / "twice.onnx")]
    assert stored[0] == stored[1]


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    onnxq.compile(TEXT / "model.onnx", tmp_path / "a.onnx", scheme="w4a8", measure=False, samples=16,
                  calib=str(TEXT / "calib.npz"), save_plan=tmp_path / "plan")
    plan = Plan.load(tmp_path / "plan")
    assert plan.multiples.keys() < plan.rounded.keys(), "tables have codes by block, too"
    onnxq.compile(TEXT / "model.onnx", tmp_path / "b.onnx", plan=tmp_path / "plan", measure=False, samples=16)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_what_is_not_faster_is_stored_in_as_few_bits(tmp_path: Path) -> None:
    """Measured on one token, where integer kernels of so small layers gain little: some stay float."""
    report = onnxq.compile(TEXT / "model.onnx", tmp_path / "a.onnx", scheme="w4a8", calib=str(TEXT / "calib.npz"),
                           samples=8, threads=1, objective="latency")
    assert report.ok, report.verdict.failures
    layers = [n for n in report.nodes if n.op in ("MatMul", "Gemm", "Gather") and n.weights]
    assert layers or all(n.scheme in ("float", "folded") for n in report.nodes)  # or none gains
    for node in layers:
        dtype = report.tensors[node.weights[0]].dtype
        assert dtype == ("int4" if node.scheme == "w4a8" and node.op != "Gather" else "uint4"), node
