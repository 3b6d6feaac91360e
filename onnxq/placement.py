"""check(): where each node of a model will run on a target, before it is there."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import verification
from onnxq.aiming import NAMELESS, sizes_of, target_for
from onnxq.calibration.readers import open_data
from onnxq.errors import DataError, ModelError
from onnxq.graph import Graph, Node, dtype_of, free_axes, full_name, is_constant, load, read_nodes, shape_of
from onnxq.runtime.machine import WASM, checking, is_here
from onnxq.runtime.observe import Executed, Planned, executed, match, optimized
from onnxq.runtime.session import CPU, SessionOptions
from onnxq.targets import Target

FOLDED = ""  # the provider of a node that is gone once the model is loaded
_SHAPES = "it computes sizes, which are read on the CPU"
_CODES = ("QLinear", "Quantize", "Dequantize", "DynamicQuantize", "MatMulInteger", "ConvInteger", "QGemm")


@dataclass
class Placed:
    """A node, the provider and kernel that are expected, why it is not the target's, and what was seen to run it."""

    name: str
    op: str
    provider: str
    kernel: str
    reason: str = ""
    ran_on: str | None = None
    ran_as: str | None = None


def check(model: str | Path, *, target: str = "cpu", runtime: str | None = None, data: Any = None,
          threads: int = 0) -> dict[str, Any]:
    """Which provider runs each node of a model on a target, how often the graph changes between providers, and what to
    change.

    On the CPU the runtime is asked how it rewrites the model; for other providers the target's tables say what it
    takes. Where the target is this machine the model is run, on `data` or random inputs, and what ran is set beside
    what was expected. Raises UsageError for an unknown target.
    """
    aim = target_for(target, runtime=runtime)
    graph = load(model)
    notes = [] if aim.opset is None or graph.opset <= aim.opset else [
        f"the model is of opset {graph.opset}, and onnxruntime {aim.since} takes {aim.opset} at most"]
    placed = _on_cpu(model, graph, aim, threads) if aim.provider in (CPU, WASM) else _by_table(graph, aim)
    notes += [_free_axes(graph)] if aim.static and _free_axes(graph) else []
    compared = _compared(model, graph, aim, placed, data, threads, notes) if is_here(aim) else None
    if not is_here(aim):
        what = f"{aim.name} is" if aim.machines is not None else f"{aim.provider} is"
        notes.append(f"{what} not here: nothing was run to compare with")
    cuts, copies = _cuts(graph, placed)
    return {"model": str(model), "target": target, "provider": aim.provider, "nodes": [asdict(p) for p in placed],
            "providers": dict(Counter(p.provider for p in placed if p.provider != FOLDED)),
            "cuts": cuts, "copies": copies, "advice": _advice(placed, aim), "agreement": compared, "notices": notes}


# ------------------------------------------------------------------ CPU kernels


def _on_cpu(model: str | Path, graph: Graph, target: Target, threads: int) -> list[Placed]:
    """By the graph that onnxruntime makes of the model as it loads it."""
    options = SessionOptions(CPU, threads, config=target.config)
    found = match(_planned(graph), optimized(model, options, read_nodes))
    return [_placed(node, target.provider, found[node.name]) for node in graph.nodes]


def _planned(graph: Graph) -> list[Planned]:
    return [Planned(n.name, tuple(t.name for t in n.outputs if t.name), ()) for n in graph.nodes]


def _placed(node: Node, provider: str, kernel: Executed | None) -> Placed:
    own = full_name(node)
    if kernel is None:
        return Placed(node.name, own, FOLDED, "", "folded as the model is loaded")
    return Placed(node.name, own, provider, kernel.op)


# ------------------------------------------------------------------ other providers


def _by_table(graph: Graph, target: Target) -> list[Placed]:
    """By the operators and types that a provider takes; what it does not take runs on the CPU."""
    shapes = _shape_arithmetic(graph)
    found = []
    for node in graph.nodes:
        own, reason = full_name(node), _refused(graph, node, target)
        if reason is None and target.sizes_on_cpu and node.name in shapes:
            reason = _SHAPES
        found.append(Placed(node.name, own, target.provider if reason is None else CPU, own, reason or ""))
    return found


