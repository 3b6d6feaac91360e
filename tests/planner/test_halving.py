"""What stays float32 in a float16 graph: what overflows or loses digits otherwise, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, apply, body, make_model, node, random, run
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from onnxq.graph import Graph
from onnxq.passes.lower.to_half import ToHalf
from onnxq.passes.manager import Context
from onnxq.plan import Plan
from onnxq.planner import halving

Written = Callable[[Graph], Path]
Nodes = list[onnx.NodeProto]
F, I64 = TensorProto.FLOAT, TensorProto.INT64
SCALARS = {"two": np.float32(2), "eps": np.float32(1e-5), "one": np.float32(1), "half": np.float32(0.5),
           "axes": np.int64([-1]), "tiny": np.float32(1e-12), "huge": np.float32(3e38)}
VECTORS = {name: random(16, seed=k) for k, name in enumerate(("g", "b", "g2", "b2"))}


def of(nodes: Nodes, ports: dict[str, Any] | None = None, outputs: dict[str, Any] | None = None,
       stored: dict[str, Any] | None = None, opset: int = 17) -> onnx.ModelProto:
    read = {t for n in nodes for t in n.input}
    known = {k: v for k, v in {**SCALARS, **VECTORS, **(stored or {})}.items() if k in read}
    return make_model(nodes, ports or {"x": ["n", 16]}, outputs or {"y": None}, known, opset)


def wide(opened: Opener, nodes: Nodes, *, keep_ports: bool = True, ranges: dict[str, tuple[float, float]] | None = None,
         **rest: Any) -> dict[str, str]:
    return halving.decide(opened(of(nodes, **rest)), ranges, keep_ports)[0]


def stepwise(path: Path, feed: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The output as onnx's reference gives it, which rounds to float16 after each node; onnxruntime's CPU provider
    doesn't round between nodes that it computes in float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(ReferenceEvaluator(str(path)).run(["y"], feed)[0])


def halved(graph: Graph, keep_ports: bool = True) -> Graph:
    plan = Plan("", "")
    plan.wide, plan.limits = halving.decide(graph, None, keep_ports)
    apply(ToHalf(keep_ports), graph, Context(plan=plan))
    return graph


# ------------------------------------------------------------------ normalisations

RMS = [node("Relu", "x", "h"), node("Pow", "h two", "s"), node("ReduceMean", "s", "m", axes=[-1]),
       node("Add", "m eps", "a"), node("Sqrt", "a", "r"), node("Div", "h r", "d"), node("Mul", "d g", "y")]
LAYER = [node("Relu", "x", "h"), node("ReduceMean", "h", "u", axes=[-1]), node("Sub", "h u", "c"),
         node("Pow", "c two", "s"), node("ReduceMean", "s", "m", axes=[-1]), node("Add", "m eps", "a"),
         node("Sqrt", "a", "r"), node("Div", "c r", "d"), node("Mul", "d g", "e"), node("Add", "e b", "y")]


def test_large_inputs_of_a_norm_do_not_overflow(opened: Opener, written: Written) -> None:
    """Squares of 300 to 3000 pass 65504; the result is as exact as float16 (11 binary digits) stores it."""
    x = np.abs(random(4, 16)) * np.float32(900) + np.float32(300)
    for nodes in (RMS, LAYER):
        model = of(nodes, outputs={"y": ["n", 16]})
        found, wanted = stepwise(written(halved(opened(model))), {"x": x}), run(model, {"x": x})["y"]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=4 * 2.0**-11 * float(np.abs(wanted).max()))
        naive = opened(model)
        apply(ToHalf(), naive)
        assert not np.allclose(stepwise(written(naive), {"x": x}), wanted, rtol=0, atol=0.1)


def test_norms_stay_float32_up_to_their_scale(opened: Opener) -> None:
    reason = "part of a {}, whose squares pass float16's range"
    assert wide(opened, RMS) == dict.fromkeys((n.name for n in RMS[1:-1]), reason.format("RMSNorm"))
    assert wide(opened, LAYER) == dict.fromkeys((n.name for n in LAYER[1:-2]), reason.format("LayerNorm"))


ALSO = {"nobody": [], "a second norm": [node(n.op_type, " ".join(f"{t}2" if t in "ucsmardegb" else t for t in n.input),
                                             f"{n.output[0]}2", **{a.name: onnx.helper.get_attribute_value(a)
                                                                   for a in n.attribute}) for n in LAYER[1:]],
        "a half node": [node("Neg", "h", "y2")], "a wide node": [node("CumSum", "h axis", "y2")]}


@pytest.mark.parametrize("also", ALSO)
@pytest.mark.parametrize("source", ["a node", "a wide node", "a Cast from float16", "an input",
                                    "an input that may be half"])
@pytest.mark.parametrize("listed", [False, True], ids=["", "as an output"])
def test_the_runtime_takes_every_layer_norm(also: str, source: str, listed: bool, opened: Opener,
                                            written: Written) -> None:
    """Whether or not what is normalised is cast for it alone, scale and shift have the type of what is fused."""
    first = {"a node": [node("Relu", "x", "h")], "a wide node": [node("CumSum", "x axis", "h")],
             "a Cast from float16": [node("Cast", "x", "h", to=F)]}.get(source, [])
    port = "x" if first else "h"
    nodes = [*first, *LAYER[1:], *ALSO[also]]
    outputs = {"y": ["n", 16], **({"y2": ["n", 16]} if ALSO[also] else {}), **({"h": ["n", 16]} if listed else {})}
    model = of(nodes, {port: (TensorProto.FLOAT16 if "float16" in source else F, ["n", 16])}, outputs,
               {"axis": np.int64(-1)})
    may_change = source.endswith("be half")
    path = written(halved(opened(model), not may_change))
    x = random(4, 16).astype(np.float16)
    found = run(path, {port: x if may_change or "float16" in source else x.astype(np.float32)}, optimize=True)
    wanted = run(model, {port: x if "float16" in source else x.astype(np.float32)})
    for name, right in wanted.items():
        np.testing.assert_allclose(found[name], right, rtol=0, atol=8 * 2.0**-11 * float(np.abs(right).max()))


def test_a_norm_without_what_could_be_fused_ends_in_float32(opened: Opener) -> None:
    """x * s + (beta - mean * s) with s = gamma / deviation."""
    nodes = [node("ReduceMean", "h", "u", axes=[-1]), node("Sub", "h u", "c"), node("Mul", "c c", "s"),
             node("ReduceMean", "s", "m", axes=[-1]), node("Add", "m eps", "a"), node("Sqrt", "a", "r"),
             node("Reciprocal", "r", "i"), node("Mul", "i g", "f"), node("Mul", "h f", "p"), node("Mul", "u f", "q"),
             node("Sub", "b q", "t"), node("Add", "p t", "y")]
    found = wide(opened, [node("Relu", "x", "h"), *nodes])
    assert set(found) == {n.name for n in nodes}


# ------------------------------------------------------------------ other regions


def test_roots_of_squares(opened: Opener) -> None:
    """A magnitude: from the squares to the root."""
    nodes = [node("Pow", "x two", "p"), node("Neg", "x", "n"), node("Mul", "n n", "q"), node("Add", "p q", "s"),
             node("Sqrt", "s", "r"), node("Relu", "r", "y")]
    assert set(wide(opened, nodes)) == {"Pow_p", "Mul_q", "Add_s", "Sqrt_r"}


def test_roots_of_other_numbers_do_not(opened: Opener) -> None:
    assert wide(opened, [node("Abs", "x", "a"), node("Sqrt", "a", "y")]) == {}


SOFTMAX = [node("ReduceMax", "x", "t", axes=[-1]), node("Sub", "x t", "s"), node("Exp", "s", "e"),
           node("ReduceSum", "e axes", "z"), node("Div", "e z", "y")]


@pytest.mark.parametrize(("nodes", "members"), [
    (SOFTMAX, ["e", "z", "y"]),
    ([node("Neg", "x", "s"), node("Exp", "s", "e"), node("Add", "e one", "z"), node("Reciprocal", "z", "y")],
     ["e", "z", "y"]),
    ([node("Exp", "x", "e"), node("Add", "e one", "z"), node("Log", "z", "y")], ["e", "z", "y"]),
    ([node("Exp", "x", "e"), node("Mul", "e g", "y")], [])], ids=["softmax", "sigmoid", "softplus", "alone"])
def test_exponentials_that_are_summed(nodes: Nodes, members: list[str], opened: Opener) -> None:
    found = wide(opened, nodes)
    assert {n.split("_")[1] for n in found} == set(members)
    assert set(found.values()) <= {"part of a sum of exponentials, which pass float16's range"}


def test_large_exponentials_have_a_logarithm(opened: Opener, written: Written) -> None:
    """log(1 + exp(20)) = 20; exp(20) is 4.9e8."""
    nodes = [node("Exp", "x", "e"), node("Add", "e one", "z"), node("Log", "z", "y")]
    graph = halved(opened(of(nodes, outputs={"y": ["n", 16]})))
    np.testing.assert_allclose(stepwise(written(graph), {"x": np.full((1, 16), 20, np.float32)}), 20, rtol=2.0**-10)


ANGLES = [node("Cast", "i", "f", to=F), node("Unsqueeze", "f axes", "c"), node("MatMul", "c w", "p"),
          node("Concat", "p p", "d", axis=-1), node("Cos", "d", "t"), node("Mul", "x t", "y")]


def test_angles_of_positions(opened: Opener, written: Written) -> None:
    """At position 5003, which float16 has not, the angle is right."""
    model = of(ANGLES, {"i": (I64, [1, 2]), "x": [1, 2, 16]}, {"y": [1, 2, 16]},
               {"w": (1 / 10 ** np.arange(8, dtype=np.float32))[None]})
    graph = opened(model)
    reason = "part of angles that follow from whole numbers, of which float16 has few"
    assert halving.decide(graph)[0] == dict.fromkeys((n.name for n in ANGLES[:-1]), reason)
    feed = {"i": np.asarray([[4097, 5003]]), "x": np.ones((1, 2, 16), np.float32)}
    np.testing.assert_allclose(run(written(halved(graph)), feed)["y"], run(model, feed)["y"], atol=2.0**-10)


def test_angles_of_other_numbers_do_not(opened: Opener) -> None:
    nodes = [node("MatMul", "x w", "h"), node("Sin", "h", "t"), node("MatMul", "t w", "y")]
    assert wide(opened, nodes, stored={"w": random(16, 16)}) == {}


def test_whole_numbers_from_whole_numbers(opened: Opener) -> None:
    """Buckets of relative positions; a fake quantization of what a layer makes is none."""
    nodes = [node("Cast", "i", "f", to=F), node("Log", "f", "l"), node("Mul", "l two", "m"),
             node("Cast", "m", "o", to=I64)]
    found = wide(opened, nodes, ports={"i": (I64, [3])}, outputs={"o": (I64, [3])})
    assert set(found) == {n.name for n in nodes}
    nodes = [node("Cast", "i", "f", to=F), node("Less", "f two", "o")]
    found = wide(opened, nodes, ports={"i": (I64, [3])}, outputs={"o": (TensorProto.BOOL, [3])})
    assert set(found) == {n.name for n in nodes}
    nodes = [node("MatMul", "x w", "h"), node("Mul", "h two", "m"), node("Round", "m", "r"),
             node("Cast", "r", "o", to=TensorProto.INT8)]
    assert wide(opened, nodes, outputs={"o": (TensorProto.INT8, ["n", 16])}, stored={"w": random(16, 16)}) == {}


# ------------------------------------------------------------------ single nodes


@pytest.mark.parametrize(("item", "reason"), [
    (node("CumSum", "x axis", "y"), "adds up in the type of what it reads"),
    (node("ReduceL2", "x", "y"), "adds up powers, which pass float16's range"),
    (node("ReduceSumSquare", "x", "y"), "adds up powers, which pass float16's range"),
    (node("ReduceSum", "x axes", "y", keepdims=1), None), (node("ReduceMean", "x", "y"), None),
    (node("Softmax", "x", "y"), None), (node("LayerNormalization", "x g b", "y"), None),
    (node("ReduceMax", "x", "y"), None)],
    ids=lambda n: n.op_type if isinstance(n, onnx.NodeProto) else "")
def test_sums(item: onnx.NodeProto, reason: str | None, opened: Opener) -> None:
    found = wide(opened, [item], outputs={"y": ["n", 1]}, stored={"axis": np.int64(-1)})
    assert found == ({item.name: reason} if reason else {})


@pytest.mark.parametrize(("shape", "fits"), [(["n", 64], True), (["n", 65], False), (["n", "m"], False)])
def test_sums_of_few_fit(shape: list[Any], fits: bool, opened: Opener) -> None:
    found = wide(opened, [node("ReduceSum", "x axes", "y")], ports={"x": shape}, outputs={"y": ["n", 1]})
    assert found == ({} if fits else {"ReduceSum_y": "its sums may pass float16's range"})


def test_sums_whose_range_is_known(opened: Opener) -> None:
    nodes, ports = [node("ReduceSum", "x axes", "y")], {"x": ["n", 1000]}
    assert wide(opened, nodes, ports=ports, outputs={"y": ["n", 1]}, ranges={"y": (-9000.0, 9.0)}) == {}
    assert "ReduceSum_y" in wide(opened, nodes, ports=ports, outputs={"y": ["n", 1]}, ranges={"y": (-17000.0, 9.0)})


def test_large_tensors_and_who_reads_them(opened: Opener) -> None:
    """Through what hands numbers on, to who reads them there."""
    nodes = [node("Mul", "x g", "h"), node("Reshape", "h to", "s"), node("Mul", "s half", "t"), node("Neg", "t", "y")]
    found = wide(opened, nodes, ranges={"h": (-1.0, 40000.0), "t": (0.0, 9.0)}, stored={"to": np.int64([-1])},
                 outputs={"y": [None]})
    reads = "reads numbers that come near the end of float16's range"
    assert found == {"Mul_h": "makes numbers that come near the end of float16's range", "Reshape_s": reads,
                     "Mul_t": reads}


def test_operators_without_float16(opened: Opener) -> None:
    nodes = [node("Neg", "a", "b"), node("Range", "b one one", "r"), node("Odd", "r", "y", domain="odd")]
    model = of(nodes, {"a": []}, {"y": [None]})
    model.opset_import.add(domain="odd", version=1)
    assert halving.decide(opened(model))[0] == {"Range_r": "Range takes no float16 at opset 17",
                                                "Odd_y": "Odd takes no float16"}


def test_between_float32_nothing_is_cast(opened: Opener) -> None:
    nodes = [node("CumSum", "x axis", "c"), node("Reshape", "c to", "r"), node("Transpose", "r", "t", perm=[1, 0]),
             node("CumSum", "t axis", "d"), node("Transpose", "d", "y", perm=[1, 0])]
    found = wide(opened, nodes, stored={"axis": np.int64(-1), "to": np.int64([-1, 16])}, outputs={"y": [None, None]})
    assert {n: w for n, w in found.items() if "CumSum" not in n} == dict.fromkeys(
        ("Reshape_r", "Transpose_t"), "between nodes that stay float32")


def test_bodies_are_looked_at(opened: Opener) -> None:
    then = body([node("CumSum", "x axis", "a")], {"a": None}, "then", {"axis": np.int64(-1)})
    other = body([node("Neg", "x", "b")], {"b": None}, "other")
    model = make_model([node("If", "c", "y", then_branch=then, else_branch=other)],
                       {"x": [2, 3], "c": (TensorProto.BOOL, [])}, {"y": [2, 3]})
    assert set(halving.decide(opened(model))[0]) == {"CumSum_a"}


# ------------------------------------------------------------------ constants


def masked(fill: float, *, second: bool = False) -> onnx.ModelProto:
    """Softmax of scores with a mask that is added, or with two."""
    nodes = [node("Where", "m zero fill", "w"), node("Add", "x w", "a"),
             *([node("Add", "a w", "a2")] if second else []), node("Softmax", "a2" if second else "a", "y", axis=-1)]
    return make_model(nodes, {"x": [2, 16], "m": (TensorProto.BOOL, [2, 16])}, {"y": [2, 16]},
                      {"zero": np.float32(0), "fill": np.float32(fill)})


@pytest.mark.parametrize("fill", [-3.4e38, -1e9, -1e5])
@pytest.mark.parametrize("second", [False, True], ids=["a mask", "two masks"])
def test_rows_that_a_mask_hides_are_numbers(fill: float, second: bool, opened: Opener, written: Written) -> None:
    """Row 0 is hidden, all scores there below 0: as in float32, it is some distribution; row 1 is what it was."""
    model = masked(fill, second=second)
    graph = opened(model)
    assert halving.decide(graph) == ({}, {"fill": 32752.0})
    mask = np.zeros((2, 16), bool)
    mask[1, :5] = True
    x = -np.abs(random(2, 16)) * np.float32(40)
    path = written(halved(graph))
    found = run(path, {"x": x, "m": mask})["y"]
    assert np.all(np.isfinite(found))
    assert np.all(np.isfinite(stepwise(path, {"x": x, "m": mask})))
    np.testing.assert_allclose(found.sum(-1), 1, atol=16 * 2.0**-12)
    np.testing.assert_allclose(found[1], run(model, {"x": x, "m": mask})["y"][1], atol=0.02)  # scores of 100 +- 1/32
    assert not found[1, 5:].any()


def test_fills_that_are_compared_are_the_end(opened: Opener) -> None:
    nodes = [node("Max", "x low", "m"), node("Clip", "m _ huge", "y")]
    assert halving.decide(opened(of(nodes, stored={"low": np.float32(-3e38)}))) == (
        {}, {"low": 65504.0, "huge": 65504.0})


def test_infinity_needs_no_limit(opened: Opener) -> None:
    nodes = [node("Add", "x low", "y")]
    assert halving.decide(opened(of(nodes, stored={"low": np.float32([-np.inf, 0] * 8)}))) == ({}, {})


@pytest.mark.parametrize(("item", "stored", "reason"), [
    (node("MatMul", "x w", "y"), np.full((16, 16), -7e4, np.float32), "a constant of it passes float16's range"),
    (node("Mul", "x w", "y"), np.full(16, 7e4, np.float32), "a constant of it passes float16's range"),
    (node("Max", "x w", "y"), np.float32(1e-12), "a constant of it has too few digits in float16"),
    (node("Mul", "x w", "y"), np.full(16, 1e-5, np.float32), "a constant of it has too few digits in float16"),
    (node("Mul", "x w", "y"), np.float32([1e-5] * 8 + [1] * 8), None),
    (node("Mul", "x w", "y"), np.zeros(16, np.float32), None)],
    ids=["large weights", "a large factor", "an epsilon", "small factors", "some small ones", "zeros"])
def test_constants_that_do_not_fit(item: onnx.NodeProto, stored: Any, reason: str | None, opened: Opener) -> None:
    found = wide(opened, [item], outputs={"y": ["n", 16]}, stored={"w": stored})
    assert found == ({item.name: reason} if reason else {})


def test_a_mean_of_nothing_is_no_division_by_zero(opened: Opener, written: Written) -> None:
    """The number of tokens, 0 in row 1, is raised to 1e-9, which float16 has not."""
    nodes = [node("Mul", "x m", "h"), node("ReduceSum", "h axes", "s"), node("ReduceSum", "m axes", "n"),
             node("Max", "n tiny", "c"), node("Expand", "c to", "d"), node("Div", "s d", "y")]
    model = of(nodes, {"x": [2, 16], "m": [2, 16]}, {"y": [2, 1]}, {"to": np.int64([2, 1])})
    graph = opened(model)
    assert halving.decide(graph)[0] == {
        "Max_c": "a constant of it has too few digits in float16",
        **dict.fromkeys(("Expand_d", "Div_y"), "divides by what may be too small for float16")}
    feed = {"x": random(2, 16), "m": np.float32([[1] * 9 + [0] * 7, [0] * 16])}
    np.testing.assert_allclose(stepwise(written(halved(graph)), feed), run(model, feed)["y"], atol=1e-3)


def test_constants_are_read_in_blocks(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large one, too, the last row counts; scales of codes are not read at all."""
    values = np.ones((9, 16), np.float32)
    values[8, 15] = 7e4
    monkeypatch.setattr(halving, "_ROWS", 32)
    nodes = [node("Gather", "w i", "h"), node("DequantizeLinear", "q s", "d", axis=1), node("MatMul", "h d", "y")]
    graph = opened(of(nodes, {"i": (I64, ["n"])}, {"y": ["n", 16]},
                      {"w": values, "q": np.ones((16, 16), np.int8), "s": np.full(16, 1e-6, np.float32)}, 21))
    assert halving.decide(graph) == ({"Gather_h": "a constant of it passes float16's range"}, {})


