"""Target cuda on a GPU; without one these tests are skipped."""

from __future__ import annotations

import pytest
from lowering_support import MODELS

import onnxq
from onnxq.placement import check
from onnxq.runtime.machine import is_here, target_here
from onnxq.verifier import verify

pytestmark = pytest.mark.skipif(not is_here(target_here("cuda")), reason="CUDAExecutionProvider does not start here")

CNN, TEXT, DECODER = MODELS / "digits_cnn", MODELS / "text_encoder", MODELS / "decoder"


@pytest.mark.parametrize(("folder", "scheme", "metric"), [
    (CNN, "float", "top1"), (CNN, "w8a16", "top1"), (TEXT, "w8a16", "top1"), (TEXT, "w4a16", "top1"),
    (DECODER, "w8a16", "perplexity"), (DECODER, "w4a16", "perplexity")])
def test_models_run_on_the_gpu_as_expected(tmp_path, folder, scheme, metric):
    output = tmp_path / "out.onnx"
    drop = "2pt" if metric == "top1" else "3%"
    report = onnxq.compile(folder / "model.onnx", output, target="cuda", scheme=scheme, eval=folder / "eval.npz",
                           metric=metric, max_drop=drop)
    assert report.ok, report.verdict.failures
    found = check(output, target="cuda", data=folder / "eval.npz")
    agreed = found["agreement"]
    assert agreed["provider"] >= 0.98 * agreed["nodes"]
    assert agreed["kernel"] >= 0.98 * agreed["nodes"]
    again = verify(folder / "model.onnx", output, target="cuda", data=folder / "eval.npz", metric=metric, max_drop=drop)
    assert again.ok, again.verdict.failures
    assert again.latency is not None
