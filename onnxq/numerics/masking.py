"""What a masked attention score may become so that the softmax of its row hardly changes and stays fast.

A softmax of a row x [n] is exp(x - m) / S with m = max(x) and 1 <= S <= n. Entries that a mask hides are far below m.
Where exp(x - m) or its quotient by S falls under the smallest normal float32, processors may take a hundred times as
long; so hidden entries are raised, to at least m - `depth(n)`. Raised to m - g, at most n of them have a total weight
d <= n exp(-g), and the entries of the row change by 2 d / (1 + d) in sum; that is at most ERROR for g >= `gap(n)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

ERROR = 1e-6  # the sum of all changes in a row
REACH = 3.0  # how many times those calibrated the scores may be
LONGER = 4  # how many times those calibrated rows may be long
_NORMAL = -math.log(float(np.finfo(np.float32).tiny))  # 87.3
_STEP = 0.125  # fills are multiples of it, exact in float32


def gap(keys: int) -> float:
    """How far below the greatest of `keys` entries all others may be put for a change of at most ERROR in sum."""
    return math.log(2.0 * keys / ERROR)


def depth(keys: int) -> float:
    """How far below the greatest of `keys` entries one may lie without a denormal weight."""
    return _NORMAL - math.log(keys)


@dataclass(frozen=True)
class Scores:
    """What is known of a tensor of scores before its mask: its range, and how many keys a row has at most."""

    low: float
    high: float
    keys: int

    @property
    def longest(self) -> int:
        """The number of keys up to which a fill has to hold."""
        return LONGER * self.keys


@dataclass(frozen=True)
class Fill:
    """A number that stands for hidden entries, good for scores of up to `reach` times those calibrated."""

    value: float
    reach: float


def hides(fill: float, scores: Scores) -> bool:
    """Whether entries of the number `fill` weigh nothing beside scores of up to REACH times those of `scores`."""
    return fill <= REACH * min(scores.low, 0.0) - depth(1)


def added(scores: Scores) -> Fill | None:
    """What to add to hidden scores, at least REACH times those of `scores`; None where nothing is exact and fast.

    Hidden and seen scores alike lie in f [low, high] for growth f, w = high - low. x - m is at most f w + fill for a
    hidden one, which has to be -gap: fill <= -(gap + f w) for f = REACH; and at least fill - w, which has to be -depth:
    fill >= w - depth for scores as calibrated. Where a greater f satisfies both as f grows, the middle is taken.
    """
    least, most = gap(scores.longest), depth(scores.longest)
    width = scores.high - scores.low
    reach = max(REACH, (most - least) / (2.0 * width) if width > 0.0 else math.inf)
    fill = -_down(least + REACH * width if reach == REACH else (least + most) / 2.0)
    if width - fill > most:
        return None
    return Fill(fill, added_reach(scores, fill))


def added_reach(scores: Scores, fill: float) -> float:
    """How many times those calibrated scores may be while `fill` added to hidden ones is exact."""
    width = scores.high - scores.low
    return (-fill - gap(scores.longest)) / width if width > 0.0 else math.inf


def floor(scores: Scores) -> Fill | None:
    """The least value that seen and hidden scores may keep, likewise; None where none is exact and fast.

    The greatest of a row is at least f min(low, 0), which has to be floor + gap, and at most f max(high, 0), which has
    to be at most floor + depth, both for growth f as in `added`.
    """
    least, most = gap(scores.longest), depth(scores.longest)
    low, high = min(scores.low, 0.0), max(scores.high, 0.0)
    width = high - low
    reach = max(REACH, (most - least) / width if width > 0.0 else math.inf)
    if math.isinf(reach):
        return Fill(-_down((least + most) / 2.0), math.inf)
    fill = -_down(least - reach * low)
    if high - fill > most:
        return None
    return Fill(fill, floor_reach(scores, fill))


def floor_reach(scores: Scores, fill: float) -> float:
    """How many times those calibrated scores may be while the floor `fill` under them is exact."""
    return (-fill - gap(scores.longest)) / -scores.low if scores.low < 0.0 else math.inf


def _down(magnitude: float) -> float:
    """A magnitude rounded up: the fill moves down, to the side that is exact."""
    return math.ceil(magnitude / _STEP) * _STEP
