"""Which of several ranges of a tensor costs least at the model's outputs, with nothing else quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from onnxq.calibration import observer
from onnxq.graph import Graph, dtype_of, switched
from onnxq.numerics import affine
from onnxq.numerics.comparison import Comparison
from onnxq.numerics.dtypes import by_name
from onnxq.plan import NodePlan
from onnxq.planner.smoothing import Searching

Range: TypeAlias = tuple[float, float]

FIRST = 32  # rows that all ranges are tried on; what wins there has to win on the others, too
_BETTER = 0.9  # times the error of a tensor's first range: smaller gains are noise of so few rows


def best(graph: Graph, nodes: Mapping[str, NodePlan], tries: Mapping[str, Sequence[Range]],
         by: Searching) -> dict[str, Range]:
    """Tensor -> its first range, or another one that is better both on the first rows and on all others.

    Errors are squared, relative to the float outputs, and averaged over those of float32. Whatever is no output of
    this type, or is read as codes by no node of the graph itself, keeps its first range.
    """
    found = {name: ranges[0] for name, ranges in tries.items()}
    left: dict[str, Sequence[Range]] = dict(tries)
    for first_row, last_row in ((0, FIRST), (FIRST, by.how.samples)):
        won: dict[str, Sequence[Range]] = {}
        for name, errors in _errors(graph, nodes, left, by, first_row, last_row).items():
            least = int(np.argmin(errors))
            if errors[least] < _BETTER * errors[0]:
                won[name] = left[name][0], left[name][least]
        left = won
    return found | {name: ranges[1] for name, ranges in left.items()}


def _errors(graph: Graph, nodes: Mapping[str, NodePlan], tries: Mapping[str, Sequence[Range]], by: Searching,
            first_row: int, last_row: int | None) -> dict[str, list[float]]:
    """Tensor -> the error of each range; those that can't be tried are left out."""
    spec = by.scheme.activations
    assert spec is not None
    dtype = by_name(spec.dtype)
    readers = {name: users for name in tries if (users := _readers(graph, nodes, name))}
    outputs = [t.name for t in graph.outputs if dtype_of(t) == np.float32]
    if not readers or not outputs:
        return {}
    probe, switches = switched(graph, readers, dtype.storage)
    feeds = {}
    for name, switch in switches.items():
        for index, (low, high) in enumerate(tries[name]):
            params = affine.choose(low, high, dtype, spec.symmetric)
            feeds[name, index] = switch.at(params.scale, params.zero_point)
    plain = {k: v for switch in switches.values() for k, v in switch.off(dtype.storage).items()}
    rows = [n for n in (last_row, by.how.samples) if n is not None]
    how = replace(by.how, samples=min(rows, default=None))
    found = observer.trials(probe, feeds, plain, outputs, by.data, how, by.options, first_row)
    return {name: [_mean(found[name, index]) for index in range(len(tries[name]))] for name in switches}


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
