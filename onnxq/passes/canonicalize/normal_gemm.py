"""Gemm with alpha, beta and transB folded into its constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, dtype_of, is_constant
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class NormalGemm(Pass):
    """alpha * A @ B' + beta * C -> A @ B + c with B float32 [K, N] and c float32 [N].

    Source: ONNX Gemm-13. Left alone where B or C is computed, A is transposed, or C is more than one number per column.
    """

    name: ClassVar[str] = "normal-gemm"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Normalise one Gemm."""
        if node.op != "Gemm" or node.domain:
            return False
        alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
        trans_b = bool(node.attrs.get("transB", 0))
        bias = graph.optional_input(node, 2)
        if node.attrs.get("transA", 0):
            return context.skip(node, "its activation is transposed")
        if not is_constant(node.inputs[1]) or (bias is not None and not is_constant(bias)):
            return context.skip(node, "its weights are computed")
        dtype = dtype_of(node.inputs[1])
        if dtype != np.float32:
            return context.skip(node, f"its weights are {dtype}")
        columns = np.shape(graph.read(node.inputs[1]))[0 if trans_b else 1]
        added = np.asarray(graph.read(bias)) if bias is not None else None
        if added is not None and (added.size not in (1, columns) or (added.ndim == 2 and added.shape[0] != 1)):
            return context.skip(node, "its bias is not one number per column")
        changed = False
        if trans_b or alpha != 1.0:
            weight = np.asarray(graph.read(node.inputs[1]))
            weight = (weight.T if trans_b else weight) * np.float32(alpha)
            name = f"{node.inputs[1].name}.kn" if alpha == 1.0 else f"{node.inputs[1].name}.{node.name}.kn"
            node.inputs[1] = graph.shared_constant(name, np.ascontiguousarray(weight, np.float32))
            changed = True
        if added is not None and (beta != 1.0 or added.shape != (columns,)):
            flat = np.broadcast_to(added.reshape(-1), (columns,)) * np.float32(beta)
            node.inputs[2] = graph.constant(f"{node.name}.bias.n", flat.astype(np.float32))
            changed = True
        for attribute in ("alpha", "beta", "transB", "transA"):
            changed |= node.attrs.pop(attribute, None) is not None
        return changed
