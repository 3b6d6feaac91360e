"""What a layer reads, as a few rows and the extremes of each channel: the data that scales are searched on.

A View says how a layer sees its input x as rows [R, K], so that its float result is rows @ w with w [K, N]: a linear
layer reads the last axis, a Conv patches. Channel c stands for the columns c * V to c * V + V - 1, V = `View.repeat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.numerics.patches import output_sizes, patches

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class View:
    """A linear layer's, or with a `kernel` that of a Conv with one group (ONNX Conv-11: strides, pads, dilations)."""

    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()

    @property
    def repeat(self) -> int:
        """Columns of a row that belong to one channel."""
        return int(np.prod(self.kernel, dtype=np.int64))

    def count(self, x: npt.NDArray[Any]) -> int:
        """The number of rows that an input has."""
        if not self.kernel:
            return x.size // x.shape[-1] if x.size else 0
        sizes = output_sizes(x.shape[2:], self.kernel, self.strides, self.pads, self.dilations)
        return len(x) * int(np.prod(sizes, dtype=np.int64))

    def rows(self, x: npt.NDArray[Any], wanted: npt.NDArray[np.int64]) -> Floats:
        """Rows of those indices: float32 [R, K]."""
        if not self.kernel:
            return np.asarray(x.reshape(-1, x.shape[-1])[wanted], np.float32)
        return patches(x, self.kernel, self.strides, self.pads, self.dilations, wanted)


@dataclass(frozen=True)
class Sample:
    """low and high, float32 [C]: the extremes of each channel; `rows`: for each View, float32 [R, K]."""

    low: Floats
    high: Floats
    rows: dict[View, Floats]


class Sampled:
    """Running extremes of each channel of a tensor, and for each View `most` rows drawn evenly from all that it saw.

    Channels lie along the last axis, or along axis 1 where a View has a kernel. The same batches give the same rows.
    Source of the draw: Vitter, Random Sampling with a Reservoir (1985), algorithm R.
    """

    def __init__(self, views: Sequence[View], most: int = 768) -> None:
        self.views, self.most = tuple(dict.fromkeys(views)), most
        self.axis = 1 if any(view.kernel for view in views) else -1
        self.low: Floats | None = None
        self.high: Floats | None = None
        self._rows: dict[View, Floats] = {}
        self._seen = dict.fromkeys(self.views, 0)
        self._random = np.random.default_rng(0)

    def update(self, x: npt.NDArray[Any]) -> None:
        """Fold in a batch; ValueError when it holds NaN. One that holds infinities is left out."""
        x = np.asarray(x, np.float32)
        if not x.size:
            return
        others = tuple(k for k in range(x.ndim) if k != self.axis % x.ndim)
        low, high = x.min(axis=others), x.max(axis=others)
        if np.isnan(low).any():
            raise ValueError("a tensor to sample holds NaN")
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            return
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)
        for view in self.views:
            self._draw(view, x)

    def _draw(self, view: View, x: Floats) -> None:
        new, seen = view.count(x), self._seen[view]
        places = self._random.integers(0, np.arange(seen, seen + new) + 1)
        places[:max(self.most - seen, 0)] = np.arange(seen, min(self.most, seen + new))
        kept: dict[int, int] = {}  # place -> row; of several for one place the last stays
        for row in np.flatnonzero(places < self.most):
            kept[int(places[row])] = int(row)
        self._seen[view] = seen + new
        if not kept:
            return
        found = view.rows(x, np.fromiter(kept.values(), np.int64))
        held = self._rows.get(view, np.empty((0, found.shape[1]), np.float32))
        size = min(self.most, seen + new)
        if len(held) < size:
            held = np.concatenate([held, np.empty((size - len(held), found.shape[1]), np.float32)])
        held[np.fromiter(kept, np.int64)] = found
        self._rows[view] = held

    def result(self) -> Sample | None:
        """What was seen; None when nothing was."""
        if self.low is None or self.high is None:
            return None
        return Sample(self.low, self.high, {view: self._rows[view] for view in self.views})
