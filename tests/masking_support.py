"""Softmax of masked scores in the forms that exporters write, as models of one layer: q, k and a mask -> weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from conftest import make_model, node
from observer_support import observe

from onnxq.calibration.readers import open_data
from onnxq.graph import Graph, load, save
from onnxq.passes.canonicalize import canonicalize
from onnxq.passes.manager import Context, PassManager, Skip
from onnxq.passes.transform.add_masks import AddMasks
from onnxq.passes.transform.normal_masks import NormalMasks
from onnxq.plan import Plan
from onnxq.planner import masks
from onnxq.planner.masks import Masks
from onnxq.planner.outline import outline
from onnxq.planner.scales import finish
from onnxq.recipe import Recipe
from onnxq.schemes import scheme
from onnxq.targets import TARGETS

Array = np.ndarray[Any, Any]
Feed = dict[str, Array]
ROWS, HEADS, LONG, WIDE = 4, 3, 12, 8
LOWEST = float(np.finfo(np.float32).min)
NODES = Sequence[onnx.NodeProto]

# what stands between scores s and masked scores x; m [N, K] is int64, 1 for keys that are seen
KEEPS = [node("Cast", "m", "kept", to=9), node("Unsqueeze", "kept axes", "keep")]
HIDES = [node("Equal", "m none", "gone"), node("Unsqueeze", "gone axes", "hide")]
CAUSAL = [node("Trilu", "ones", "triangle", upper=0), node("Cast", "triangle", "earlier", to=9)]
FORMS: dict[str, NODES] = {
    "where": [*KEEPS, node("Where", "keep s fill", "x")],
    "masked_fill": [*HIDES, node("Where", "hide fill s", "x")],
    "added": [*KEEPS, node("Where", "keep zero fill", "b"), node("Add", "s b", "x")],
    "added first": [*KEEPS, node("Where", "keep zero fill", "b"), node("Add", "b s", "x")],
    "product": [node("Cast", "m", "f", to=1), node("Sub", "one f", "g"), node("Unsqueeze", "g axes", "u"),
                node("Mul", "u fill", "b"), node("Add", "s b", "x")],
    "causal and padding": [*CAUSAL, node("Where", "earlier zero fill", "c"), *KEEPS,
                           node("Where", "keep zero fill", "p"), node("Add", "c p", "b"), node("Add", "s b", "x")],
    "added in turn": [*CAUSAL, node("Where", "earlier zero fill", "c"), node("Add", "s c", "t"), *KEEPS,
                      node("Where", "keep zero fill", "p"), node("Add", "t p", "x")],
    "clamped": [*CAUSAL, node("Where", "earlier zero fill", "c"), *KEEPS, node("Where", "keep zero fill", "p"),
                node("Add", "c p", "d"), node("Max", "d fill", "b"), node("Add", "s b", "x")],
    "selected and added": [*CAUSAL, node("Where", "earlier s fill", "t"), *KEEPS,
                           node("Where", "keep zero fill", "p"), node("Add", "t p", "x")],
    "selected twice": [*CAUSAL, node("Where", "earlier s fill", "t"), *KEEPS, node("Where", "keep t fill", "x")],
}
ADDED = [name for name in FORMS if name not in ("where", "masked_fill", "selected and added", "selected twice")]


def model(form: str = "added", fill: float = LOWEST, layers: int = 1, opset: int = 17, **attrs: Any) -> onnx.ModelProto:
    """Softmax of q k^T masked in one of the FORMS; of several layers, each has its own q and all share the mask."""
    nodes, outputs, inputs = [], {}, {"m": (onnx.TensorProto.INT64, ["N", LONG]), "k": ["N", HEADS, WIDE, LONG]}
    shared = [n for n in FORMS[form] if not {"s", "t"} & {*n.input, *n.output} and "x" not in n.output]
    own = [n for n in FORMS[form] if n not in shared]
    nodes += shared
    for layer in range(layers):
        end = "" if layers == 1 else str(layer)
        inputs[f"q{end}"] = ["N", HEADS, LONG, WIDE]
        nodes.append(node("MatMul", f"q{end} k", f"s{end}"))
        for item in own:
            names = [f"{n}{end}" if n in ("s", "t", "x") else n for n in (*item.input, *item.output)]
            nodes.append(node(item.op_type, " ".join(names[:-1]), names[-1]))
        nodes.append(node("Softmax", f"x{end}", f"y{end}", **(attrs or {"axis": -1})))
        outputs[f"y{end}"] = ["N", HEADS, LONG, LONG]
    stored = {"axes": np.array([1, 2]), "none": np.int64(0), "zero": np.float32(0), "one": np.float32(1),
              "fill": np.float32(fill), "ones": np.ones((LONG, LONG), np.float32)}
    used = {name for n in nodes for name in n.input}
    return make_model(nodes, inputs, outputs, {k: v for k, v in stored.items() if k in used}, opset=opset)


def feed(largest: float = 5.0, empty: bool = False, left: bool = False, layers: int = 1, seed: int = 0) -> Feed:
    """Scores between -largest and largest; rows of the batch have padding, behind them or on the left, one is empty."""
    rng = np.random.default_rng(seed)
    found: Feed = {"m": np.ones((ROWS, LONG), np.int64), "k": np.zeros((ROWS, HEADS, WIDE, LONG), np.float32)}
    found["k"][..., :WIDE] = np.eye(WIDE, dtype=np.float32)
    found["k"][..., WIDE:] = np.eye(WIDE, dtype=np.float32)[:, :LONG - WIDE]
    for row, seen in enumerate((LONG, 5, 1, 9)):
        found["m"][row] = (np.arange(LONG) < seen)[::-1 if left else 1]
    if empty:
        found["m"][1] = 0
    for end in [""] if layers == 1 else map(str, range(layers)):
        q = rng.uniform(-largest, largest, (ROWS, HEADS, LONG, WIDE)).astype(np.float32)
        q[0, 0, 0, :2] = -largest, largest
        found[f"q{end}"] = q
    return found


def canonical(made: onnx.ModelProto, folder: Path) -> Graph:
    """The canonical graph of a model."""
    onnx.save(made, folder / "source.onnx")
    graph = load(folder / "source.onnx")
    PassManager(canonicalize()).run(graph, Context(TARGETS["cpu"]))
    return graph


def planned(graph: Graph, calib: Sequence[Feed] | None, floors: str = "") -> tuple[Plan, Masks]:
    """The Plan of a float graph's masks; `floors` names a form that is taken where the Plan has none."""
    recipe, target = Recipe(scheme("w8a8-dynamic")), TARGETS["cpu"]
    found = masks.find(graph)
    if calib is not None:
        observe(found.graph, [], open_data(list(calib), graph.ports()), beside=found.statistics)
    plan = finish(outline(graph, recipe, target), graph, {}, recipe, target)
    masks.decide(found, plan)
    for name, floor in found.floors.items():
        if floor.form == floors:
            masks.use_floor(found, plan, name)
    return plan, found


def rewritten(graph: Graph, plan: Plan, folder: Path) -> tuple[Path, list[Skip], bool]:
    """(file, near misses, whether a second run edits) after the passes on masks."""
    context = Context(TARGETS["cpu"], plan)
    steps = [AddMasks(), NormalMasks()]
    PassManager(steps).run(graph, context)
    again = PassManager(steps).run(graph, context)
    path = folder / "rewritten.onnx"
    save(graph, path)
    onnx.checker.check_model(str(path), full_check=True)
    return path, context.skips, again


def operators(graph: Graph) -> list[str]:
    """Operators in their order."""
    return [n.op for n in graph.nodes]


Masker = Callable[[str], onnx.ModelProto]
Fed = Mapping[str, Array]
