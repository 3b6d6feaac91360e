"""Rewrites of the float graph: the places that they edit, what those compute, and whether they pay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from conftest import Opener, make_model, node, random
from lowering_support import HERE, ONE_THREAD

from onnxq.graph import Graph, Node
from onnxq.passes.manager import Context, Pass
from onnxq.passes.transform.keep_layer_norm import KeepLayerNorm
from onnxq.planner import rewriting
from onnxq.planner.rewriting import AFTER, BEFORE, weigh
from onnxq.runtime.race import KernelTime
from onnxq.runtime.timings import TimingCache

FEED = {"x": random(2, 6, 16)}


@pytest.fixture
def norms(opened: Opener) -> Graph:
    """Two residual blocks with the same shapes, a large MatMul between them."""
    ones, w = np.ones(16, np.float32), random(16, 16)
    nodes = [node("Relu", "x", "r", name="act"), node("Add", "x r", "s", name="add"),
             node("LayerNormalization", "s g b", "n", name="norm"), node("MatMul", "n w", "m", name="mix"),
             node("Add", "n m", "t", name="add2"), node("LayerNormalization", "t g b", "y", name="norm2")]
    return opened(make_model(nodes, {"x": [2, 6, 16]}, {"y": None}, {"g": ones, "b": ones * 0, "w": w}, opset=17))


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], list[int]]:
    """Makes up the times of a place before and after; counts the races."""

    def set_times(before: float, after: float) -> list[int]:
        runs: list[int] = []

        def made_up(calls: Mapping[str, list[Callable[[], None]]], **_: Any) -> dict[str, KernelTime]:
            assert list(calls) == [BEFORE, AFTER]
            for [call] in calls.values():
                call()
            runs.append(1)
            return {name: KernelTime(ms, ms, ms, 3) for name, ms in zip(calls, (before, after), strict=True)}

        monkeypatch.setattr(rewriting, "race", made_up)
        return runs

    return set_times


@dataclass(frozen=True)
class Halve(Pass):
    """Relu(x) => Abs(x): wrong on purpose."""

    name: ClassVar[str] = "halve"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        if node.op != "Relu":
            return False
        node.op = "Abs"
        return True


def weighed(graph: Graph, step: Pass, tmp_path: Path) -> rewriting.Weighed | None:
    return weigh(graph, step, Context(HERE), [FEED], ONE_THREAD, TimingCache({"on": "this"}, tmp_path))


@pytest.mark.parametrize(("before", "after", "pays"), [(1.0, 0.5, True), (1.0, 0.99, False), (0.5, 1.0, False)])
def test_a_rewrite_is_kept_where_it_is_faster_beyond_a_tie(
        before: float, after: float, pays: bool, norms: Graph, race: Callable[[float, float], list[int]],
        tmp_path: Path) -> None:
    runs = race(before, after)
    found = weighed(norms, KeepLayerNorm(), tmp_path)
    assert found is not None
    assert (found.name, found.places, found.pays, found.fault) == ("keep-layer-norm", 2, pays, "")
    assert (found.before_ms, found.after_ms) == (2 * before, 2 * after)
    assert len(runs) == 2  # the places are alike but for the activation in front of one of them
    assert [n.op for n in norms.nodes].count("Sum") == 0, "the graph itself stays as it is"


def test_a_gain_within_the_spread_of_the_rounds_is_none(norms: Graph, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    spread = {BEFORE: KernelTime(1.0, 0.7, 1.2, 3), AFTER: KernelTime(0.8, 0.6, 0.9, 3)}
    monkeypatch.setattr(rewriting, "race", lambda *_, **__: spread)
    found = weighed(norms, KeepLayerNorm(), tmp_path)
    assert found is not None
    assert not found.pays


def test_places_known_from_before_are_not_timed_again(norms: Graph, race: Callable[[float, float], list[int]],
                                                      tmp_path: Path) -> None:
    runs = race(1.0, 0.5)
    first, again = (weighed(norms, KeepLayerNorm(), tmp_path) for _ in range(2))
    assert first == again
    assert len(runs) == 2


def test_what_edits_nothing_is_not_weighed(opened: Opener, tmp_path: Path) -> None:
    graph = opened(make_model([node("Abs", "x", "y")], {"x": [2, 6, 16]}, {"y": None}))
    assert weighed(graph, KeepLayerNorm(), tmp_path) is None


def test_what_computes_something_else_is_never_kept(norms: Graph, race: Callable[[float, float], list[int]],
                                                    tmp_path: Path) -> None:
    race(1.0, 0.1)
    found = weighed(norms, Halve(), tmp_path)
    assert found is not None
    assert not found.pays
    assert "comes out otherwise" in found.fault
