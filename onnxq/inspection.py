"""inspect(): what is in a model, what a scheme would quantize, and why not the rest; no data, nothing is run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import presets, verification
from onnxq.aiming import aim
from onnxq.explanation import codes
from onnxq.graph import Graph, dtype_of, full_name, is_constant, load, port_of, shape_of
from onnxq.numerics import dtypes
from onnxq.passes.canonicalize import canonicalize
from onnxq.passes.manager import Context, PassManager
from onnxq.plan import NodePlan
from onnxq.planner.outline import outline
from onnxq.runtime.machine import target_here


def inspect(model: str | Path, *, scheme: str | None = None, target: str = "cpu") -> dict[str, Any]:
    """A model's ports, operators and weights (bytes by dtype), and each node's verdict under a scheme.

    `scheme` None is the target's. `int8_share` is the share of float weights that the scheme would turn into int8.
    Verdicts are those of the planner: a compilation also measures, and may leave float what does not pay. Raises
    UsageError for an unknown scheme or target, and what loading a model raises.
    """
    here = target_here(target)
    recipe = aim(presets.named(scheme or here.scheme), here)
    graph = load(model)
    operators = Counter(full_name(node) for node, _ in graph.walk())
    ports = {"inputs": _ports(graph.inputs), "outputs": _ports(graph.outputs)}
    by_dtype: Counter[str] = Counter()
    for dtype, count in _weights(graph).values():
        by_dtype[dtype] += count
    PassManager(canonicalize()).run(graph, Context(here))
    nodes = outline(graph, recipe, here).nodes
    rows = [verification.row(n) for n in nodes.values()]
    codes.connect(rows, nodes, graph)
    return {"model": str(model), "scheme": recipe.scheme.name, "target": target, "opset": graph.opset, **ports,
            "operators": dict(operators.most_common()), "weight_bytes": dict(by_dtype.most_common()),
            "int8_share": _int8_share(nodes, _weights(graph)),
            "nodes": [row.to_dict() for row in rows]}


def _ports(tensors: list[Any]) -> dict[str, str]:
    return {t.name: str(port_of(t)) for t in tensors}


def _weights(graph: Graph) -> dict[str, tuple[str, int]]:
    """Stored tensor -> (dtype, bytes), each once, those of bodies included."""
    found: dict[str, tuple[str, int]] = {}
    for node, _ in graph.walk():
        for tensor in node.inputs:
            if is_constant(tensor):
                dtype = dtype_of(tensor)
                count = int(np.prod([int(d or 0) for d in shape_of(tensor) or ()], dtype=np.int64))
                found[tensor.name] = (str(dtype), -(-count * _bits(dtype) // 8))
    return found


def _bits(dtype: np.dtype[Any] | None) -> int:
    """Of an element in the file, where several of less than 8 share a byte."""
    known = next((d.bits for d in dtypes.ALL if d.name == str(dtype)), None)
    return known or (8 * dtype.itemsize if dtype is not None else 8)


def _int8_share(nodes: dict[str, NodePlan], weights: dict[str, tuple[str, int]]) -> float:
    total = sum(count for dtype, count in weights.values() if dtype == "float32")
    chosen = {name for n in nodes.values() if n.is_int for name in (n.weight, *n.stored) if name is not None}
    return sum(weights[name][1] for name in chosen if name in weights) / total if total else 0.0
