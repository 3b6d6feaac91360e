"""DQ -> HardSigmoid -> Q  =>  DQ -> Add -> Q, whose codes are read at another scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node
from onnxq.numerics import affine
from onnxq.numerics.dtypes import by_name
from onnxq.passes import pattern
from onnxq.passes.manager import Context, Pass

KERNEL = "QLinearAdd"


@dataclass(frozen=True)
class HardSigmoidToAdd(Pass):
    """h = clip(alpha x + beta, 0, 1) = alpha clip(x + beta / alpha, 0, 1 / alpha), and saturation of codes clips.

    x is a float32 tensor of any shape. Q takes x + beta / alpha at scale s / alpha and zero point 0, s being the scale
    of h, at most 1 / 255: its codes from 0 to 255 are those of h, and DQ reads them at scale s. A HardSigmoid has no
    integer kernel, an Add has. Source: ONNX HardSigmoid-6.
    """

    name: ClassVar[str] = "hard-sigmoid-to-add"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Rewrite one HardSigmoid that the Plan gives to the kernel of Add."""
        verdict = context.plan.node(node.name)
        if node.op != "HardSigmoid" or verdict is None or verdict.lowering != KERNEL:
            return False
        found = pattern.stored(graph, node.outputs[0], frozenset())
        if found is None or pattern.read(graph, node.inputs[0]) is None or not pattern.activation(found.codes):
            return context.skip(node, "not everything around it is uint8 codes")
        scale, zero_point = graph.read(found.codes.scale), int(graph.read(found.codes.zero_point))
        if zero_point != 0 or 255 * float(scale) > 1.0 + 1e-6:
            return context.skip(node, "its codes reach beyond 0 and 1")
        alpha, beta = float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5))
        shift = np.asarray(beta / alpha, np.float32)
        params = affine.choose(shift, shift, by_name("uint8"))
        name = node.name
        parts = [graph.constant(f"{name}.shift.q", affine.quantize(shift, params)),
                 graph.constant(f"{name}.shift.scale", params.scale),
                 graph.constant(f"{name}.shift.zero_point", params.zero_point)]
        decoded = graph.variable(f"{name}.shift.dq", "float32", ())
        graph.add_node("DequantizeLinear", f"{name}/dequantize_shift", parts, [decoded])
        node.op = "Add"
        node.attrs.clear()
        graph.replace_input(node, 1, decoded)
        wider = graph.constant(f"{name}.sum.scale", np.asarray(scale / alpha, np.float32))
        graph.replace_input(found.quantize, 1, wider)
        return True
