"""Weights with zeros: by themselves, or by what layers read of calibrated data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from onnxq.calibration import observer
from onnxq.calibration.observer import Statistic
from onnxq.calibration.readers import Dataset
from onnxq.errors import UsageError
from onnxq.graph import Graph, identity, is_constant, shape_of, up_to
from onnxq.numerics import sparsity as numerics
from onnxq.numerics.allocation import Option, allocate
from onnxq.numerics.compensation import Drift
from onnxq.numerics.filters import by_place, from_matrix, restored, to_matrix
from onnxq.numerics.sampling import View
from onnxq.numerics.sparsity import Pattern, Wanted
from onnxq.passes.manager import Context
from onnxq.passes.transform.prune import Prune
from onnxq.plain import plain
from onnxq.plan import Plan
from onnxq.planner.hessians import Drawing, Rows, chunks
from onnxq.planner.prunable import Task, find
from onnxq.planner.scales import finite
from onnxq.recipe import Recipe
from onnxq.runtime.session import SessionOptions
from onnxq.sparsity import BUDGET, MAGNITUDE, SPARSEGPT
from onnxq.spool import Spool, digest
from onnxq.version import VERSION

Floats = npt.NDArray[np.float32]
Reading = tuple[tuple[str, ...], View]  # tensors, and how layers see them

_WIDEST = 8192  # inputs of a layer: the work grows with the cube
_DAMPING = 0.01
_AROUND = (-0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15)  # shares of one weight beside that of all
_MOST = 0.95  # of a weight's numbers that become 0 by a budget
_WORK = 3e12  # products of weights and rows, for all runs of the model together: a minute on two cores
_FEW, _MANY = 4, 128  # rows of the data that tell of others, and as many as there are where nobody knows


@dataclass(frozen=True)
class Calibrated:
    """What layers are observed on."""

    data: Dataset
    options: SessionOptions
    progress: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Pruned:
    """A weight with zeros: who reads it, the method, and the squared change of what these make, over its squares, on
    the calibration rows (None: not observed)."""

    weight: str
    layers: tuple[str, ...]
    method: str
    error: float | None


@dataclass
class Pruning:
    """`values`: weight name -> float32, of the weight's shape; `found` says how each came about, `spared` maps the name
    of a layer that stays as it is to the reason."""

    values: dict[str, Floats] = field(default_factory=dict)
    found: list[Pruned] = field(default_factory=list)
    spared: dict[str, str] = field(default_factory=dict)


def prune(graph: Graph, recipe: Recipe, by: Calibrated | None, spool: Spool | None = None) -> Pruning:
    """Prune a canonical graph's weights as the recipe says; without `by`, by magnitude.

    By SparseGPT, where the model and the data are small, one tensor that layers read is taken after the other, from the
    first to the last: its layers are observed with all before them pruned, and make up for what those are off by. A
    larger model would run too often for that: as by other methods, all layers are observed in float at once. What is
    done goes into the `spool`, from where the values are mapped, and where an interrupted run goes on. Raises
    ModelError for weights with NaN or infinities.
    """
    tasks, spared = find(graph, recipe)
    told = [(task.name, identity(graph, task.weight)) for task in tasks]
    work = _Work(graph, recipe, spool, digest(VERSION, plain(recipe.sparsity), told, *_told(recipe, by)),
                 Pruning(spared=spared))
    readings: dict[Reading, list[Task]] = {}
    for task in tasks:
        if by is None or task.view is None or task.inputs > _WIDEST:
            work.take(task, MAGNITUDE, None)
        else:
            readings.setdefault((task.reads, task.view), []).append(task)
    if by is not None:
        work.shares = _shares(work, readings, by)
        if recipe.sparsity.method == SPARSEGPT and _affordable(graph, readings, recipe, by):
            for reading, members in readings.items():
                _step(work, {reading: members}, by, work.done.values)
        else:
            _step(work, readings, by, None)
    order = {task.name: place for place, task in enumerate(tasks)}
    work.done.found.sort(key=lambda one: order[one.weight])
    return work.done


def _shares(work: _Work, readings: dict[Reading, list[Task]], by: Calibrated) -> dict[str, float]:
    """Weight -> its share of zeros, where all together have the recipe's and each what costs least in sum: the squared
    change of its layers' results over their squares, by SparseGPT in float."""
    share, entry = work.recipe.sparsity.wanted, digest(work.key, BUDGET)
    if work.recipe.sparsity.shares != BUDGET or not isinstance(share, float) or not readings:
        return {}
    kept = work.spool.get(entry) if work.spool is not None else None
    if kept is not None:
        return {name: float(one) for name, one in kept.items()}
    tried = sorted({min(max(share + step, 0.0), _MOST) for step in _AROUND})
    items: dict[str, list[Option]] = {}
    for chunk in chunks({reading: members[0].inputs for reading, members in readings.items()}):
        for reading, drift in _observed(work, chunk, by, None):
            hessian = drift.hessian()
            for task in readings[reading]:
                order = _order(task)
                w = to_matrix(finite(work.graph, task.weight, task.layers[0]), _turned(task))[order]
                h = hessian[np.ix_(order, order)]
                items[task.name] = [Option(int(w.size * (1 - s)), numerics.relative_error(
                    w, numerics.sparsegpt(w, h, s, _DAMPING), h)) for s in tried]
    most = sum(int(_count(task) * (1 - share)) for members in readings.values() for task in members)
    chosen = allocate(list(items.values()), most)
    found = {name: tried[k] for name, k in zip(items, chosen, strict=True)}
    if work.spool is not None:
        work.spool.put(entry, {name: np.array(one) for name, one in found.items()})
    return found


