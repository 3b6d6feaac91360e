"""BatchNormalization -> Mul or Add of a constant per channel -> BatchNormalization alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, is_constant, shape_of
from onnxq.passes import pattern
from onnxq.passes.manager import Context, Pass


@dataclass(frozen=True)
class AffineToBatchNorm(Pass):
    """BN(x; gamma, beta) * c -> BN(x; gamma * c, beta * c) and BN(x; gamma, beta) + c -> BN(x; gamma, beta + c).

    gamma and beta are [C], c is [C, 1, ..], [1, C, 1, ..] or one number. Caffe keeps gamma and beta in a Scale layer of
    its own; the runtime folds such pairs behind a Conv only, and runs them one by one behind a BatchNormalization.
    """

    name: ClassVar[str] = "affine-to-batchnorm"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Fold one Add or Mul."""
        found = pattern.behind(graph, node, "BatchNormalization")
        if found is None:
            return False
        norm, factor = found
        source = norm.outputs[0]
        if graph.only_consumer(source) is None:
            return context.skip(node, f"the result of {norm.name} is read elsewhere too")
        if not all(is_constant(t) for t in norm.inputs[1:3]):
            return context.skip(node, "the BatchNormalization's gamma or beta is computed")
        given, dims = np.asarray(graph.read(factor)), shape_of(source)
        gamma, beta = (np.asarray(graph.read(t)) for t in norm.inputs[1:3])
        if dims is None or not pattern.per_channel(given.shape, len(dims), len(gamma)):
            what = "adds" if node.op == "Add" else "multiplies by"
            return context.skip(node, f"what it {what} is not one number per channel")
        numbers = np.broadcast_to(given.reshape(-1), gamma.shape)
        if node.op == "Mul":
            graph.replace_input(norm, 1, graph.constant(f"{node.name}.gamma", gamma * numbers))
        shifted = beta * numbers if node.op == "Mul" else beta + numbers
        graph.replace_input(norm, 2, graph.constant(f"{node.name}.beta", shifted))
        result = node.outputs[0]
        graph.remove(node)
        graph.set_output(norm, 0, result)
        return True
