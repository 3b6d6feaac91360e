"""Which weights can be pruned, and why others are spared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant, shape_of
from onnxq.numerics.sampling import View
from onnxq.numerics.sparsity import Pattern
from onnxq.plan import MOVES_CODES
from onnxq.planner.readers import view_of
from onnxq.planner.rules import verdicts
from onnxq.recipe import Recipe

_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
_BESIDE_CONSTANTS = frozenset({"Add", "Div", "Mul", "Sub"})
# what may stand between a head and the model's outputs
_BEHIND_HEADS = MOVES_CODES | _BESIDE_CONSTANTS | {"Cast", "Concat", "Identity", "LogSoftmax", "Sigmoid", "Softmax",
                                                   "Tanh"}


@dataclass(frozen=True)
class Task:
    """A weight to prune, and the layers that read it: tensors `reads`, each by the same `view` (None: of no known
    rows). A `table` is one whose rows are looked up, and has neither."""

    weight: Tensor
    layers: tuple[Node, ...]
    view: View | None
    reads: tuple[str, ...]
    table: bool = False

    @property
    def name(self) -> str:
        """That of the weight."""
        return str(self.weight.name)

    @property
    def inputs(self) -> int:
        """K: what an output of the layer sums over, the columns of a table."""
        dims = [int(d or 0) for d in shape_of(self.weight) or ()]
        return int(np.prod(dims[1:])) if self.table or self.layers[0].op == "Conv" else dims[0]


def find(graph: Graph, recipe: Recipe) -> tuple[list[Task], dict[str, str]]:
    """(weights to prune, in execution order; node -> why it is spared, for layers and embeddings that are not)."""
    kept = verdicts(graph, recipe)
    outside = {node.name for node in graph.nodes}
    tasks: list[Task] = []
    spared: dict[str, str] = {}
    seen: set[str] = set()
    for node in graph.nodes:
        weight = _weight(node, recipe.sparsity.embeddings)
        if weight is None or weight.name in seen:
            continue
        seen.add(weight.name)
        readers = graph.consumers(weight)
        reasons = [_spared(graph, reader, weight, recipe) if reader.name in outside else "it is in a body"
                   for reader in readers]
        reasons = [kept.get(reader.name) or reason for reader, reason in zip(readers, reasons, strict=True)]
        views = [view_of(reader) for reader in readers] if not any(reasons) and readers[0].op != "Gather" else [None]
        why = next((reason for reason in reasons if reason), None)
        if why is None and len({(reader.op == "Conv", reader.op == "Gather") for reader in readers}) > 1:
            why = "its weights are read in several ways"
        if why is None and any(view != views[0] for view in views):
            why = "the layers that share its weights see their inputs in different ways"
        if why is not None:
            spared |= {reader.name: reason or why for reader, reason in zip(readers, reasons, strict=True)}
            continue
        table = node.op == "Gather"
        reads = () if table else tuple(dict.fromkeys(reader.inputs[0].name for reader in readers))
        tasks.append(Task(weight, tuple(readers), views[0], reads, table))
    return tasks, spared


def _weight(node: Node, embeddings: bool) -> Tensor | None:
    """The weight of a layer, or the table of a look-up where these are pruned; None where a node has none."""
    index = 0 if node.op == "Gather" else 1
    if node.domain or node.op not in (_LAYERS | {"Gather"} if embeddings else _LAYERS) or len(node.inputs) <= index:
        return None
    weight = node.inputs[index]
    return weight if is_constant(weight) and dtype_of(weight) == np.float32 else None


def _spared(graph: Graph, node: Node, weight: Tensor, recipe: Recipe) -> str | None:
    """Why one reader keeps a weight as it is."""
    if _weight(node, recipe.sparsity.embeddings) is not weight:
        return "its weights are read as floats elsewhere"
    if graph.is_output(weight):
        return "its weights are an output of the model"
    dims = [int(d or 0) for d in shape_of(weight) or ()]
    if node.op == "Gather":
        return None if len(dims) == 2 and _is_embedding(graph, node) else "what it looks up is no table of embeddings"
    if is_constant(node.inputs[0]):
        return "it computes nothing from the model's inputs"
    if node.op == "Conv" and int(node.attrs.get("group", 1)) != 1:
        return "its filters see a part of the channels each, too few to lose some"
    if node.op != "Conv" and (len(dims) != 2 or node.attrs):
        return "its weights are no plain matrix"
    if _is_head(graph, node):
        return "its result is the model's"
    wanted, inputs = recipe.sparsity.wanted, dims[1 if node.op == "Conv" else 0]
    if isinstance(wanted, Pattern) and inputs % wanted.size:
        return f"its {inputs} {'channels' if node.op == 'Conv' else 'inputs'} make no groups of {wanted.size}"
    return None


def _is_head(graph: Graph, node: Node) -> bool:
    """Whether what a layer makes goes to outputs alone, with no more than movement and simple operators between."""
    waiting, seen = list(node.outputs), set[str]()
    while waiting:
        tensor = waiting.pop()
        for reader in graph.consumers(tensor):
            others = [t for t in reader.inputs if t.name and t is not tensor]
            beside = reader.op in _BESIDE_CONSTANTS and not all(is_constant(t) for t in others)
            if reader.domain or reader.op not in _BEHIND_HEADS or beside:
                return False
            if reader.name not in seen:
                seen.add(reader.name)
                waiting += reader.outputs
    return True


def _is_embedding(graph: Graph, node: Node) -> bool:
    """Whether rows that are looked up are more than factors of something computed, as sines of positions are."""
    if int(node.attrs.get("axis", 0)) != 0:
        return False
    waiting = list(node.outputs)
    while waiting:
        tensor = waiting.pop()
        for reader in graph.consumers(tensor):
            if reader.op in MOVES_CODES | {"Cast"} and not reader.domain:
                waiting += reader.outputs
            elif reader.op not in ("Mul", "RotaryEmbedding") or any(is_constant(t) for t in reader.inputs):
                return True
    return False
