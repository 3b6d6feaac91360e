"""Hessians of what layers read, of each half of the data, as many as memory holds at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from onnxq.numerics.rounding import Hessian
from onnxq.numerics.sampling import View

Decoder = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
Key = TypeVar("Key", bound=Hashable)

_MOST_BYTES = 512 << 20  # of Hessians that are held at once
PATCHES = 1024  # rows that a batch gives a Conv at most: neighbouring patches tell nearly the same
_LEAST = 1e-30  # of a row's size


class Rows:
    """How many rows layers with a view see."""

    def __init__(self, view: View) -> None:
        self.view, self.rows = view, 0

    def update(self, x: npt.NDArray[np.float32]) -> None:
        """Count one batch."""
        self.rows += self.view.count(x)


class Drawing:
    """Which rows of a batch are taken: all of a layer's, PATCHES of a Conv's at most, the same in every run."""

    def __init__(self, view: View) -> None:
        self.view, self._random = view, np.random.default_rng(0)

    def next(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Their places in the next batch."""
        count = self.view.count(x)
        if self.view.kernel and count > PATCHES:
            return self._random.choice(count, PATCHES, replace=False)
        return np.arange(count)


class Half:
    """The Hessian of what layers read of one half of the data, as its codes say.

    `alike`: rows larger than the median of a batch are brought to its size, or a few tokens, a hundred times as large
    as others, would decide every code.
    """

    def __init__(self, view: View, decoded: Decoder, alike: bool) -> None:
        self.view, self.decoded, self.alike, self.hessian = view, decoded, alike, Hessian()
        self._drawing = Drawing(view)

    def update(self, x: npt.NDArray[np.float32]) -> None:
        """Fold in one batch."""
        wanted = self._drawing.next(x)
        if wanted.size:
            rows = self.decoded(self.view.rows(x, wanted))
            if self.alike:
                sizes = np.linalg.norm(rows, axis=1, keepdims=True)
                rows = rows / np.maximum(sizes, max(float(np.median(sizes)), _LEAST))
            self.hessian.update(rows)


class Halves:
    """Those of the even and of the odd samples."""

    def __init__(self, view: View, decoded: Decoder, alike: bool) -> None:
        self.halves = Half(view, decoded, alike), Half(view, decoded, alike)


def chunks(inputs: Mapping[Key, int]) -> list[list[Key]]:
    """Keys whose Hessians are held together; `inputs` is K of each."""
    found: list[list[Key]] = []
    size = _MOST_BYTES
    for key, count in inputs.items():
        need = 3 * 8 * count**2
        if size + need > _MOST_BYTES:
            found.append([])
            size = 0
        found[-1].append(key)
        size += need
    return found
