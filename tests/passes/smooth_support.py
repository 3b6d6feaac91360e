"""A graph smoothed by hand: random factors for what layers read, through the pass, with all that has to hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from conftest import Opener, apply, assert_same, run, save_checked, text

from onnxq.graph import Graph, Node, save, shape_of
from onnxq.passes.absorbing import Absorber, absorber
from onnxq.passes.manager import Context
from onnxq.passes.transform.smooth import Smooth, scaled_tensors
from onnxq.plan import Plan, Smoothing

Constants = set[tuple[str, int, int]]
TOLERANCE = 1e-5  # of the largest output: float32 products of other factors


@dataclass
class Layers:
    """Nodes that read one tensor, as the planner would give them to the pass."""

    graph: Graph
    nodes: list[Node]

    @property
    def axis(self) -> int:
        """Of the channels."""
        return 1 if self.nodes[0].op == "Conv" else -1

    @property
    def channels(self) -> int:
        """Of what they read."""
        dims = shape_of(self.nodes[0].inputs[1]) or ()
        return int(dims[1] or 0) * self.nodes[0].attrs.get("group", 1) if self.axis == 1 else int(dims[0] or 0)

    def absorber(self) -> Absorber | None:
        """What takes factors of what they read."""
        return absorber(self.graph, self.nodes[0].inputs[0], frozenset(n.name for n in self.nodes), self.channels,
                        self.axis)

    def constants(self) -> Constants | None:
        """The same as (node, input, axis)."""
        found = self.absorber()
        return None if found is None else {(c.node, c.index, c.axis) for c in found.constants}


def layers(graph: Graph, names: str) -> Layers:
    """The layers that make `names`."""
    by_result = {n.outputs[0].name: n for n in graph.nodes}
    return Layers(graph, [by_result[name] for name in names.split()])


def smoothing(of: Layers, seed: int = 0, source: np.ndarray[Any, np.dtype[np.int64]] | None = None) -> Smoothing:
    """Random factors; channels that share a slice share theirs. With a `source` channels are repeated first."""
    above = of.absorber()
    rng = np.random.default_rng(seed)
    s = np.exp(rng.normal(size=of.channels if source is None else source.size)).astype(np.float32)
    if above is not None and above.tie is not None:
        s = s[above.tie]
    return Smoothing(of.nodes[0].inputs[0].name, tuple(n.name for n in of.nodes), s, of.axis, above is not None, source)


def smoothed(model: onnx.ModelProto, names: str, feed: Mapping[str, Any], opened: Opener, folder: Path,
             sources: Mapping[str, Any] | None = None) -> tuple[Graph, dict[str, Smoothing]]:
    """The graph with what each group of layers (`a b, c`) reads smoothed, by a Plan that was saved and loaded.

    Outputs have to be the model's, and a second run to edit nothing.
    """
    graph = opened(model)
    plan = Plan("", "")
    for k, group in enumerate(names.split(",")):
        found = smoothing(layers(graph, group), k, (sources or {}).get(group.strip()))
        plan.smoothings[found.tensor] = found
    plan.save(folder / "plan")
    again = Plan.load(folder / "plan")
    assert again.digest() == plan.digest()
    before = text(graph)
    assert apply(Smooth(), graph, Context(plan=again)) == (True, [])
    after = text(graph)
    assert after != before
    path = folder / "smoothed.onnx"
    save_checked(graph, path)
    assert_same(run(path, feed), run(model, feed), TOLERANCE)
    assert_same(run(path, feed, optimize=True), run(model, feed), TOLERANCE)
    _told(opened(model), graph, feed, folder)
    assert apply(Smooth(), graph, Context(plan=again)) == (False, []), "a second run edits nothing"
    assert text(graph) == after
    return graph, plan.smoothings


def _told(before: Graph, after: Graph, feed: Mapping[str, Any], folder: Path) -> None:
    """What the graph names as scaled is, and nothing else of the same name."""
    made = {t.name for n in after.nodes for t in n.outputs if t.name}
    names = [t.name for n in before.nodes for t in n.outputs if t.name in made]
    found = []
    for name, graph in (("before", before), ("after", after)):
        save(graph, folder / f"{name}.onnx", extra_outputs=names)
        found.append(run(folder / f"{name}.onnx", feed))
    scaled = scaled_tensors(after)
    assert scaled <= set(names)
    for name in names:
        wanted, got = (values[name] for values in found)
        if name not in scaled:
            assert_same({name: got}, {name: wanted}, TOLERANCE)
        else:
            assert wanted.shape != got.shape or np.abs(wanted - got).max() > 0.01 * np.abs(wanted).max(), name


def ops(graph: Graph) -> list[str]:
    """Operators in their order."""
    return [n.op for n in graph.nodes]
