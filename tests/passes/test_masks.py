"""Masks of Softmax: every form comes out the same to 1e-6, rows that see nothing included, and without denormals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import Opener, apply, make_model, node, run
from masking_support import (
    ADDED,
    FORMS,
    HEADS,
    LONG,
    LOWEST,
    Array,
    Feed,
    canonical,
    feed,
    model,
    operators,
    planned,
    rewritten,
)

from onnxq.passes.manager import Context
from onnxq.passes.transform.add_masks import AddMasks
from onnxq.passes.transform.normal_masks import NormalMasks
from onnxq.plan import BOUNDED, FLOORED, ROW_FLOORED, Masking, Plan

FILLS = [LOWEST, -np.inf, -1e9, -10000.0]
ROUNDING = 5e-7  # float32 sums of a row's weights
TINY = float(np.finfo(np.float32).tiny)
WIDTHS = {"": 4.0, FLOORED: 9.0, ROW_FLOORED: 40.0}  # scores narrow enough for a bounded mask, for a floor, for neither


def largest_change(got: dict[str, Array], wanted: dict[str, Array]) -> float:
    """The greatest sum of changes in a row; NaN has to stay NaN."""
    changes = []
    for name, right in wanted.items():
        assert np.array_equal(np.isnan(got[name]), np.isnan(right)), "NaN comes from the same rows"
        changes.append(np.nansum(np.abs(got[name].astype(np.float64) - right), axis=-1).max())
    return float(max(changes))


@pytest.mark.parametrize(("form", "fill"), [(form, fill) for form in FORMS for fill in FILLS
                                            if (form, fill) != ("product", -np.inf)])  # 0 * inf is NaN
@pytest.mark.parametrize("floors", WIDTHS)
def test_weights_stay(form: str, fill: float, floors: str, tmp_path: Path) -> None:
    source = model(form, fill)
    graph = canonical(source, tmp_path)
    plan, _ = planned(graph, [feed(WIDTHS[floors])], floors)
    path, skips, again = rewritten(graph, plan, tmp_path)
    assert (skips, again) == ([], False)
    if form in ADDED:
        assert [m.form for m in plan.maskings.values()] == [floors or BOUNDED]
    for grown in (1.0, 3.0):
        for left in (False, True):
            fed = feed(grown * WIDTHS[floors], left=left, empty=True, seed=3)
            assert largest_change(run(path, fed), run(source, fed)) <= 1e-6 + ROUNDING


@pytest.mark.parametrize("form", ADDED)
@pytest.mark.parametrize("floors", [*WIDTHS])
def test_no_weight_is_denormal(form: str, floors: str, tmp_path: Path) -> None:
    fed: Feed = feed(WIDTHS[floors])
    source = model(form, -1e9)
    graph = canonical(source, tmp_path)
    before = run(source, fed)["y"]
    assert before.min() < TINY, "else there is nothing to mend"
    after = run(rewritten(graph, planned(graph, [fed], floors)[0], tmp_path)[0], fed)["y"]
    if floors != ROW_FLOORED or form not in ("where", "masked_fill"):
        assert after[before < TINY].min() >= TINY


@pytest.mark.parametrize("form", ["where", "masked_fill"])
@pytest.mark.parametrize("fill", [LOWEST, -np.inf, -1e9])
def test_a_selection_becomes_an_add_bit_for_bit(form: str, fill: float, tmp_path: Path) -> None:
    source = model(form, fill, layers=2)
    graph = canonical(source, tmp_path)
    plan, _ = planned(graph, None)
    path, _, again = rewritten(graph, plan, tmp_path)
    assert not again
    assert operators(graph).count("Where") == 1, "both layers add one mask"
    assert operators(graph).count("Add") == 2
    for left in (False, True):
        fed = feed(50.0, left=left, empty=True, layers=2)
        wanted = run(source, fed)
        for name, got in run(path, fed).items():
            assert np.array_equal(got, wanted[name], equal_nan=True)


def test_layers_share_a_bounded_mask(tmp_path: Path) -> None:
    source = model("causal and padding", -1e9, layers=3)
    graph = canonical(source, tmp_path)
    fed = feed(3.0, layers=3)
    fed["q1"] *= 1.5
    plan, _ = planned(graph, [fed])
    rewritten(graph, plan, tmp_path)
    assert len({m.fill for m in plan.maskings.values()}) == 1, "that of the widest scores"
    assert operators(graph).count("Max") == operators(graph).count("ReduceMax") == 1


def test_entries_may_be_left_out_one_by_one(tmp_path: Path) -> None:
    source = model("where", -1e9, layers=2)
    graph = canonical(source, tmp_path)
    plan, _ = planned(graph, [feed(3.0, layers=2)])
    assert len(plan.added) == len(plan.maskings) == 2
    plan.maskings.popitem()
    _, skips, _ = rewritten(graph.copy(), plan, tmp_path)
    assert skips == []
    gone = plan.added.popitem()[0]
    assert gone == "Where_x1"
    path, skips, _ = rewritten(graph, plan, tmp_path)
    assert skips == []
    fed = feed(9.0, layers=2, empty=True)
    assert largest_change(run(path, fed), run(source, fed)) <= 1e-6 + ROUNDING


def test_near_misses_say_why(opened: Opener, tmp_path: Path) -> None:
    graph = canonical(model("where"), tmp_path)
    plan = Plan("", "", maskings={"Softmax_y": Masking("Softmax_y", BOUNDED, -50.0)})
    assert apply(NormalMasks(), graph, Context(plan=plan)) == (
        False, [("Softmax_y", "no mask is added to what it reads")])
    other = opened(make_model([node("Where", "c a b", "y")], {"c": (9, [2]), "a": [2], "b": [2]}, {"y": [2]}))
    assert apply(AddMasks(), other, Context(plan=Plan("", "", added={"Where_y": -1e30}))) == (
        False, [("Where_y", "it does not select between computed scores and one stored number")])
    for step in (AddMasks(), NormalMasks()):
        assert apply(step, graph, Context()) == (False, []), "what the Plan does not name stays"


def test_masks_are_summed_as_they_were(tmp_path: Path) -> None:
    """Masks added in turn are summed apart, once; a bias that is no mask keeps its weight."""
    stored = {"near": -np.abs(np.arange(LONG)[:, None] - np.arange(LONG)).astype(np.float32)[None, None] / 4}
    source = make_model([node("MatMul", "q k", "s"), node("Add", "s near", "t"), node("Add", "t m", "x"),
                         node("Softmax", "x", "y", axis=-1)],
                        {"q": ["N", HEADS, LONG, 8], "k": ["N", HEADS, 8, LONG], "m": ["N", 1, 1, LONG]},
                        {"y": ["N", HEADS, LONG, LONG]}, stored)
    fed = feed(3.0)
    fed["m"] = np.where(fed["m"][:, None, None] == 0, np.float32(-1e9), np.float32(0))
    graph = canonical(source, tmp_path)
    plan, _ = planned(graph, [fed])
    path, _, _ = rewritten(graph, plan, tmp_path)
    assert [m.form for m in plan.maskings.values()] == [BOUNDED]
    assert operators(graph).count("Add") == 3, "the masks', the bound's, that of the scores"
    assert largest_change(run(path, fed), run(source, fed)) <= 1e-6 + ROUNDING
