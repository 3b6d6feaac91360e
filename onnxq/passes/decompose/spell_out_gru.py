"""GRU, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from onnxq.graph import FLOAT32, Graph, Node, Tensor, is_constant, shape_of
from onnxq.passes.decompose.parts import Decomposition, Parts, is_float32
from onnxq.passes.manager import Context

_MOST = 128  # steps; each takes about a dozen nodes
_BACKWARD = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SpellOutGru(Decomposition):
    """GRU(x, W, R, B) -> the operators of each step one after the other, for up to 128 steps whose number is known.

    x float32 [S, N, I]; W [D, 3H, I], R [D, 3H, H] and B [D, 6H] are constants, their gates in the order z, r, h. What
    follows from x alone is one MatMul over all steps. Source: ONNX GRU-14.
    """

    name: ClassVar[str] = "spell-out-gru"
    known: ClassVar[tuple[str, ...]] = ("GRU",)

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Replace one GRU."""
        dims = shape_of(node.inputs[0]) or (None,)
        if {"activations", "activation_alpha", "activation_beta", "clip"} & node.attrs.keys():
            return context.skip(node, "it clips, or has activations of its own")
        if node.attrs.get("layout", 0) or graph.optional_input(node, 4) is not None:
            return context.skip(node, "its batch comes first, or its sequences have lengths of their own")
        if not isinstance(dims[0], int) or not 0 < dims[0] <= _MOST or not is_float32(node):
            return context.skip(node, f"it is not known to be float32 of 1 to {_MOST} steps")
        if not all(is_constant(t) for t in node.inputs[1:4] if t.name):
            return context.skip(node, "its weights are computed")
        parts, directions = Parts(graph, node), _BACKWARD[node.attrs.get("direction", "forward")]
        states = [_Direction(parts, k).states(dims[0], backward) for k, backward in enumerate(directions)]
        every, last = node.outputs[0], node.outputs[1] if len(node.outputs) > 1 else None
        graph.remove(node)
        if every.name:
            rows = [_joined(parts, f"row_{t}", [found[t] for found in states], [0, 1], 1) for t in range(dims[0])]
            graph.add_node("Concat", f"{node.name}/all", rows, [every], {"axis": 0})
        if last is not None and last.name:
            ends = [found[0 if backward else -1] for found, backward in zip(states, directions, strict=True)]
            graph.add_node("Identity", f"{node.name}/last", [_joined(parts, "ends", ends, [0], 0)], [last])
        return True


def _joined(parts: Parts, part: str, states: Sequence[Tensor], axes: Sequence[int], axis: int) -> Tensor:
    """States [N, H] of each direction with axes in front, side by side."""
    raised = []
    for k, state in enumerate(states):
        dims = [*([1] * len(axes)), *(shape_of(state) or (None, None))]
        raised.append(parts.make("Unsqueeze", f"{part}.{k}", [state, parts.integers(f"{part}.{k}_axes", axes)],
                                 shape=dims))
    if len(raised) == 1:
        return raised[0]
    dims = list(shape_of(raised[0]) or ())
    dims[axis] = len(raised)
    return parts.make("Concat", part, raised, attrs={"axis": axis}, shape=dims)


