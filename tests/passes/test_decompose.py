"""Operators that a provider lacks, in those that it has: the same outputs, and none of the old ones left."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import Opener, Try, apply, body, make_model, node, random
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from onnxq.graph import Graph
from onnxq.passes.decompose import decompose
from onnxq.passes.decompose.parts import full_name
from onnxq.passes.decompose.scale_first import ScaleFirst
from onnxq.passes.decompose.spell_out_activations import SpellOutActivations
from onnxq.passes.decompose.spell_out_attention import SpellOutAttention
from onnxq.passes.decompose.spell_out_einsum import SpellOutEinsum
from onnxq.passes.decompose.spell_out_group_norm import SpellOutGroupNorm
from onnxq.passes.decompose.spell_out_gru import SpellOutGru
from onnxq.passes.decompose.spell_out_norms import SpellOutNorms
from onnxq.passes.decompose.spell_out_rotary import SpellOutRotary
from onnxq.passes.decompose.spell_out_simple import SpellOutSimple
from onnxq.passes.lower.to_half import ToHalf
from onnxq.passes.manager import Context, Pass, PassManager
from onnxq.planner import composites
from onnxq.targets import TARGETS

MS = "com.microsoft"
X = random(2, 5, 12) * np.float32(3)


def names(graph: Graph) -> set[str]:
    return {full_name(n) for n, _ in graph.walk()}


def of(item: onnx.NodeProto, stored: dict[str, Any], shape: list[Any] | None = None, opset: int = 23,
       outputs: dict[str, Any] | None = None) -> onnx.ModelProto:
    domains = {MS: 1} if item.domain else {}
    shape = shape or ["n", 5, 12]
    return make_model([item], {"x": shape}, outputs or {"y": [None] * len(shape)}, stored, opset, domains, 10)


ROW, OTHER, LAST = random(12), random(12, seed=1), random(12, seed=2)


# ------------------------------------------------------------------ normalisations


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize(("attrs", "shape"), [
    ({}, (12,)), ({"axis": 1, "epsilon": 0.1}, (5, 12)), ({"axis": -2}, (5, 1))])
@pytest.mark.parametrize("shifted", [False, True], ids=["scale", "scale and B"])
def test_layer_normalization(opset: int, attrs: dict[str, Any], shape: tuple[int, ...], shifted: bool,
                             fires: Try) -> None:
    stored = {"g": random(*shape), **({"b": random(*shape, seed=1)} if shifted else {})}
    model = of(node("LayerNormalization", "x g b" if shifted else "x g", "y", **attrs), stored, opset=opset)
    graph, skips = fires(model, SpellOutNorms(), {"x": X})
    assert (skips, names(graph) & set(SpellOutNorms.known)) == ([], set())
    assert set(composites.find(graph).values()) == {"LayerNorm"}


def test_rms_normalization(fires: Try) -> None:
    graph, _ = fires(of(node("RMSNormalization", "x g", "y", epsilon=0.01), {"g": ROW}), SpellOutNorms(), {"x": X})
    assert set(composites.find(graph).values()) == {"RMSNorm"}
    assert len(composites.find(graph)) == len(graph.nodes)


@pytest.mark.parametrize(("op", "read"), [
    ("SkipLayerNormalization", "x s g"), ("SkipLayerNormalization", "x s g b"), ("SkipLayerNormalization", "x s g b c"),
    ("SkipLayerNormalization", "x s g _ c"), ("SkipSimplifiedLayerNormalization", "x s g"),
    ("SkipSimplifiedLayerNormalization", "x s g c")])
@pytest.mark.parametrize("total", [False, True])
def test_normalisations_of_a_sum(op: str, read: str, total: bool, fires: Try) -> None:
    stored = {"s": random(1, 5, 12, seed=3), "g": ROW, "b": OTHER, "c": LAST}
    stored = {k: v for k, v in stored.items() if k in read.split()}
    stored["s"] = np.repeat(stored["s"], 2, axis=0)
    model = of(node(op, read, "y _ _ t" if total else "y", domain=MS), stored, [2, 5, 12],
               outputs={"y": [2, 5, 12], **({"t": [2, 5, 12]} if total else {})})
    graph, skips = fires(model, SpellOutNorms(), {"x": X})
    assert (skips, any(n.startswith(MS) for n in names(graph))) == ([], False)


def test_a_mean_that_is_read_keeps_its_normalisation(leaves: Try) -> None:
    model = of(node("LayerNormalization", "x g", "y m", name="norm"), {"g": ROW},
               outputs={"y": ["n", 5, 12], "m": ["n", 5, 1]})
    _, skips = leaves(model, SpellOutNorms(), {"x": X})
    assert skips == [("norm", "its mean or deviation is read, too")]


def test_half_normalisations_stay(leaves: Try) -> None:
    model = make_model([node("LayerNormalization", "x g", "y", name="norm")], {"x": (TensorProto.FLOAT16, [2, 12])},
                       {"y": (TensorProto.FLOAT16, [2, 12])}, {"g": ROW.astype(np.float16)})
    _, skips = leaves(model, SpellOutNorms(), {"x": X[0, :2].astype(np.float16)})
    assert skips == [("norm", "what it normalises is not known to be float32, or its rank is not")]


IMAGE = random(2, 6, 3, 5)
GROUPED = {18: {"s": random(3), "b": random(3, seed=1)}, 21: {"s": random(6), "b": random(6, seed=1)}}


@pytest.mark.parametrize("opset", [18, 21])
@pytest.mark.parametrize("free", [[], ["w"], ["h", "w"]], ids=len)
def test_group_normalization(opset: int, free: list[str], fires: Try) -> None:
    shape = ["n", 6, 3, 5][:4 - len(free)] + free
    graph, _ = fires(of(node("GroupNormalization", "x s b", "y", num_groups=3, epsilon=0.01), GROUPED[opset], shape,
                        opset), SpellOutGroupNorm(), {"x": IMAGE})
    assert names(graph) == {"InstanceNormalization", "Reshape", "Mul", "Add", *(["Shape"] if len(free) > 1 else [])}


def test_computed_scales_of_groups(fires: Try) -> None:
    model = make_model([node("Neg", "s", "t"), node("GroupNormalization", "x t b", "y", num_groups=3)],
                       {"x": [2, 6, 3, 5], "s": [6]}, {"y": [2, 6, 3, 5]}, {"b": random(6)}, 21)
    fires(model, SpellOutGroupNorm(), {"x": IMAGE, "s": random(6)})


def test_computed_scales_of_whole_groups_stay(opened: Opener) -> None:
    model = make_model([node("Neg", "s", "t"), node("GroupNormalization", "x t b", "y", name="norm", num_groups=3)],
                       {"x": [2, 6, 3, 5], "s": [3]}, {"y": [2, 6, 3, 5]}, {"b": random(3)}, 18)
    assert apply(SpellOutGroupNorm(), opened(model)) == (False, [("norm", "its scale or bias is computed")])


# ------------------------------------------------------------------ activations


@pytest.mark.parametrize("item", [
    node("Gelu", "x", "y"), node("Gelu", "x", "y", approximate="tanh"), node("Mish", "x", "y"),
    node("HardSwish", "x", "y"), node("Gelu", "x", "y", domain=MS), node("FastGelu", "x", "y", domain=MS),
    node("FastGelu", "x b", "y", domain=MS), node("BiasGelu", "x b", "y", domain=MS),
    node("QuickGelu", "x", "y", domain=MS), node("QuickGelu", "x", "y", domain=MS, alpha=2.0)],
    ids=lambda n: f"{n.domain}{n.op_type}{len(n.input)}{len(n.attribute)}")
def test_activations(item: onnx.NodeProto, fires: Try) -> None:
    graph, skips = fires(of(item, {"b": ROW} if len(item.input) > 1 else {}, outputs={"y": ["n", 5, 12]}),
                         SpellOutActivations(), {"x": X})
    assert (skips, names(graph) & set(SpellOutActivations.known)) == ([], set())
    if "Gelu" in item.op_type and "Quick" not in item.op_type:
        assert "Gelu" in composites.find(graph).values()


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_swish(alpha: float, opened: Opener) -> None:
    graph = opened(make_model([node("Swish", "x", "y", alpha=alpha)], {"x": [4]}, {"y": [4]}, opset=24, ir_version=10))
    assert apply(SpellOutActivations(), graph) == (True, [])
    assert [n.op for n in graph.nodes] == (["Sigmoid", "Mul"] if alpha == 1 else ["Mul", "Sigmoid", "Mul"])


# ------------------------------------------------------------------ Einsum

PRODUCTS = ["bij,bjk->bik", "ij,jk->ik", "ij,kj", "bhqd,bhkd->bhqk", "bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd",
            "bthd,hdm->btm", "btm,mhd->bthd", "bij,bj->bi", "bi,bi->b", "bi,bj->bij", "bi,bi->bi", "...ij,...jk->...ik",
            "...ij,jk", "abc,cd->dab", "ij,ij->"]
SIZES = dict(zip("abcdhijkmqt", (2, 3, 4, 5, 2, 3, 4, 6, 7, 4, 3), strict=True))


def operands(equation: str) -> list[np.ndarray[Any, Any]]:
    return [random(*(n for c in term.replace("...", "ab") for n in [SIZES[c]]), seed=k)
            for k, term in enumerate(equation.partition("->")[0].split(","))]


@pytest.mark.parametrize("equation", PRODUCTS)
def test_einsum_of_two(equation: str, fires: Try) -> None:
    given = operands(equation)
    model = make_model([node("Einsum", "p q", "y", equation=equation)],
                       {"p": list(given[0].shape), "q": list(given[1].shape)},
                       {"y": list(np.einsum(equation, *given).shape)})
    graph, _ = fires(model, SpellOutEinsum(), {"p": given[0], "q": given[1]})
    assert "MatMul" in names(graph) <= {"MatMul", "Transpose", "Reshape"}


@pytest.mark.parametrize("equation", ["ij->ji", "b...->...b", "...ij->...ji"])
def test_einsum_of_one(equation: str, fires: Try) -> None:
    (given,) = operands(equation)
    model = make_model([node("Einsum", "p", "y", equation=equation)], {"p": list(given.shape)},
                       {"y": list(np.einsum(equation, given).shape)})
    assert names(fires(model, SpellOutEinsum(), {"p": given})[0]) == {"Transpose"}


def test_einsum_of_free_axes(fires: Try) -> None:
    """Batch and one of the merged sizes may be free."""
    p, q = operands("bthd,hdm->btm")
    model = make_model([node("Einsum", "p q", "y", equation="bthd,hdm->btm")],
                       {"p": ["n", "t", *p.shape[2:]], "q": list(q.shape)}, {"y": ["n", "t", q.shape[2]]})
    fires(model, SpellOutEinsum(), {"p": p, "q": q})


@pytest.mark.parametrize(("equation", "reason"), [
    ("ii->i", "'ii->i' names an axis twice, or its axes are not known"),
    ("ij->i", "'ij->i' is no product of two matrices"),
    ("ij,jk->i", "'ij,jk->i' is no product of two matrices"),
    ("ij,jk,ki->ij", "'ij,jk,ki->ij' is no product of two matrices")])
def test_other_einsums_stay(equation: str, reason: str, opened: Opener) -> None:
    terms = equation.partition("->")[0].split(",")
    ports = {f"p{k}": [SIZES["i"]] * len(term) for k, term in enumerate(terms)}
    graph = opened(make_model([node("Einsum", " ".join(ports), "y", name="sum", equation=equation)], ports,
                              {"y": [None] * len(equation.partition(">")[2])}))
    assert apply(SpellOutEinsum(), graph) == (False, [("sum", reason)])


def test_einsum_of_unknown_sizes_stays(opened: Opener) -> None:
    graph = opened(make_model([node("Einsum", "p q", "y", name="sum", equation="btm,mhd->bthd")],
                              {"p": ["b", "t", "m"], "q": ["m", "h", "d"]}, {"y": [None] * 4}))
    assert apply(SpellOutEinsum(), graph) == (False, [("sum", "more than one size that it merges is not known")])


# ------------------------------------------------------------------ rotary embeddings

POSITIONS = np.asarray([[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]])
TABLES = {"c": np.cos(random(8, 3)), "s": np.sin(random(8, 3))}


@pytest.mark.parametrize("pairs", [0, 1], ids=["halves", "pairs"])
@pytest.mark.parametrize(("shape", "attrs"), [
    ([2, 2, 5, 6], {}), ([2, 5, 12], {}), ([2, 5, 12], {"num_heads": 2}),
    ([2, 5, 16], {"num_heads": 2, "rotary_embedding_dim": 6})], ids=["heads apart", "flat", "flat, told", "a part"])
def test_rotary_embedding_of_the_runtime(pairs: int, shape: list[int], attrs: dict[str, int], fires: Try) -> None:
    item = node("RotaryEmbedding", "x p c s", "y", domain=MS, interleaved=pairs, **attrs)
    model = make_model([item], {"x": shape, "p": (TensorProto.INT64, [2, 5])}, {"y": shape}, TABLES, domains={MS: 1})
    graph, _ = fires(model, SpellOutRotary(), {"x": random(*shape), "p": POSITIONS})
    assert not any(n.startswith(MS) for n in names(graph))


@pytest.mark.parametrize("pairs", [0, 1], ids=["halves", "pairs"])
@pytest.mark.parametrize(("shape", "attrs"), [([2, 2, 5, 6], {}), ([2, 2, 5, 8], {"rotary_embedding_dim": 6}),
                                              ([2, 5, 12], {"num_heads": 2})])
@pytest.mark.parametrize("rows", [False, True], ids=["positions", "rows"])
def test_rotary_embedding_of_onnx(pairs: int, shape: list[int], attrs: dict[str, int], rows: bool, fires: Try) -> None:
    item = node("RotaryEmbedding", "x c s" if rows else "x c s p", "y", interleaved=pairs, **attrs)
    tables = {k: v[POSITIONS] for k, v in TABLES.items()} if rows else TABLES
    ports: dict[str, Any] = {"x": shape} if rows else {"x": shape, "p": (TensorProto.INT64, [2, 5])}
    feed = {"x": random(*shape), **({} if rows else {"p": POSITIONS})}
    fires(make_model([item], ports, {"y": shape}, tables, 23, ir_version=10), SpellOutRotary(), feed)


# ------------------------------------------------------------------ attention

FLAT = {"q_num_heads": 4, "kv_num_heads": 2}


def attention(inputs: str, outputs: str = "y", flat: bool = False, kv: int = 2, mask: Any = None, rows: int = 5,
              **attrs: Any) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """q of 4 heads of 6 and 3 rows, k and v of kv heads and 5 rows, 2 in the past."""
    feed = {"q": random(2, 4, 3, 6), "k": random(2, kv, rows, 6, seed=1), "v": random(2, kv, rows, 6, seed=2),
            "m": mask, "pk": random(2, kv, 2, 6, seed=3), "pv": random(2, kv, 2, 6, seed=4)}
    shapes = {"y": [2, 4, 3, 6], "nk": [2, kv, rows + 2, 6], "nv": [2, kv, rows + 2, 6]}
    if flat:
        feed |= {k: feed[k].transpose(0, 2, 1, 3).reshape(2, feed[k].shape[2], -1) for k in "qkv"}
        shapes["y"] = [2, 3, 24]
    feed = {k: v for k, v in feed.items() if k in inputs.split()}
    ports = {k: (TensorProto.BOOL if v.dtype == bool else TensorProto.FLOAT, ["n", *v.shape[1:]] if k in "qkv" else
                 list(v.shape)) for k, v in feed.items()}
    item = node("Attention", inputs, outputs, "attention", **(FLAT if flat else {}), **attrs)
    return make_model([item], ports, {k: s for k, s in shapes.items() if k in outputs.split()}, opset=23,
                      ir_version=10), feed


SEEN = np.tri(3, 5, 2, dtype=bool)


@pytest.mark.parametrize("flat", [False, True], ids=["heads apart", "flat"])
@pytest.mark.parametrize("case", [
    {"inputs": "q k v"}, {"inputs": "q k v", "scale": 0.5}, {"inputs": "q k v m", "mask": SEEN},
    {"inputs": "q k v m", "mask": random(2, 1, 3, 5)}, {"inputs": "q k v", "rows": 3, "is_causal": 1},
    {"inputs": "q k v _ pk pv", "outputs": "y nk nv"}, {"inputs": "q k v m pk pv", "outputs": "y nk nv",
                                                        "mask": np.tri(3, 7, 4, dtype=bool)}],
    ids=["plain", "scaled", "hidden", "masked", "causal", "with a past", "hidden with a past"])
def test_attention(case: dict[str, Any], flat: bool, fires: Try) -> None:
    model, feed = attention(**case, flat=flat)
    graph, skips = fires(model, SpellOutAttention(), feed)
    assert (skips, "Attention" in names(graph)) == ([], False)


def test_attention_with_a_key_for_each_head(fires: Try) -> None:
    model, feed = attention("q k v", kv=4)
    assert "Expand" not in names(fires(model, SpellOutAttention(), feed)[0])


@pytest.mark.parametrize(("case", "reason"), [
    ({"inputs": "q k v", "softcap": 9.0}, "it caps scores, or its sequences have lengths of their own"),
    ({"inputs": "q k v", "is_causal": 1}, "what each row may see depends on sizes that are not known, or on a past")])
def test_other_attentions_stay(case: dict[str, Any], reason: str, opened: Opener) -> None:
    assert apply(SpellOutAttention(), opened(attention(**case)[0])) == (False, [("attention", reason)])


# ------------------------------------------------------------------ scaled products

NPU = TARGETS["cann"]


def scaled(item: onnx.NodeProto, c: float, opset: int = 17) -> onnx.ModelProto:
    return make_model([node("MatMul", "q k", "s", "product"), item, node("Softmax", "y", "z")],
                      {"q": [2, 3, 6], "k": [2, 6, 5]}, {"y": [2, 3, 5], "z": [2, 3, 5]}, {"c": np.float32(c)}, opset)


QK = {"q": random(2, 3, 6), "k": random(2, 6, 5)}


@pytest.mark.parametrize(("item", "c"), [(node("Mul", "s c", "y"), 0.3), (node("Mul", "c s", "y"), -0.3),
                                         (node("Div", "s c", "y"), 7.0)], ids=["Mul", "Mul from the left", "Div"])
def test_products_are_scaled_first(item: onnx.NodeProto, c: float, fires: Try) -> None:
    graph, _ = fires(scaled(item, c), ScaleFirst(), QK, NPU)
    assert [n.op for n in graph.nodes] == ["Mul", "MatMul", "Softmax"]


def test_a_second_scale_stays_behind(fires: Try) -> None:
    model = scaled(node("Mul", "s c", "t"), 0.3)
    model.graph.node.insert(2, node("Mul", "t c", "y"))
    graph, _ = fires(model, ScaleFirst(), QK, NPU)  # a second run, which sees the second scale, edits nothing
    assert [n.op for n in graph.nodes] == ["Mul", "MatMul", "Mul", "Softmax"]


def test_scores_that_float16_does_not_hold(opened: Opener, written: Any) -> None:
    """q k of 90000 at a scale of 1/10: infinite in between, were it not scaled first."""
    model = scaled(node("Mul", "s c", "y"), 0.1)
    feed = {"q": np.full((2, 3, 6), 150, np.float32), "k": np.full((2, 6, 5), 100, np.float32)}
    for steps, finite in (([ScaleFirst(), ToHalf()], True), ([ToHalf()], False)):
        graph = opened(model)
        PassManager(steps).run(graph, Context(NPU))
        with np.errstate(over="ignore", invalid="ignore"):
            found = ReferenceEvaluator(str(written(graph))).run(["y"], feed)[0]
        assert bool(np.all(np.isfinite(found))) is finite


@pytest.mark.parametrize(("item", "c", "reasons"), [
    (node("Mul", "s c", "y"), 3.0, [("product", "it is not scaled down")]),
    (node("Div", "s c", "y"), 0.3, [("product", "it is not scaled down")]), (node("Div", "c s", "y"), 7.0, []),
    (node("Add", "s c", "y"), 0.3, []), (node("Mul", "s c", "y"), 0.0, [])],
    ids=["up", "up by Div", "inverse", "Add", "0"])
def test_other_products_stay(item: onnx.NodeProto, c: float, reasons: list[tuple[str, str]], leaves: Try) -> None:
    assert leaves(scaled(item, c), ScaleFirst(), QK, NPU)[1] == reasons


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_products_stay_where_nothing_overflows(target: str, leaves: Try) -> None:
    leaves(scaled(node("Mul", "s c", "y"), 0.3), ScaleFirst(), QK, TARGETS[target])


# ------------------------------------------------------------------ GRU


def gru(direction: str, late: int, inputs: str, outputs: str = "y last", steps: Any = 5,
        **attrs: Any) -> onnx.ModelProto:
    many = 2 if direction == "bidirectional" else 1
    stored = {"w": random(many, 12, 3), "r": random(many, 12, 4, seed=1), "b": random(many, 24, seed=2)}
    ports: dict[str, Any] = {"x": [steps, "n", 3], "h": [many, "n", 4], "l": (TensorProto.INT32, ["n"])}
    shapes = {"y": [steps, many, "n", 4], "last": [many, "n", 4]}
    item = node("GRU", inputs, outputs, "gru", hidden_size=4, direction=direction, linear_before_reset=late, **attrs)
    return make_model([item], {k: p for k, p in ports.items() if k in inputs.split()},
                      {k: p for k, p in shapes.items() if k in outputs.split()},
                      {k: v for k, v in stored.items() if k in inputs.split()})


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("inputs", ["x w r", "x w r b", "x w r b _ h", "x w r _ _ h"])
def test_recurrent_units(direction: str, late: int, inputs: str, fires: Try) -> None:
    many = 2 if direction == "bidirectional" else 1
    feed = {"x": random(5, 2, 3), **({"h": random(many, 2, 4)} if "h" in inputs else {})}
    graph, skips = fires(gru(direction, late, inputs), SpellOutGru(), feed)
    assert (skips, "GRU" in names(graph)) == ([], False)


@pytest.mark.parametrize("outputs", ["y", "_ last"])
def test_recurrent_units_with_one_result(outputs: str, fires: Try) -> None:
    fires(gru("forward", 0, "x w r b", outputs), SpellOutGru(), {"x": random(5, 2, 3)})


@pytest.mark.parametrize(("changes", "reason"), [
    ({"clip": 1.0}, "it clips, or has activations of its own"),
    ({"activations": ["Tanh", "Tanh"]}, "it clips, or has activations of its own"),
    ({"inputs": "x w r b l"}, "its batch comes first, or its sequences have lengths of their own"),
    ({"steps": "s"}, "it is not known to be float32 of 1 to 128 steps"),
    ({"steps": 129}, "it is not known to be float32 of 1 to 128 steps")])
def test_other_recurrent_units_stay(changes: dict[str, Any], reason: str, opened: Opener) -> None:
    model = gru("forward", 0, **{"inputs": "x w r b", **changes})
    assert apply(SpellOutGru(), opened(model)) == (False, [("gru", reason)])


# ------------------------------------------------------------------ others

ODD = np.asarray([[1.5, np.nan, np.inf], [-np.inf, 0, -2]], np.float32)


@pytest.mark.parametrize(("item", "stored"), [
    (node("IsNaN", "x", "y"), {}), (node("IsInf", "x", "y"), {}), (node("IsInf", "x", "y", detect_negative=0), {}),
    (node("IsInf", "x", "y", detect_positive=0), {})], ids=["nan", "inf", "+inf", "-inf"])
def test_odd_numbers(item: onnx.NodeProto, stored: dict[str, Any], fires: Try) -> None:
    graph, _ = fires(of(item, stored, [2, 3], outputs={"y": (TensorProto.BOOL, [2, 3])}), SpellOutSimple(), {"x": ODD})
    assert names(graph) <= {"Equal", "Not", "Or"}


@pytest.mark.parametrize("upper", [0, 1])
@pytest.mark.parametrize("k", [None, 0, 1, -2, 9, -9])
def test_triangles(upper: int, k: int | None, fires: Try) -> None:
    item = node("Trilu", "x" if k is None else "x k", "y", upper=upper)
    graph, _ = fires(of(item, {} if k is None else {"k": np.int64(k)}), SpellOutSimple(), {"x": X})
    assert names(graph) == {"Where"}


def test_triangles_of_unknown_size_stay(leaves: Try) -> None:
    _, skips = leaves(of(node("Trilu", "x", "y", name="tri"), {}, ["n", "m", 12]), SpellOutSimple(), {"x": X})
    assert skips == [("tri", "its type, the size of its matrices or its diagonal is not known")]


def test_tangent_and_cast_like(fires: Try) -> None:
    model = make_model([node("Tan", "x", "t"), node("CastLike", "t k", "y")], {"x": [2, 5, 12]},
                       {"y": (TensorProto.DOUBLE, [2, 5, 12])}, {"k": np.float64(1)})
    graph, _ = fires(model, SpellOutSimple(), {"x": X / np.float32(8)})
    assert names(graph) == {"Sin", "Cos", "Div", "Cast"}


def test_nodes_in_bodies_too(fires: Try) -> None:
    then = body([node("Gelu", "x", "a")], {"a": None}, "then")
    other = body([node("LayerNormalization", "x g", "b")], {"b": None}, "other")
    model = make_model([node("If", "c", "y", then_branch=then, else_branch=other)],
                       {"x": [2, 5, 12], "c": (TensorProto.BOOL, [])}, {"y": [2, 5, 12]}, {"g": ROW}, 20)
    for step in (SpellOutActivations(), SpellOutNorms()):
        fires(model, step, {"x": X, "c": np.asarray(step.name == "spell-out-activations")})


def test_only_what_is_lacking_is_replaced(opened: Opener) -> None:
    steps: list[Pass] = decompose(frozenset({"Gelu", "Swish", "Mish", "HardSwish", "Einsum", "GroupNormalization"}))
    assert str(steps[2]) == (
        "spell-out-activations(operators=('com.microsoft.BiasGelu', 'com.microsoft.FastGelu', 'com.microsoft.Gelu', "
        "'com.microsoft.QuickGelu'))")
    assert "spell-out-einsum" not in {s.name for s in steps}
    graph = opened(of(node("Gelu", "x", "y"), {}))
    assert apply(steps[2], graph) == (False, [])
    assert apply(SpellOutActivations(), graph)[0] is True


def test_the_runtime_still_fuses_a_normalisation(opened: Opener, written: Any, tmp_path: Any) -> None:
    graph = opened(of(node("LayerNormalization", "x g b", "y"), {"g": ROW, "b": OTHER}, opset=17))
    apply(SpellOutNorms(), graph)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(written(graph)), options, providers=["CPUExecutionProvider"])
    assert [n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node] == ["LayerNormalization"]
