"""Codes of weights in blocks: by the weights alone, or by what layers read where that holds on other rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from blocks_support import form
from conftest import body, make_model, node, random
from lowering_support import CPU, MODELS, ONE_THREAD, canonical, recipe
from observer_support import ALL
from onnx import TensorProto
from search_support import Array, Case, case

from onnxq.calibration import observer
from onnxq.calibration.readers import open_data
from onnxq.graph import Graph, is_constant, load
from onnxq.numerics import affine, blocks, rounding
from onnxq.numerics.affine import QuantParams
from onnxq.numerics.compensation import Drift
from onnxq.passes.blocks import coded
from onnxq.plan import Blocks, Plan
from onnxq.planner import block_rounding
from onnxq.planner.outline import outline
from onnxq.planner.scales import finish
from onnxq.planner.smoothing import Searching
from onnxq.recipe import Outliers
from onnxq.schemes import scheme

K, N = 48, 40


def together(*shape: int, seed: int = 0) -> Array:
    """Normal numbers whose last axis are mixtures of 6 channels."""
    mixed = random(*shape[:-1], 6, seed=seed) @ random(6, shape[-1], seed=1) + 0.1 * random(*shape, seed=seed + 1)
    return np.asarray(mixed, np.float32)


def deep(layers: int = 3) -> onnx.ModelProto:
    """x [rows, 4, K] through layers w0, w1 .., each behind a Tanh; what they read is computed."""
    nodes, last = [], "x"
    for k in range(layers):
        nodes += [node("Tanh", last, f"t{k}"), node("MatMul", f"t{k} w{k}", f"y{k}", name=f"fc{k}")]
        last = f"y{k}"
    weights = {f"w{k}": random(K, K, seed=k) for k in range(layers)}
    return make_model(nodes, {"x": ["rows", 4, K]}, {last: None}, weights)


def planned(of: Case, name: str = "w4a16") -> Plan:
    return finish(of.found, of.graph, {}, recipe(name), of.by.target)


def formula(w: Array, how: Blocks) -> tuple[Array, QuantParams]:
    params = blocks.choose(w, how.dtype, how.block_size, how.symmetric, how.search)
    return affine.quantize(w, params), params


def is_formula(plan: Plan, name: str, w: Array, how: Blocks) -> bool:
    codes, params = formula(w, how)
    found = plan.weights[name]
    return bool((plan.rounded[name] == codes).all() and (found.scale == params.scale).all()
                and (found.zero_point == params.zero_point).all())


# ------------------------------------------------------------------ by formula


@pytest.mark.parametrize("name", ["w2a16", "w4a16", "w8a16"])
def test_the_formula_finds_what_passes_would_find(name: str, tmp_path: Path) -> None:
    model = make_model([node("Gather", "t i", "g"), node("MatMul", "g w", "y")], {"i": (TensorProto.INT64, ["n"])},
                       {"y": None}, {"t": random(400, 72), "w": random(72, N)})
    onnx.save(model, tmp_path / "m.onnx")
    graph = canonical(load(tmp_path / "m.onnx"))
    plan = finish(outline(graph, recipe(name), CPU), graph, {}, recipe(name), CPU)
    weights = {t.name: t for n in graph.nodes for t in n.inputs if is_constant(t)}
    wanted = {key: coded(graph, weight, plan)() for key, weight in weights.items()}
    steps: list[int] = []
    block_rounding.by_formula(graph, plan, steps.append)
    assert steps == [1, 2]
    assert (plan.blocks, plan.weights.keys(), plan.rounded.keys()) == ({}, {"t", "w"}, {"t", "w"})
    assert {key: (p.axis, p.scale.shape) for key, p in plan.weights.items()} == {
        "t": (1, (400, 3 if name != "w8a16" else 1)), "w": (0, (3 if name != "w8a16" else 1, N))}
    assert {key: codes.shape for key, codes in plan.rounded.items()} == {"t": (400, 72), "w": (72, N)}
    for key, weight in weights.items():  # the passes read it from the Plan now
        codes, params = coded(graph, weight, plan)()
        np.testing.assert_array_equal(codes, wanted[key][0])
        np.testing.assert_array_equal(affine.dequantize(codes, params), affine.dequantize(*wanted[key]))


def test_the_formula_leaves_what_is_spared(tmp_path: Path) -> None:
    of = case(deep(2), tmp_path, together(8, 4, K), "w4a16")
    plan = planned(of)
    block_rounding.by_formula(of.graph, plan, spared=["w0"])
    assert (list(plan.blocks), list(plan.weights)) == (["w0"], ["w1"])


# ------------------------------------------------------------------ by data


def errors(of: Case, plans: Sequence[Plan], x: Array, tensors: Sequence[str]) -> list[dict[str, float]]:
    """For each plan the mean squared error of tensors on rows x, relative to their mean square."""
    data = open_data([{"x": x}], of.graph.ports())
    return [relative(of.graph, plan, data, tensors) for plan in plans]


def relative(graph: Graph, plan: Plan, data: Any, tensors: Sequence[str]) -> dict[str, float]:
    pairs = {t: (t, 1, t) for t in tensors}
    found = observer.compare([graph, block_rounding._quantized(graph, plan)], pairs, data, ALL, ONE_THREAD)
    return {t: 10 ** (-(found[t].sqnr_db or np.inf) / 10) for t in tensors}


@pytest.mark.parametrize(("name", "factor"), [("w2a16", 0.7), ("w4a16", 0.7)])
def test_codes_keep_results_of_other_rows(name: str, factor: float, tmp_path: Path) -> None:
    of = case(deep(), tmp_path, together(256, 4, K), name)
    plans = [planned(of, name), planned(of, name)]
    block_rounding.by_formula(of.graph, plans[0])
    block_rounding.by_data(of.graph, plans[1], of.by)
    for plan in plans:
        assert plan.blocks == {}
        assert {k: c.shape for k, c in plan.rounded.items()} == {f"w{k}": (K, K) for k in range(3)}
    before, after = errors(of, plans, together(64, 4, K, seed=9), ["y0", "y1", "y2"])
    assert all(after[t] < factor * before[t] for t in before)


def test_layers_of_a_real_model_are_nearer_to_float_on_other_data(tmp_path: Path) -> None:
    graph = canonical(load(MODELS / "text_encoder" / "model.onnx"))
    calib, unseen = (open_data(str(MODELS / "text_encoder" / f"{part}.npz"), graph.ports())
                     for part in ("calib", "eval"))
    chosen = recipe("w4a16")
    found = outline(graph, chosen, CPU)
    plans = [finish(found, graph, {}, chosen, CPU) for _ in range(2)]
    block_rounding.by_formula(graph, plans[0])
    block_rounding.by_data(graph, plans[1], Searching(scheme("w4a16"), CPU, Outliers(), calib, ALL, ONE_THREAD))
    layers = [str(v.result) for v in found.nodes.values() if v.lowering == "MatMulNBits" and v.part_of is None]
    before, after = (relative(graph, plan, unseen, layers) for plan in plans)
    assert len(layers) == 12
    assert sum(after[t] < before[t] for t in layers) >= 11
    assert np.mean(np.log([after[t] / before[t] for t in layers])) < np.log(0.85)


def test_one_sample_leaves_nothing_to_judge_by(tmp_path: Path) -> None:
    of, how = case(deep(), tmp_path, random(1, 4, K), "w4a16"), form(4, 32, False)
    plan = planned(of)
    assert plan.blocks == {f"w{k}": how for k in range(3)}
    block_rounding.by_data(of.graph, plan, of.by)
    assert plan.blocks == {}
    assert all(is_formula(plan, f"w{k}", random(K, K, seed=k), how) for k in range(3))


def drift(seed: int, rows: int = 300, mixed: bool = True) -> Drift:
    found, x = Drift(), together(rows, K, seed=seed) if mixed else random(rows, K, seed=seed)
    found.update(x + 0.01 * random(rows, K, seed=seed + 50), x)
    return found


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_was_found_is_kept_only_where_it_holds_on_the_other_half(bits: int, symmetric: bool) -> None:
    w, how = random(K, N), form(bits, 32, symmetric)
    plain = formula(w, how)
    for seen, unseen in ((drift(0), drift(7)), (drift(0), drift(0)), (drift(0, 3), drift(7, mixed=False))):
        codes, _ = block_rounding._rounded(w, how, seen, unseen)
        assert codes.shape == w.shape
        tried = block_rounding._searched(how, seen.target(w, block_rounding._DAMPING), seen.hessian())
        aim, hessian = unseen.target(w, block_rounding._DAMPING), unseen.hessian()
        old, new = (rounding.output_error(aim, *one, hessian).sum() for one in (plain, tried))
        assert (codes == plain[0]).all() == (not new < old)


def test_a_search_that_fails_on_the_other_half_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    w, how = random(K, N), form(4, 32, False)
    plain, tried = formula(w, how), []

    def flat(how: Blocks, aim: Array, hessian: Array) -> tuple[Array, QuantParams]:
        tried.append(np.array_equal(hessian, drift(0).hessian()))
        return np.broadcast_to(plain[1].zero_point.repeat(32, axis=0)[:K], w.shape), plain[1]  # all of it stands for 0

    monkeypatch.setattr(block_rounding, "_searched", flat)
    codes, params = block_rounding._rounded(w, how, drift(0), drift(7, 200))
    np.testing.assert_array_equal(codes, plain[0])
    np.testing.assert_array_equal(params.scale, plain[1].scale)
    assert tried == [True], "found on one half, judged by the other"


def test_what_holds_is_found_again_on_both_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    w, how, tried = random(K, N), form(4, 32, False), []
    searched = block_rounding._searched

    def counted(how: Blocks, aim: Array, hessian: Array) -> tuple[Array, QuantParams]:
        tried.append(float(np.trace(hessian)))
        return searched(how, aim, hessian)

    monkeypatch.setattr(block_rounding, "_searched", counted)
    block_rounding._rounded(w, how, drift(0), drift(7, 200))
    one, other = (float(np.trace(half.hessian())) for half in (drift(0), drift(7, 200)))
    np.testing.assert_allclose(tried, [one, one + other])


def test_what_no_layer_reads_for_itself_is_by_the_formula(tmp_path: Path) -> None:
    """What reads the model's input, a table, weights that two layers share, those in bodies."""
    then, other = (body([node("MatMul", "b v", name)], {name: None}, name) for name in "pq")
    model = make_model(
        [node("MatMul", "x w0", "a"), node("Tanh", "a", "t"), node("MatMul", "t w1", "b"), node("MatMul", "b w1", "d"),
         node("MatMul", "d w2", "y"), node("If", "c", "z", then_branch=then, else_branch=other)],
        {"x": ["rows", 4, K]}, {"y": None, "z": None},
        {**{f"w{k}": random(K, K, seed=k) for k in range(3)}, "v": random(K, K, seed=3), "c": np.array(True)})
    of = case(model, tmp_path, together(256, 4, K), "w4a16")
    plan = planned(of)
    hows = dict(plan.blocks)
    assert hows.keys() >= {"w0", "w1", "w2"}
    block_rounding.by_data(of.graph, plan, of.by)
    assert plan.blocks == {}
    for name, how in hows.items():
        w = random(K, K, seed=3 if name == "v" else int(name[1]))
        assert is_formula(plan, name, w, how) == (name != "w2"), name


