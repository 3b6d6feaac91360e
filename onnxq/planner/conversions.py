"""What it takes to go from float to codes and back, by the number of elements."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.graph import Graph, alone, save
from onnxq.runtime.race import KernelTime, race
from onnxq.runtime.session import Session, SessionOptions
from onnxq.runtime.timings import TimingCache

_COUNTS = (1 << 10, 1 << 15, 1 << 18, 1 << 21)  # elements; times between them are interpolated
_CHANNELS = 64
_SCALE, _ZERO_POINT = np.asarray(0.02, np.float32), np.asarray(128, np.uint8)


@dataclass(frozen=True)
class Costs:
    """Milliseconds at the element counts of `counts`: QuantizeLinear, DequantizeLinear and the Transpose of codes
    between the layouts of a float and an integer Conv, and a Mul by a factor per channel, each without what running any
    graph takes."""

    counts: tuple[int, ...]
    quantize: tuple[float, ...]
    dequantize: tuple[float, ...]
    layout: tuple[float, ...]
    scale: tuple[float, ...] = (0.0,)

    def to_codes(self, elements: int, rank: int) -> float:
        """Milliseconds from float to uint8 codes; tensors of more than 3 axes change their layout, too."""
        return self._at(self.quantize, elements) + self._layout(elements, rank)

    def to_scale(self, elements: int) -> float:
        """Milliseconds to scale the channels of a float tensor."""
        return self._at(self.scale, elements)

    def to_float(self, elements: int, rank: int) -> float:
        """Milliseconds from uint8 codes to float."""
        return self._at(self.dequantize, elements) + self._layout(elements, rank)

    def _layout(self, elements: int, rank: int) -> float:
        return self._at(self.layout, elements) if rank > 3 else 0.0

    def _at(self, times: tuple[float, ...], elements: int) -> float:
        """Linear between the counts and beyond the last; below the first, that of the first."""
        if elements > self.counts[-1]:
            return times[-1] * elements / self.counts[-1]
        return float(np.interp(elements, self.counts, times))


FREE = Costs((1,), (0.0,), (0.0,), (0.0,))


def measure(options: SessionOptions, cache: TimingCache) -> Costs:
    """Time the conversions on the target, or take them from the cache."""
    rows: dict[str, list[float]] = {"quantize": [], "dequantize": [], "layout": [], "scale": []}
    call = 0.0
    for count in _COUNTS:
        about = {"conversions and scaling of elements": count}
        times = cache.get(about)
        if times is None:
            times = _time(count, options)
            cache.put(about, times)
        call = call or times["call"].ms
        for name, row in rows.items():
            row.append(max(times[name].ms - call, 0.0))
    return Costs(_COUNTS, **{name: tuple(row) for name, row in rows.items()})


def _time(count: int, options: SessionOptions) -> dict[str, KernelTime]:
    generator = np.random.default_rng(0)
    floats = generator.standard_normal((1, _CHANNELS, count // _CHANNELS)).astype(np.float32)
    codes = generator.integers(0, 256, floats.shape, np.uint8)
    pair: list[npt.NDArray[Any]] = [_SCALE, _ZERO_POINT]
    graphs: dict[str, tuple[Graph, npt.NDArray[Any]]] = {
        "call": (alone("Neg", [floats[:, :1, :1]], [np.float32]), floats[:, :1, :1]),
        "quantize": (alone("QuantizeLinear", [floats], [np.uint8], constants=pair), floats),
        "dequantize": (alone("DequantizeLinear", [codes], [np.float32], constants=pair), codes),
        "layout": (alone("Transpose", [codes], [np.uint8], {"perm": [0, 2, 1]}), codes),
        "scale": (alone("Mul", [floats], [np.float32], constants=[floats[:1, :1].reshape(-1)]), floats)}
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        calls: dict[str, list[Callable[[], None]]] = {}
        for name, (graph, array) in graphs.items():
            path = Path(folder) / f"{name}.onnx"
            save(graph, path)
            calls[name] = [Session(path, options).runner({"x0": array})]
        return race(calls, block_seconds=0.05, give_up=float("inf"))
