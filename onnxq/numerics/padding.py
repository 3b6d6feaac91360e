"""Which positions of a batch of texts are padding: what they hold, nobody reads, and it must not shape any scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_MASK = "attention_mask"  # what exporters of language models call it


def real_positions(feed: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.bool_] | None:
    """bool [B, S], false at padding, from a fed mask of ones and zeros; None where nothing is padded.

    A row without any real position counts as real throughout.
    """
    mask = next((v for k, v in feed.items() if k.lower().endswith(_MASK) and v.ndim == 2), None)
    if mask is None or not np.isin(mask, (0, 1)).all():
        return None
    real = mask.astype(bool)
    real |= ~real.any(axis=1, keepdims=True)
    return None if real.all() else real


def without_padding(values: npt.NDArray[Any], real: npt.NDArray[np.bool_] | None) -> npt.NDArray[Any]:
    """[R, K], the real positions of values [B, S, K]; anything of another shape as it is."""
    return values[real] if real is not None and values.ndim == 3 and values.shape[:2] == real.shape else values
