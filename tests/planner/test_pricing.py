"""Units, their candidates, and what is timed, checked and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Opener, make_model, node, random
from lowering_support import HERE, ONE_THREAD, canonical, recipe

from onnxq.graph import Graph
from onnxq.plan import Plan
from onnxq.planner import pricing, values
from onnxq.planner.candidates import description, emit, forms, inputs_of, units
from onnxq.planner.outline import outline
from onnxq.planner.pricing import price
from onnxq.planner.scales import finish
from onnxq.runtime.race import KernelTime
from onnxq.runtime.timings import TimingCache

FEED = {"x": random(2, 8, 12, 12)}
Planned = tuple[Graph, Plan]


@pytest.fixture
def convs(opened: Opener) -> Planned:
    """Three Convs, the last two alike, with a Relu and an Add that join them."""
    weights = {"w0": random(16, 8, 3, 3), "w1": random(16, 16, 1, 1, seed=1), "w2": random(16, 16, 1, 1, seed=2)}
    nodes = [node("Conv", "x w0", "a", name="first"), node("Relu", "a", "ar", name="relu"),
             node("Conv", "ar w1", "b", name="second"), node("Conv", "b w2", "c", name="third"),
             node("Add", "c ar", "d", name="add"), node("Conv", "d w2", "y", name="last")]
    return planned(opened(make_model(nodes, {"x": [2, 8, 12, 12]}, {"y": None}, weights)))


def planned(graph: Graph, scheme: str = "w8a8") -> Planned:
    graph = canonical(graph)
    found = outline(graph, recipe(scheme), HERE)
    return graph, finish(found, graph, dict.fromkeys(found.ranges_of, (-4.0, 4.0)), recipe(scheme), HERE)


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The candidates of each race; times are made up, as no test may depend on real ones."""
    found: list[list[str]] = []

    def race(calls: Mapping[str, list[Callable[[], None]]], **_: Any) -> dict[str, KernelTime]:
        for turns in calls.values():
            for call in turns:
                call()
        found.append(list(calls))
        return {name: KernelTime(1.0 + n, 1.0, 9.0, 3) for n, name in enumerate(calls)}

    monkeypatch.setattr(pricing, "race", race)
    monkeypatch.setattr(pricing.conversions, "race", race)
    return found


def test_a_unit_is_a_kernel_with_what_it_computes_along(convs: Planned) -> None:
    graph, plan = convs
    first, *rest = units(plan, graph)
    assert (first.nodes, first.members, first.reads, first.makes) == (("first",), ("first", "relu"), ("x",), ("ar",))
    assert [u.name for u in rest] == ["second", "third", "add", "last"]
    assert rest[2].reads == ("c", "ar")
    assert inputs_of(graph, first) == ["x"]


def test_layers_that_share_their_row_scales_are_one_unit(opened: Opener) -> None:
    nodes = [node("MatMul", "x w0", "a", name="q"), node("MatMul", "x w1", "b", name="k"), node("Add", "a b", "y")]
    graph, plan = planned(opened(make_model(nodes, {"x": [4, 32]}, {"y": None}, {
        "w0": random(32, 32), "w1": random(32, 32, seed=1)})), "w8a8-dynamic")
    [unit] = units(plan, graph)
    assert (unit.nodes, unit.reads, unit.makes) == (("q", "k"), (), ())


