"""The pass that packs weights: what it packs, what it leaves, and that it keeps to the memory it may take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, apply, assert_same, make_model, node, random, run, text
from packing_support import CONTRIB, SHAPE, examples, grouped, odd, reader

from onnxq.graph import Graph, constants
from onnxq.graph.decoders import PACKED
from onnxq.numerics.encoding_choice import BASE
from onnxq.passes.manager import Context
from onnxq.passes.pack import pack
from onnxq.passes.pack.weights import ANYHOW, PackWeights

EXAMPLES = examples()
PLENTY = 10**9


def packed(graph: Graph) -> dict[str, tuple[str, ...]]:
    """Weight -> encodings, by what the pass says."""
    context = Context()
    edited, _ = apply(PackWeights(PLENTY), graph, context)
    found = {w.name: w.encodings for w in context.packing.weights}
    assert edited is bool(found)
    assert len([n for n in graph.nodes if n.domain == PACKED]) == sum(len(names) for names in found.values())
    return found


def large(values: np.ndarray[Any, Any], times: int = 12) -> np.ndarray[Any, Any]:
    """Enough of it that a decoder, which each file holds once, pays."""
    return np.concatenate([values] * times, axis=0)


def product(weights: dict[str, np.ndarray[Any, Any]], opset: int = 21) -> onnx.ModelProto:
    """x times each of the int8 weights [K, N]."""
    rows = len(next(iter(weights.values())))
    nodes = [node("DynamicQuantizeMatMul", f"x {w} scale", f"{w}_y", domain="com.microsoft") for w in weights]
    return make_model(nodes, {"x": ["N", rows]}, {f"{w}_y": ["N", v.shape[1]] for w, v in weights.items()},
                      {**weights, "scale": np.float32(0.1)}, opset, CONTRIB, 10)


@pytest.mark.parametrize(("example", "names"), [
    ("exceptions", ("Exceptions", "Planes_4")),
    ("planes-6", ("Planes_6",)),
    ("bitmap", ("Bitmap",)),
    ("groups", ("Groups_2_4_3",)),
    ("groups-rows", ("Bitmap",)),  # 4:8 takes a byte for eight, too, and a transpose
    ("codebook-2-int8", ("Codebook_2",)),
])
def test_packs_by_size(example: str, names: tuple[str, ...], opened: Opener, written: Callable[[Graph], Path]) -> None:
    model = product({"w": large(EXAMPLES[example].weight)})
    graph = opened(model)
    assert packed(graph) == {"w": names}
    feed = {"x": random(2, 12 * SHAPE[0])}
    assert_same(run(written(graph), feed), run(model, feed))


def test_a_second_run_and_a_copy(opened: Opener, written: Callable[[Graph], Path]) -> None:
    graph = opened(product({"w": large(EXAMPLES["exceptions"].weight)}))
    assert packed(graph)
    twin, before = graph.copy(), text(graph)
    assert apply(PackWeights(PLENTY), graph)[0] is False
    assert text(graph) == before
    assert written(twin).read_bytes() == written(graph).read_bytes()


def test_leaves_what_does_not_gain(opened: Opener) -> None:
    """Codes that use all their bits, small weights, other types, graph outputs, and a decoder that takes more than it
    saves."""
    rng = np.random.default_rng(0)
    wide = rng.integers(-128, 128, (960, 40)).astype(np.int8)
    assert packed(opened(product({"w": wide}))) == {}
    assert packed(opened(product({"w": EXAMPLES["exceptions"].weight[:40]}))) == {}
    assert packed(opened(product({"w": EXAMPLES["planes-6"].weight}))) == {}, "its table is larger than what it saves"
    gathered = make_model([node("Gather", "table x", "y")], {"x": (onnx.TensorProto.INT64, [2])}, {"y": None},
                          {"table": np.zeros((960, 40), np.int64)}, 21)
    assert packed(opened(gathered)) == {}
    shown = make_model([node("Add", "x w", "y")], {"x": [960, 40]}, {"y": None, "w": [960, 40]},
                       {"w": odd(large(EXAMPLES["bitmap"].weight, 10))}, 21)
    assert packed(opened(shown)) == {}


def test_leaves_graphs_of_old_opsets(opened: Opener) -> None:
    assert packed(opened(product({"w": large(EXAMPLES["exceptions"].weight)}, opset=20))) == {}


def test_leaves_a_weight_whose_names_are_taken(opened: Opener) -> None:
    weight = large(EXAMPLES["exceptions"].weight).astype(np.int8)
    model = product({"w": weight, "w.dense": weight[:, ::-1].copy(), "w.low": weight})
    found = packed(opened(model))
    assert "w" not in found
    assert set(found) == {"w.dense", "w.low"}


def test_what_is_told(opened: Opener) -> None:
    context, weight = Context(), large(EXAMPLES["exceptions"].weight)
    graph = opened(product({"w": weight, "v": np.random.default_rng(0).integers(-128, 128, weight.shape, np.int8)}))
    apply(PackWeights(PLENTY), graph, context)
    told = context.packing
    [row] = told.weights
    assert row.zeros == pytest.approx(np.mean(weight == 0))
    assert (row.shape, row.dense_bytes) == (weight.shape, weight.nbytes)
    assert 0.5 * weight.nbytes < row.packed_bytes < 0.6 * weight.nbytes
    assert told.limit == PLENTY
    assert told.dense_peak == BASE + 4 * weight.nbytes
    assert told.peak == told.fewest_peak > told.dense_peak
    assert told.packed_bytes == told.fewest_bytes
    assert row.packed_bytes + weight.nbytes < told.packed_bytes < 2 * weight.nbytes


def test_keeps_to_the_memory(opened: Opener) -> None:
    """Less of it, larger files: with none to spare everything stays dense, and 4 bits come before a bitmap."""
    few = grouped(EXAMPLES["exceptions"].weight, (5, 8))
    weights = {f"w{k}": large(few) for k in range(4)}
    dense = 4 * weights["w0"].nbytes
    sizes, names = [], []
    for room in (2.0, 3.0, 5.0, 30.0):
        context = Context()
        apply(PackWeights(int(BASE + room * dense)), opened(product(weights)), context)
        assert context.packing.peak <= context.packing.limit
        sizes.append(context.packing.packed_bytes)
        names.append({row.encodings for row in context.packing.weights})
    assert sizes[0] == dense
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
    assert names[0] == set()
    assert not any(part == "Bitmap" for row in names[1] | names[2] for part in row)
    assert names[3] == {("Bitmap", "Exceptions", "Planes_4")}


def test_the_default_memory(opened: Opener) -> None:
    """2.5 times what dense weights take, twice their bytes, or 16 MB if that is more."""
    context = Context()
    apply(PackWeights(), opened(product({"w": large(EXAMPLES["exceptions"].weight)})), context)
    assert context.packing.limit == BASE + ANYHOW
    context, much = Context(), large(EXAMPLES["exceptions"].weight, 1200)
    apply(PackWeights(), opened(product({"w": much})), context)
    assert context.packing.limit == BASE + 5 * much.nbytes > BASE + ANYHOW
    assert [row.encodings for row in context.packing.weights] == [("Exceptions", "Planes_4")]


def test_a_decoder_that_several_weights_share_pays(opened: Opener) -> None:
    """For one weight a bitmap's decoder takes more than it saves over no packing, for ten of them less."""
    weight = EXAMPLES["bitmap"].weight
    assert packed(opened(product({"w": weight}))) == {"w": ("Exceptions", "Filled")}
    assert set(packed(opened(product({f"w{k}": weight for k in range(10)}))).values()) == {("Bitmap",)}


def test_the_stage() -> None:
    assert [step.name for step in pack()] == ["pack-codes", "pack-multiples", "pack-weights"]
    assert [step.name for step in pack(weights=False)] == ["pack-codes", "pack-multiples"]
    assert pack(load_memory=7)[-1] == PackWeights(7)


def test_float_weights(opened: Opener) -> None:
    model = reader(odd(EXAMPLES["bitmap"].weight) * np.float32(1.1))
    assert packed(opened(model)) in ({"w": ("FloatBitmap",)}, {"w": ("Codebook_8",)}, {"w": ("Exceptions", "Filled")})
    assert [t.name for t in constants(opened(model))] == ["w"]
