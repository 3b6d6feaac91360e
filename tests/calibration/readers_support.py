"""Ports, arrays and short-hands of the tests of readers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from onnxq.calibration.readers import Dataset
from onnxq.ports import Port

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
X = Port("x", F32, ("N", 3))
IDS = Port("ids", I64, ("N", None))
FIXED4 = Port("x", F32, (4, 3))
STATEFUL = [Port("input", F32, ("batch", 5)), Port("sr", I64, ()), Port("state", F32, (2, "batch", 3))]
Save = Callable[..., None]


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def feeds(data: Dataset, **limits: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    return [batch.feed for batch in data.batches(**limits)]


def joined(data: Dataset, name: str = "x", **limits: int) -> np.ndarray[Any, Any]:
    return np.concatenate([feed[name] for feed in feeds(data, **limits)])
