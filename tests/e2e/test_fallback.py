"""Layers that stay float by number: which, why, and together with names, measuring and saved plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random
from lowering_support import MODELS

import onnxq
from onnxq.recipe import Fallback, Recipe
from onnxq.report.report import Report
from onnxq.schemes import scheme

# how far the greatest value of what each layer reads stands out
SPIKES = {"first": 4.0, "second": 30.0, "third": 8.0, "fourth": 60.0}
NAMES = list(SPIKES)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of four linear layers, each on an input of its own, and its data."""
    folder = tmp_path_factory.mktemp("fallback")
    model = make_model([node("MatMul", f"x{k} w{k}", f"y{k}", name=name) for k, name in enumerate(NAMES)],
                       {f"x{k}": ["n", 32] for k in range(4)}, {f"y{k}": None for k in range(4)},
                       {f"w{k}": random(32, 32, seed=k) for k in range(4)})
    onnx.save(model, folder / "m.onnx")
    rows = {f"x{k}": random(64, 32, seed=k) for k in range(4)}
    for k, spike in enumerate(SPIKES.values()):
        rows[f"x{k}"][5, 7] = spike
    np.savez(folder / "calib.npz", **rows)
    return folder / "m.onnx", folder / "calib.npz"


def compiled(source: tuple[Path, Path], out: Path, **options: Any) -> Report:
    options = {"calib": source[1], "measure": False, "force": True, **options}
    report = onnxq.compile(source[0], out, **options)
    assert report.ok
    return report


def kept(report: Report) -> dict[str, str]:
    return {n.name: n.reason for n in report.nodes if n.scheme == "float" and n.name in NAMES}


@pytest.mark.parametrize("scheme_name", ["w8a8", "w8a8-dynamic"])
def test_the_most_sensitive_layers_stay_float(scheme_name: str, source: tuple[Path, Path], tmp_path: Path) -> None:
    report = compiled(source, tmp_path / "o.onnx", scheme=scheme_name, fallback=2, outliers="none")
    found = kept(report)
    assert list(found) == ["second", "fourth"]
    assert found["fourth"].startswith("kept float: 1st most sensitive by range_parm (")
    assert found["second"].startswith("kept float: 2nd most sensitive by range_parm (")
    assert found["second"].endswith(") of --fallback 2")
    x = np.load(source[1])["x3"]
    assert f"({np.abs(x).max() / x.astype(np.float64).std():.1f})" in found["fourth"]
    assert "2 of 4 layers (50%) stay float" in " ".join(report.verdict.notices)
    stored = {t.name: t.data_type for t in onnx.load(tmp_path / "o.onnx").graph.initializer}
    assert (stored["w1"], stored["w3"]) == (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT)
    assert "w0" not in stored


@pytest.mark.parametrize("rank", ["kurtosis", "sqnr"])
def test_other_ranks_see_the_same_here(rank: str, source: tuple[Path, Path], tmp_path: Path) -> None:
    chosen = Recipe(scheme("w8a8"), fallback=Fallback(level=2, rank=rank))
    found = kept(compiled(source, tmp_path / "o.onnx", recipe=chosen))
    assert set(found) == {"second", "fourth"}
    assert f"1st most sensitive by {rank} (" in found["fourth"]


def test_names_do_not_count_and_the_call_goes_before_the_recipe(source: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("scheme: w8a8\nfallback: {disable_names: [fourth], disable_level: L3}\n")
    found = kept(compiled(source, tmp_path / "o.onnx", recipe=tmp_path / "r.yaml", fallback=1))
    assert found["fourth"] == "kept float as asked (fourth)"
    assert list(found) == ["second", "fourth"]
    assert found["second"].startswith("kept float: 1st most sensitive")
    none = compiled(source, tmp_path / "o.onnx", recipe=tmp_path / "r.yaml", fallback=0)
    assert list(kept(none)) == ["fourth"]
    assert "1 of 4 layers (25%) stay float" in " ".join(none.verdict.notices)


def test_more_than_there_are(source: tuple[Path, Path], tmp_path: Path) -> None:
    report = compiled(source, tmp_path / "o.onnx", fallback=9, keep_float=["first"])
    assert set(kept(report)) == set(NAMES)
    assert "--fallback 9 keeps all 3 layers float, since there are no more" in report.verdict.notices


def test_a_plan_is_replayed_and_nothing_ranked_again(source: tuple[Path, Path], tmp_path: Path) -> None:
    first = compiled(source, tmp_path / "a.onnx", fallback=2, save_plan=tmp_path / "plan")
    again = compiled(source, tmp_path / "b.onnx", fallback=2, plan=tmp_path / "plan", calib=None)
    assert kept(again) == kept(first)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    other = compiled(source, tmp_path / "c.onnx", plan=tmp_path / "plan", calib=None)
    assert kept(other) == kept(first)


def test_what_is_ranked_stays_float_whatever_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are timed after the ranking: what that refuses has its own reason, what is kept is no candidate."""
    from onnxq import settling
    from onnxq.planner.choice import Choice

    timed: list[str] = []

    def choose(graph: Any, prices: Any, tie: float) -> Choice:
        timed.extend(u.name for u in prices.units)
        return Choice({prices.units[0].name: "slower here"}, frozenset())

    monkeypatch.setattr(settling, "choose", choose)
    monkeypatch.setattr(settling.Settling, "_faster", lambda *_: True)
    monkeypatch.setattr(settling.Settling, "_pays", lambda *_: True)
    monkeypatch.setattr(settling.Settling, "_beside_the_file", lambda *_: None)
    folder = MODELS / "text_encoder"
    report = onnxq.compile(folder / "model.onnx", tmp_path / "o.onnx", calib=folder / "calib.npz", samples=16,
                           fallback=2)
    ranked = {n.name for n in report.nodes if n.reason.startswith("kept float: ")}
    assert len(ranked) == 2
    assert timed
    assert not ranked & set(timed)
    assert [n.name for n in report.nodes if "slower here" in n.reason] == [timed[0]]
