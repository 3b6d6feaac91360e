"""What measuring makes of a Plan; times are made up, so that no test depends on real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import onnxq
from onnxq import settling, verification
from onnxq.plan import Plan
from onnxq.planner.pricing import Prices
from onnxq.report.report import Latency, Report
from onnxq.runtime.measure import Timing
from onnxq.runtime.race import KernelTime
from onnxq.settling import MOST_CONFIRMATIONS

MODELS = Path(__file__).resolve().parents[2] / "models"
FOLDER = MODELS / "digits_cnn"
Speed = Callable[[list[str]], float]


def compiled(tmp_path: Path, **options: Any) -> Report:
    return onnxq.compile(FOLDER / "model.onnx", tmp_path / "o.onnx", calib=FOLDER / "calib.npz", samples=32,
                         threads=1, force=True, **options)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Sets how fast models are by the operators in them, and what kernels take; gives the integer Convs of each."""
    seen: list[int] = []

    def set_times(speed: Callable[[int], float], kernels: Callable[[str], tuple[float, float]],
                  chosen: float = 1.1) -> list[int]:
        def latency(reference: Path, made: Path, *_: Any, **__: Any) -> Latency:
            convs = [n.op_type for n in onnx.load(made).graph.node].count("QLinearConv")
            seen.append(convs)
            ratio = speed(convs)
            return Latency(1.0, 1 / ratio, ratio, ratio - 0.01, ratio + 0.01, {}, 1, "calib.npz")

        def price(graph: Any, plan: Plan, target: Any, feeds: Any, options: Any, cache: Any, *_: Any) -> Prices:
            from onnxq.planner.candidates import units

            found = Prices(units(plan, graph))
            for unit in found.units:
                found.elements |= dict.fromkeys(unit.reads + unit.makes, 1)
                found.ranks |= dict.fromkeys(unit.reads + unit.makes, 4)
                a, b = kernels(unit.name)
                found.times[unit.name] = {"float": KernelTime(a, a, a, 3), unit.kernel: KernelTime(b, b, b, 3)}
            return found

        monkeypatch.setattr(verification, "latency", latency)
        monkeypatch.setattr(settling, "price", price)
        monkeypatch.setattr(settling, "compare_models", lambda *_, **__: Timing(1, 1, chosen, chosen, chosen, 5))
        return seen

    return set_times


def quantized(report: Report) -> int:
    return sum(row.lowering == "QLinearConv" and row.part_of is None and row.op == "Conv" for row in report.nodes)


def test_what_pays_is_kept_and_its_times_are_reported(tmp_path: Path, timed: Callable[..., list[int]]) -> None:
    seen = timed(lambda convs: 2.0, lambda name: (2.0, 1.0))
    report = compiled(tmp_path)
    assert quantized(report) > 5
    assert len(seen) == 2  # against the float graph that int8 has to beat, and against the file as it came
    row = next(row for row in report.nodes if row.lowering == "QLinearConv" and row.part_of is None)
    assert row.times == {"float": 2.0, "QLinearConv": 1.0}
    assert report.latency is not None
    assert report.latency.speedup == 2.0


def test_kernels_that_are_slower_stay_float_and_say_so(tmp_path: Path, timed: Callable[..., list[int]]) -> None:
    everything = quantized(compiled(tmp_path, measure=False))
    first = next(n.name for n in onnx.load(FOLDER / "model.onnx").graph.node if n.op_type == "Conv")
    timed(lambda convs: 1.5, lambda name: (1.0, 3.0) if name == first else (2.0, 1.0))
    report = compiled(tmp_path)
    assert quantized(report) == everything - 1
    row = next(row for row in report.nodes if row.name == first)
    assert row.scheme in ("float", "stored")
    assert row.reason.endswith("measured as fast or faster in float")
    assert row.times == {"float": 1.0, "QLinearConv": 3.0}


