"""A graph whose tensors each run may quantize or not, at scales that it feeds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.graph.graph import Graph, Node, Tensor
from onnxq.graph.tensors import Array


@dataclass(frozen=True)
class Switch:
    """The three inputs of one quantizer, by their names: bool [], float32 [] and a code []."""

    on: str
    scale: str
    zero_point: str

    def off(self, storage: Any) -> dict[str, Array]:
        """What to feed for readers that see float values; `storage` is the dtype of codes."""
        return self._fed(False, np.ones((), np.float32), np.zeros((), storage))

    def at(self, scale: Array, zero_point: Array) -> dict[str, Array]:
        """What to feed for readers that see what codes of this scale and zero point leave."""
        return self._fed(True, scale.reshape(()), zero_point.reshape(()))

    def _fed(self, on: bool, scale: Array, zero_point: Array) -> dict[str, Array]:
        return {self.on: np.array(on), self.scale: scale, self.zero_point: zero_point}


def switched(graph: Graph, readers: Mapping[str, Collection[str]], storage: Any) -> tuple[Graph, dict[str, Switch]]:
    """A copy in which `readers`, by node name, of each named tensor read x' = on ? DQ(Q(x)) : x, and its switches."""
    copy = graph.copy()
    tensors = {t.name: t for t in [*copy.inputs, *(t for n in copy.nodes for t in n.outputs)] if t.name in readers}
    nodes = copy.nodes
    found = {}
    for name, tensor in tensors.items():
        users = [n for n in nodes if n.name in readers[name]]
        found[name] = _switch(copy, tensor, users, storage)
    copy.sort()
    return copy, found


def _switch(graph: Graph, tensor: Tensor, users: list[Node], storage: Any) -> Switch:
    name = f"{tensor.name}.switched"
    on, scale, zero_point = (graph.variable(f"{name}.{part}", dtype, [])
                             for part, dtype in (("on", np.bool_), ("scale", np.float32), ("zero_point", storage)))
    graph.ir.inputs.extend([on, scale, zero_point])
    codes = graph.like(tensor, f"{name}.codes", storage)
    decoded, result = graph.like(tensor, f"{name}.decoded"), graph.like(tensor, name)
    for user in users:
        for index, read in enumerate(user.inputs):
            if read is tensor:
                graph.replace_input(user, index, result)
    graph.add_node("QuantizeLinear", f"{name}/quantize", [tensor, scale, zero_point], [codes])
    graph.add_node("DequantizeLinear", f"{name}/dequantize", [codes, scale, zero_point], [decoded])
    graph.add_node("Where", f"{name}/where", [on, decoded, tensor], [result])
    return Switch(on.name, scale.name, zero_point.name)
