"""Attention in small operators."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxq.graph import Graph, Node, Tensor, dtype_of, shape_of
from onnxq.passes.decompose.parts import Decomposition, Parts, is_float32
from onnxq.passes.manager import Context

_LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class SpellOutAttention(Decomposition):
    """Attention(q, k, v, mask, past) -> Mul by the scale, MatMul, Add of the mask, Softmax, MatMul.

    q float32 [N, heads, S, D], or [N, S, heads * D]; k and v the same with T and kv heads, each of which several heads
    of q may share; the mask is added or, of bools, hides scores where it is false. Keys and values behind the past ones
    are results, too. Rows that are hidden as a whole have equal weights, in place of NaN. Source: ONNX Attention-23.
    """

    name: ClassVar[str] = "spell-out-attention"
    known: ClassVar[tuple[str, ...]] = ("Attention",)

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Replace one Attention."""
        why = _obstacle(node, graph)
        if why:
            return context.skip(node, why)
        parts, flat = Parts(graph, node), len(shape_of(node.inputs[0]) or ()) == 3
        heads, shared, size = _heads(node)
        query = self._apart(parts, "query", node.inputs[0], heads) if flat else node.inputs[0]
        mask, found = graph.optional_input(node, 3), []
        for k, part in ((1, "key"), (2, "value")):
            tensor = self._apart(parts, part, node.inputs[k], shared) if flat else node.inputs[k]
            found.append(self._shared(parts, part, self._joined(parts, part, tensor, k), heads // shared, heads))
        turned = parts.make("Transpose", "turned", [found[0]], attrs={"perm": [0, 1, 3, 2]})
        scale = parts.number("scale", float(node.attrs.get("scale", 1 / math.sqrt(size))))
        query = parts.make("Mul", "scaled", [query, scale])  # before the product, which float16 may not hold
        scores = self._masked(parts, parts.make("MatMul", "scores", [query, turned]), mask)
        weights = parts.make("Softmax", "weights", [scores], attrs={"axis": -1})
        if not flat:
            parts.finish("MatMul", [weights, found[1]])
            return True
        result = parts.make("MatMul", "result", [weights, found[1]])
        moved = parts.make("Transpose", "moved", [result], attrs={"perm": [0, 2, 1, 3]})
        parts.finish("Reshape", [moved, parts.integers("flat", [0, 0, -1])])
        return True

    @staticmethod
    def _apart(parts: Parts, part: str, tensor: Tensor, heads: int) -> Tensor:
        """[N, S, heads * D] -> [N, heads, S, D]."""
        shape = parts.integers(f"{part}_heads", [0, 0, heads, -1])
        split = parts.make("Reshape", f"{part}.heads", [tensor, shape])
        return parts.make("Transpose", part, [split], attrs={"perm": [0, 2, 1, 3]})

    @staticmethod
    def _joined(parts: Parts, part: str, tensor: Tensor, index: int) -> Tensor:
        """Keys or values behind the past ones; what the node gives of them is made here."""
        graph, node = parts.graph, parts.node
        past = graph.optional_input(node, index + 3)
        result = node.outputs[index] if len(node.outputs) > index and node.outputs[index].name else None
        if result is None:
            return tensor if past is None else parts.make("Concat", f"{part}.joined", [past, tensor], attrs={"axis": 2})
        graph.set_output(node, index, graph.variable(f"{parts.prefix}.{part}.unread"))
        if past is None:
            graph.add_node("Identity", f"{node.name}/{part}.present", [tensor], [result])
        else:
            graph.add_node("Concat", f"{node.name}/{part}.present", [past, tensor], [result], {"axis": 2})
        return result

    @staticmethod
    def _shared(parts: Parts, part: str, tensor: Tensor, times: int, heads: int) -> Tensor:
        """[N, kv heads, T, D] -> [N, heads, T, D], each head `times` times."""
        if times == 1:
            return tensor
        axis = parts.integers(f"{part}_axis", [2])
        raised = parts.make("Unsqueeze", f"{part}.raised", [tensor, axis])
        shape = parts.integers(f"{part}_times", [1, 1, times, 1, 1])
        copies = parts.make("Expand", f"{part}.copies", [raised, shape])
        dims = shape_of(parts.node.inputs[1 if part == "key" else 2]) or (None,)
        size = int(dims[-1] or 0) if len(dims) == 4 else int(dims[-1] or 0) * times // heads
        return parts.make("Reshape", f"{part}.shared", [copies, parts.integers(f"{part}_shape", [0, heads, -1, size])])

    @staticmethod
    def _masked(parts: Parts, scores: Tensor, mask: Tensor | None) -> Tensor:
        node = parts.node
        if node.attrs.get("is_causal", 0):
            rows = int((shape_of(node.inputs[0]) or ())[-2] or 0)
            lower = np.where(np.tri(rows, dtype=np.bool_), 0, np.float32(_LOWEST)).astype(np.float32)
            scores = parts.make("Add", "causal", [scores, parts.graph.constant(f"{node.name}.causal", lower)])
        if mask is None:
            return scores
        if dtype_of(mask) == np.bool_:
            return parts.make("Where", "hidden", [mask, scores, parts.number("lowest", _LOWEST)])
        return parts.make("Add", "masked", [scores, mask])


def _heads(node: Node) -> tuple[int, int, int]:
    """(heads of q, heads of k and v, D)."""
    dims: list[Any] = [shape_of(t) or () for t in node.inputs[:2]]
    if len(dims[0]) == 4:
        return dims[0][1], dims[1][1], dims[0][3]
    heads = int(node.attrs["q_num_heads"])
    return heads, int(node.attrs["kv_num_heads"]), dims[0][2] // heads


def _obstacle(node: Node, graph: Graph) -> str:
    """Why an Attention can't be spelled out, if so."""
    dims = [shape_of(t) for t in node.inputs[:3]]
    if not is_float32(node) or any(d is None or len(d) not in (3, 4) for d in dims):
        return "what it reads is not known to be float32 [N, heads, S, D] or [N, S, heads * D]"
    wanted = (1, 3) if len(dims[0] or ()) == 4 else (2,)
    if not all(isinstance((d or ())[k], int) for d in dims for k in wanted):
        return "its heads or their sizes are not known"
    if node.attrs.get("softcap", 0.0) or graph.optional_input(node, 6) is not None:
        return "it caps scores, or its sequences have lengths of their own"
    if len(node.outputs) > 3 and node.outputs[3].name:
        return "its scores are a result, too"
    rows = [(d or ())[-2] for d in dims[:2]]
    past = graph.optional_input(node, 4)
    if node.attrs.get("is_causal", 0) and (past is not None or rows[0] != rows[1] or not isinstance(rows[0], int)):
        return "what each row may see depends on sizes that are not known, or on a past"
    return ""