def test_the_table_stays_where_it_is_faster_as_a_whole(tmp_path: Path, timed: Callable[..., list[int]]) -> None:
    everything = quantized(compiled(tmp_path, measure=False))
    first = next(n.name for n in onnx.load(FOLDER / "model.onnx").graph.node if n.op_type == "Conv")
    timed(lambda convs: 1.5, lambda name: (1.0, 3.0) if name == first else (2.0, 1.0), chosen=0.9)
    assert quantized(compiled(tmp_path)) == everything


def test_nothing_pays_runs_floats_own_kernels(tmp_path: Path, timed: Callable[..., list[int]]) -> None:
    seen = timed(lambda convs: 0.8 if convs else 1.0, lambda name: (2.0, 1.0))
    report = compiled(tmp_path)
    assert report.ok
    assert quantized(report) == 0
    assert any(n.startswith("nothing pays, left float: int8 ran at 0.80x") for n in report.verdict.notices)
    assert len(seen) <= MOST_CONFIRMATIONS
    assert report.latency is not None
    assert report.latency.speedup == 1.0


def test_a_gain_within_noise_goes_to_the_smaller_change_unless_size_is_asked_for(
        tmp_path: Path, timed: Callable[..., list[int]]) -> None:
    timed(lambda convs: 1.01 if convs else 1.0, lambda name: (2.0, 1.0))
    assert quantized(compiled(tmp_path)) == 0
    assert quantized(compiled(tmp_path, objective="latency")) > 5
    timed(lambda convs: 0.99 if convs else 1.0, lambda name: (2.0, 1.0))
    assert quantized(compiled(tmp_path, objective="size")) > 5


def test_regions_that_gain_least_are_reverted_first_and_confirmed_at_most_five_times(
        tmp_path: Path, timed: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is slow while any of its last Convs is in integers; each Conv counts as a region here."""
    everything = quantized(compiled(tmp_path, measure=False))
    monkeypatch.setattr(settling, "by_gain", lambda prices, plan: [
        list(u.nodes) for u in prices.units if u.op == "Conv"])
    seen = timed(lambda convs: 1.5 if 0 < convs <= everything // 2 else 0.8 if convs else 1.0, lambda name: (2.0, 1.0))
    report = compiled(tmp_path)
    assert 0 < quantized(report) <= everything // 2
    assert len(seen) <= MOST_CONFIRMATIONS
    assert report.latency is not None
    assert report.latency.speedup == 1.5
    reasons = {row.reason for row in report.nodes if row.op == "Conv" and row.scheme in ("float", "stored")}
    assert all(r.endswith("its region is faster by itself, but the whole model was not") for r in reasons)


def test_measured_choices_are_saved_and_replayed(tmp_path: Path, timed: Callable[..., list[int]]) -> None:
    first = next(n.name for n in onnx.load(FOLDER / "model.onnx").graph.node if n.op_type == "Conv")
    timed(lambda convs: 1.5, lambda name: (1.0, 3.0) if name == first else (2.0, 1.0))
    compiled(tmp_path, save_plan=tmp_path / "plan")
    made = (tmp_path / "o.onnx").read_bytes()
    onnxq.compile(FOLDER / "model.onnx", tmp_path / "o.onnx", plan=tmp_path / "plan", force=True, samples=32)
    assert (tmp_path / "o.onnx").read_bytes() == made


def test_shapes_to_time_with(tmp_path: Path, timed: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[list[tuple[int, ...]]] = []
    timed(lambda convs: 1.5, lambda name: (2.0, 1.0))
    latency = verification.latency

    def noted(reference: Path, made: Path, feeds: Any, *rest: Any, **more: Any) -> Latency:
        fed.append([v.shape for feed in feeds for v in feed.values()])
        return latency(reference, made, feeds, *rest, **more)

    monkeypatch.setattr(verification, "latency", noted)
    [axis] = [d.dim_param for d in onnx.load(FOLDER / "model.onnx").graph.input[0].type.tensor_type.shape.dim
              if d.dim_param]
    compiled(tmp_path, shapes={axis: (1, 3)})
    assert [shape[0] for shape in fed[0]] == [1, 3]
    with pytest.raises(onnxq.errors.UsageError, match="no dynamic axis"):
        compiled(tmp_path, shapes={"nowhere": 2})
