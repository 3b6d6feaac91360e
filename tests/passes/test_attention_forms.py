"""Rotary embeddings as one operator, and keys and values that query heads share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, Try, apply, make_model, node, random
from lowering_support import CPU, canonical
from onnx import TensorProto

from onnxq.graph import Graph
from onnxq.passes.canonicalize.fold_dims import FoldDims
from onnxq.passes.canonicalize.rotary_embedding import RotaryEmbedding
from onnxq.passes.canonicalize.share_kv_heads import ShareKVHeads
from onnxq.passes.manager import Context

Nodes = list[onnx.NodeProto]
Stored = dict[str, Any]
HEADS = ["B", 3, "S", 8]
ANGLES = np.arange(32)[:, None] / 7.0 ** (np.arange(4) / 4)
WIDE = np.concatenate([ANGLES, ANGLES], 1)
IDS = np.array([[3, 0, 9, 31, 4], [1, 1, 0, 7, 30]])
FEED = {"x": random(2, 3, 5, 8), "p": IDS}
PORTS = {"x": HEADS, "p": (TensorProto.INT64, ["B", "S"])}
NUMBERS = {"one": np.array([1]), "zero": np.array([0]), "last": np.array([-1]), "half": np.array([4]),
           "much": np.array([2**62]), "step": np.array([1]), "size": np.array([8]), "third": np.array([3])}


def ops(graph: Graph) -> list[str]:
    return sorted(n.op for n in graph.nodes)


def of(nodes: Sequence[onnx.NodeProto], stored: Stored, ports: dict[str, Any] | None = None, opset: int = 17,
       ) -> onnx.ModelProto:
    read = {t for n in nodes for t in n.input}
    return make_model(nodes, ports or PORTS, {"y": ["B", 3, None, 8]},
                      {k: v for k, v in {**NUMBERS, **stored}.items() if k in read}, opset)


# ------------------------------------------------------------------ rotary-embedding

TABLES = {"ct": np.cos(WIDE).astype(np.float32), "st": np.sin(WIDE).astype(np.float32)}
LOOKED_UP = [node("Gather", "ct p", "c0"), node("Unsqueeze", "c0 one", "c"),
             node("Gather", "st p", "s0"), node("Unsqueeze", "s0 one", "s")]
SLICED = [node("Slice", "x zero half last", "a"), node("Slice", "x half much last step", "b")]
TURNED = [node("Neg", "b", "n"), node("Concat", "n a", "r", axis=-1), node("Mul", "x c", "d"), node("Mul", "r s", "e"),
          node("Add", "d e", "y")]


def waves(f: str, unsqueezed: bool) -> Nodes:
    """cos(concat(f, f)) and sin of the same, unsqueezed before or after."""
    join = [node("Concat", f"{f} {f}", "ff", axis=-1)]
    if not unsqueezed:
        return [*join, node("Cos", "ff", "c"), node("Sin", "ff", "s")]
    return [*join, node("Cos", "ff", "c0"), node("Sin", "ff", "s0"), node("Unsqueeze", "c0 one", "c"),
            node("Unsqueeze", "s0 one", "s")]


FREQUENCIES = {"w": (1 / 7.0 ** (np.arange(4) / 4)).astype(np.float32)}
COMPUTED = [node("Unsqueeze", "p last", "p1"), node("Cast", "p1", "p2", to=TensorProto.FLOAT),
            node("Mul", "p2 w", "f0")]
PAIRS = {"five": np.array([0, 3, -1, 4, 2]), "four": np.array([0, 3, -1, 8]),
         "ct": np.cos(ANGLES).astype(np.float32), "st": np.sin(ANGLES).astype(np.float32)}
PAIRED = [*LOOKED_UP, node("Reshape", "x five", "z"), node("Split", "z", "z0 z1", axis=-1),
          node("Squeeze", "z0 last", "e"), node("Squeeze", "z1 last", "o"), node("Mul", "e c", "ec"),
          node("Mul", "o s", "os"), node("Mul", "e s", "es"), node("Mul", "c o", "oc"), node("Sub", "ec os", "re"),
          node("Add", "oc es", "im"), node("Unsqueeze", "re last", "re1"), node("Unsqueeze", "im last", "im1"),
          node("Concat", "re1 im1", "j", axis=-1), node("Reshape", "j four", "y")]
ROTARY: dict[str, tuple[Nodes, Stored]] = {
    "tables": ([*LOOKED_UP, *SLICED, *TURNED], TABLES),
    "other order": ([*LOOKED_UP, *SLICED, *TURNED[:2], node("Mul", "c x", "d"), node("Mul", "s r", "e"),
                     node("Add", "e d", "y")], TABLES),
    "split": ([*LOOKED_UP, node("Split", "x", "a b", axis=3), *TURNED], TABLES),
    "computed, unsqueezed before": ([*COMPUTED, node("Unsqueeze", "f0 one", "f"), *waves("f", False), *SLICED, *TURNED],
                                    FREQUENCIES),
    "computed, unsqueezed behind": ([*COMPUTED, *waves("f0", True), *SLICED, *TURNED], FREQUENCIES),
    "pairs": (PAIRED, PAIRS),
}


@pytest.mark.parametrize("case", ROTARY)
def test_rotary_embeddings(case: str, fires: Try) -> None:
    nodes, stored = ROTARY[case]
    graph, skips = fires(of(nodes, stored), RotaryEmbedding(), FEED, CPU)
    assert skips == []
    assert set(ops(graph)).isdisjoint({"Add", "Neg", "Split", "Sub"}), "the small operators are gone"
    rotary = next(n for n in graph.nodes if n.op == "RotaryEmbedding")
    assert (rotary.name, rotary.attrs["interleaved"]) == (nodes[-1].name, int(case == "pairs"))


def embedding(x: str, y: str) -> Nodes:
    """SLICED and TURNED of another tensor, every name with that of the result behind it."""
    return [node("Slice", f"{x} zero half last", f"a{y}"), node("Slice", f"{x} half much last", f"b{y}"),
            node("Neg", f"b{y}", f"n{y}"), node("Concat", f"n{y} a{y}", f"r{y}", axis=-1),
            node("Mul", f"{x} c", f"d{y}"), node("Mul", f"r{y} s", f"e{y}"), node("Add", f"d{y} e{y}", y)]


def test_queries_and_keys_share_their_angles(fires: Try) -> None:
    nodes = [*COMPUTED, *waves("f0", True), *embedding("x", "turned"), *embedding("turned", "y")]
    graph, _ = fires(of(nodes, FREQUENCIES), RotaryEmbedding(), FEED, CPU)
    assert [ops(graph).count(op) for op in ("RotaryEmbedding", "Cos", "Range")] == [2, 1, 1]


OTHERS = {"ct": np.cos(np.concatenate([ANGLES, 2 * ANGLES], 1)).astype(np.float32), "st": TABLES["st"]}
UNEQUAL = [node("Slice", "x zero third last", "a"), node("Slice", "x third much last", "b")]
NO_ROTARY: dict[str, tuple[Nodes, Stored, dict[str, Any], list[str]]] = {
    "halves differ": ([*LOOKED_UP, *SLICED, *TURNED], OTHERS, {}, ["the halves of its cosines or sines differ"]),
    "one row of positions for all": (
        [*LOOKED_UP, *SLICED, *TURNED], TABLES, {"p": IDS[:1]},
        ["its positions are not known to be one per row and token"]),
    "cosines from outside": (
        [*LOOKED_UP[2:], *SLICED, *TURNED], TABLES, {"c": random(2, 1, 5, 8)},
        ["its cosines and sines are no rows of stored tables and not of the same angles"]),
    "unequal parts": ([*LOOKED_UP, *UNEQUAL, *TURNED], TABLES, {}, []),
    "the first half negated": ([*LOOKED_UP, *SLICED, node("Neg", "a", "n"), node("Concat", "n b", "r", axis=-1),
                                *TURNED[2:]], TABLES, {}, []),
}


@pytest.mark.parametrize("case", NO_ROTARY)
def test_what_is_no_rotary_embedding(case: str, leaves: Try) -> None:
    nodes, stored, feed, reasons = NO_ROTARY[case]
    ports = {**PORTS, **{k: ((TensorProto.INT64 if k == "p" else TensorProto.FLOAT), list(v.shape))
                         for k, v in feed.items()}}
    _, skips = leaves(of(nodes, stored, ports), RotaryEmbedding(), {**FEED, **feed}, CPU)
    assert [s[1] for s in skips] == reasons


def test_a_target_without_the_operator_keeps_the_small_ones(leaves: Try) -> None:
    assert leaves(of([*LOOKED_UP, *SLICED, *TURNED], TABLES), RotaryEmbedding(), FEED)[1] == []


def test_bounds_that_are_computed_from_the_shape_are_folded_first(opened: Opener) -> None:
    bounds = [node("Shape", "x", "d4"), node("Gather", "d4 last", "d"), node("Div", "d two", "h")]
    sliced = [node("Slice", "x zero h last", "a"), node("Slice", "x h d last", "b")]
    turned = [node("Neg", "b", "n"), node("Concat", "n a", "r", axis=-1), node("Mul", "x c", "k"),
              node("Mul", "r s", "e"), node("Add", "k e", "y")]
    model = of([*LOOKED_UP, *bounds, *sliced, *turned], {**TABLES, "two": np.array([2])})
    assert ops(canonical(opened(model))) == ["RotaryEmbedding"]


# ------------------------------------------------------------------ fold-dims

SHAPED = {"x": ["B", 3, "S", 8]}


@pytest.mark.parametrize(("inputs", "op", "stored", "attrs", "wanted"), [
    ("d i", "Gather", {"i": np.array(-1)}, {}, 8),
    ("d i", "Gather", {"i": np.array([[1, 3]])}, {}, [[3, 8]]),
    ("d i", "Gather", {"i": np.array(0)}, {"start": 1, "end": 2}, 3),
    ("d i j", "Slice", {"i": np.array([3]), "j": np.array([9])}, {}, [8]),
    ("d i j k l", "Slice", {"i": np.array([-1]), "j": np.array([-9]), "k": np.array([0]), "l": np.array([-2])},
     {}, [8, 3]),
])
def test_fixed_dimensions_of_a_free_shape(inputs: str, op: str, stored: Stored, attrs: dict[str, int], wanted: Any,
                                          opened: Opener) -> None:
    model = make_model([node("Shape", "x", "d", **attrs), node(op, inputs, "e"), node("Identity", "e", "y")], SHAPED,
                       {"y": (TensorProto.INT64, None)}, stored)
    graph = opened(model)
    assert apply(FoldDims(), graph) == (True, [])
    assert [n.op for n in graph.nodes] == ["Identity"]
    assert graph.read(graph.nodes[0].inputs[0]).tolist() == wanted
    assert apply(FoldDims(), graph) == (False, [])


@pytest.mark.parametrize(("nodes", "reasons"), [
    ([node("Shape", "x", "d"), node("Gather", "d i", "e"), node("Identity", "e", "y")], []),
    ([node("Shape", "x", "d"), node("Gather", "d n", "e"), node("Identity", "e", "y")], []),
    ([node("Shape", "x", "d", start=2), node("Gather", "d k", "e"), node("Identity", "e", "y")],
     [("Gather_e", "it reads a dimension that there is not")]),
    ([node("Shape", "x", "d"), node("Gather", "d k", "y")], []),
], ids=["free", "computed index", "out of range", "an output"])
def test_dimensions_that_stay(nodes: Nodes, reasons: list[tuple[str, str]], opened: Opener) -> None:
    ports = {**SHAPED, "n": (TensorProto.INT64, [])}
    graph = opened(make_model(nodes, ports, {"y": (TensorProto.INT64, None)}, {"i": np.array(2), "k": np.array(3)}))
    assert apply(FoldDims(), graph) == (False, reasons)


# ------------------------------------------------------------------ share-kv-heads

ONE = {"q": ["B", 6, "S", 8], "k": ["B", 1, "T", 8]}
TWO = {"q": ["B", 6, "S", 8], "k": ["B", 2, "T", 8]}
KEYS: Callable[[int], dict[str, Any]] = lambda heads: {"q": random(2, 6, 3, 8), "k": random(2, heads, 5, 8)}  # noqa: E731
EXPANDED = [node("Unsqueeze", "k two", "k5"), node("Expand", "k5 e", "x5"), node("Reshape", "x5 r", "kk")]
SWAP = node("Transpose", "kk", "kt", perm=[0, 1, 3, 2])
HEADS_OF = {"two": np.array([2]), "e": np.array([1, 1, 3, 1, 1]), "r": np.array([0, 6, -1, 8]),
            "e1": np.array([1, 6, 1, 1]), "scale": np.float32(0.3)}
SIZES = [node("Shape", "k", "d"), node("Gather", "d i0", "b"), node("Gather", "d i2", "t"),
         node("Concat", "b two three t eight", "e", axis=0), node("Concat", "b six t eight", "r", axis=0)]
COUNTS = {"i0": np.array([0]), "i2": np.array([2]), "two": np.array([2]), "three": np.array([3]),
          "six": np.array([6]), "eight": np.array([8])}
SHARED: dict[str, tuple[Nodes, Stored, int, list[str]]] = {
    "one head, transposed, scaled": (
        [node("Expand", "k e1", "kk"), SWAP, node("MatMul", "q kt", "m"), node("Mul", "m scale", "y")], HEADS_OF, 1,
        ["MatMul", "Mul", "Reshape", "Reshape", "Transpose"]),
    "values of one head": (
        [node("Transpose", "q", "qt", perm=[0, 1, 3, 2]), node("MatMul", "qt q", "w"), node("Expand", "k e1", "kk"),
         SWAP, node("MatMul", "w kt", "y")], HEADS_OF, 1,
        ["MatMul", "MatMul", "Reshape", "Reshape", "Transpose", "Transpose"]),
    "two heads, stored sizes": ([*EXPANDED, SWAP, node("MatMul", "q kt", "y")], HEADS_OF, 2,
                                ["MatMul", "Reshape", "Reshape", "Transpose"]),
    "two heads, scaled before": (
        [*EXPANDED, SWAP, node("Div", "kt scale", "ks"), node("MatMul", "q ks", "y")], HEADS_OF, 2,
        ["Div", "MatMul", "Reshape", "Reshape", "Transpose"]),
    "two heads, computed sizes": ([*SIZES, *EXPANDED, SWAP, node("MatMul", "q kt", "y")], COUNTS, 2,
                                  ["MatMul", "Reshape", "Reshape", "Transpose"]),
}


def shares(nodes: Nodes, stored: Stored, ports: dict[str, Any]) -> onnx.ModelProto:
    read = {t for n in nodes for t in n.input}
    return make_model(nodes, ports, {"y": [None] * 4}, {k: v for k, v in stored.items() if k in read})


@pytest.mark.parametrize("case", SHARED)
def test_heads_that_share_keys(case: str, fires: Try) -> None:
    nodes, stored, heads, wanted = SHARED[case]
    feed = KEYS(heads)
    if case.startswith("values"):
        feed["q"] = random(2, 6, 8, 8)
    graph, skips = fires(shares(nodes, stored, ONE if heads == 1 else TWO), ShareKVHeads(), feed)
    assert (ops(graph), skips) == (wanted, [])


OTHER_REPEATS: dict[str, tuple[Nodes, Stored, dict[str, Any], list[str]]] = {
    "rows, too": ([node("Expand", "k e2", "kk"), SWAP, node("MatMul", "q kt", "y")],
                  {"e2": np.array([2, 6, 1, 1])}, {"q": ["B", 6, "S", 8], "k": ["B", 1, "T", 8]}, []),
    "whole heads one after the other": (
        [node("Unsqueeze", "k one", "k5"), node("Expand", "k5 e", "x5"), node("Reshape", "x5 r", "kk"), SWAP,
         node("MatMul", "q kt", "y")], {"one": np.array([1]), "e": np.array([1, 3, 1, 1, 1]), "r": HEADS_OF["r"]},
        TWO, []),
    "queries of an unknown number of heads": (
        [*EXPANDED, SWAP, node("MatMul", "q kt", "y")], HEADS_OF, {**TWO, "q": ["B", "H", "S", 8]},
        ["what it multiplies is not known to have 6 heads"]),
    "nothing repeated": ([node("Expand", "k e3", "kk"), SWAP, node("MatMul", "q kt", "y")],
                         {"e3": np.array([1, 1, 1, 1])}, {"q": ["B", 6, "S", 8], "k": ["B", 1, "T", 8]}, []),
}


@pytest.mark.parametrize("case", OTHER_REPEATS)
def test_repeats_that_stay(case: str, leaves: Try) -> None:
    nodes, stored, ports, reasons = OTHER_REPEATS[case]
    feed = KEYS(2 if ports["k"][1] == 2 else 1)
    _, skips = leaves(shares(nodes, stored, ports), ShareKVHeads(), feed)
    assert [s[1] for s in skips] == reasons


def test_the_names_of_a_pass_hold_on_the_target(opened: Opener) -> None:
    graph = opened(of([*LOOKED_UP, *SLICED, *TURNED], TABLES))
    context = Context(CPU)
    apply(RotaryEmbedding(), graph, context)
    assert [n.domain for n in graph.nodes] == ["com.microsoft"]
    assert sorted(t.name for t in graph.nodes[0].inputs[2:]) == ["ct.half", "st.half"]
