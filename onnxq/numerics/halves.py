"""float32 -> float16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = 65504.0  # of float16
_BLOCK = 1 << 20  # elements that are converted at a time
SMALLEST_NORMAL = 2.0**-14  # smaller numbers of float16 have fewer digits, down to 2**-24


def nearest(values: NDArray[Any], limit: float = LARGEST) -> NDArray[np.float16]:
    """float32 of any shape -> float16 of that shape, to nearest even.

    Numbers beyond +-`limit`, which is at most LARGEST, become +-`limit`; infinities and NaN stay.
    """
    given = np.asarray(values)
    found = np.empty(given.shape, np.float16)
    flat, made = np.atleast_1d(given), np.atleast_1d(found)
    each = max(1, _BLOCK // max(1, flat[:1].size))
    for start in range(0, len(flat), each):  # of a large weight there is little in memory besides the result
        _convert(flat[start:start + each], made[start:start + each], limit)
    return found


def _convert(values: NDArray[Any], found: NDArray[np.float16], limit: float) -> None:
    """Write float16 of float32 values into an array of their shape."""
    with np.errstate(over="ignore"):
        found[...] = values
    beyond = np.abs(found) > limit
    if beyond.any():
        given = values[beyond]
        found[beyond] = np.where(np.isfinite(given), np.copysign(np.float16(limit), found[beyond]), found[beyond])


def shares(values: NDArray[np.float32]) -> tuple[int, int]:
    """Of float32 values of any shape, how many there are other than 0, and how many of these lose digits in float16
    since they are small."""
    sizes = np.abs(values[values != 0])
    return sizes.size, int(np.count_nonzero(sizes < SMALLEST_NORMAL))
