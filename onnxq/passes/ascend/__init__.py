"""From pairs of Q and DQ to what Ascend's tools take: ATC's own operators, or pairs of AMCT's granularities."""

from __future__ import annotations

from onnxq.passes.ascend.ascend_operators import AscendOperators
from onnxq.passes.ascend.one_scale import OneScale
from onnxq.passes.ascend.standard_operators import StandardOperators
from onnxq.passes.manager import Pass


def deploy() -> list[Pass]:
    """Passes whose result ATC compiles; onnxruntime does not know its operators."""
    return [AscendOperators()]


def for_amct() -> list[Pass]:
    """Passes whose result amct_onnx.convert_qat_model takes."""
    return [OneScale()]


def as_standard() -> list[Pass]:
    """Passes that make of a deploy graph one that onnxruntime computes."""
    return [StandardOperators()]


__all__ = ["AscendOperators", "OneScale", "StandardOperators", "as_standard", "deploy", "for_amct"]