def _refused(graph: Graph, node: Node, target: Target) -> str | None:
    """Why a provider does not take a node; None where it does."""
    if node.op in ("If", "Loop", "Scan") and not node.domain:
        inner = [n.op for owner, body in graph.subgraphs() if owner is node for n, _ in body.walk()
                 if _refused(body, n, target) is not None]
        if inner:
            return f"its body holds {', '.join(sorted(set(inner)))}"
    assert target.operators is not None
    own = full_name(node)
    if own not in target.operators:
        return f"the provider has no {own}"
    if target.symmetric and node.op in ("QuantizeLinear", "DequantizeLinear"):
        return _unsymmetric(graph, node, target)
    takes, first = target.operators[own], next((t for t in node.inputs if t.name), None)
    dtype = str(dtype_of(first)) if first is not None and dtype_of(first) is not None else None
    if takes and dtype is not None and dtype not in takes:
        return f"the provider has no {own} of {dtype}"
    return None


def _unsymmetric(graph: Graph, node: Node, target: Target) -> str | None:
    codes = node.outputs[0] if node.op == "QuantizeLinear" else node.inputs[0]
    dtype = str(dtype_of(codes))
    if dtype not in ("int8", "int4", "float8_e4m3fn", *(() if target.float_bias else ("int32",))):
        return f"the provider takes int8 codes, not {dtype}"
    zero = graph.optional_input(node, 2)
    if zero is not None and (not is_constant(zero) or graph.read(zero).astype("float32").any()):
        return "the provider takes zero points of 0 alone"
    return None


def _shape_arithmetic(graph: Graph) -> set[str]:
    """Nodes that compute sizes from sizes: the runtime keeps them on the CPU, where their results are read."""
    sizes, found = set[str](), set[str]()
    for node in graph.nodes:
        computed = [t.name for t in node.inputs if t.name and not is_constant(t)]
        begins = node.op in ("Shape", "Size") and not node.domain
        if not (begins or (computed and all(name in sizes for name in computed))):
            continue
        small = all(len(shape_of(t) or ()) <= 1 for t in node.outputs)
        if small and all(np.dtype(dtype_of(t) or np.int64).kind in "iub" for t in node.outputs if t.name):
            sizes |= {t.name for t in node.outputs}
            found |= set() if begins else {node.name}
    return found


# ------------------------------------------------------------------ figures


def _cuts(graph: Graph, placed: Sequence[Placed]) -> tuple[int, int]:
    """(changes between providers in the order of execution, tensors that are copied from one to another)."""
    where = {p.name: p.provider for p in placed if p.provider != FOLDED and p.reason != _SHAPES}
    order = [where[n.name] for n in graph.nodes if n.name in where]
    cuts = sum(a != b for a, b in itertools.pairwise(order))
    copies = 0
    for node in graph.nodes:
        for tensor in node.outputs:
            there = {where[user.name] for user in graph.consumers(tensor) if user.name in where}
            copies += len(there - {where[node.name]}) if node.name in where else 0
    return cuts, copies


def _advice(placed: Iterable[Placed], target: Target) -> list[str]:
    """What to change, most nodes first."""
    away = Counter((p.op, p.reason) for p in placed
                   if p.provider not in (target.provider, FOLDED) and p.reason != _SHAPES)
    said = [f"{count} {op} run on the CPU: {reason}" for (op, reason), count in away.most_common()]
    quantized = any(op.rpartition(".")[2].startswith(_CODES) or op.startswith("com.microsoft.") for op, _ in away)
    if quantized:
        said.append(f"compile the float model with --target {target.name}: it writes what this provider takes")
    elif away and target.static:
        said.append(f"the provider takes whole graphs, and fails on these: compile with --target {target.name}, which "
                    "writes most of them as operators that it has")
    return said


def _free_axes(graph: Graph) -> str:
    free, unnamed = free_axes(graph)
    if unnamed:
        return f"the provider compiles the model anew for each size of {', '.join(unnamed)}: {NAMELESS}"
    return (f"the provider compiles the model anew for each size of {', '.join(free)}: fix them with "
            f"{sizes_of(free)}") if free else ""


def _compared(model: str | Path, graph: Graph, target: Target, placed: list[Placed], data: Any, threads: int,
              notes: list[str]) -> dict[str, Any] | None:
    """What ran beside what was expected: nodes whose provider, and whose kernel, are as expected; None if nothing
    runs."""
    options = checking(target, threads).options
    try:
        given = open_data(data if data is not None else "random", graph.ports())
        ran = executed(model, verification.first_feeds(given, None, 1), options, read_nodes)
    except (DataError, ModelError) as e:
        notes.append(f"nothing was run to compare with: {e}")
        return None
    found = match(_planned(graph), ran)
    for one in placed:
        kernel = found[one.name]
        one.ran_on, one.ran_as = (kernel.provider or one.provider, kernel.op) if kernel is not None else (FOLDED, "")
    return {"nodes": len(placed), "provider": sum(p.ran_on == p.provider for p in placed),
            "kernel": sum(p.ran_as == p.kernel for p in placed)}
