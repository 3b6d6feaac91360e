"""Runs each model of this folder on the sample beside it and compares what comes out with what is expected.

    python smoke.py

Needs numpy and onnxruntime. Ends with 1 where an output is off.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

FOLDER = Path(__file__).resolve().parent


def read(tensor: dict[str, Any]) -> np.ndarray[Any, Any]:
    """An array from the little-endian file of a tensor of the manifest."""
    dtype = np.dtype(tensor["dtype"]).newbyteorder("<")
    values = np.frombuffer((FOLDER / tensor["file"]).read_bytes(), dtype)
    return values.astype(tensor["dtype"]).reshape(tensor["shape"])


def difference(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """The largest difference: infinite where types or shapes differ, or one is not a number."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return float("inf")
    if found.dtype.kind not in "f":
        found, expected = found.astype(object), expected.astype(object)  # integers of any size
        return float(np.abs(found * 1 - expected * 1).max(initial=0))
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(found - expected))
    return float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max(initial=0))


def session(model: dict[str, Any], threads: int) -> onnxruntime.InferenceSession:
    """A session as the manifest describes it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    for key, value in model["config"].items():
        options.add_session_config_entry(key, value)
    provider = model["provider"]
    if provider not in onnxruntime.get_available_providers():
        sys.exit(f"this onnxruntime has no {provider}")
    wanted = [(provider, model["provider_options"])]
    return onnxruntime.InferenceSession(str(FOLDER / model["file"]), options, providers=wanted)


def main() -> bool:
    """Compare every output of every model; whether all are well."""
    manifest = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
    sample = manifest["sample"]
    feed = {tensor["name"]: read(tensor) for tensor in sample["inputs"]}
    names = [tensor["name"] for tensor in sample["outputs"]]
    well = bool(manifest["models"])
    for model in manifest["models"]:
        found = session(model, manifest["threads"]).run(names, feed)
        for tensor, values in zip(sample["outputs"], found, strict=True):
            error, allowed = difference(values, read(tensor)), tensor["tolerance"]
            well = well and error <= allowed
            judged = "ok" if error <= allowed else "WRONG"
            print(f"{model['file']} {tensor['name']}: error {error:.3g}, allowed {allowed}: {judged}")
    return well


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
