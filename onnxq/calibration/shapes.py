"""Real rows in other sizes: what a model is timed on when its free axes shall have the sizes of the deployment."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.errors import UsageError
from onnxq.ports import Port

Feed = Mapping[str, npt.NDArray[Any]]


def resized(feed: Feed, ports: Sequence[Port],
            shapes: Mapping[str, Sequence[int]]) -> list[dict[str, npt.NDArray[Any]]]:
    """A feed for each combination of sizes of the named free axes, values taken from `feed` in order.

    Along such an axis the first elements are kept, or all of them repeated from the start: tokens, pixels and padding
    stay real. Raises UsageError for an axis that no input has, with those there are, and for sizes below 1.
    """
    free = sorted({d for p in ports for d in p.shape or () if isinstance(d, str)})
    for axis, sizes in shapes.items():
        if axis not in free:
            raise UsageError(f"the model has no dynamic axis {axis!r}; it has {', '.join(free) or 'none'}")
        if not sizes or min(sizes) < 1:
            raise UsageError(f"axis {axis!r} can't have the sizes {list(sizes)}; give at least 1")
    found = []
    for chosen in itertools.product(*shapes.values()):
        wanted = dict(zip(shapes, chosen, strict=True))
        made = {name: np.asarray(values) for name, values in feed.items()}
        for port in (p for p in ports if p.name in made):
            for position, dim in enumerate(port.shape or ()):
                if isinstance(dim, str) and dim in wanted:
                    made[port.name] = np.take(made[port.name], np.arange(wanted[dim]), axis=position, mode="wrap")
        found.append(made)
    return found