def test_linear_layers_have_the_kernel_that_finds_its_scale_as_a_candidate(opened: Opener) -> None:
    graph, plan = planned(opened(make_model([node("MatMul", "x w", "y", name="m")], {"x": [4, 32]}, {"y": None},
                                            {"w": random(32, 32)})))
    [unit] = units(plan, graph)
    assert list(forms(unit, plan, HERE)) == ["float", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"]


def test_a_candidate_is_what_the_compiler_writes_and_takes_codes(convs: Planned) -> None:
    graph, plan = convs
    unit = units(plan, graph)[1]
    read = {"ar": np.abs(random(2, 16, 12, 12))}
    form, twin = emit(graph, unit, forms(unit, plan, HERE)["QLinearConv"], HERE, read, "qoperator")
    assert [n.op for n in form.graph.nodes] == ["QLinearConv"]
    assert [n.op for n in twin.graph.nodes].count("Conv") == 1
    assert {name: v.dtype for name, v in form.feed.items()} == {"ar.q": np.uint8}
    plain, _ = emit(graph, unit, forms(unit, plan, HERE)["float"], HERE, read, "qoperator")
    assert ([n.op for n in plain.graph.nodes], list(plain.feed)) == (["Conv"], ["ar"])


def test_equal_units_are_timed_once_and_a_known_kernel_never_again(convs: Planned, races: list[list[str]],
                                                                   tmp_path: Path) -> None:
    graph, plan = convs
    found = price(graph, plan, HERE, [FEED], ONE_THREAD, TimingCache({"on": "this"}, tmp_path))
    kernels = [r for r in races if "float" in r]
    assert kernels == [["float", "QLinearConv"], ["float", "QLinearConv"], ["float", "QLinearAdd"]]
    assert found.times.keys() == {"first", "second", "third", "add", "last"}
    assert found.of("third") == found.of("second")
    assert found.faults == []
    assert found.elements["x"] == FEED["x"].size
    races.clear()
    again = price(graph, plan, HERE, [FEED], ONE_THREAD, TimingCache({"on": "this"}, tmp_path))
    assert (races, again.times) == ([], found.times)


def test_other_shapes_are_other_kernels(convs: Planned) -> None:
    graph, plan = convs
    first, second, third, *_ = units(plan, graph)
    wide, narrow = ({"ar": random(2, 16, n, n)} for n in (12, 6))
    assert description(graph, second, [wide]) != description(graph, second, [narrow])
    assert description(graph, second, [wide]) == description(graph, third, [{"b": wide["ar"]}])
    assert description(graph, first, [FEED]) != description(graph, second, [wide])


def test_a_kernel_that_computes_something_else_is_reported_and_has_no_time(
        convs: Planned, races: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second Conv's weights are made others in the lowered form, as a broken kernel would read them."""
    right = pricing.emit

    def wrong(graph: Graph, unit: Any, *rest: Any) -> Any:
        form, twin = right(graph, unit, *rest)
        if unit.name == "second" and form.graph.nodes[0].op == "QLinearConv":
            tensor = form.graph.nodes[0].inputs[3]
            form.graph.replace_input(form.graph.nodes[0], 3, form.graph.constant(
                "broken", np.roll(form.graph.read(tensor), 1, axis=0)))
        return form, twin

    monkeypatch.setattr(pricing, "emit", wrong)
    found = price(*convs, HERE, [FEED], ONE_THREAD, TimingCache({"on": "this"}, tmp_path))
    assert list(found.times["second"]) == ["float"]
    assert list(found.times["third"]) == ["float", "QLinearConv"]
    [fault] = found.faults
    assert fault.startswith("second: QLinearConv agrees to ")
    monkeypatch.setattr(pricing, "emit", right)
    mended = price(*convs, HERE, [FEED], ONE_THREAD, TimingCache({"on": "this"}, tmp_path))
    assert mended.faults == []  # a check is known by what was checked, not by the unit's name


def test_a_kernel_that_does_not_run_is_reported_and_not_raced(
        convs: Planned, races: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = pricing.emit

    def unknown(graph: Graph, unit: Any, *rest: Any) -> Any:
        form, twin = right(graph, unit, *rest)
        if unit.name == "add" and form.graph.nodes[0].op == "QLinearAdd":
            form.graph.nodes[0].op = "QLinearNothing"
        return form, twin

    monkeypatch.setattr(pricing, "emit", unknown)
    found = price(*convs, HERE, [FEED], ONE_THREAD, TimingCache({"on": "this"}, tmp_path))
    assert ["float"] in races
    assert list(found.times["add"]) == ["float"]
    [fault] = found.faults
    assert fault.startswith("add: QLinearAdd does not run: ")


def test_small_batches_read_their_weights_from_memory(opened: Opener, races: list[list[str]], tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """One row: as many copies as exceed the cache; with many rows a single one."""
    copies: list[int] = []
    repeat = pricing.repeat

    def noted(graph: Graph, times: int) -> None:
        copies.append(times)
        repeat(graph, times)

    monkeypatch.setattr(pricing, "repeat", noted)
    monkeypatch.setattr(pricing, "copies_needed", lambda *_: 5)
    graph, plan = planned(opened(make_model([node("MatMul", "x w", "y", name="m")], {"x": ["n", 32]}, {"y": None},
                                            {"w": random(32, 32)})))
    for rows in (1, 64):
        price(graph, plan, HERE, [{"x": random(rows, 32)}], ONE_THREAD, TimingCache({"rows": rows}, tmp_path))
    assert copies == [5, 5, 5]  # the three candidates of one row


def test_tensors_are_fetched_a_few_at_a_time(convs: Planned, races: list[list[str]], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "AT_ONCE", 2)
    held: list[int] = []
    of = values.Values.of

    def watched(self: Any, *args: Any) -> Any:
        found = of(self, *args)
        held.append(len(self.held))
        return found

    monkeypatch.setattr(values.Values, "of", watched)
    price(*convs, HERE, [FEED], ONE_THREAD, TimingCache({"on": "this"}, tmp_path))
    assert max(held) <= 3  # what one unit needs
