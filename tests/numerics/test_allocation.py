"""Bytes shared out among weights: against all combinations, and by the bound of the linear relaxation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.numerics import allocation
from onnxq.numerics.allocation import Option, allocate, least

OPTION = st.builds(Option, st.integers(1, 30), st.floats(0, 10, allow_subnormal=False))
ITEMS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def total(items: list[list[Option]], chosen: list[int]) -> tuple[int, float]:
    taken = [options[k] for options, k in zip(items, chosen, strict=True)]
    return sum(o.size for o in taken), sum(o.damage for o in taken)


def best(items: list[list[Option]], budget: int) -> float:
    """The least damage of all combinations that fit."""
    every = itertools.product(*(range(len(options)) for options in items))
    return min(damage for size, damage in (total(items, list(chosen)) for chosen in every) if size <= budget)


@given(ITEMS, st.integers(0, 60))
def test_it_is_the_best_that_fits(items: list[list[Option]], spare: int) -> None:
    budget = least(items) + spare
    size, damage = total(items, allocate(items, budget))
    assert size <= budget
    assert damage == pytest.approx(best(items, budget), abs=1e-12)


@given(ITEMS, st.integers(0, 60), st.integers(1, 9))
def test_coarse_units_cost_one_for_each_item_at_most(items: list[list[Option]], spare: int, units: int) -> None:
    budget = least(items) + spare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "UNITS", units)
        size, damage = total(items, allocate(items, budget))
    assert size <= budget
    unit = max(-(-spare // units), 1)
    assert damage <= best(items, max(budget - unit * (len(items) + 1), least(items))) + 1e-12


def test_bytes_of_real_weights() -> None:
    """Damage falls fourfold with each bit: the relaxation's bound says how little is lost to units."""
    random = np.random.default_rng(0)
    items = [[Option(int(weights * bits / 8), float(damage * 4.0**-bits)) for bits in (2, 4, 8)]
             for weights, damage in zip(random.choice([10**6, 3 * 10**6, 8 * 10**6], 60), random.lognormal(0, 2, 60),
                                        strict=True)]
    budget = sum(options[1].size for options in items)
    size, damage = total(items, allocate(items, budget))
    assert 0.99 * budget <= size <= budget
    bound = max(sum(min(o.damage + price * o.size for o in options) for options in items) - price * budget
                for price in np.geomspace(1e-12, 1e-3, 1000))
    assert bound <= damage <= 1.02 * bound


def test_a_budget_for_everything_takes_the_least_damage() -> None:
    items = [[Option(4, 1.0), Option(8, 0.25)], [Option(5, 3.0), Option(9, 3.0), Option(7, 0.5)]]
    assert allocate(items, 15) == [1, 2]
    assert allocate(items, 1000) == [1, 2]


def test_bytes_go_where_they_save_most() -> None:
    """By hand: 4 bytes save 0.9 at the first item, 2 save 2.5 at the second."""
    items = [[Option(4, 1.0), Option(8, 0.1)], [Option(5, 3.0), Option(7, 0.5)]]
    assert [allocate(items, budget) for budget in (9, 11, 14, 15)] == [[0, 0], [0, 1], [0, 1], [1, 1]]


def test_what_saves_most_for_each_byte_may_not_be_the_best() -> None:
    items = [[Option(0, 4.0), Option(4, 0.0)], [Option(0, 9.0), Option(10, 0.0)]]
    assert allocate(items, 10) == [0, 1]


def test_of_equals_the_smaller() -> None:
    assert allocate([[Option(3, 1.0), Option(2, 1.0), Option(9, 1.0)]], 100) == [1]


def test_nothing_to_allocate() -> None:
    assert allocate([], 0) == []
    assert least([]) == 0


@pytest.mark.parametrize(("items", "budget", "message"), [
    ([[Option(4, 1.0)], [Option(5, 0.0), Option(3, 9.0)]], 6, "6 bytes are less than the 7"),
    ([[]], 9, "no option"), ([[Option(1, -1.0)]], 9, "finite"), ([[Option(1, np.inf)]], 9, "finite"),
    ([[Option(1, np.nan)]], 9, "finite")])
def test_what_cannot_be_is_refused(items: list[list[Option]], budget: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(items, budget)
