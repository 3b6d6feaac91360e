"""compile() by w8a8-sparse: int8 weights that fit fewer bits but for a few, and bits chosen within a size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lowering_support import MODELS

import onnxq
from onnxq import Plan
from onnxq.errors import RecipeError, UsageError
from onnxq.numerics import outliers
from onnxq.recipe import parse
from onnxq.report.report import Report

TEXT, CNN = MODELS / "text_encoder", MODELS / "digits_cnn"


def compiled(folder: Path, output: Path, **options: Any) -> Report:
    given = {"scheme": "w8a8-sparse", "calib": str(folder / "calib.npz"), "measure": False, "force": True, **options}
    return onnxq.compile(folder / "model.onnx", output, **given)


@pytest.mark.parametrize("folder", [TEXT, CNN], ids=lambda folder: folder.name)
def test_all_but_a_few_codes_fit_4_bits(tmp_path: Path, folder: Path) -> None:
    report = compiled(folder, tmp_path / "q.onnx", pack=True, save_plan=tmp_path / "plan")
    assert report.ok, report.verdict.failures
    plan = Plan.load(tmp_path / "plan")
    assert set(plan.widths) == set(plan.weights)
    assert set(plan.widths.values()) == {4}
    assert plan.rounded, "GPTQ found better codes than the nearest ones"
    for name, codes in plan.rounded.items():
        # rounded codes are protected where nearest ones are; nothing else is wide
        assert outliers.protected(codes, 4) <= 0.011 * codes.size + 1, name
    dense = compiled(folder, tmp_path / "dense.onnx", scheme="w8a8")
    assert report.size is not None
    assert dense.size is not None
    assert report.size.ratio < 0.85 * dense.size.ratio


def test_more_bits_are_nearer_to_float(tmp_path: Path) -> None:
    found = []
    for bits in (4, 5, 6):
        recipe = parse("scheme: w8a8-sparse").to_dict()
        recipe["scheme"]["weights"]["bits"] = bits
        (tmp_path / "r.yaml").write_text(str(recipe).replace("None", "null").replace("True", "true").replace(
            "False", "false").replace("(", "[").replace(")", "]"))
        report = compiled(TEXT, tmp_path / "q.onnx", scheme="auto", recipe=tmp_path / "r.yaml")
        assert report.accuracy is not None
        found.append(float(np.mean([one.sqnr_db for one in report.accuracy.outputs.values() if one.sqnr_db])))
    assert found[0] + 2 < found[1] < found[2]


def test_bits_are_chosen_within_a_size(tmp_path: Path) -> None:
    narrow, wide = (compiled(TEXT, tmp_path / f"{name}.onnx", pack=True, scheme=name).size
                    for name in ("w8a8-sparse", "w8a8"))
    assert narrow is not None
    assert wide is not None
    middle = int((narrow.compiled_bytes + wide.compiled_bytes) / 2)
    report = compiled(TEXT, tmp_path / "q.onnx", pack=True, max_size=str(middle), save_plan=tmp_path / "plan")
    assert report.ok, report.verdict.failures
    assert any(said.startswith("bits of weights were chosen within the size: ") for said in report.verdict.notices)
    widths = Plan.load(tmp_path / "plan").widths
    assert len(set(widths.values())) > 1 or len(widths) < len(Plan.load(tmp_path / "plan").weights)
    assert report.size is not None
    assert narrow.compiled_bytes < report.size.compiled_bytes <= middle
    with pytest.raises(UsageError, match=r"--max-size can't be met: with 4 bits for all weights the file takes"):
        compiled(TEXT, tmp_path / "q.onnx", pack=True, max_size="40kB")


def test_bits_are_chosen_for_what_is_packed() -> None:
    with pytest.raises(RecipeError, match=r"bits: .* give --pack"):
        parse("scheme: w8a8-sparse\nbits: {target: 5}")
    with pytest.raises(RecipeError, match=r"fraction: 0\.5 of a weight can't be protected; use 0 to 0\.1"):
        parse("scheme: {name: mine, activations: {dtype: uint8, symmetric: false}, operators: [MatMul],"
              " weights: {granularity: channel, bits: 4, fraction: 0.5}}")
    with pytest.raises(RecipeError, match=r"scheme\.weights\.bits: 7 has no kernel here"):
        parse("scheme: {name: mine, activations: {dtype: uint8, symmetric: false}, operators: [MatMul],"
              " weights: {granularity: channel, bits: 7}}")
