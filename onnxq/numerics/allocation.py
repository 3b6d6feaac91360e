"""Which format each of many weights gets, so that all of them fit a budget of bytes at the least damage in sum.

A multiple-choice knapsack: of each item one option is taken. Dynamic programming over the bytes beyond those of the
smallest options, in units that divide them into at most UNITS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

UNITS = 1 << 16


@dataclass(frozen=True)
class Option:
    """One format of a weight: bytes that it takes, and what it costs in whatever unit, 0 or more."""

    size: int
    damage: float


def least(items: Sequence[Sequence[Option]]) -> int:
    """The fewest bytes that all items can have together."""
    return sum(min(option.size for option in options) for options in items)


def allocate(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The index of each item's option: together at most `budget` bytes, with the least damage in sum.

    Exact while budget - least(items) is at most UNITS; beyond, what each item takes more than its least is rounded up
    to a unit, so the damage is at most the least possible with one unit less for each item. Of equally good options the
    smaller one is taken.
    Time and memory: options and items times UNITS. ValueError for an item without options, damages that are negative or
    not finite, and a budget below `least`.
    """
    for options in items:
        if not options or not all(0 <= option.damage < np.inf for option in options):
            raise ValueError("an item has no option, or one with a damage that is no finite number from 0 on; "
                             "give each item options with finite damages")
    spare = budget - least(items)
    if spare < 0:
        raise ValueError(f"{budget} bytes are less than the {least(items)} that the smallest options take; allow more")
    unit = max(-(-spare // UNITS), 1)
    room = spare // unit
    damage = np.zeros(room + 1)  # by the units that are used at most
    taken, extras = [], []
    for options in items:
        smallest = min(option.size for option in options)
        extras.append([-(-(option.size - smallest) // unit) for option in options])
        damage, picked = _added(damage, options, extras[-1])
        taken.append(picked)
    chosen = []
    for picked, extra in zip(reversed(taken), reversed(extras), strict=True):
        chosen.append(int(picked[room]))
        room -= extra[chosen[-1]]
    return chosen[::-1]


def _added(damage: npt.NDArray[np.float64], options: Sequence[Option],
           extras: Sequence[int]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint16]]:
    """(damage, index of the option) by the units used, with one more item."""
    found, picked = np.full(len(damage), np.inf), np.zeros(len(damage), np.uint16)
    for k in sorted(range(len(options)), key=lambda k: options[k].size):
        if extras[k] >= len(damage):
            continue
        tried = damage[: len(damage) - extras[k]] + options[k].damage
        better = tried < found[extras[k] :]
        found[extras[k] :][better] = tried[better]
        picked[extras[k] :][better] = k
    return found, picked
