"""Which of several ranges of a tensor costs least at the model's outputs, with nothing else quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxq.calibration import observer
from onnxq.graph import Graph, dtype_of, switched
from onnxq.numerics import affine
from onnxq.numerics.comparison import Comparison
from onnxq.numerics.dtypes import by_name
from onnxq.plan import NodePlan
from onnxq.planner.smoothing import Searching

Range: TypeAlias = tuple[float, float]

FIRST = 16  # rows that all ranges are tried on; what wins there has to win on the others, too
_BETTER = 0.9  # times the error of a tensor's first range: smaller gains are noise of so few rows

Trial: TypeAlias = Mapping[str, Range]  # tensors that are quantized at once, at these ranges


def best(graph: Graph, nodes: Mapping[str, NodePlan], tries: Mapping[str, Sequence[Range]],
         by: Searching) -> dict[str, Range]:
    """Tensor -> its first range, or another one that is better on the first rows and, with all that are, on the others.

    Where all of them together fail on the others, each half of them is tried there by itself, down to single ones.
    Errors are squared, relative to the float outputs, and averaged over those of float32. Whatever is no output of
    this type, or is read as codes by no node of the graph itself, keeps its first range.
    """
    found = {name: ranges[0] for name, ranges in tries.items()}
    readers = {name: users for name in tries if (users := _readers(graph, nodes, name))}
    alone = [{name: one} for name in readers for one in tries[name]]
    errors = iter(_errors(graph, readers, alone, by, 0, FIRST))
    won = {}
    for name in readers:
        of_ranges = [next(errors) for _ in tries[name]]
        least = int(np.argmin(of_ranges))
        if of_ranges[least] < _BETTER * of_ranges[0]:
            won[name] = tries[name][least]
    left = [won] if won else []
    while left:
        some = left.pop()
        before, after = _errors(graph, {name: readers[name] for name in some},
                                [{name: tries[name][0] for name in some}, some], by, FIRST, by.how.samples)
        if after < _BETTER * before:
            found |= some
        elif len(some) > 1:
            names, half = list(some), len(some) // 2
            left += [{name: some[name] for name in part} for part in (names[:half], names[half:])]
    return found


def _errors(graph: Graph, readers: Mapping[str, Sequence[str]], trials: Sequence[Trial], by: Searching,
            first_row: int, last_row: int | None) -> list[float]:
    """The error of each trial; 0 without outputs to compare, or rows."""
    spec = by.scheme.activations
    assert spec is not None
    dtype = by_name(spec.dtype)
    outputs = [t.name for t in graph.outputs if dtype_of(t) == np.float32]
    if not readers or not outputs:
        return [0.0] * len(trials)
    probe, switches = switched(graph, readers, dtype.storage)
    feeds: dict[int, dict[str, npt.NDArray[Any]]] = {}
    for index, trial in enumerate(trials):
        feeds[index] = {}
        for name, (low, high) in trial.items():
            params = affine.choose(low, high, dtype, spec.symmetric)
            feeds[index] |= switches[name].at(params.scale, params.zero_point)
    plain = {k: v for switch in switches.values() for k, v in switch.off(dtype.storage).items()}
    rows = [n for n in (last_row, by.how.samples) if n is not None]
    how = replace(by.how, samples=min(rows, default=None))
    found = observer.trials(probe, feeds, plain, outputs, by.data, how, by.options, first_row)
    return [_mean(found[index]) for index in range(len(trials))]


def _readers(graph: Graph, nodes: Mapping[str, NodePlan], name: str) -> list[str]:
    """Nodes that see what codes leave of a tensor: all where it is made as codes, else those that read codes."""
    stored = any(name in (v.result, *v.more_results) for v in nodes.values() if v.int_output)
    found = []
    for node in graph.nodes:
        verdict = nodes.get(node.name)
        read = [k for k, t in enumerate(node.inputs) if t.name == name]
        if read and (stored or (verdict is not None and any(k in verdict.int_inputs for k in read))):
            found.append(str(node.name))
    return found


def _mean(compared: Mapping[str, Comparison]) -> float:
    """The relative squared error; 0 where nothing was compared."""
    noise = [0.0 if not one.count or (db := one.sqnr_db) is None else 10.0 ** (-db / 10) for one in compared.values()]
    return float(np.mean(noise))
