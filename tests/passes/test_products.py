"""MatMul of two computed tensors under attention: int8: what is written, what it computes, and what stays float."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Opener, make_model, node, random
from lowering_support import BOTH_FORMATS, HERE, MODELS, Array, canonical, described, make, recipe

import onnxq
from onnxq.planner.outline import outline
from onnxq.recipe import Recipe
from onnxq.schemes import scheme

SHAPES = {"2-D": ([9, 16], [16, 7]), "3-D": ([3, 9, 16], [3, 16, 7]), "4-D": ([2, 3, 9, 16], [2, 3, 16, 7]),
          "odd inner": ([2, 5, 17], [2, 17, 6])}


def integer_product(made: Any, a: Array, b: Array) -> Array:
    """The exact product of the codes in the file's scales."""
    stored = made.initializers()
    parts = []
    for name, values, low, high in (("a", a, 0, 255), ("b.s8", b, -128, 127)):
        scale, zero = np.float32(stored[f"{name}.scale"]), int(stored[f"{name}.zero_point"])
        codes = np.clip(np.rint(values / scale) + zero, low, high).astype(np.int64) - zero
        parts.append((codes, np.float64(scale)))
    (x, x_scale), (y, y_scale) = parts
    return (x @ y) * (x_scale * y_scale)


@BOTH_FORMATS
@pytest.mark.parametrize("case", SHAPES)
def test_integer_products(case: str, fmt: str, tmp_path: Path) -> None:
    left, right = SHAPES[case]
    feed = {"a": random(*left) + np.float32(0.3), "b": random(*right, seed=2)}
    model = make_model([node("MatMul", "a b", "y", name="mix")], {"a": left, "b": right}, {"y": None})
    made = make(model, tmp_path, [feed], fmt, attention="int8")
    assert made.skips == []
    assert made.ran("mix") == ["MatMulIntegerToFloat"]
    wanted = integer_product(made, feed["a"], feed["b"])
    for optimize in (True, False):
        found = made.run(made.compiled, optimize=optimize)["y"]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    signal, noise = feed["a"] @ feed["b"], found - feed["a"] @ feed["b"]
    assert np.square(noise).sum() < 1e-3 * np.square(signal).sum()


@BOTH_FORMATS
def test_largest_codes_do_not_saturate(fmt: str, tmp_path: Path) -> None:
    """Every code of both sides at its extreme: without VNNI, pairs of such products have to fit 16 bits."""
    feed = {"a": np.full((1, 8, 64), 3, np.float32), "b": np.full((1, 64, 8), -2, np.float32)}
    model = make_model([node("MatMul", "a b", "y", name="mix")], {"a": [1, 8, 64], "b": [1, 64, 8]}, {"y": None})
    made = make(model, tmp_path, [feed], fmt, attention="int8")
    np.testing.assert_allclose(made.run(made.compiled)["y"], np.full((1, 8, 8), -384), rtol=0.02)
    codes = np.rint(feed["b"] / made.initializers()["b.s8.scale"])
    assert np.abs(codes).max() <= (64 if HERE.saturates else 128)


def test_the_range_of_a_softmax_needs_no_data(tmp_path: Path) -> None:
    model = make_model([node("Softmax", "x", "p", axis=-1), node("MatMul", "p v", "y", name="mix")],
                       {"x": [2, 8, 8], "v": [2, 8, 4]}, {"y": None})
    made = make(model, tmp_path, [{"x": random(2, 8, 8), "v": random(2, 8, 4)}], attention="int8")
    params = made.plan.activations["p"]
    assert (float(params.scale), int(params.zero_point)) == (pytest.approx(1 / 255), 0)


STAYS: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "read by others, too": ([node("MatMul", "a b", "m", name="mix"), node("Relu", "b", "r"), node("Add", "m r", "y")],
                            {"a": [8, 8], "b": [8, 8]},
                            "what is on its right is read by other nodes, too, and its codes are int8"),
    "by itself": ([node("MatMul", "a a", "y", name="mix")], {"a": [8, 8]},
                  "what is on its right is read by other nodes, too, and its codes are int8"),
    "ranks": ([node("MatMul", "a b", "y", name="mix")], {"a": [2, 8, 8], "b": [8, 8]},
              "what it multiplies are no matrices of one rank"),
    "a vector": ([node("MatMul", "a b", "y", name="mix")], {"a": [8], "b": [8]},
                 "what it multiplies are no matrices of one rank"),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_stays_float(case: str, opened: Opener) -> None:
    nodes, ports, reason = STAYS[case]
    graph = canonical(opened(make_model(nodes, ports, {"y": None})))
    found = outline(graph, replace(recipe(), attention="int8"), HERE).nodes["mix"]
    assert described(found) == f"float: {reason}"


def test_it_is_asked_for(opened: Opener) -> None:
    model = make_model([node("MatMul", "a b", "y", name="mix")], {"a": [8, 8], "b": [8, 8]}, {"y": None})
    graph = canonical(opened(model))
    assert outline(graph, recipe(), HERE).nodes["mix"].scheme == "float"
    assert outline(graph, replace(recipe("w8a8-dynamic"), attention="int8"), HERE).nodes["mix"].scheme == "float"


def test_a_real_encoder(tmp_path: Path) -> None:
    folder = MODELS / "text_encoder"
    report = onnxq.compile(folder / "model.onnx", tmp_path / "out.onnx", calib=folder / "calib.npz",
                           recipe=Recipe(scheme("w8a8"), attention="int8"), eval=folder / "eval.npz", metric="top1",
                           measure=False)
    products = [row for row in report.nodes if "attention: int8" in row.reason]
    assert len(products) >= 2
    assert {row.ran_as for row in products} == {"com.microsoft.MatMulIntegerToFloat"}
    assert report.verdict.failures == []
    assert report.accuracy is not None
    assert report.accuracy.drop is not None
    assert report.accuracy.drop < 0.01