class _Direction:
    """One direction of a GRU."""

    def __init__(self, parts: Parts, number: int) -> None:
        self.parts, self.number, graph, node = parts, number, parts.graph, parts.node
        self.x, weights, recurrent = node.inputs[:3]
        self.start, bias = graph.optional_input(node, 5), graph.optional_input(node, 3)
        self.late = bool(node.attrs.get("linear_before_reset", 0))
        size, width = int((shape_of(recurrent) or ())[2] or 0), int((shape_of(weights) or ())[2] or 0)
        self.size = size
        self.of_x = self._stored("W", weights, (width, 3 * size), lambda w: w.T)
        self.of_gates = self._stored("Rzr", recurrent, (size, 2 * size), lambda r: r[:2 * size].T)
        self.of_state = self._stored("Rh", recurrent, (size, size), lambda r: r[2 * size:].T)
        self.shift = self.late_shift = None
        if bias is not None:
            # the recurrent bias of h is added before r multiplies, or together with all others
            counts = np.repeat([1.0, 0.0 if self.late else 1.0], [2 * size, size]).astype(np.float32)
            self.shift = self._stored("B", bias, (3 * size,), lambda b: b[:3 * size] + counts * b[3 * size:])
            self.late_shift = self._stored("Rbh", bias, (size,), lambda b: b[5 * size:]) if self.late else None

    def _stored(self, part: str, tensor: Tensor, dims: Sequence[int], pick: Callable[[Array], Array]) -> Tensor:
        graph, number = self.parts.graph, self.number
        return graph.computed(f"{self.parts.node.name}.{number}.{part}", FLOAT32, dims,
                              lambda: np.ascontiguousarray(pick(np.asarray(graph.read(tensor))[number])))

    def states(self, steps: int, backward: bool) -> list[Tensor]:
        """The state [N, H] after each step, in the order of x."""
        parts, size, name = self.parts, self.size, f"{self.number}"
        rows = (shape_of(self.x) or (None, None))[1]
        products = parts.make("MatMul", f"{name}.product", [self.x, self.of_x], shape=[steps, rows, 3 * size])
        if self.shift is not None:
            products = parts.make("Add", f"{name}.shifted", [products, self.shift], products)
        gates, inner = self._split(f"{name}.of_x", products, [2 * size, size])
        if self.start is None:
            state = parts.graph.constant(f"{parts.node.name}.{name}.start", np.zeros((1, size), np.float32))
        else:
            state = self._gathered(f"{name}.start", self.start, self.number)
        found = []
        for t in reversed(range(steps)) if backward else range(steps):
            state = self._step(f"{name}.{t}", state, self._gathered(f"{name}.{t}.of_gates", gates, t),
                               self._gathered(f"{name}.{t}.of_inner", inner, t))
            found.append(state)
        return found[::-1] if backward else found

    def _step(self, name: str, state: Tensor, gates: Tensor, inner: Tensor) -> Tensor:
        """(1 - z) * tanh(inner) + z * state."""
        make = self.parts.make
        reads = make("MatMul", f"{name}.reads", [state, self.of_gates], gates)
        opened = make("Sigmoid", f"{name}.gates", [make("Add", f"{name}.sum", [gates, reads], gates)], gates)
        update, reset = self._split(f"{name}.gate", opened, [self.size, self.size])
        if self.late:
            past = make("MatMul", f"{name}.past", [state, self.of_state], inner)
            if self.late_shift is not None:
                past = make("Add", f"{name}.past_shifted", [past, self.late_shift], inner)
            past = make("Mul", f"{name}.kept", [reset, past], inner)
        else:
            kept = make("Mul", f"{name}.kept", [reset, state], inner)
            past = make("MatMul", f"{name}.past", [kept, self.of_state], inner)
        fresh = make("Tanh", f"{name}.fresh", [make("Add", f"{name}.inner", [inner, past], inner)], inner)
        change = make("Mul", f"{name}.change", [update, make("Sub", f"{name}.gap", [state, fresh], inner)], inner)
        return make("Add", f"{name}.state", [fresh, change], inner)

    def _gathered(self, part: str, tensor: Tensor, index: int) -> Tensor:
        dims = shape_of(tensor)
        number = self.parts.graph.constant(f"{self.parts.node.name}.{part}_index", np.asarray(index, np.int64))
        return self.parts.make("Gather", part, [tensor, number], attrs={"axis": 0},
                               shape=None if dims is None else dims[1:])

    def _split(self, part: str, tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        parts = self.parts
        made = [parts.graph.variable(f"{parts.prefix}.{part}.{k}", FLOAT32, [*(shape_of(tensor) or ())[:-1], size])
                for k, size in enumerate(sizes)]
        parts.graph.add_node("Split", f"{parts.node.name}/{part}", [tensor, parts.integers(f"{part}_sizes", sizes)],
                             made, {"axis": -1})
        return made
