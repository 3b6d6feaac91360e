"""Tables whose transpose is a layer's weight: tied embeddings, of which exporters write two tensors."""

from __future__ import annotations

import numpy as np

from onnxq.errors import UsageError
from onnxq.graph import Graph, Tensor, dtype_of, is_constant, shape_of
from onnxq.plan import Plan
from onnxq.planner.weight_only import LINEAR, readers

_ROWS = 256  # that are compared at a time
_CORNER = 16


def find(graph: Graph) -> dict[str, str]:
    """Table [V, D] -> the weight [D, V] of a layer, where one is the other's transpose; each in one pair at most."""
    tables: dict[tuple[int, ...], list[Tensor]] = {}
    weights: list[Tensor] = []
    for name, reading in readers(graph).items():
        ops = {node.op for _, node in reading}
        [tensor] = {id(t): t for _, node in reading[:1] for t in node.inputs if t.name == name}.values()
        if dtype_of(tensor) != np.float32:
            continue
        if ops == {"Gather"}:
            tables.setdefault(_dims(tensor), []).append(tensor)
        elif ops <= LINEAR:
            weights.append(tensor)
    found: dict[str, str] = {}
    for weight in weights:
        for table in tables.get(_dims(weight)[::-1], []):
            if table.name not in found and _transposes(graph, table, weight):
                found[table.name] = weight.name
                break
    return found


def check(plan: Plan, graph: Graph) -> None:
    """Whether tables whose codes are those of a layer's weight still are its transpose. Raises UsageError if not."""
    constants = {t.name: t for node, _ in graph.walk() for t in node.inputs if t.name and is_constant(t)}
    for table, weight in plan.ties.items():
        pair = constants.get(table), constants.get(weight)
        if pair[0] is None or pair[1] is None or not _transposes(graph, pair[0], pair[1]):
            raise UsageError(f"the plan was made for another model: {table!r} is not the transpose of {weight!r} in "
                             "this one; make a plan of this model with --save-plan DIR")


def _transposes(graph: Graph, table: Tensor, weight: Tensor) -> bool:
    """A corner is compared first, so that tensors that only have such shapes cost little, on the disk, too."""
    if _dims(table) != _dims(weight)[::-1]:
        return False
    some = (np.asarray(graph.read_rows(one, 0, _CORNER)[:, :_CORNER]) for one in (table, weight))
    if not np.array_equal(next(some), next(some).T):
        return False
    values = np.asarray(graph.read(weight))
    starts = range(0, _dims(table)[0], _ROWS)
    return all(np.array_equal(graph.read_rows(table, first, first + _ROWS), values[:, first : first + _ROWS].T)
               for first in starts)


def _dims(tensor: Tensor) -> tuple[int, ...]:
    return tuple(int(d or 0) for d in shape_of(tensor) or ())
