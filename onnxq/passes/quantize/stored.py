"""W -> Cast(Wq) * scale, for operators that compute in float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, Tensor, shape_of
from onnxq.numerics import affine
from onnxq.numerics.affine import QuantParams
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class StoreWeights(Pass):
    """op(x, W) -> op(x, Cast(Wq) * scale): Wq int8 of W's shape, scale float32 with 1 for all axes but the channel's.

    The runtime folds Cast and Mul of constants when it loads the model, so the operator runs on float weights as ever;
    a DequantizeLinear would not fold and run at every call. A look-up Gather(T, i), T float32 [V, D], becomes
    Cast(Gather(Tq, i)) * Gather(scale, i) with scale [V, 1]: only the rows that are read are decoded.
    Source: onnxruntime's constant folding, which leaves DequantizeLinear alone.
    """

    name: ClassVar[str] = "store-weights"

    def run(self, graph: Graph, context: Context) -> bool:
        """Bodies of If, Loop and Scan hold weights, too; what decodes them stands in the same body.

        A weight that several graphs read is decoded once, in the outermost.
        """
        found = [(node, holder, index, tensor) for node, holder in graph.walk() if len(node.outputs)
                 for index, tensor in enumerate(node.inputs) if tensor.name in self._wanted(node, context)]
        places: dict[str, Graph] = {}
        for _, holder, _, tensor in found:
            places[tensor.name] = holder if places.get(tensor.name, holder) is holder else graph
        for node, holder, index, tensor in found:
            params, place = context.plan.weights[tensor.name], places[tensor.name]
            if node.op == "Gather":
                self._look_up(holder, node, *_stored(place, tensor, params))
            else:
                holder.replace_input(node, index, self._decoded(place, tensor, params))
        for place in {id(g): g for _, g, _, _ in found}.values():
            place.sort()
        graph.sort()
        return bool(found)

    @staticmethod
    def _wanted(node: Node, context: Context) -> tuple[str, ...]:
        verdict = context.plan.node(node.name)
        return verdict.stored if verdict is not None else ()

    @staticmethod
    def _decoded(graph: Graph, weight: Tensor, params: QuantParams) -> Tensor:
        name = f"{weight.name}.decoded"
        if graph.has(name):
            return graph.made(name)
        codes, scale = _stored(graph, weight, params)
        dims = shape_of(weight)
        floats = graph.variable(f"{weight.name}.floats", "float32", dims)
        graph.add_node("Cast", f"{weight.name}/cast", [codes], [floats], {"to": 1})
        decoded = graph.variable(name, "float32", dims)
        graph.add_node("Mul", f"{weight.name}/decode", [floats, scale], [decoded])
        return decoded

    @staticmethod
    def _look_up(graph: Graph, node: Node, codes: Tensor, scale: Tensor) -> None:
        indices, result = node.inputs[1], node.outputs[0]
        found = graph.like(result, f"{node.name}.codes", "int8")
        graph.replace_input(node, 0, codes)
        graph.set_output(node, 0, found)
        floats = graph.like(result, f"{node.name}.floats", "float32")
        graph.add_node("Cast", f"{node.name}/cast", [found], [floats], {"to": 1})
        dims = shape_of(result)
        row_scale = graph.variable(f"{node.name}.scale", "float32", [*dims[:-1], 1] if dims else None)
        graph.add_node("Gather", f"{node.name}/scale", [scale, indices], [row_scale], dict(node.attrs))
        graph.add_node("Mul", f"{node.name}/decode", [floats, row_scale], [result])


def _stored(graph: Graph, weight: Tensor, params: QuantParams) -> tuple[Tensor, Tensor]:
    """(codes, scale) as constants; the scale has the weight's rank so that a Mul broadcasts it."""
    if not graph.has(f"{weight.name}.q"):
        dims = [1] * len(shape_of(weight) or ())
        if params.axis is not None:
            dims[params.axis] = params.scale.size
        graph.constant(f"{weight.name}.q", affine.quantize(graph.read(weight), params))
        graph.constant(f"{weight.name}.scales", np.asarray(params.scale).reshape(dims))
    return graph.made(f"{weight.name}.q"), graph.made(f"{weight.name}.scales")
