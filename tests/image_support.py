"""Folders of small images and what the reader makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from onnxq.calibration.readers import open_data
from onnxq.ports import Port
from onnxq.recipe import Preprocessing

Array = npt.NDArray[Any]
F32, U8 = np.dtype(np.float32), np.dtype(np.uint8)


def port(*shape: int | str | None, dtype: np.dtype[Any] = F32) -> Port:
    return Port("x", dtype, shape)


def pixels(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def write(folder: Path, **images: Array | Image.Image) -> Path:
    """PNG files by name; `__` in a name is a sub-folder."""
    for name, image in images.items():
        path = folder / (name.replace("__", "/") + ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)
    return folder


def read(folder: Path, to: Port, how: Preprocessing | None = None, **limits: int) -> list[Array]:
    return [batch.feed["x"] for batch in open_data(folder, [to], how=how or Preprocessing()).batches(**limits)]


def codes(folder: Path, to: Port, **how: Any) -> Array:
    """The first image's row as pixel codes from 0 to 255, [C, H, W] or [H, W, C]."""
    return read(folder, to, Preprocessing(scale=1.0, **how))[0][0]