def test_computed_constants_are_computed_once(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halving, "_ROWS", 32)
    made = []
    graph = opened(of([node("MatMul", "x w", "y")], stored={"w": random(16, 16)}, outputs={"y": ["n", 16]}))

    def compute() -> np.ndarray[Any, Any]:
        made.append("v")
        return np.full((16, 16), 7e4, np.float32)

    graph.replace_input(graph.nodes[0], 1, graph.computed("v", np.float32, (16, 16), compute))
    assert halving.decide(graph) == ({"MatMul_y": "a constant of it passes float16's range"}, {})
    assert made == ["v"]


def test_older_plans_load(tmp_path: Path) -> None:
    plan = Plan("w4a16", "cuda")
    plan.save(tmp_path)
    path = tmp_path / "plan.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    del told["wide"], told["limits"]
    path.write_text(json.dumps(told), encoding="utf-8")
    assert Plan.load(tmp_path).digest() == plan.digest()


def test_a_plan_keeps_it(tmp_path: Path) -> None:
    plan = Plan("w4a16", "cuda", wide={"a": "so"}, limits={"b": 32752.0})
    plan.save(tmp_path)
    assert (Plan.load(tmp_path).wide, Plan.load(tmp_path).limits) == ({"a": "so"}, {"b": 32752.0})
    assert len({p.digest() for p in (plan, Plan("w4a16", "cuda"), Plan("w4a16", "cuda", wide={"a": "so"}))}) == 3
