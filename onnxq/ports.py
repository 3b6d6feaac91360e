"""What a model asks for at one graph input: the word that the rooms use between them, so that none needs another's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Port:
    """One graph input that has to be fed.

    `dtype` is None where NumPy has no such type. `shape` has an int for a fixed dimension, a str for a named one, None
    for an unnamed one; it is () for a scalar, and None where the model declares no rank.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...] | None
