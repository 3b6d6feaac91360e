"""Constants whose values are computed as they are saved: what is written, how often, and that nothing is kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from conftest import Opener, assert_same, body, make_model, node, random, run
from onnx import TensorProto, numpy_helper

from onnxq.errors import GraphError
from onnxq.graph import Graph, Shared, alone, dtype_of, is_constant, save, shape_of, weight_bytes, widen

WEIGHT = random(30, 40)


class Counter:
    """A computation that counts how often it ran and knows whether a result of it is still alive."""

    def __init__(self, values: Any) -> None:
        self.values, self.calls, self.last = values, 0, None

    def __call__(self) -> Any:
        self.calls += 1
        found = np.array(self.values)
        self.last = weakref.ref(found)
        return found


def product(opened: Opener) -> Graph:
    """x [2, 30] -> y [2, 40] by a stored weight, which the tests replace."""
    zeros = np.zeros_like(WEIGHT)
    return opened(make_model([node("MatMul", "x w", "y")], {"x": [2, 30]}, {"y": [2, 40]}, {"w": zeros}))


def test_what_is_known_without_computing(opened: Opener) -> None:
    graph, compute = product(opened), Counter(WEIGHT)
    tensor = graph.computed("c", np.float32, (30, 40), compute)
    graph.replace_input(graph.nodes[0], 1, tensor)
    assert (dtype_of(tensor), shape_of(tensor), is_constant(tensor)) == (np.float32, (30, 40), True)
    assert weight_bytes(graph) == 4800
    assert graph.made("c") is tensor
    assert graph.check() == []
    assert compute.calls == 0
    with pytest.raises(GraphError, match="'c' exists already"):
        graph.computed("c", np.float32, (1,), compute)


def test_each_reading_computes_and_nothing_is_kept(opened: Opener) -> None:
    graph, compute = product(opened), Counter(WEIGHT)
    tensor = graph.computed("c", np.float32, (30, 40), compute)
    for calls in (1, 2):
        np.testing.assert_array_equal(graph.read(tensor), WEIGHT)
        assert (compute.calls, compute.last()) == (calls, None)


@pytest.mark.parametrize("external_above", [0, 10**9])
def test_saved(opened: Opener, tmp_path: Path, external_above: int) -> None:
    graph, compute = product(opened), Counter(WEIGHT)
    graph.replace_input(graph.nodes[0], 1, graph.computed("c", np.float32, (30, 40), compute))
    twin = graph.copy()
    for index, one in enumerate((graph, twin)):
        path = tmp_path / f"{index}.onnx"
        save(one, path, external_above=external_above)
        assert (compute.calls, compute.last()) == (index + 1, None), "computed once, kept nowhere"
        assert path.with_name(f"{index}.onnx.data").exists() is (external_above == 0)
        onnx.checker.check_model(str(path), full_check=True)
        feed = {"x": random(2, 30)}
        np.testing.assert_allclose(run(path, feed)["y"], feed["x"] @ WEIGHT, rtol=1e-5, atol=1e-5)


def test_small_ones_stay_in_the_model(opened: Opener, tmp_path: Path) -> None:
    graph = opened(make_model([node("Add", "x b", "y")], {"x": [4]}, {"y": [4]}, {"b": random(4)}))
    tensor = graph.computed("c", np.float32, (4,), lambda: np.arange(4, dtype=np.float32))
    graph.replace_input(graph.nodes[0], 1, tensor)
    save(graph, tmp_path / "m.onnx", external_above=0)
    assert_same(run(tmp_path / "m.onnx", {"x": np.ones(4, np.float32)}), {"y": np.float32([1, 2, 3, 4])})


@pytest.mark.parametrize(("values", "found"), [
    (random(40, 30), r"float32 \[40, 30\]"), (WEIGHT.astype(np.float64), r"float64 \[30, 40\]")])
def test_values_other_than_promised(opened: Opener, tmp_path: Path, values: Any, found: str) -> None:
    graph = product(opened)
    tensor = graph.computed("c", np.float32, (30, 40), lambda: values)
    graph.replace_input(graph.nodes[0], 1, tensor)
    message = f"'c' was computed as {found} in place of float32 " + r"\[30, 40\]"
    with pytest.raises(GraphError, match=message):
        graph.read(tensor)
    with pytest.raises(GraphError, match=message):
        save(graph, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_computed_halves_that_are_widened(opened: Opener, tmp_path: Path) -> None:
    graph = product(opened)
    half = WEIGHT.astype(np.float16)
    tensor = graph.computed("c", np.float16, half.shape, lambda: half)
    widen(tensor)
    assert dtype_of(tensor) == np.float32
    np.testing.assert_array_equal(graph.read(tensor), half.astype(np.float32), strict=True)
    graph.replace_input(graph.nodes[0], 1, tensor)
    for limit in (0, 10**9):
        save(graph, tmp_path / "m.onnx", external_above=limit)
        stored = onnx.load(tmp_path / "m.onnx").graph.initializer[0]
        np.testing.assert_array_equal(numpy_helper.to_array(stored), half.astype(np.float32), strict=True)


def test_in_bodies(opened: Opener, tmp_path: Path) -> None:
    """Read by both branches it is stored once, in the main graph, and computed once."""
    branch = body([node("MatMul", "x w", "r")], {"r": [2, 40]})
    graph = opened(make_model([node("If", "c", "y", then_branch=branch, else_branch=branch)],
                              {"c": (TensorProto.BOOL, []), "x": [2, 30]}, {"y": [2, 40]}, {"w": WEIGHT}))
    compute = Counter(2 * WEIGHT)
    tensor = graph.computed("w2", np.float32, (30, 40), compute)
    for _, inner in graph.subgraphs():
        inner.replace_input(inner.nodes[0], 1, tensor)
    for limit in (0, 10**9):
        compute.calls = 0
        save(graph, tmp_path / "m.onnx", external_above=limit)
        assert compute.calls == 1
        for flag in (True, False):
            feed = {"c": np.array(flag), "x": random(2, 30)}
            wanted = feed["x"] @ (2 * WEIGHT)
            np.testing.assert_allclose(run(tmp_path / "m.onnx", feed)["y"], wanted, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ below a byte

SMALL: dict[str, tuple[int, int]] = {"int4": (-8, 7), "uint4": (0, 15), "int2": (-2, 1), "uint2": (0, 3)}


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (33, 131)])
@pytest.mark.parametrize("external_above", [0, 10**9])
@pytest.mark.parametrize("how", ["constant", "computed"])
def test_sub_byte_values(tmp_path: Path, kind: str, shape: tuple[int, ...], external_above: int, how: str) -> None:
    """Values in all orders of nibbles, odd numbers of them too, as onnx itself reads them back."""
    low, high = SMALL[kind]
    values = np.random.default_rng(3).integers(low, high + 1, shape).astype(getattr(ml_dtypes, kind))
    graph = alone("Identity", [np.zeros(1, np.float32)], [np.float32])
    graph.outputs[0].shape = [1]
    graph.ir.opset = 25
    if how == "constant":
        tensor = graph.constant("w", values)
    else:
        tensor = graph.computed("w", values.dtype, values.shape, lambda: values)
    assert (dtype_of(tensor), shape_of(tensor)) == (values.dtype, shape)
    np.testing.assert_array_equal(graph.read(tensor), values, strict=True)
    graph.add_cast("cast", tensor, graph.variable("f", np.float32, shape))
    graph.ir.outputs.append(graph.made("f"))
    bits = 4 if kind.endswith("4") else 2
    size = -(-values.size * bits // 8)
    assert weight_bytes(graph) == size
    path = tmp_path / "m.onnx"
    save(graph, path, external_above=external_above)
    onnx.checker.check_model(str(path), full_check=True)
    assert path.with_name("m.onnx.data").exists() is (external_above == 0)
    stored = onnx.load(path).graph.initializer[0]
    assert len(stored.raw_data) == size
    np.testing.assert_array_equal(numpy_helper.to_array(stored), values, strict=True)
    np.testing.assert_array_equal(run(path, {"x0": np.zeros(1, np.float32)})["f"], values.astype(np.float32))


def test_sub_byte_values_in_bodies(opened: Opener, written: Callable[[Graph], Path]) -> None:
    branch = body([node("Cast", "i", "f", to=1), node("Mul", "x f", "r")], {"r": [3]}, "b", {"i": np.int8([1, 2, 3])})
    graph = opened(make_model([node("If", "c", "y", then_branch=branch, else_branch=branch)],
                              {"c": (TensorProto.BOOL, []), "x": [3]}, {"y": [3]}, opset=21, ir_version=9))
    for number, (_, inner) in enumerate(graph.subgraphs()):
        # the attributes of a node are sorted: else_branch comes first
        codes = inner.constant(f"w{number}", np.array([-8, 7, number], ml_dtypes.int4))
        inner.replace_input(inner.nodes[0], 0, codes)
    path = written(graph.copy())
    assert onnx.load(path).ir_version == 10, "the first with int4"
    for flag, last in ((False, 0), (True, 1)):
        feed = {"c": np.array(flag), "x": np.ones(3, np.float32)}
        np.testing.assert_array_equal(run(path, feed)["y"], np.float32([-8, 7, last]))


# ------------------------------------------------------------------ several from one computation


def pair(number: int) -> list[Any]:
    return [np.full(3, number), np.full(2, -number)]


def test_parts_taken_together_cost_one_computation() -> None:
    calls: list[int] = []
    shared = Shared()
    of = {n: shared.parts(lambda n=n: calls.append(n) or pair(n), 2) for n in (1, 2)}
    for number in (1, 2, 1):
        for index, part in enumerate(of[number]):
            np.testing.assert_array_equal(part(), pair(number)[index])
    assert calls == [1, 2, 1]


def test_parts_in_any_order_are_right() -> None:
    calls: list[int] = []
    shared = Shared()
    (a, b), (c, d) = (shared.parts(lambda n=n: calls.append(n) or pair(n), 2) for n in (1, 2))
    for part, wanted in ((a, 1), (a, 1), (c, 2), (b, -1), (d, -2), (d, -2), (c, 2)):
        assert part()[0] == wanted
    assert calls == [1, 2, 1, 2]


def test_one_result_is_held_at_most_and_none_at_the_end() -> None:
    shared = Shared()
    codes, scales = Counter(random(5)), Counter(random(3))
    others: list[bool] = []

    def second() -> list[Any]:
        others.append(codes.last() is None)
        return [np.zeros(1)]

    take, rest = shared.parts(lambda: [codes(), scales()], 2)
    (other,) = shared.parts(second, 1)
    take()
    assert codes.last() is not None, "held for the scales"
    other()
    assert others == [True], "what is held goes before the next is computed"
    take()
    rest()
    assert (codes.last(), scales.last()) == (None, None)


def test_a_computation_that_fails_leaves_nothing_behind() -> None:
    shared = Shared()
    attempts: list[int] = []

    def fails_once() -> list[Any]:
        attempts.append(1)
        if len(attempts) == 1:
            raise MemoryError
        return pair(7)

    first, second = shared.parts(fails_once, 2)
    with pytest.raises(MemoryError):
        first()
    assert (first()[0], second()[0], len(attempts)) == (7, -7, 2)
