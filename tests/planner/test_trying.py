"""Ranges by the model's outputs: the best one that wins on the first rows and, with all that do, on the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_model, node, random
from search_support import K, N, case, linear

from onnxq.calibration.readers import open_data
from onnxq.planner import trying

WIDE, CLOSE, NARROW = (-8.0, 8.0), (-4.0, 4.0), (-0.5, 0.5)


def test_the_least_error_wins(tmp_path: Path) -> None:
    """Values within 4: a range of 8 wastes a bit, one of 0.5 clips most of them."""
    of = case(linear(), tmp_path, np.clip(random(256, 4, K), -4, 4))
    tried = [[WIDE, CLOSE, NARROW], [CLOSE, WIDE, NARROW], [NARROW, WIDE, CLOSE], [WIDE, NARROW]]
    assert [trying.best(of.graph, of.found.nodes, {"x": ranges}, of.by)["x"] for ranges in tried] == [
        CLOSE, CLOSE, CLOSE, WIDE]


def test_small_gains_are_none(tmp_path: Path) -> None:
    of = case(linear(), tmp_path, np.clip(random(256, 4, K), -4, 4))
    assert trying.best(of.graph, of.found.nodes, {"x": [(-4.1, 4.1), CLOSE]}, of.by) == {"x": (-4.1, 4.1)}


@pytest.mark.parametrize("at", [0, trying.FIRST], ids=["the first rows", "the others"])
def test_what_wins_on_a_part_of_the_rows_alone_does_not(at: int, tmp_path: Path) -> None:
    """Rows of large values are in one part only: the other part alone would clip them."""
    x = random(2 * trying.FIRST, 4, K) / 4
    x[at:at + trying.FIRST] *= 8
    of = case(linear(), tmp_path, x, batch=8)
    assert trying.best(of.graph, of.found.nodes, {"x": [WIDE, (-2.0, 2.0)]}, of.by) == {"x": WIDE}


def test_few_rows_confirm_nothing(tmp_path: Path) -> None:
    of = case(linear(), tmp_path, np.clip(random(trying.FIRST, 4, K), -4, 4), batch=8)
    assert trying.best(of.graph, of.found.nodes, {"x": [WIDE, CLOSE]}, of.by) == {"x": WIDE}


def test_each_tensor_by_itself(tmp_path: Path) -> None:
    """x needs its wide range, what the Relu makes does not; what no node reads as codes keeps the first."""
    model = make_model([node("MatMul", "x w", "t", name="first"), node("Relu", "t", "r", name="relu"),
                        node("MatMul", "r v", "y", name="last")], {"x": ["rows", 4, K]}, {"y": None},
                       {"w": random(K, N) / 16, "v": random(N, N)})
    of = case(model, tmp_path, random(128, 4, K) * 4, batch=8)
    tries = {"x": [(-16.0, 16.0), (-1.0, 1.0)], "r": [(0.0, 64.0), (0.0, 8.0)], "y": [WIDE, NARROW]}
    assert trying.best(of.graph, of.found.nodes, tries, of.by) == {
        "x": (-16.0, 16.0), "r": (0.0, 8.0), "y": WIDE}


def test_outputs_of_other_types_tell_nothing(tmp_path: Path) -> None:
    model = make_model([node("MatMul", "x w", "t", name="fc"), node("ArgMax", "t", "y", axis=-1)],
                       {"x": ["rows", 4, K]}, {"y": None}, {"w": random(K, N)})
    model.graph.output[0].type.tensor_type.elem_type = 7
    of = case(model, tmp_path, random(64, 4, K), batch=8)
    assert trying.best(of.graph, of.found.nodes, {"x": [WIDE, CLOSE]}, of.by) == {"x": WIDE}


def test_of_those_that_fail_together_each_that_wins_by_itself_is_taken(tmp_path: Path) -> None:
    """Behind the first rows u is larger than its narrow range, which spoils what the one of x gains."""
    model = make_model([node("MatMul", "x w", "s", name="first"), node("MatMul", "u v", "t", name="second"),
                        node("Concat", "s t", "y", axis=-1)],
                       {"x": ["rows", 4, K], "u": ["rows", 4, K]}, {"y": None}, {"w": random(K, N), "v": random(K, N)})
    x = np.clip(random(128, 4, 2 * K), -4, 4)
    x[trying.FIRST:, :, K:] *= 4
    of = case(model, tmp_path, x[..., :K], batch=8)
    data = open_data([{"x": part[..., :K], "u": part[..., K:]} for part in np.split(x, 16)], of.graph.ports())
    tries = {name: [(-16.0, 16.0), CLOSE] for name in ("x", "u")}
    found = trying.best(of.graph, of.found.nodes, tries, replace(of.by, data=data))
    assert found == {"x": CLOSE, "u": (-16.0, 16.0)}
