"""analyze(): what quantizing each layer costs, by itself and with everything before it, and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from onnxq.calibration.readers import Dataset, open_data
from onnxq.errors import UsageError
from onnxq.graph import Graph, load
from onnxq.numerics.affine import QuantParams
from onnxq.numerics.comparison import Comparison
from onnxq.numerics.moments import Moments, Outside
from onnxq.passes.canonicalize import canonicalize
from onnxq.passes.manager import Context, PassManager
from onnxq.passes.quantize import quantize
from onnxq.passes.transform import transform
from onnxq.plan import STATIC, Plan
from onnxq.planner import alone
from onnxq.planner.alone import Errors
from onnxq.planner.sensitivity import Layer, layers
from onnxq.planning import Planning
from onnxq.progress import Progress, Silent
from onnxq.recipe import Recipe
from onnxq.request import AUTO, resolve
from onnxq.runtime.machine import session_options, target_here
from onnxq.runtime.measure import environment
from onnxq.targets import Target
from onnxq.version import VERSION

LEAST_DB = -300.0  # for what has no figure: noise where float makes zeros, or values that are no numbers


def analyze(model: str | Path, *, calib: Any, scheme: str = AUTO, recipe: Recipe | str | Path | None = None,
            samples: int | None = None, batch: int | None = None, ranges: str | None = None, target: str = "cpu",
            threads: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """What int8 costs each layer that a scheme (w8a8 unless named) quantizes, on the rows of `calib`, as plain data.

    `layers` are in execution order: `sqnr_db` of the result with the layer alone quantized, `accumulated_db` with the
    whole model quantized (None: identical to float; never below -300); of what the layer reads `range_parm` (the
    greatest magnitude / the standard deviation), `kurtosis` (0 for a normal distribution), `low`, `high` and `scale`
    of its codes and `clipped`, the share of values beyond them (None where the scale is found at run time). `outputs`
    maps an output of the model to its SQNR. Kernels are not timed: layers are those of compile() with `measure` False.
    Raises UsageError for a wrong call, DataError for data that don't fit.
    """
    chosen = resolve(target=target_here(target), scheme=scheme, recipe=recipe, calib=calib, samples=samples,
                     batch=batch, ranges=ranges)
    if chosen.scheme.is_float:
        raise UsageError("nothing is quantized under the scheme float; name another one with --scheme or in the recipe")
    with threadpool_limits(1, "blas"):  # as in compile()
        return _analyzed(model, chosen, calib, target, threads, progress or Silent())


def _analyzed(model: str | Path, chosen: Recipe, calib: Any, target: str, threads: int, bar: Progress,
              ) -> dict[str, Any]:
    here = target_here(target)
    bar.stage("load")
    graph = load(model)
    data = open_data(calib, graph.ports(), how=chosen.data)
    PassManager(canonicalize()).run(graph, Context(here))
    planning = Planning(graph, chosen, here, data, session_options(here, threads), bar, _stages(bar))
    plan = planning.plan()
    planning.round(plan)
    planning.correct(plan)
    graph = planning.graph_for(plan)
    found = layers(plan.nodes, graph)
    moments, outside = _statistics(plan, found)
    bar.stage("analyze")
    rows = _rows(data, chosen.calibration.samples)
    bar.total(rows * alone.runs(len(found)) if rows is not None else None)
    errors = alone.errors(graph, plan, found, data, chosen.calibration, planning.options, bar.step,
                          _twin(graph, plan, here), {name: [moments[name], *outside.get(name, ())] for name in moments})
    notices = [*planning.notices, *(f"calibration data: {note}" for note in data.notes)]
    if not found:
        notices.append(f"no layer of this model runs on codes under {chosen.scheme.name}; onnxq inspect tells why")
    if data.random:
        notices.append("the data are random, as asked: the figures tell nothing about real ones")
    return {
        "model": str(model), "scheme": chosen.scheme.name, "target": target, "data": data.name, "rows": rows,
        "layers": [_row(layer, plan, errors, moments[layer.reads], outside.get(layer.reads, [])) for layer in found],
        "outputs": {name: _decibels(comparison) for name, comparison in errors.outputs.items()},
        "notices": notices, "recipe": chosen.to_dict(), "environment": {"onnxq": VERSION, **environment()}}


def _stages(bar: Progress) -> Any:
    @contextmanager
    def stage(name: str) -> Iterator[None]:
        bar.stage(name)
        yield

    return stage


def _twin(graph: Graph, plan: Plan, target: Target) -> Graph:
    """The whole model quantized, as Q and DQ around float operators."""
    twin, context = graph.copy(), Context(target, plan)
    PassManager([*transform(plan.dropped), *quantize()]).run(twin, context)
    return twin


def _rows(data: Dataset, samples: int | None) -> int | None:
    known = [n for n in (data.rows, samples) if n is not None]
    return min(known) if data.rows is not None else None


def _statistics(plan: Plan, found: list[Layer]) -> tuple[dict[str, Moments], dict[str, list[Outside]]]:
    """By the tensor read: its moments, and what lies beyond its codes where their scale is known."""
    moments = {layer.reads: Moments() for layer in found}
    outside = {}
    for layer in found:
        codes = _codes(layer, plan)
        if codes is not None:
            low, high = _range(codes)
            half = float(codes.scale) / 2  # what lies nearer is rounded as everything else is
            outside[layer.reads] = [Outside(low - half, high + half)]
    return moments, outside


def _codes(layer: Layer, plan: Plan) -> QuantParams | None:
    return plan.activations.get(layer.reads) if plan.nodes[layer.node].activation == STATIC else None


def _range(codes: QuantParams) -> tuple[float, float]:
    """The least and the greatest number that a code stands for."""
    low, high = (float((bound - int(codes.zero_point)) * np.float64(codes.scale))
                 for bound in (codes.dtype.qmin, codes.dtype.qmax))
    return low, high


def _row(layer: Layer, plan: Plan, errors: Errors, moments: Moments, outside: list[Outside]) -> dict[str, Any]:
    codes = _codes(layer, plan)
    low, high = _range(codes) if codes is not None else (None, None)
    return {
        "name": layer.node, "op": layer.op, "kernel": layer.kernel, "reads": layer.reads, "makes": layer.makes,
        "sqnr_db": _decibels(errors.alone[layer.node]), "accumulated_db": _decibels(errors.accumulated[layer.node]),
        "range_parm": moments.range_parm, "kurtosis": moments.kurtosis,
        "clipped": outside[0].share if codes is not None and outside else None,
        "low": low, "high": high, "scale": float(codes.scale) if codes is not None else None,
        "zero_point": int(codes.zero_point) if codes is not None else None}


def _decibels(comparison: Comparison) -> float | None:
    return None if comparison.sqnr_db is None else max(comparison.sqnr_db, LEAST_DB)
