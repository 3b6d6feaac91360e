"""Nodes in the order in which they can run."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from onnxq.errors import GraphError


def in_order(given: Sequence[Any], reads: Callable[[Any], Iterable[Any]]) -> list[Any]:
    """The nodes in execution order, keeping the given order where it is one; `reads` gives the tensors of a node.

    Raises GraphError on a cycle.
    """
    nodes = list(given)
    position = {id(n): i for i, n in enumerate(nodes)}
    waiting: dict[int, set[int]] = {}
    readers: dict[int, list[int]] = {}
    for i, node in enumerate(nodes):
        needs = {position[id(p)] for t in reads(node) for p in t.inputs if id(p) in position} - {i}
        waiting[i] = needs
        for need in needs:
            readers.setdefault(need, []).append(i)
    ready = [i for i, needs in waiting.items() if not needs]
    heapq.heapify(ready)
    order = []
    while ready:
        i = heapq.heappop(ready)
        order.append(nodes[i])
        for reader in readers.get(i, ()):
            waiting[reader].discard(i)
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(nodes):
        raise GraphError("the graph has a cycle; check the model with onnx.checker")
    return order
