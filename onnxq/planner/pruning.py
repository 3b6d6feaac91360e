"""Weights with zeros: by themselves, or by what layers read of calibrated data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from onnxq.calibration import observer
from onnxq.calibration.readers import Dataset
from onnxq.errors import UsageError
from onnxq.graph import Graph, identity, is_constant, shape_of
from onnxq.numerics import sparsity as numerics
from onnxq.numerics.sampling import View
from onnxq.plain import plain
from onnxq.plan import Plan
from onnxq.planner.hessians import Half, chunks
from onnxq.planner.prunable import Task, find
from onnxq.planner.scales import finite
from onnxq.recipe import Recipe
from onnxq.runtime.session import SessionOptions
from onnxq.sparsity import MAGNITUDE, SPARSEGPT
from onnxq.spool import Spool, digest
from onnxq.version import VERSION

Floats = npt.NDArray[np.float32]
Reading = tuple[tuple[str, ...], View]  # tensors, and how layers see them

_WIDEST = 8192  # inputs of a layer: the work grows with the cube


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

    Layers are observed in float, all of them in one run over the data if memory holds their Hessians; those that read
    the same share one. What is done goes into the `spool`, from where the values are mapped, and where an interrupted
    run goes on. Raises ModelError for weights with NaN or infinities.
    """
    tasks, spared = find(graph, recipe)
    key = digest(VERSION, plain(recipe.sparsity), *_told(recipe, by))
    work = _Work(graph, recipe, spool, key, Pruning(spared=spared))
    readings: dict[Reading, list[Task]] = {}
    for task in tasks:
        if by is None or task.view is None or task.inputs > _WIDEST:
            work.take(task, MAGNITUDE, None)
        elif not work.known(task, recipe.sparsity.method):
            readings.setdefault((task.reads, task.view), []).append(task)
    for chunk in chunks({reading: members[0].inputs for reading, members in readings.items()}):
        assert by is not None
        running = {reading: Half(reading[1], lambda x: x, False) for reading in chunk}
        observer.fold(graph, {}, by.data, recipe.calibration, by.options, by.progress,
                      [dict.fromkeys(reading[0], half) for reading, half in running.items()])
        for reading in chunk:
            hessian = running.pop(reading).hessian.result()
            for task in readings[reading]:
                work.take(task, recipe.sparsity.method if hessian.any() else MAGNITUDE, hessian)
    order = {task.name: place for place, task in enumerate(tasks)}
    work.done.found.sort(key=lambda one: order[one.weight])
    return work.done


@dataclass
class _Work:
    """What is pruned already; `key` stands for all that results depend on but the weight itself."""

    graph: Graph
    recipe: Recipe
    spool: Spool | None
    key: str
    done: Pruning

    def known(self, task: Task, method: str) -> bool:
        """Take what an earlier run made of a weight; whether it made something."""
        kept = self.spool.get(self._entry(task, method)) if self.spool is not None else None
        if kept is None:
            return False
        error = float(kept["error"])
        self.done.values[task.name] = np.asarray(kept["values"])
        self.done.found.append(Pruned(task.name, tuple(n.name for n in task.layers), method,
                                      None if np.isnan(error) else error))
        return True

    def take(self, task: Task, method: str, hessian: npt.NDArray[np.float64] | None) -> None:
        """Prune one weight, unless an earlier run has."""
        if self.known(task, method):
            return
        values, error = _pruned(finite(self.graph, task.weight, task.layers[0]), task, self.recipe, method, hessian)
        if self.spool is not None:
            told = np.array(np.nan if error is None else error)
            self.spool.put(self._entry(task, method), {"values": values, "error": told})
            if self.known(task, method):  # from disk
                return
        self.done.values[task.name] = values
        self.done.found.append(Pruned(task.name, tuple(n.name for n in task.layers), method, error))

    def _entry(self, task: Task, method: str) -> str:
        return digest(self.key, task.name, identity(self.graph, task.weight), method)


def _told(recipe: Recipe, by: Calibrated | None) -> list[object]:
    """What results depend on besides the weights; the first rows of the data stand for all."""
    if by is None:
        return []
    first = next(iter(by.data.batches(1)), None)
    return [by.data.name, by.data.rows or 0, dict(first.feed) if first is not None else {}, plain(recipe.calibration)]


def _pruned(values: Floats, task: Task, recipe: Recipe, method: str,
            hessian: npt.NDArray[np.float64] | None) -> tuple[Floats, float | None]:
    """(the weight with zeros, the error of its layers' results where what they read is known)."""
    wanted = recipe.sparsity.wanted
    assert wanted is not None
    matrix, order = _matrix(values, task), _order(task)
    if hessian is not None:
        hessian = hessian[np.ix_(order, order)]
    if hessian is None or method == MAGNITUDE:
        made = np.where(numerics.magnitude(matrix, wanted), matrix, np.float32(0))
    elif method == SPARSEGPT:
        made = numerics.refit(matrix, numerics.sparsegpt(matrix, hessian, wanted), hessian)
    else:
        made = np.where(numerics.wanda(matrix, np.sqrt(hessian.diagonal()), wanted), matrix, np.float32(0))
    error = numerics.relative_error(matrix, made, hessian) if hessian is not None else None
    return _back(made, task, values.shape), error


# ------------------------------------------------------------------ form


def _order(task: Task) -> npt.NDArray[np.int64]:
    """Of which column of a row each input is: a Conv's channels at one place of the filter follow one another."""
    repeat = task.view.repeat if task.view is not None else _places(task)
    return np.arange(task.inputs).reshape(-1, repeat).T.reshape(-1)


def _places(task: Task) -> int:
    dims = [int(d or 0) for d in shape_of(task.weight) or ()]
    return int(np.prod(dims[2:])) if task.layers[0].op == "Conv" else 1


def _matrix(values: Floats, task: Task) -> Floats:
    """A weight as [K, N]."""
    if task.table:
        return np.ascontiguousarray(values.T)
    if task.layers[0].op != "Conv":
        return values
    return np.ascontiguousarray(values.reshape(len(values), -1).T[_order(task)])


def _back(matrix: Floats, task: Task, shape: tuple[int, ...]) -> Floats:
    """[K, N] in the shape of the weight."""
    if task.table:
        return np.ascontiguousarray(matrix.T)
    if task.layers[0].op != "Conv":
        return matrix
    back = np.empty_like(matrix)
    back[_order(task)] = matrix
    return np.ascontiguousarray(back.T).reshape(shape)


# ------------------------------------------------------------------ saved plans


def check_pruned(plan: Plan, graph: Graph) -> None:
    """Whether the weights that a Plan prunes are those of a graph. Raises UsageError when they are not."""
    shapes = {t.name: shape_of(t) for node in graph.nodes for t in node.inputs if is_constant(t)}
    for name, values in plan.pruned.items():
        if shapes.get(name) != values.shape:
            raise UsageError(f"the plan was made for another model: it prunes weights {name!r} {list(values.shape)}, "
                             "which this one does not have; make a plan of this model with --save-plan DIR")
