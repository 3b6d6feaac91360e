"""The cheapest choice, against trying all of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
from conftest import make_model, node, random
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.graph import Graph, load
from onnxq.plan import NodePlan, Plan
from onnxq.planner.candidates import Unit
from onnxq.planner.choice import by_gain, choose
from onnxq.planner.conversions import Costs
from onnxq.planner.pricing import Prices
from onnxq.runtime.race import KernelTime

COUNTS = (1, 10_000)


def unit(name: str, reads: str, makes: str, op: str = "Conv") -> Unit:
    return Unit((name,), op, "int", (name,), tuple(reads.split()), tuple(makes.split()))


UNITS = [unit("a", "x", "ta"), unit("b", "ta", "tb"), unit("c", "ta", "tc"), unit("d", "tb tc", "y", "Add")]


def prices(units: list[Unit], times: Mapping[str, tuple[float, float]], q: float, dq: float) -> Prices:
    tensors = {t for u in units for t in (*u.reads, *u.makes)}
    found = Prices(units, elements=dict.fromkeys(tensors, 1), ranks=dict.fromkeys(tensors, 2),
                   conversion=Costs(COUNTS, (q, q), (dq, dq), (0.0, 0.0)))
    for name, (as_float, as_int) in times.items():
        found.times[name] = {"float": KernelTime(as_float, as_float, as_float, 9),
                             "int": KernelTime(as_int, as_int, as_int, 9)}
    return found


@pytest.fixture(scope="module")
def diamond(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """x -> a -> (b, c) -> Add -> y: one tensor with two readers, and an operator that only joins."""
    w = {k: random(4, 4, 1, 1, seed=n) for n, k in enumerate(("w0", "w1", "w2"))}
    model = make_model([node("Conv", "x w0", "ta", name="a"), node("Conv", "ta w1", "tb", name="b"),
                        node("Conv", "ta w2", "tc", name="c"), node("Add", "tb tc", "y", name="d")],
                       {"x": [1, 4, 2, 2]}, {"y": [1, 4, 2, 2]}, w)
    path = tmp_path_factory.mktemp("choice") / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return load(path)


def cost(chosen: frozenset[str], times: Mapping[str, tuple[float, float]], q: float, dq: float) -> float | None:
    """Of the diamond: kernels, a Q per tensor that comes as float and goes as codes, a DQ the other way round."""
    if "d" in chosen and not {"b", "c"} <= chosen:
        return None  # an Add joins only where both of what it adds are codes
    total = sum(times[name][name in chosen] for name in times)
    total += q * ("a" in chosen)
    total += q * ("a" not in chosen and bool(chosen & {"b", "c"}))
    total += dq * ("a" in chosen and not {"b", "c"} <= chosen)
    total += sum(dq for name in "bc" if name in chosen and "d" not in chosen)
    return total + dq * ("d" in chosen)


milliseconds = st.integers(1, 40).map(lambda n: n / 8)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(milliseconds, milliseconds), min_size=4, max_size=4), milliseconds, milliseconds)
def test_no_other_choice_is_cheaper(diamond: Graph, four: list[tuple[float, float]], q: float, dq: float) -> None:
    times = dict(zip("abcd", four, strict=True))
    choice = choose(diamond, prices(UNITS, times, q, dq), tie=0.0)
    chosen = frozenset("abcd") - choice.refused.keys()
    every = (frozenset(s) for n in range(5) for s in itertools.combinations("abcd", n))
    best = min(c for s in every if (c := cost(s, times, q, dq)) is not None)
    found = cost(chosen, times, q, dq)
    assert found is not None
    assert found == pytest.approx(best, abs=1e-5)  # capacities are whole nanoseconds


def test_a_tie_goes_to_float_and_a_gain_within_the_tie_too(diamond: Graph) -> None:
    times = dict.fromkeys("abcd", (1.0, 0.99))
    assert set(choose(diamond, prices(UNITS, times, 0, 0), tie=0.02).refused) == set("abcd")
    assert choose(diamond, prices(UNITS, times, 0, 0), tie=0.0).refused == {}
    slower = dict.fromkeys("abcd", (1.0, 1.01))
    assert choose(diamond, prices(UNITS, slower, 0, 0), tie=-0.02).refused == {}


def test_reasons_tell_a_slow_kernel_from_dear_conversions(diamond: Graph) -> None:
    slow = choose(diamond, prices(UNITS, dict.fromkeys("abcd", (1.0, 2.0)), 0, 0), tie=0.0).refused
    dear = choose(diamond, prices(UNITS, dict.fromkeys("abcd", (1.0, 0.9)), 9, 9), tie=0.0).refused
    assert set(slow.values()) == {"measured as fast or faster in float"}
    assert set(dear.values()) == {"measured faster in int8, but by less than it costs to convert what is around it"}


def test_a_kernel_that_finds_its_scale_itself_is_taken_where_it_beats_both(diamond: Graph) -> None:
    found = prices(UNITS, dict.fromkeys("abcd", (1.0, 0.9)), 9, 9)
    for name, ms in (("b", 0.5), ("c", 0.99)):
        found.times[name]["at run time"] = KernelTime(ms, ms, ms, 9)
    choice = choose(diamond, found, tie=0.0)
    assert choice.at_run_time == {"b"}  # c gains less than what makes its results depend on the batch
    assert set(choice.refused) == set("abcd")


def test_a_kernel_that_computes_something_else_is_never_chosen(diamond: Graph) -> None:
    found = prices(UNITS, dict.fromkeys("abcd", (1.0, 0.1)), 0, 0)
    del found.times["b"]["int"]
    choice = choose(diamond, found, tie=0.0)
    assert set(choice.refused) == {"b", "d"}  # and what only joins there


def test_regions_by_what_they_save() -> None:
    found = prices(UNITS, {"a": (1.0, 0.5), "b": (9.0, 1.0), "c": (3.0, 1.0), "d": (1.0, 1.0)}, 0, 0)
    plan = Plan("s", "t", {u.name: NodePlan(u.name, u.op, "s", "int", "") for u in UNITS})
    assert by_gain(found, plan) == [["a", "b", "c", "d"]]
    for name in "ad":
        plan.nodes[name] = NodePlan(name, "Conv", "float", "float", "")
    found.units = [unit("a", "x", "ta"), unit("b", "ta", "tb"), unit("c", "tz", "tc"), unit("d", "tb tc", "y", "Add")]
    assert by_gain(found, plan) == [["b"], ["c"]]

