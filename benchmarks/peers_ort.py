"""onnxruntime.quantization as a user would call it, without preprocessing and without choosing nodes by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

from benchmarks.models import Array, Case, read

BATCH = 8  # rows per calibration feed, as onnxq feeds them
_LINEARS = ["MatMul", "Gemm"]


class Rows(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """The first `samples` rows of a case's calibration data, a batch per feed."""

    def __init__(self, case: Case, samples: int) -> None:
        self._feeds = self._cut(case, samples)

    @staticmethod
    def _cut(case: Case, samples: int) -> Iterator[dict[str, Array]]:
        data = read(case.calib)
        rows, step = min(samples, len(data[next(iter(case.stored))])), case.batch(BATCH)
        for start in range(0, rows - rows % step if case.max_batch else rows, step):
            yield case.feed(data, start, min(start + step, rows))

    def get_next(self) -> dict[str, Any] | None:
        """The next feed, None at the end."""
        return next(self._feeds, None)


def static_default(case: Case, output: Path, samples: int) -> None:
    """quantize_static with all its defaults: QDQ, int8 activations and weights per tensor, min-max ranges."""
    quantize_static(case.model, output, Rows(case, samples))


def static_unsigned(case: Case, output: Path, samples: int) -> None:
    """quantize_static with uint8 activations and int8 weights per channel, min-max ranges: its best for CNNs on x86."""
    quantize_static(case.model, output, Rows(case, samples), per_channel=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)


def static_linears(case: Case, output: Path, samples: int) -> None:
    """quantize_static for MatMul and Gemm with constant weights, outputs left float, as suits an x86 processor.

    uint8 activations, int8 weights per channel, min-max ranges.
    """
    quantize_static(
        case.model, output, Rows(case, samples), op_types_to_quantize=_LINEARS, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": _LINEARS})


def dynamic(case: Case, output: Path, samples: int) -> None:
    """quantize_dynamic with int8 weights per channel; activations uint8 with scales made at run time, no data."""
    del samples
    quantize_dynamic(case.model, output, per_channel=True, weight_type=QuantType.QInt8)
