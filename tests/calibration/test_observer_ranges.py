"""Every method of finding ranges, from the recipe through the observer to the values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import Opener, make_model, node
from observer_support import observe

from onnxq import request
from onnxq.calibration.readers import open_data
from onnxq.errors import UsageError
from onnxq.numerics import ranges
from onnxq.numerics.dtypes import INT4
from onnxq.recipe import Calibration, Recipe
from onnxq.schemes import TensorSpec, scheme

METHODS = ["minmax", "moving-average", "percentile", "entropy", "mse"]


def data(folder: Path) -> str:
    """400 rows of 500 normal numbers, with an outlier at 30 on each side in the last row."""
    x = np.random.default_rng(0).standard_normal((400, 500)).astype(np.float32)
    x[-1, :2] = 30.0, -30.0
    np.savez(folder / "data.npz", x=x)
    return str(folder / "data.npz")


def observed(opened: Opener, folder: Path, method: str, spec: TensorSpec | None = None) -> tuple[float, float]:
    """The range of y = 2 x."""
    model = make_model([node("Add", "x x", "y")], {"x": ["N", 500]}, {"y": ["N", 500]})
    graph = opened(model)
    how = Calibration(samples=None, batch=40, ranges=method, percentile=99.9)
    return observe(graph, ["y"], open_data(data(folder), graph.ports()), how, spec=spec)["y"]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_gives_its_own_range(method: str, opened: Opener, tmp_path: Path) -> None:
    y = 2 * np.load(data(tmp_path))["x"]
    running = ranges.make(method, **({"percent": 99.9} if method == "percentile" else {}))
    for k in range(0, 400, 40):
        running.update(y[k:k + 40])
    assert observed(opened, tmp_path, method) == running.result()


def test_all_but_minmax_clip_the_outliers(opened: Opener, tmp_path: Path) -> None:
    found = {method: observed(opened, tmp_path, method)[1] for method in METHODS}
    assert found["minmax"] == 60.0
    assert all(high < 60.0 for method, high in found.items() if method != "minmax")


@pytest.mark.parametrize("method", ["entropy", "mse"])
def test_searches_are_for_the_type_of_the_activations(method: str, opened: Opener, tmp_path: Path) -> None:
    spec = TensorSpec("int4", symmetric=True)
    running = ranges.make(method, dtype=INT4, symmetric=True)
    running.update(2 * np.load(data(tmp_path))["x"])
    found = observed(opened, tmp_path, method, spec)
    assert found == running.result()
    assert found[1] < observed(opened, tmp_path, method)[1] < 60.0  # fewer codes pay for less range


def test_a_type_matters_to_the_searches_only(opened: Opener, tmp_path: Path) -> None:
    assert observed(opened, tmp_path, "minmax", TensorSpec("int4")) == (-60.0, 60.0)


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_ranges_of_a_call_go_into_the_recipe(method: str) -> None:
    resolved = request.resolve(scheme="w8a8", ranges=method)
    assert resolved.calibration.ranges == method
    recipe = Recipe(scheme("w8a8"), calibration=Calibration(samples=7, ranges="percentile"))
    assert request.resolve(recipe=recipe).calibration == recipe.calibration
    assert request.resolve(recipe=recipe, ranges=method).calibration == Calibration(samples=7, ranges=method)


def test_auto_is_the_default() -> None:
    assert request.resolve(scheme="w8a8").calibration.ranges == "auto"


def test_auto_is_minmax_where_no_layer_tells_more(opened: Opener, tmp_path: Path) -> None:
    """What is chosen by layers' errors, the planner chooses."""
    assert observed(opened, tmp_path, "auto") == observed(opened, tmp_path, "minmax") == (-60.0, 60.0)


def test_unknown_ranges_are_refused() -> None:
    with pytest.raises(UsageError, match="'kl' are not known; use one of auto, minmax, moving-average"):
        request.resolve(scheme="w8a8", ranges="kl")
