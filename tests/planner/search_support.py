"""Small models of layers that read outliers, and what a search over them needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from conftest import make_model, node, random
from lowering_support import CPU, ONE_THREAD, canonical, recipe
from observer_support import ALL

import onnxq
from onnxq.calibration.readers import open_data
from onnxq.graph import Graph, load
from onnxq.planner.outline import Outline, outline
from onnxq.planner.smoothing import Searching
from onnxq.recipe import Outliers, Recipe
from onnxq.report.report import Report
from onnxq.schemes import scheme
from onnxq.targets import Target

Array = np.ndarray[Any, Any]
K, N = 48, 32
SMOOTH = Outliers()
LARGE = (5, 17)  # channels with outliers
PAIRED = replace(CPU, saturates=True)  # two products have to fit 16 bits, whatever this machine does


@dataclass
class Case:
    """A model's graph, its verdicts and its data."""

    graph: Graph
    found: Outline
    by: Searching


def case(model: onnx.ModelProto, folder: Path, x: Array, name: str = "w8a8", target: Target = CPU,
         outliers: Outliers = SMOOTH, batch: int = 64) -> Case:
    """The canonical graph of a model that reads x [rows, ..], outlined under a scheme."""
    onnx.save(model, folder / "model.onnx")
    graph = canonical(load(folder / "model.onnx"))
    data = open_data([{"x": part} for part in np.split(x, range(batch, len(x), batch))], graph.ports())
    by = Searching(scheme(name), target, outliers, data, ALL, ONE_THREAD)
    return Case(graph, outline(graph, recipe(name), target), by)


def compiled(model: onnx.ModelProto, folder: Path, x: Array, name: str = "w8a8", keep: Sequence[str] = (),
             **parts: Any) -> Report:
    """The report of a compilation by the tables, with calibration rows x, told against other rows of the same kind."""
    half = len(x) // 2
    onnx.save(model, folder / "model.onnx")
    np.savez(folder / "calib.npz", x=x[:half])
    np.savez(folder / "eval.npz", x=x[half:])
    made = replace(Recipe(scheme(name)), **parts)
    report = onnxq.compile(folder / "model.onnx", folder / "out.onnx", recipe=made, keep_float=keep, force=True,
                           calib=folder / "calib.npz", eval=folder / "eval.npz", measure=False,
                           save_plan=folder / "plan")
    assert report.verdict.failures == []
    return report


def sqnr(report: Report) -> float:
    """Of the output y."""
    assert report.accuracy is not None
    found = report.accuracy.outputs["y"].sqnr_db
    assert found is not None
    return found


def reasons(report: Report) -> dict[str, str]:
    """Node -> reason."""
    return {row.name: row.reason for row in report.nodes}


def gains() -> Array:
    """1 for each of K channels, but for those with outliers."""
    values = np.ones(K, np.float32)
    values[list(LARGE)] = 60
    return values


def normed(large: bool = True) -> onnx.ModelProto:
    """x [rows, 4, K], normalised with a gain that makes outlier channels, and a layer `fc`."""
    return make_model([node("LayerNormalization", "x g b", "t", name="norm"), node("MatMul", "t w", "y", name="fc")],
                      {"x": ["rows", 4, K]}, {"y": ["rows", 4, N]},
                      {"g": gains() if large else np.ones(K, np.float32), "b": random(K, seed=1) / 9,
                       "w": random(K, N)})


def plain(rows: int = 256, large: bool = True) -> Array:
    """Rows [rows, 4, K] of normal numbers, with outlier channels if asked."""
    return np.asarray(random(rows, 4, K) * (gains() if large else 1), np.float32)


def linear(**stored: Any) -> onnx.ModelProto:
    """x [rows, 4, K] through one layer `fc`."""
    return make_model([node("MatMul", "x w", "y", name="fc")], {"x": ["rows", 4, K]}, {"y": ["rows", 4, N]},
                      {"w": random(K, N), **stored})


def perceptron(activation: str = "Gelu") -> onnx.ModelProto:
    """x [rows, 4, 16] up to K channels, of which one is an outlier, down again, and normalised."""
    up = random(16, K, seed=2)
    up[:, LARGE[0]] *= 60
    return make_model([node("MatMul", "x u", "h", name="up"), node(activation, "h", "t"),
                       node("MatMul", "t w", "d", name="down"), node("LayerNormalization", "d ones zeros", "y")],
                      {"x": ["rows", 4, 16]}, {"y": ["rows", 4, N]},
                      {"u": up, "w": random(K, N), "ones": np.ones(N, np.float32), "zeros": np.zeros(N, np.float32)},
                      opset=20)
