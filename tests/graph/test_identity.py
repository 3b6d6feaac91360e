"""Identities of weights: the same as long as nothing changed, another as soon as something did."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Opener, make_model, node, random

from onnxq.graph import Graph, identity, load, save, widen


def two(values: Any, other: Any = None) -> Any:
    """w and v, by default of the same values."""
    other = values if other is None else other
    return make_model([node("Identity", "w", "y"), node("Identity", "v", "z")], {},
                      {"y": list(values.shape), "z": list(other.shape)}, {"w": values, "v": other})


def of(graph: Graph) -> list[str | None]:
    return [identity(graph, n.inputs[0]) for n in graph.nodes]


def outside(model: Any, folder: Path, opened: Opener) -> Path:
    folder.mkdir()
    save(opened(model), folder / "m.onnx", external_above=0)
    return folder / "m.onnx"


def test_of_external_data(tmp_path: Path, opened: Opener) -> None:
    path = outside(two(random(300, 400)), tmp_path / "a", opened)
    w, v = of(load(path))
    assert w != v, "equal values at two places are two weights: they aren't read"
    assert of(load(path)) == [w, v]
    path.rename(path.with_name("renamed.onnx"))
    path.parent.rename(tmp_path / "moved")
    assert of(load(tmp_path / "moved" / "renamed.onnx")) == [w, v]
    graph = load(tmp_path / "moved" / "renamed.onnx")
    assert of(graph.copy()) == [w, v]


@pytest.mark.parametrize("at", [0, 300 * 400 * 4 - 1])
def test_of_external_data_that_changed(tmp_path: Path, opened: Opener, at: int) -> None:
    """By its bytes even if the file claims to be as old as before, and by its age even if no sample changed."""
    path = outside(two(random(300, 400)), tmp_path / "a", opened)
    data, before = path.with_name("m.onnx.data"), of(load(path))
    told = data.stat()
    os.utime(data, ns=(told.st_atime_ns, told.st_mtime_ns + 1_000_000_000))
    assert of(load(path))[0] != before[0]
    with data.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(data, ns=(told.st_atime_ns, told.st_mtime_ns))
    after = of(load(path))
    assert (after[0] != before[0], after[1] == before[1]) == (True, True)


def test_type_and_shape_count(opened: Opener) -> None:
    graph = opened(two(random(30, 40), random(30, 40).reshape(40, 30)))
    w, v = of(graph)
    assert w != v
    half = opened(make_model([node("Identity", "w", "y")], {}, {"y": None}, {"w": random(30, 40).astype(np.float16)}))
    before = of(half)
    widen(half.nodes[0].inputs[0])
    assert of(half) != before


def test_of_what_is_in_the_model_or_in_memory(opened: Opener) -> None:
    changed = random(30, 40).copy()
    changed[29, 39] += 1
    graph = opened(two(random(30, 40), changed))
    w, v = of(graph)
    assert w != v
    assert w == identity(graph, graph.constant("c", random(30, 40)))
    texts = [identity(graph, graph.constant(f"s{k}", np.array(["a", k], object))) for k in "bc"]
    assert texts[0] != texts[1]


def test_computed_values_have_none(opened: Opener) -> None:
    graph = opened(two(random(30, 40)))
    assert identity(graph, graph.computed("c", np.float32, (1,), lambda: np.zeros(1, np.float32))) is None
