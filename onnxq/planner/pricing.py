"""What each kernel of a Plan takes on the target, in integers and in float, and what going between the two takes."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from onnxq.errors import ModelError
from onnxq.graph import Graph, read_nodes, repeat, save, weight_bytes
from onnxq.numerics.comparison import Comparison
from onnxq.plan import FLOAT, Plan
from onnxq.planner import conversions
from onnxq.planner.candidates import FREE, Form, Unit, description, emit, forms, inputs_of, units
from onnxq.planner.values import Feed, Values
from onnxq.runtime.observe import executed
from onnxq.runtime.race import BLOCK_SECONDS, KernelTime, copies_needed, race
from onnxq.runtime.session import Session, SessionOptions
from onnxq.runtime.timings import TimingCache
from onnxq.targets import Target

LEAST_CHECK_DB = 25.0  # codes that are off by one everywhere still agree to about 30 dB
_ROWS_OF_DECODING = 16  # with more rows than these, reading the weights no longer decides how long a kernel takes
_ALL_BLOCKS_SECONDS = 8.0  # shared by the units of one round of one candidate: larger models get shorter blocks
_LAYOUT = frozenset({"ReorderInput", "ReorderOutput", "Transpose"})
_MODEL_ROUNDS = 25  # profiled runs, to tell a kernel from the layout conversions around it


@dataclass
class Prices:
    """Times by unit and candidate, milliseconds over one run of each feed; what could not be timed is left out.

    `faults` tells of candidates that compute something else than their Q/DQ form says; they are never chosen.
    `elements` are those of each tensor that a unit reads or makes, `ranks` their ranks; `scaled` names those that a Mul
    makes for integer kernels alone.
    """

    units: list[Unit]
    times: dict[str, dict[str, KernelTime]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    elements: dict[str, int] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    conversion: conversions.Costs = conversions.FREE
    scaled: frozenset[str] = frozenset()

    def to_codes(self, tensor: str) -> float:
        """Milliseconds from a float tensor to what a kernel reads: codes, of scaled channels where it wants these."""
        scaling = self.conversion.to_scale(self.elements[tensor]) if tensor in self.scaled else 0.0
        return scaling + self.conversion.to_codes(self.elements[tensor], self.ranks[tensor])

    def of(self, node: str) -> dict[str, float]:
        """Candidate -> milliseconds for a node that has a kernel; for all of its unit, where that has several nodes."""
        unit = next((u for u in self.units if node in u.nodes), None)
        return {name: time.ms for name, time in self.times.get(unit.name, {}).items()} if unit is not None else {}


def price(graph: Graph, plan: Plan, target: Target, feeds: Sequence[Feed], options: SessionOptions,
          cache: TimingCache, fmt: str = "qoperator", progress: Callable[[int, int], None] | None = None) -> Prices:
    """Time each distinct unit of a Plan for the canonical float graph on what it reads for these feeds.

    Equal units (operators, attributes, shapes, types) share one timing, which the cache keeps. Each unit's integer form
    is checked against its QDQ twin, unless the cache knows the result for just these weights and scales.
    """
    found = Prices(units(plan, graph), scaled=frozenset(
        f"{name}.smooth" for name, one in plan.smoothings.items() if not one.absorbed))
    wanted = {t for unit in found.units for t in (*inputs_of(graph, unit), *unit.reads, *unit.makes)}
    with Values(graph, feeds, options, wanted) as values:
        known: dict[str, dict[str, KernelTime]] = {}
        bench = _Bench(graph, plan, target, options, cache, fmt, found)
        for number, unit in enumerate(found.units):
            read = values.of(inputs_of(graph, unit), unit.reads + unit.makes)
            for name, arrays in read.sizes.items():
                found.elements[name], found.ranks[name] = arrays
            if unit.op not in FREE:
                bench.add(unit, read.feeds, known)
            if progress is not None:
                progress(number + 1, len(found.units))
    found.conversion = conversions.measure(options, cache)
    return found


class _Bench:
    """Emits, checks and times the candidates of one unit after the other."""

    def __init__(self, graph: Graph, plan: Plan, target: Target, options: SessionOptions, cache: TimingCache,
                 fmt: str, found: Prices) -> None:
        self.graph, self.plan, self.target, self.options = graph, plan, target, options
        self.cache, self.fmt, self.found = cache, fmt, found
        self.model_bytes = weight_bytes(graph)

    def add(self, unit: Unit, feeds: Sequence[Feed], known: dict[str, dict[str, KernelTime]]) -> None:
        """Price one unit; what its kernel computes is checked whether its time is known or not."""
        parts = forms(unit, self.plan, self.target)
        about = {"op": unit.op, **description(self.graph, unit, feeds), "candidates": list(parts),
                 "format": self.fmt}
        key = repr(about)
        with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
            candidates = _Candidates(self, unit, parts, feeds, Path(folder))
            wrong = candidates.wrong()
            self.found.faults += [f"{unit.name}: {name} {fault}" for name, fault in wrong.items()]
            if key not in known:
                times = self.cache.get(about)
                if times is None:
                    times = candidates.race()
                    self.cache.put(about, times)
                known[key] = times
        right = {name: time for name, time in known[key].items() if name not in wrong}
        if FLOAT in right:
            self.found.times[unit.name] = right


class _Candidates:
    """The forms of one unit as files."""

    def __init__(self, bench: _Bench, unit: Unit, parts: Mapping[str, Plan], feeds: Sequence[Feed],
                 folder: Path) -> None:
        self.bench, self.folder = bench, folder
        self.forms: dict[str, list[Form]] = {}
        self.twins: dict[str, Form] = {}
        for name, part in parts.items():
            pairs = [emit(bench.graph, unit, part, bench.target, feed, bench.fmt) for feed in feeds]
            self.forms[name], self.twins[name] = [form for form, _ in pairs], pairs[0][1]
        self.copies = self._copies(feeds)

    def _copies(self, feeds: Sequence[Feed]) -> int:
        """How many copies of the weights to rotate: one where there are many rows to a weight."""
        rows = max(int(np.prod(v.shape[:-1])) for feed in feeds for v in feed.values())
        stored = weight_bytes(self.forms[FLOAT][0].graph)
        if rows > _ROWS_OF_DECODING or stored == 0:
            return 1
        return copies_needed(stored, self.bench.model_bytes)

    def wrong(self) -> dict[str, str]:
        """Candidate -> how its result differs from that of its QDQ twin; one that does not run is left out then."""
        found = {}
        for name, twin in self.twins.items():
            if name == FLOAT:
                continue
            key = self._check_key(self.forms[name][0], twin)
            db = self.bench.cache.checked(key)
            if db is None:
                try:
                    db = self._agreement(name, twin)
                except ModelError as e:
                    found[name] = f"does not run: {e}"
                    self.forms.pop(name)
                    continue
                self.bench.cache.note_check(key, db)
            if db < LEAST_CHECK_DB:
                found[name] = f"agrees to {db:.1f} dB only with what its Q/DQ form says"
        return found

    def _check_key(self, form: Form, twin: Form) -> str:
        digest = hashlib.sha256()
        for kind, one in (("form", form), ("twin", twin)):
            path = self.folder / f"{kind}.onnx"
            save(one.graph, path)
            digest.update(path.read_bytes())
            for name in sorted(one.feed):
                digest.update(f"{name}{one.feed[name].dtype}{one.feed[name].shape}".encode())
                digest.update(np.ascontiguousarray(one.feed[name]).tobytes())
        return digest.hexdigest()

    def _agreement(self, name: str, twin: Form) -> float:
        """SQNR in dB of the worst output; codes are compared as numbers about their zero point's."""
        plain = replace(self.bench.options, optimize=False)
        compiled = self.forms[name][0]
        a = Session(self.folder / "twin.onnx", plain).run(twin.feed)
        b = Session(self.folder / "form.onnx", self.bench.options).run(compiled.feed)
        folds = []
        for left, right in zip(a.values(), b.values(), strict=True):
            folds.append(Comparison())
            centre = left.astype(np.float32).mean() if left.dtype != np.float32 else np.float32(0)
            folds[-1].update(left.astype(np.float32) - centre, right.astype(np.float32) - centre)
        return min((f.sqnr_db for f in folds if f.sqnr_db is not None), default=float("inf"))

    def race(self) -> dict[str, KernelTime]:
        """Milliseconds of each candidate, without what converts layouts around it: in a region there are none."""
        calls: dict[str, list[Callable[[], None]]] = {}
        shares = {}
        for name, made in self.forms.items():
            path = self.folder / f"{len(calls)}.onnx"
            graph = made[0].graph
            if self.copies > 1:
                repeat(graph, self.copies)
            save(graph, path)
            calls[name] = [Session(path, self.bench.options).cycle([form.feed for form in made])]
            shares[name] = self._kernel_share(path, made[0])
        seconds = min(BLOCK_SECONDS, _ALL_BLOCKS_SECONDS / len(self.bench.found.units))
        times = race(calls, per_call=dict.fromkeys(calls, self.copies), block_seconds=seconds)
        return {name: _scaled(time, shares[name]) for name, time in times.items()}

    def _kernel_share(self, path: Path, form: Form) -> float:
        """What part of a run is the kernels themselves; 1 where the runtime converts no layouts."""
        own = {node.op for node in form.graph.nodes}
        if not any(v.ndim > 2 for v in form.feed.values()) or own & _LAYOUT:
            return 1.0
        ran = executed(path, [form.feed] * _MODEL_ROUNDS, self.bench.options, read_nodes)
        layout = sum(node.ms for node in ran if node.op.rsplit(".", 1)[-1] in _LAYOUT)
        return 1.0 - layout / max(sum(node.ms for node in ran), 1e-9)


def _scaled(time: KernelTime, share: float) -> KernelTime:
    return KernelTime(time.ms * share, time.low * share, time.high * share, time.runs)
