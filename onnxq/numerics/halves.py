"""float32 -> float16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = 65504.0  # of float16
SMALLEST_NORMAL = 2.0**-14  # smaller numbers of float16 have fewer digits, down to 2**-24


def nearest(values: NDArray[Any], limit: float = LARGEST) -> NDArray[np.float16]:
    """float32 of any shape -> float16 of that shape, to nearest even.

    Numbers beyond +-`limit`, which is at most LARGEST, become +-`limit`; infinities and NaN stay.
    """
    with np.errstate(over="ignore"):
        found = np.asarray(values).astype(np.float16)
    beyond = np.abs(found) > limit
    if beyond.any():  # of a large weight hardly ever, so that no more than it is in memory
        given = np.asarray(values)[beyond]
        found[beyond] = np.where(np.isfinite(given), np.copysign(np.float16(limit), found[beyond]), found[beyond])
    return found


def shares(values: NDArray[np.float32]) -> tuple[int, int]:
    """Of float32 values of any shape, how many there are other than 0, and how many of these lose digits in float16
    since they are small."""
    sizes = np.abs(values[values != 0])
    return sizes.size, int(np.count_nonzero(sizes < SMALLEST_NORMAL))
