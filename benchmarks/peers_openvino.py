"""OpenVINO on the CPU, and NNCF's post-training quantization for it, as their documentation calls them.

Runs in an environment that has them (benchmarks/peers/requirements.txt). `python -m benchmarks.peers_openvino` prints
the versions there as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.models import Array, Case, read

PACKAGES = ("onnxq", "onnxruntime", "openvino", "nncf")
FLOAT, HALF = "f32", "bf16"


class Compiled:
    """A model in OpenVINO that runs as onnxq.runtime.session.Session does.

    `precision` is what float layers compute in: f32, bf16, or "" for OpenVINO's own choice. Tuned for latency.
    Raises ValueError for bf16 on a processor that has no instructions for it, where OpenVINO would run in float.
    """

    def __init__(self, model: Path, threads: int, precision: str) -> None:
        import openvino

        self._core = openvino.Core()
        if precision == HALF and "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ValueError("this processor has no bf16")
        self._config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        if precision:
            self._config["INFERENCE_PRECISION_HINT"] = precision
        self._path = model
        self._compiled: Any = None

    def run(self, feed: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once and return the wanted outputs, which must be named."""
        assert outputs is not None
        if self._compiled is None:
            self._compiled = self._core.compile_model(self._core.read_model(self._path), "CPU", self._config)
        found = self._compiled(dict(feed))
        return {name: found[name] for name in outputs}

    def runner(self, feed: Mapping[str, Array]) -> Callable[[], None]:
        """A call that runs the model on the feed, compiled for just its shapes, which suits OpenVINO best."""
        import openvino

        model = self._core.read_model(self._path)
        model.reshape({name: list(array.shape) for name, array in feed.items()})
        request = self._core.compile_model(model, "CPU", self._config).create_infer_request()
        for name, array in feed.items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

        def call() -> None:
            request.infer()

        return call


def quantize(case: Case, output: Path, samples: int) -> None:
    """nncf.quantize with its defaults over the first rows of the calibration data, one by one; an .xml and a .bin.

    Models with attention are declared transformers, as NNCF asks for: it then smooths activations.
    """
    import nncf
    import openvino

    model = openvino.Core().read_model(case.model)
    data = read(case.calib)
    rows = min(samples, len(data[next(iter(case.stored))]))
    feeds = [case.feed(data, row, row + 1) for row in range(rows)]
    kind = nncf.ModelType.TRANSFORMER if _attends(model) else None
    quantized = nncf.quantize(model, nncf.Dataset(feeds), subset_size=rows, model_type=kind)
    openvino.save_model(quantized, output, compress_to_fp16=False)


def _attends(model: Any) -> bool:
    """Whether a MatMul reads what a Softmax made."""
    return any(reader.get_node().get_type_name() == "MatMul"
               for node in model.get_ordered_ops() if node.get_type_name() == "Softmax"
               for reader in node.output(0).get_target_inputs())


if __name__ == "__main__":
    import nncf  # noqa: F401  # both must load
    import openvino  # noqa: F401

    json.dump({package: version(package) for package in PACKAGES}, sys.stdout)
