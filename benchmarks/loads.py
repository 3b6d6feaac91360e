"""What a model is fed at once when it is timed: rows of its evaluation data, never made up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.models import Array, Case


@dataclass(frozen=True)
class Load:
    """`rows` rows at once (or what the model fixes), each made of `joined` stored ones, one behind the other on axis 1.

    Joined rows [S, ...] keep their padding, so that a row [joined * S, ...] has it at its middle, too.
    """

    rows: int = 8
    joined: int = 1

    def feed(self, case: Case, data: Mapping[str, Array]) -> dict[str, Array]:
        """The first rows of the data [N, S, ...] as the model is fed; [rows, joined * S, ...] where rows are joined."""
        if self.joined == 1:
            return case.feed(data, 0, case.batch(self.rows))
        stored = case.feed(data, 0, self.rows * self.joined)
        return {name: np.ascontiguousarray(array.reshape(self.rows, self.joined * array.shape[1], *array.shape[2:]))
                for name, array in stored.items()}


_LOADS = {"minilm": (Load(8), Load(8, joined=2), Load(1, joined=2))}  # the others as they are stored


def of(case: Case) -> tuple[Load, ...]:
    """The loads that a model is timed with."""
    return _LOADS.get(case.name, (Load(),))


def name(feed: Mapping[str, Array]) -> str:
    """The sizes of the first input, as "8 x 64"."""
    return " x ".join(map(str, next(iter(feed.values())).shape)) or "scalar"
