"""Kernels on weights in blocks, each form once, on its own: for models that are never run as a whole."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.graph import Graph, Node, save, shape_of
from onnxq.passes.blocks import layout
from onnxq.plan import UNTOUCHED, Plan
from onnxq.planner.candidates import emit, units
from onnxq.planner.weight_only import weight_of
from onnxq.runtime.compare import least_sqnr
from onnxq.runtime.session import Session, SessionOptions
from onnxq.targets import Target

LEAST_DB = 25.0  # activations rounded to int8 in blocks leave 35 and more
_ROWS = 4
_MOST_WEIGHTS = 1 << 24  # of a layer that is checked
_BYTES = 20  # for each of them: its decoded form takes five floats


@dataclass
class Checked:
    """How many kernels ran, the least agreement in dB (infinite for none), and what is wrong."""

    kernels: int = 0
    least_db: float = float("inf")
    faults: list[str] = field(default_factory=list)


def check(graph: Graph, plan: Plan, target: Target, options: SessionOptions, fmt: str, memory: int) -> Checked:
    """Run one layer of each form (operator, shape, dtype, block size, bias) on random rows, and its decoded form.

    A layer whose decoded form takes more than `memory` bytes is left out.
    """
    most = min(_MOST_WEIGHTS, memory // _BYTES)
    found, nodes = Checked(), {n.name: n for n in graph.nodes}
    seen: set[object] = set()
    random = np.random.default_rng(0)
    for unit in units(plan, graph):
        node, verdict = nodes[unit.name], plan.nodes[unit.name]
        form = layout(plan, verdict.weight) if verdict.weight is not None else None
        if verdict.activation != UNTOUCHED or form is None:
            continue
        dims = tuple(int(d or 0) for d in shape_of(weight_of(node)) or ())
        key = (node.op, dims, form, verdict.bias_add is not None or len(node.inputs) > 2)
        if key in seen or np.prod(dims) > most:
            continue
        seen.add(key)
        feed = {node.inputs[_reads(node)].name: _rows(node, dims, random)}
        compiled, twin = emit(graph, unit, plan, target, feed, fmt)
        with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
            paths = [Path(folder) / f"{k}.onnx" for k in (0, 1)]
            for path, one in zip(paths, (twin, compiled), strict=True):
                save(one.graph, path)
            plain = replace(options, optimize=False)
            db = least_sqnr(Session(paths[0], plain), Session(paths[1], options), [feed])
        found.kernels += 1
        found.least_db = min(found.least_db, db if db is not None else float("inf"))
        if db is not None and db < LEAST_DB:
            found.faults.append(f"{unit.name}: {verdict.lowering} agrees to {db:.1f} dB only with its decoded form; "
                                "please report this")
    return found


def _reads(node: Node) -> int:
    return 1 if node.op == "Gather" else 0


def _rows(node: Node, dims: tuple[int, ...], random: np.random.Generator) -> npt.NDArray[Any]:
    if node.op == "Gather":
        return random.integers(0, dims[0], (1, _ROWS))
    return random.standard_normal((1, _ROWS, dims[0])).astype(np.float32)