def test_rows_of_both_kinds() -> None:
    x = together(64, 4, K)
    paired, alone = block_rounding._Half(paired=True), block_rounding._Half(paired=False)
    paired.update(np.concatenate([x + 1, x], axis=-1))
    alone.update(x)
    for half, rows in ((paired, (x + 1).reshape(-1, K)), (alone, x.reshape(-1, K))):
        wanted = rows.T.astype(np.float64) @ rows
        np.testing.assert_allclose(half.drift.hessian(), wanted, rtol=0, atol=1e-5 * wanted.max())
        half.update(np.zeros((0, 4, 2 * K if half.paired else K), np.float32))
        assert half.drift.count == 64 * 4
    w = random(K, N, seed=1)
    assert np.array_equal(alone.drift.target(w, 0.01), w)
    assert not np.allclose(paired.drift.target(w, 0.01), w, atol=1e-3)


# ------------------------------------------------------------------ steps


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """(the tensors that are observed, how many layers are quantized by then) of each run over the data."""
    seen: list[tuple[list[str], int]] = []
    fold = observer.fold

    def counted(graph: Graph, running: Any, data: Any, how: Any, options: Any, progress: Any = None, beside: Any = (),
                twin: Graph | None = None) -> None:
        if twin is not None:
            done = sum(n.op == "MatMul" and not is_constant(n.inputs[1]) for n in twin.nodes)
            seen.append(([name for some in beside for name in some], done))
        elif beside:
            seen.append(([name for some in beside for name in some], 0))
        assert not any(n.op == "MatMul" and not is_constant(n.inputs[1]) for n in graph.nodes), "float, to compare with"
        fold(graph, running, data, how, options, progress, beside, twin)

    monkeypatch.setattr(observer, "fold", counted)
    return seen