def _observed(work: _Work, chunk: Sequence[Reading], by: Calibrated,
              before: Mapping[str, Floats] | None) -> Iterator[tuple[Reading, Drift]]:
    """What layers read, in one run over the data; with the weights `before` pruned, and in float, unless there are
    none."""
    running = {reading: Seen(reading[1], bool(before)) for reading in chunk}
    whole = _up_to(work.graph, chunk)
    twin = whole.copy() if before else None
    if twin is not None:
        Prune().run(twin, Context(plan=Plan("", "", pruned=dict(before or {}))))
    observer.fold(whole, {}, by.data, work.recipe.calibration, by.options, by.progress, _named(running), twin)
    for reading in chunk:
        yield reading, running.pop(reading).drift


def _affordable(graph: Graph, readings: dict[Reading, list[Task]], recipe: Recipe, by: Calibrated) -> bool:
    """Whether the model may run once for each reading, half of it on average, and in two forms; as told by a few rows
    of the data."""
    counted = {reading: Rows(reading[1]) for reading in readings}
    if not counted:
        return False
    observer.fold(graph, {}, by.data, replace(recipe.calibration, samples=_FEW), by.options, None, _named(counted))
    products = sum(counted[reading].rows * _count(task) for reading, members in readings.items() for task in members)
    total = min(n for n in (by.data.rows, recipe.calibration.samples, _MANY) if n is not None)
    return len(readings) * products * max(total / _FEW, 1.0) <= _WORK


def _count(task: Task) -> int:
    return int(np.prod([int(d or 0) for d in shape_of(task.weight) or ()]))


def _named(running: Mapping[Reading, Statistic]) -> list[dict[str, Statistic]]:
    return [dict.fromkeys(reading[0], one) for reading, one in running.items()]


def _step(work: _Work, readings: dict[Reading, list[Task]], by: Calibrated,
          before: Mapping[str, Floats] | None) -> None:
    """Prune the layers that read some tensors, as `_observed`."""
    method = work.recipe.sparsity.method
    left = {reading: members[0].inputs for reading, members in readings.items()
            if not all(work.known(task, method) for task in members)}
    for chunk in chunks(left):
        for reading, drift in _observed(work, chunk, by, before):
            for task in readings[reading]:
                if drift.count:
                    work.take(task, method, drift)
                else:
                    work.take(task, MAGNITUDE, None)


def _up_to(graph: Graph, readings: Sequence[Reading]) -> Graph:
    """What computes the tensors that are read."""
    inputs = {t.name for t in graph.inputs}
    computed = [name for names, _ in readings for name in names if name not in inputs]
    return up_to(graph, computed) if computed else graph


class Seen:
    """What layers read by one view: in float, or `paired`: as what is pruned makes it, and then in float; with a
    `constant` 1 behind each row, if wanted."""

    def __init__(self, view: View, paired: bool, constant: bool = False) -> None:
        self.view, self.paired, self.constant, self.drift = view, paired, constant, Drift()
        self._drawing = Drawing(view)

    def update(self, x: Floats) -> None:
        """Fold in one batch; of one whose last axis is twice as long both halves."""
        self.fold(*(np.split(x, 2, axis=-1) if self.paired else [x]))

    def fold(self, *parts: Floats) -> None:
        """Fold in one batch as what is changed makes it, and behind it as it is in float, if that is another."""
        wanted = self._drawing.next(parts[0])
        if wanted.size:
            rows = [self.view.rows(part, wanted) for part in parts]
            if self.constant:
                rows = [np.pad(row, ((0, 0), (0, 1)), constant_values=1) for row in rows]
            self.drift.update(*rows)


