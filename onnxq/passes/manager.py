"""Passes and the manager that runs them.

A pass is a frozen dataclass whose fields are its options. It returns whether it edited the graph; a second run edits
nothing. What it looked at and left alone, it reports with `context.skip(node, reason)`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from onnxq.errors import GraphError, PassError
from onnxq.graph import Graph, Node, Tensor
from onnxq.plan import Plan
from onnxq.targets import Target


@dataclass(frozen=True)
class Skip:
    """A near miss: the pass that looked, the node it left alone, and why."""

    pass_name: str
    node: str
    reason: str


@dataclass(frozen=True)
class Packed:
    """A weight that was packed: `encodings` from the outermost one on, its share of zeros, bytes before and after."""

    name: str
    encodings: tuple[str, ...]
    shape: tuple[int, ...]
    zeros: float
    dense_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class Packing:
    """What was packed, with estimates of the peak of loading: of the model as it was (`dense_peak`), with the
    `packed_bytes` of weights that it has now (`peak`), and with the `fewest_bytes`, where memory is no matter
    (`fewest_peak`). `limit` is what was allowed."""

    weights: tuple[Packed, ...] = ()
    limit: int = 0
    dense_peak: int = 0
    peak: int = 0
    packed_bytes: int = 0
    fewest_bytes: int = 0
    fewest_peak: int = 0


@dataclass
class Context:
    """What passes read (plan, target) and where they leave their near misses.

    `packing` is what became of weights that were packed. `weights` holds weights that codes took the place of, by name,
    for a later pass that writes these in another form.
    """

    target: Target | None = None
    plan: Plan = field(default_factory=lambda: Plan("", ""))
    skips: list[Skip] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    packing: Packing = Packing()
    current: str = ""

    @property
    def absorbed(self) -> set[str]:
        """Names of nodes that another node's kernel computes."""
        return {n.node for n in self.plan.nodes.values() if n.part_of is not None}

    def skip(self, node: Node, reason: str) -> bool:
        """Record a near miss; returns False so that a visit can `return context.skip(...)`."""
        self.skips.append(Skip(self.current, node.name, reason))
        return False


@dataclass(frozen=True)
class Pass:
    """A graph rewrite; subclasses give `visit` for one node, or `run` for the whole graph.

    One that is `weighed` leaves the outputs as they are and is there for speed alone: it is kept where it was measured
    to be faster, unless nothing is measured.
    """

    name: ClassVar[str] = ""
    weighed: ClassVar[bool] = False

    def run(self, graph: Graph, context: Context) -> bool:
        """Rewrite the graph; whether anything changed. A pass that says nothing else leaves bodies of If/Loop alone."""
        changed = False
        for node in graph.nodes:
            if len(node.outputs):  # a node that an earlier visit removed has none
                changed |= self.visit(node, graph, context)
        return changed

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Rewrite one node; whether anything changed."""
        raise TypeError(f"{type(self).__name__} defines neither run nor visit")

    def __str__(self) -> str:
        options = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"{self.name}({options})" if options else self.name


Hook = Callable[[Pass, Graph, float], None]


@dataclass
class PassManager:
    """Runs passes in order, checks the graph after each, and calls the hooks with the pass, the graph and seconds."""

    passes: Sequence[Pass]
    hooks: Sequence[Hook] = ()

    def run(self, graph: Graph, context: Context) -> bool:
        """Run all passes once; whether any edited.

        Raises PassError naming the pass after which the graph was invalid, and the passes before it.
        """
        changed = False
        done: list[str] = []
        for step in self.passes:
            context.current = step.name
            start = time.perf_counter()
            edited = step.run(graph, context)
            changed |= edited
            faults = _faults(graph) if edited else []
            if faults:
                raise PassError(f"pass {step.name} left an invalid graph ({faults[0]}) after "
                                f"{', '.join(done) or 'no other pass'}; please report this with the model")
            for hook in self.hooks:
                hook(step, graph, time.perf_counter() - start)
            done.append(step.name)
        return changed


@dataclass
class Removals:
    """A hook that notes which pass took which node of a graph out, bodies included, before passes run on it.

    `found` maps the name of a removed node to (operator, names of what it made, name of the pass).
    """

    graph: Graph
    found: dict[str, tuple[str, tuple[str, ...], str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._present = {n.name: (n.op, tuple(t.name for t in n.outputs if t.name)) for n, _ in self.graph.walk()}

    def __call__(self, step: Pass, graph: Graph, seconds: float) -> None:
        """What is no longer there was taken out by this pass."""
        left = {n.name for n, _ in graph.walk()}
        for name in [n for n in self._present if n not in left]:
            self.found[name] = (*self._present.pop(name), step.name)


def _faults(graph: Graph) -> list[str]:
    """Bring the graph into order and look for faults; a cycle is one."""
    try:
        graph.sort()
    except GraphError as e:
        return [str(e)]
    return graph.check()