def test_each_layer_sees_those_before_it_quantized(runs: list[tuple[list[str], int]], tmp_path: Path) -> None:
    of = case(deep(6), tmp_path, together(64, 4, K), "w4a16")
    block_rounding.by_data(of.graph, planned(of), of.by)
    assert runs == [([f"t{k}"], k) for k in range(6)]


def test_a_large_model_is_observed_at_once(runs: list[tuple[list[str], int]], tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_rounding, "_WORK", 1.0)
    of = case(deep(9), tmp_path, together(64, 4, K), "w4a16")
    block_rounding.by_data(of.graph, planned(of), of.by)
    assert runs == [([f"t{k}" for k in range(9)], 0)]


def test_layers_that_read_the_same_are_observed_together(runs: list[tuple[list[str], int]], tmp_path: Path) -> None:
    model = make_model([node("Tanh", "x", "t"), *(node("MatMul", f"t w{k}", f"y{k}") for k in range(3))],
                       {"x": ["rows", 4, K]}, {f"y{k}": None for k in range(3)},
                       {f"w{k}": random(K, N, seed=k) for k in range(3)})
    of = case(model, tmp_path, together(64, 4, K), "w4a16")
    block_rounding.by_data(of.graph, planned(of), of.by)
    assert runs == [(["t"], 0)]


def test_only_what_computes_the_tensors_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, counts = case(deep(4), tmp_path, together(64, 4, K), "w4a16"), []
    fold = observer.fold

    def counted(graph: Graph, *args: Any) -> None:
        counts.append(len(graph.nodes))
        fold(graph, *args)

    monkeypatch.setattr(observer, "fold", counted)
    block_rounding.by_data(of.graph, planned(of), of.by)
    assert counts == [1, 1, 3, 5, 7]  # the first one counts rows
    assert len(of.graph.nodes) == 8


def test_wide_layers_are_left_to_the_formula(runs: list[tuple[list[str], int]], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_rounding, "_WIDEST", K - 1)
    of = case(deep(2), tmp_path, together(64, 4, K), "w4a16")
    plan = planned(of)
    block_rounding.by_data(of.graph, plan, of.by)
    assert (runs, plan.blocks, list(plan.rounded)) == ([], {}, ["w0", "w1"])


def test_the_same_data_give_the_same_codes(tmp_path: Path) -> None:
    of = case(deep(), tmp_path, together(64, 4, K), "w4a16")
    plans = [planned(of), planned(of)]
    for plan in plans:
        block_rounding.by_data(of.graph, plan, of.by)
    assert plans[0].digest() == plans[1].digest()
