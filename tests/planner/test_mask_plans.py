"""What is decided on masks, and what is said where nothing is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import make_model, node
from masking_support import HEADS, LONG, LOWEST, Feed, canonical, feed, model, planned, rewritten

from onnxq.graph import load
from onnxq.plan import BOUNDED, FLOORED, ROW_FLOORED, Plan
from onnxq.planner import masks
from onnxq.planner.retreat import all_float, without_masks


def told(plan: Plan, name: str = "Softmax_y") -> str:
    """What is said on a node's mask."""
    return plan.nodes[name].reason.partition("; its mask ")[2]


def decided(made: onnx.ModelProto, folder: Path, calib: Feed | None) -> tuple[Plan, masks.Masks]:
    return planned(canonical(made, folder), None if calib is None else [calib])


def test_narrow_scores_get_a_fill_with_its_margin(tmp_path: Path) -> None:
    plan, found = decided(model(), tmp_path, feed(4.0))
    assert plan.maskings["Softmax_y"].form == BOUNDED
    assert -80 < plan.maskings["Softmax_y"].fill < -40
    assert told(plan) == ("hides with -51, exact to 1e-06 for scores 4.1 times those of the calibration data in rows "
                          "of up to 48 keys")
    assert found.floors == {}
    assert masks.notice(plan) == ("masks of attention scores: 1 hide with numbers in the range of exp, exact to 1e-06 "
                                  "within the margin that the report gives for each Softmax")


@pytest.mark.parametrize(("largest", "form"), [(9.0, FLOORED), (40.0, ROW_FLOORED)])
def test_wide_scores_keep_theirs_and_have_a_floor_to_try(largest: float, form: str, tmp_path: Path) -> None:
    plan, found = decided(model(), tmp_path, feed(largest))
    assert plan.maskings == {}
    assert told(plan) == (f"keeps its fill: none in the range of exp is exact for scores 3 times those of the "
                          f"calibration data (-{largest:g} to {largest:g})")
    assert [f.form for f in found.floors.values()] == [form]
    masks.use_floor(found, plan, "Softmax_y")
    assert plan.maskings == found.floors
    assert told(plan).startswith("hides by a floor of -51" if form == FLOORED else "hides 30 below the greatest score")
    masks.drop(plan, "Softmax_y", "keeps its fill: a floor is slower")
    assert (plan.maskings, told(plan)) == ({}, "keeps its fill: a floor is slower")


def test_without_data_only_exact_rewrites_are_made(tmp_path: Path) -> None:
    plan, found = decided(model(), tmp_path, None)
    assert (plan.added, plan.maskings, found.floors) == ({}, {}, {})
    assert told(plan) == "keeps its fill: another one takes calibration data"
    plan, _ = decided(model("where", -1e9), tmp_path, None)
    assert plan.added == {"Where_x": LOWEST}
    assert told(plan, "Where_x") == "is added instead, which is faster"
    assert masks.notice(plan) == "masks of attention scores: 1 are added instead of selected, the same bit for bit"


def test_a_fill_that_scores_might_reach_stays(tmp_path: Path) -> None:
    plan, _ = decided(model("where", -10000.0), tmp_path, None)
    assert (plan.added, told(plan, "Where_x")) == ({}, "is selected still: scores may lie near -10000")
    assert told(plan) == "keeps its fill: it selects scores"
    assert decided(model("where", -10000.0), tmp_path, feed(4.0))[0].added == {"Where_x": LOWEST}
    assert decided(model("where", -10000.0), tmp_path, feed(4000.0))[0].added == {}


def test_scores_that_are_no_numbers_decide_nothing(tmp_path: Path) -> None:
    for bad in (np.nan, np.inf):
        fed = feed(4.0)
        fed["q"][0, 0, 0, 0] = bad
        plan, _ = decided(model(), tmp_path, fed)
        assert (plan.maskings, told(plan)) == ({}, "keeps its fill: scores were infinite or no number")


def test_a_shallow_mask_stays(tmp_path: Path) -> None:
    plan, _ = decided(model(fill=-60.0), tmp_path, feed(4.0))
    assert (plan.maskings, told(plan)) == ({}, "hides with numbers in the range of exp")


@pytest.mark.parametrize("axis", [0, 1, -2])
def test_other_axes_are_left_alone(axis: int, tmp_path: Path) -> None:
    found = masks.find(canonical(model("product", axis=axis), tmp_path))
    assert (found.observed, found.added, found.statistics) == ({}, {}, {})


def test_the_last_axis_by_its_number(tmp_path: Path) -> None:
    assert list(masks.find(canonical(model("product", axis=3), tmp_path)).observed) == ["Softmax_y"]


def test_a_selection_of_its_own_mask_stays(tmp_path: Path) -> None:
    """A mask as large as the scores that one layer reads: adding it would be one more pass."""
    shape = ["N", HEADS, LONG, LONG]
    made = make_model([node("MatMul", "q k", "s"), node("Where", "c s fill", "x"), node("Softmax", "x", "y", axis=-1)],
                      {"q": ["N", HEADS, LONG, 8], "k": ["N", HEADS, 8, LONG], "c": (onnx.TensorProto.BOOL, shape)},
                      {"y": shape}, {"fill": np.float32(-np.inf)})
    assert masks.find(canonical(made, tmp_path)).added == {}


@pytest.mark.parametrize("form", ["where", "causal and padding", "added in turn"])
def test_what_was_rewritten_is_not_rewritten_again(form: str, tmp_path: Path) -> None:
    graph = canonical(model(form, -1e9), tmp_path)
    plan, _ = planned(graph, [feed(4.0)])
    path, _, _ = rewritten(graph, plan, tmp_path)
    again = load(path)
    plan, found = planned(again, [feed(4.0)])
    assert (plan.added, plan.maskings, found.floors) == ({}, {}, {})


def test_a_stored_triangle_is_a_mask(tmp_path: Path) -> None:
    stored = {"b": np.triu(np.full((LONG, LONG), LOWEST, np.float32), 1)}
    made = make_model([node("MatMul", "q k", "s"), node("Add", "b s", "x"), node("Softmax", "x", "y")],
                      {"q": ["N", HEADS, LONG, 8], "k": ["N", HEADS, 8, LONG]}, {"y": ["N", HEADS, LONG, LONG]}, stored)
    fed = feed(4.0)
    del fed["m"]
    assert [m.form for m in decided(made, tmp_path, fed)[0].maskings.values()] == [BOUNDED]


def test_retreats_keep_masks_until_they_go_themselves(tmp_path: Path) -> None:
    plan, _ = decided(model("where", -1e9), tmp_path, feed(4.0))
    assert plan.changes
    assert not plan.quantizes
    kept = all_float(plan, "why")
    assert (kept.added, kept.maskings) == (plan.added, plan.maskings)
    gone = without_masks(plan)
    assert not gone.changes
    assert "mask" not in gone.nodes["Softmax_y"].reason + gone.nodes["Where_x"].reason
