"""Ranges of named tensors, as one observer run finds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from onnxq.calibration import observer
from onnxq.calibration.observer import Statistic
from onnxq.calibration.readers import Dataset
from onnxq.graph import Graph
from onnxq.recipe import Calibration
from onnxq.runtime.session import SessionOptions
from onnxq.schemes import TensorSpec

ALL, ONE_THREAD = Calibration(samples=None), SessionOptions(threads=1)


def observe(graph: Graph, wanted: Sequence[str], data: Dataset, how: Calibration = ALL,
            progress: Callable[[int], None] | None = None, spec: TensorSpec | None = None,
            beside: Mapping[str, Statistic] | None = None) -> dict[str, tuple[float, float]]:
    """Tensor name -> (min, max) over the data; `beside` are statistics folded in the same run."""
    running = observer.make(wanted, how, spec)
    observer.fold(graph, running, data, how, ONE_THREAD, progress, [beside or {}])
    return {name: found.result() for name, found in running.items()}