@dataclass
class _Work:
    """What is pruned already; `key` stands for all that results depend on but the weight itself."""

    graph: Graph
    recipe: Recipe
    spool: Spool | None
    key: str
    done: Pruning
    shares: Mapping[str, float] = field(default_factory=dict)  # of weights that have one of their own

    def known(self, task: Task, method: str) -> bool:
        """Take what an earlier run made of a weight; whether it made something."""
        if task.name in self.done.values:
            return True
        kept = self.spool.get(self._entry(task, method)) if self.spool is not None else None
        if kept is None:
            return False
        error = float(kept["error"])
        self._note(task, method, np.asarray(kept["values"]), None if np.isnan(error) else error)
        return True

    def take(self, task: Task, method: str, drift: Drift | None) -> None:
        """Prune one weight, unless that is done."""
        if self.known(task, method):
            return
        values, error = _pruned(finite(self.graph, task.weight, task.layers[0]), task, method, drift,
                                self.shares.get(task.name, self.recipe.sparsity.wanted))
        if self.spool is not None:
            told = np.array(np.nan if error is None else error)
            self.spool.put(self._entry(task, method), {"values": values, "error": told})
            if self.known(task, method):  # from disk
                return
        self._note(task, method, values, error)

    def _note(self, task: Task, method: str, values: Floats, error: float | None) -> None:
        self.done.values[task.name] = values
        self.done.found.append(Pruned(task.name, tuple(n.name for n in task.layers), method, error))

    def _entry(self, task: Task, method: str) -> str:
        return digest(self.key, task.name, method)


def _told(recipe: Recipe, by: Calibrated | None) -> list[object]:
    """What results depend on besides the weights; the first rows of the data stand for all."""
    if by is None:
        return []
    first = next(iter(by.data.batches(1)), None)
    return [by.data.name, by.data.rows or 0, dict(first.feed) if first is not None else {}, plain(recipe.calibration)]


def _pruned(values: Floats, task: Task, method: str, drift: Drift | None,
            wanted: Wanted | None) -> tuple[Floats, float | None]:
    """(the weight with zeros, the error of its layers' results where what they read is known)."""
    assert wanted is not None
    order = _order(task)
    aim = to_matrix(values, _turned(task))
    if drift is not None and method == SPARSEGPT:
        aim = drift.target(aim, _DAMPING)
    aim, hessian = aim[order], None if drift is None else drift.hessian()[np.ix_(order, order)]
    if hessian is None or method == MAGNITUDE:
        made = np.where(numerics.magnitude(aim, wanted), aim, np.float32(0))
    elif method == SPARSEGPT:
        pattern = wanted if isinstance(wanted, Pattern) else None
        made = numerics.exchange(aim, numerics.sparsegpt(aim, hessian, wanted, _DAMPING), hessian, pattern, _DAMPING)
    else:
        made = np.where(numerics.wanda(aim, np.sqrt(hessian.diagonal()), wanted), aim, np.float32(0))
    error = numerics.relative_error(aim, made, hessian) if hessian is not None else None
    return from_matrix(restored(made, order), values.shape[2:], _turned(task)), error


def _order(task: Task) -> npt.NDArray[np.int64]:
    """Of which column of a row each input is: a Conv's channels at one place of the filter follow one another."""
    dims = [int(d or 0) for d in shape_of(task.weight) or ()]
    return by_place(task.inputs, tuple(dims[2:]) if task.layers[0].op == "Conv" else ())


def _turned(task: Task) -> bool:
    """Whether the inputs of a weight lie along its last axes: filters, and tables."""
    return task.table or task.layers[0].op == "Conv"


# ------------------------------------------------------------------ saved plans


def check_pruned(plan: Plan, graph: Graph) -> None:
    """Whether the weights that a Plan prunes are those of a graph. Raises UsageError when they are not."""
    shapes = {t.name: shape_of(t) for node in graph.nodes for t in node.inputs if is_constant(t)}
    for name, values in plan.pruned.items():
        if shapes.get(name) != values.shape:
            raise UsageError(f"the plan was made for another model: it prunes weights {name!r} {list(values.shape)}, "
                             "which this one does not have; make a plan of this model with --save-plan DIR")
