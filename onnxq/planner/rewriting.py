"""Whether a rewrite of the float graph pays on the target: the places that a pass edits, timed as they were and as
they are then."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import networkx as nx
import numpy as np

from onnxq.graph import Graph, Node, cut, is_constant, save, shape_of
from onnxq.numerics.comparison import Comparison
from onnxq.passes.manager import Context, Hook, Pass, PassManager
from onnxq.planner.candidates import describe
from onnxq.planner.values import Feed, Values
from onnxq.runtime.blocks import Call
from onnxq.runtime.race import KernelTime, race
from onnxq.runtime.session import Session, SessionOptions
from onnxq.runtime.timings import TimingCache

BEFORE, AFTER = "as it was", "rewritten"
_LEAST_GAIN = 0.02  # share of the time; what gains less is the larger change for nothing
_LEAST_DB = 80.0  # a rewrite that is exact within float rounding agrees far better
_HEAVY = 4096  # elements; operators with larger weights beside a place would drown what it gains
_BLOCK_SECONDS = 0.1


@dataclass(frozen=True)
class Place:
    """Nodes that a pass replaces, and those that it puts there, each with the nodes that they may be fused with."""

    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass
class Weighed:
    """What a pass gains: milliseconds of all its places as they were and rewritten, the least of the former and the
    greatest of the latter over the rounds, and what it computes wrongly, if anything."""

    name: str
    places: int
    before_ms: float = 0.0
    after_ms: float = 0.0
    before_low: float = 0.0
    after_high: float = 0.0
    fault: str = ""

    @property
    def pays(self) -> bool:
        """Whether the rewrite is right and faster: by more than a tie, and beyond the spread of the rounds."""
        beyond_noise = self.after_ms < self.before_low and self.after_high < self.before_ms
        return not self.fault and beyond_noise and self.after_ms < (1 - _LEAST_GAIN) * self.before_ms


@dataclass
class Kept:
    """`rewritten` tells whether any rewrite was applied, `dropped` the names of those that gain nothing, `faults` of
    those that compute something else."""

    rewritten: bool = False
    dropped: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)


def keep_faster(graph: Graph, steps: Sequence[Pass], context: Context, feeds: Sequence[Feed], options: SessionOptions,
                cache: TimingCache, hooks: Sequence[Hook] = ()) -> Kept:
    """Apply the weighed ones of some passes to the graph where they are faster, one after the other.

    `hooks` are those of the manager that applies them.
    """
    found = Kept()
    for step in (s for s in steps if s.weighed):
        gain = weigh(graph, step, context, feeds, options, cache)
        if gain is None:
            continue
        if gain.pays:
            found.rewritten |= PassManager([step], hooks).run(graph, context)
        else:
            found.dropped.add(step.name)
        if gain.fault:
            found.faults.append(f"rewrite {step.name} was left out: {gain.fault}")
    return found


def weigh(graph: Graph, step: Pass, context: Context, feeds: Sequence[Feed], options: SessionOptions,
          cache: TimingCache) -> Weighed | None:
    """Time what a pass edits on the values that the graph makes of the feeds; None where it edits nothing.

    Equal places share one timing, which the cache keeps. The rewritten place has to compute what the old one does.
    """
    edited = graph.copy()
    PassManager([step]).run(edited, context)
    places = list(_places(graph, edited))
    if not places:
        return None
    found, known = Weighed(step.name, len(places)), dict[str, dict[str, KernelTime]]()
    needed = {place: _inputs((cut(graph, place.before, {}), cut(edited, place.after, {}))) for place in places}
    with Values(graph, feeds, options, {name for names in needed.values() for name in names}) as values:
        for place in places:
            read = values.of(needed[place], []).feeds
            pair = cut(graph, place.before, read[0]), cut(edited, place.after, read[0])
            about = {"rewrite": step.name, BEFORE: describe(pair[0].nodes, pair[0], read),
                     AFTER: describe(pair[1].nodes, pair[1], read)}
            times = known.get(repr(about)) or cache.get(about)
            if times is None:
                found.fault = _fault(pair, read[0], options)
                if found.fault:
                    return found
                times = _race(pair, read, options)
                cache.put(about, times)
            known[repr(about)] = times
            found.before_ms += times[BEFORE].ms
            found.after_ms += times[AFTER].ms
            found.before_low += times[BEFORE].low
            found.after_high += times[AFTER].high
    return found


def _inputs(pair: tuple[Graph, Graph]) -> list[str]:
    return list(dict.fromkeys(t.name for part in pair for t in part.inputs))


def _places(graph: Graph, edited: Graph) -> Iterator[Place]:
    """Edits that touch one another are one place."""
    old, new = ({n.name: _signature(n) for n in g.nodes} for g in (graph, edited))
    gone = {name for name, what in old.items() if new.get(name) != what}
    come = {name for name, what in new.items() if old.get(name) != what}
    net: nx.Graph[tuple[str, str]] = nx.Graph()
    for kind, g, names in (("before", graph, gone), ("after", edited, come)):
        for node in (n for n in g.nodes if n.name in names):
            net.add_node((kind, node.name))
            for tensor in (t for t in [*node.inputs, *node.outputs] if t.name and not is_constant(t)):
                net.add_edge((kind, node.name), ("tensor", tensor.name))
    for part in nx.connected_components(net):
        before = _with_neighbours(graph, {name for kind, name in part if kind == "before"})
        after = _with_neighbours(edited, {name for kind, name in part if kind == "after"})
        yield Place(before, after)


def _signature(node: Node) -> tuple[object, ...]:
    attrs = sorted((k, str(v)) for k, v in node.attrs.items())
    return node.op, node.domain, attrs, [t.name for t in node.inputs], [t.name for t in node.outputs]


def _with_neighbours(graph: Graph, names: set[str]) -> tuple[str, ...]:
    """What stands right before or behind counts, too: the runtime fuses across the edge of an edit."""
    near = set(names)
    for node in (n for n in graph.nodes if n.name in names):
        users = [u for t in node.outputs for u in graph.consumers(t)]
        makers = [m for t in node.inputs if (m := graph.producer(t)) is not None]
        near |= {n.name for n in (*users, *makers) if not _heavy(n)}
    return tuple(n.name for n in graph.nodes if n.name in near)


def _heavy(node: Node) -> bool:
    sizes = (int(np.prod([int(d or 0) for d in shape_of(t) or ()])) for t in node.inputs if is_constant(t))
    return max(sizes, default=0) > _HEAVY


def _fault(pair: tuple[Graph, Graph], feed: Feed, options: SessionOptions) -> str:
    """How the rewritten place differs from the old one; "" where it computes the same."""
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        results = [_session(part, Path(folder) / f"{k}.onnx", options).run(_fed(part, feed))
                   for k, part in enumerate(pair)]
    shared = [name for name in results[0] if name in results[1]]
    for name in shared:
        fold = Comparison()
        a, b = (np.asarray(r[name], np.float32) for r in results)
        fold.update(a, b)
        if fold.sqnr_db is not None and fold.sqnr_db < _LEAST_DB:
            return f"{name} comes out otherwise ({fold.sqnr_db:.0f} dB)"
    return "" if shared else "nothing that it makes can be compared"


def _race(pair: tuple[Graph, Graph], feeds: Sequence[Feed], options: SessionOptions) -> dict[str, KernelTime]:
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        calls: dict[str, list[Call]] = {}
        for name, part in zip((BEFORE, AFTER), pair, strict=True):
            session = _session(part, Path(folder) / f"{len(calls)}.onnx", options)
            calls[name] = [session.cycle([_fed(part, feed) for feed in feeds])]
        return race(calls, block_seconds=_BLOCK_SECONDS, give_up=float("inf"))


def _session(graph: Graph, path: Path, options: SessionOptions) -> Session:
    save(graph, path)
    return Session(path, options)


def _fed(graph: Graph, feed: Feed) -> Feed:
    return {t.name: feed[t.name] for t in graph.inputs}
