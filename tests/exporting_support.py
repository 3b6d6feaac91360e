"""What the tests of exports share: the models of the repository, compiled once."""

from __future__ import annotations

from pathlib import Path

import onnxq

MODELS = Path(__file__).resolve().parent.parent / "models"


def compiled(folder: Path, name: str, scheme: str = "w8a8") -> Path:
    """A model of models/ compiled into `folder` by a scheme, without timing anything."""
    path = folder / f"{name}.{scheme}.onnx"
    if not path.exists():
        calib = str(MODELS / name / "calib.npz") if scheme == "w8a8" else None
        onnxq.compile(MODELS / name / "model.onnx", path, scheme=scheme, calib=calib, samples=16, measure=False)
    return path


def rows(name: str) -> str:
    """The evaluation data of a model of models/."""
    return str(MODELS / name / "eval.npz")
