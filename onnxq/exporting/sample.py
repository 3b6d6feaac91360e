"""One input with the output that is expected of it, and how far another machine's may be from that."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.calibration.readers import open_data
from onnxq.errors import ModelError
from onnxq.exporting.manifest import Stored
from onnxq.graph import NUDGE, write_nudged
from onnxq.ports import Port
from onnxq.recipe import Preprocessing
from onnxq.runtime.session import Session, SessionOptions

Array = npt.NDArray[Any]
FOLDER = "sample"
RANDOM = "random"

_NUDGES = 4
_FACTOR = 2.0  # on the largest of the differences seen, which are few
# of an output's largest number: what float32 sums differ by, of another type some units in its last place
_ROUNDINGS, _UNITS = 1e-5, 4
_DIGITS = 3


def take(data: Any, ports: list[Port], how: Preprocessing) -> tuple[dict[str, Array], str]:
    """(feed, what it is) of the first row of DATA, or of a made one where `data` is None. Raises DataError."""
    opened = open_data(RANDOM if data is None else data, ports, how=how)
    feed = next(iter(opened.batches(1))).feed
    return feed, "made at random" if opened.random else f"first row of {opened.name}"


def tolerances(model: Path, feed: Mapping[str, Array], expected: Mapping[str, Array], options: SessionOptions,
               floats: str = "float32") -> dict[str, float]:
    """By how much each output may differ where another machine runs the model rightly, at the most.

    The model is run without optimizations, with constants nudged by 2^-18 (see onnxq.graph.nudged), and with float
    activations beside weights in blocks. Twice the largest difference from `expected` is allowed, and of floats 1e-5 of
    the largest number besides (or 4 units in the last place of a type coarser than float32). Integers are allowed what
    they differed by. Where the device computes in `floats` float16, nudges are of 2^-10, a unit in its last place. The
    folder of `model` has to be writable.
    """
    spread = dict.fromkeys(expected, 0.0)
    unit = float(np.finfo(floats).eps)
    for found in _variants(model, feed, options, max(NUDGE, unit)):
        for name, wanted in expected.items():
            apart = difference(found[name], wanted)
            if math.isfinite(apart):
                spread[name] = max(spread[name], apart)
    allowed = {}
    for name, wanted in expected.items():
        if wanted.dtype.kind != "f":
            allowed[name] = spread[name]
            continue
        finite = np.abs(wanted[np.isfinite(wanted)].astype(np.float64))
        relative = max(_ROUNDINGS, _UNITS * unit, _UNITS * float(np.finfo(wanted.dtype).eps))
        allowed[name] = _rounded(_FACTOR * spread[name] + relative * float(finite.max(initial=0)))
    return allowed


def _variants(model: Path, feed: Mapping[str, Array], options: SessionOptions,
              nudge: float) -> Iterator[dict[str, Array]]:
    """Outputs of models as right as this one; those that don't run say nothing."""
    plain = replace(options, optimize=False)
    variant = model.with_name(f".variant{model.suffix}")
    for seed in ("plain", None, *range(_NUDGES)):
        try:
            if seed == "plain":
                yield Session(model, plain).run(feed)
            elif write_nudged(model, variant, seed if isinstance(seed, int) else None, nudge):
                yield Session(variant, options).run(feed)
        except ModelError:
            continue
        finally:
            variant.unlink(missing_ok=True)


def difference(found: Array, expected: Array) -> float:
    """The largest difference of two tensors: infinite where types or shapes differ, or one is not a number.

    NaN equals NaN, and infinities of one sign are equal.
    """
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return math.inf
    if found.dtype.kind != "f":
        apart = [abs(int(a) - int(b)) for a, b in zip(found.flat, expected.flat, strict=True) if a != b]
        return float(max(apart, default=0))
    a, b = found.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart_by = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    return float(np.nan_to_num(apart_by, nan=math.inf, posinf=math.inf).max(initial=0.0))


def store(folder: Path, arrays: Mapping[str, Array], role: str,
          allowed: Mapping[str, float] | None = None) -> tuple[Stored, ...]:
    """Write arrays into FOLDER below `folder`, each in a file of its own, named by its `role` and place."""
    (folder / FOLDER).mkdir(exist_ok=True)
    found = []
    for k, (name, values) in enumerate(arrays.items()):
        file = f"{FOLDER}/{role}{k}.bin"
        (folder / file).write_bytes(values.astype(values.dtype.newbyteorder("<")).tobytes())
        found.append(Stored(name, values.dtype.name, values.shape, file, (allowed or {}).get(name, 0.0)))
    return tuple(found)


def fetch(folder: Path, tensor: Stored) -> Array:
    """The array of a stored tensor. Raises ModelError for a file of another size."""
    stored = np.dtype(tensor.dtype).newbyteorder("<")
    raw = (folder / tensor.file).read_bytes()
    if len(raw) != math.prod(tensor.shape) * stored.itemsize:
        raise ModelError(f"{folder / tensor.file} does not hold {tensor.dtype} {list(tensor.shape)}; export the model "
                         "again")
    return np.frombuffer(bytearray(raw), stored).astype(tensor.dtype).reshape(tensor.shape)


def _rounded(number: float) -> float:
    """Up to a few digits, so that manifests can be read."""
    if number == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(number)) - _DIGITS + 1)
    return float(f"{math.ceil(number / unit) * unit:.{_DIGITS}g}")
