"""Which weights are pruned and which are spared, by which rows, in which order; what a spool keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random, run
from search_support import ONE_THREAD, canonical

from onnxq.calibration import observer
from onnxq.calibration.readers import open_data
from onnxq.errors import ModelError, UsageError
from onnxq.graph import Graph, load, save
from onnxq.numerics import sparsity as numerics
from onnxq.passes.manager import Context, PassManager
from onnxq.passes.transform.prune import Prune
from onnxq.plan import Plan
from onnxq.planner import prunable, pruning
from onnxq.planner.pruning import Calibrated, Pruning, prune
from onnxq.recipe import Calibration, Fallback, Match, Recipe, Rule
from onnxq.schemes import FLOAT
from onnxq.sparsity import Sparsity
from onnxq.spool import Spool

K, N = 16, 12
HALF = Sparsity("50%")


def graph_of(model: onnx.ModelProto, folder: Path) -> Graph:
    onnx.save(model, folder / "model.onnx")
    return canonical(load(folder / "model.onnx"))


def asked(sparsity: Sparsity = HALF, **parts: Any) -> Recipe:
    return Recipe(FLOAT, sparsity=sparsity, **{"calibration": Calibration(samples=None), **parts})


def by(graph: Graph, feeds: Sequence[dict[str, Any]]) -> Calibrated:
    return Calibrated(open_data(list(feeds), graph.ports()), ONE_THREAD)


def interrupted_at(place: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let the weight of that place, from 1 on, interrupt the run that comes to it; gives what was begun, as it is."""
    pruned, taken = pruning._pruned, list[Any]()

    def counted(*args: Any) -> Any:
        taken.append(args)
        if len(taken) == place:
            raise KeyboardInterrupt
        return pruned(*args)

    monkeypatch.setattr(pruning, "_pruned", counted)
    return taken


def spared(model: onnx.ModelProto, folder: Path, sparsity: Sparsity = HALF, **parts: Any) -> dict[str, str]:
    tasks, why = prunable.find(graph_of(model, folder), asked(sparsity, **parts))
    return dict.fromkeys([layer.name for task in tasks for layer in task.layers], "") | why


def perceptron(depth: int = 3) -> onnx.ModelProto:
    """x [rows, K] through layers fc0, fc1 .. with Relu between, the last one a head."""
    nodes, weights, x = [], {}, "x"
    for k in range(depth):
        weights[f"w{k}"] = random(K, K, seed=k) / 3
        nodes += [node("MatMul", f"{x} w{k}", f"h{k}", name=f"fc{k}"), node("Relu", f"h{k}", f"r{k}")]
        x = f"r{k}"
    nodes += [node("MatMul", f"{x} head", "y", name="head")]
    return make_model(nodes, {"x": ["rows", K]}, {"y": None}, weights | {"head": random(K, N)})


def rows(count: int = 64, seed: int = 9) -> np.ndarray[Any, Any]:
    """[count, K] whose numbers move together."""
    return (random(count, 5, seed=seed) @ random(5, K, seed=1) + 0.3 * random(count, K, seed=seed + 1)).astype(
        np.float32)


def zeros(found: Pruning) -> dict[str, float]:
    return {name: float((values == 0).mean()) for name, values in found.values.items()}


# ------------------------------------------------------------------ who is spared


def test_heads_are_spared_and_layers_before_them_not(tmp_path: Path) -> None:
    found = spared(perceptron(2), tmp_path)
    assert found == {"fc0": "", "fc1": "", "head": "its result is the model's"}


def test_heads_behind_movement_and_simple_operators_are_spared(tmp_path: Path) -> None:
    model = make_model([node("MatMul", "x w", "h", name="fc"), node("MatMul", "h v", "m", name="head"),
                        node("Add", "m b", "a"), node("Transpose", "a", "t", perm=[1, 0]), node("Softmax", "t", "y")],
                       {"x": ["rows", K]}, {"y": None}, {"w": random(K, K), "v": random(K, N), "b": random(N)})
    assert spared(model, tmp_path) == {"fc": "", "head": "its result is the model's"}


def test_a_result_that_something_else_reads_makes_no_head(tmp_path: Path) -> None:
    """As a key of a cache: it is an output, and attention reads it."""
    model = make_model([node("MatMul", "x w", "h", name="key"), node("Transpose", "h", "key_out", perm=[1, 0]),
                        node("MatMul", "x key_out", "y", name="scores")],
                       {"x": ["rows", K]}, {"y": None, "key_out": None}, {"w": random(K, K)})
    assert spared(model, tmp_path) == {"key": ""}


def test_what_users_keep_float_is_spared(tmp_path: Path) -> None:
    found = spared(perceptron(3), tmp_path, fallback=Fallback(keep_float=("fc0",)),
                   rules=(Rule(Match(name="fc1"), "float", "it matters"),))
    assert found["fc0"] == "kept float as asked (fc0)"
    assert found["fc1"] == "it matters"
    assert found["fc2"] == ""


def test_depthwise_filters_and_channels_without_groups_are_spared(tmp_path: Path) -> None:
    model = make_model([node("Conv", "x w", "a", name="first"), node("Conv", "a d", "b", name="depthwise", group=8),
                        node("Conv", "b p", "c", name="point"), node("Conv", "c q", "y", name="head")],
                       {"x": ["N", 3, 9, 9]}, {"y": None},
                       {"w": random(8, 3, 3, 3), "d": random(8, 1, 3, 3), "p": random(8, 8, 1, 1),
                        "q": random(8, 8, 1, 1)})
    assert spared(model, tmp_path)["depthwise"].startswith("its filters see a part of the channels")
    assert spared(model, tmp_path)["first"] == ""
    patterned = spared(model, tmp_path, Sparsity(pattern="2:4"))
    assert patterned["first"] == "its 3 channels make no groups of 4"
    assert patterned["point"] == ""


def test_embeddings_are_pruned_by_request_and_tables_of_factors_never(tmp_path: Path) -> None:
    model = make_model([node("Gather", "table ids", "e", name="embed"), node("Gather", "cos ids", "c", name="angles"),
                        node("Add", "e e", "s"), node("Mul", "s c", "m"), node("MatMul", "m w", "h", name="fc"),
                        node("MatMul", "h v", "y", name="head")],
                       {"ids": (onnx.TensorProto.INT64, ["n"])}, {"y": None},
                       {"table": random(50, K), "cos": random(50, K, seed=1), "w": random(K, K), "v": random(K, N)})
    assert spared(model, tmp_path) == {"fc": "", "head": "its result is the model's"}
    found = spared(model, tmp_path, replace(HALF, embeddings=True))
    assert found["embed"] == ""
    assert found["angles"] == "what it looks up is no table of embeddings"
    made = prune(graph_of(model, tmp_path), asked(replace(HALF, embeddings=True, method="magnitude")), None)
    assert zeros(made) == {"table": 0.5, "w": 0.5}


def test_a_weight_that_is_read_in_other_ways_is_spared(tmp_path: Path) -> None:
    model = make_model([node("MatMul", "x w", "h", name="fc"), node("MatMul", "h v", "m", name="head"),
                        node("Transpose", "x", "t", perm=[1, 0]), node("MatMul", "w t", "z", name="other")],
                       {"x": ["rows", K]}, {"m": None, "z": None}, {"w": random(K, K), "v": random(K, N)})
    assert spared(model, tmp_path)["fc"] == "its weights are read as floats elsewhere"


# ------------------------------------------------------------------ how


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_shares_hold_and_errors_are_those_of_the_rows(tmp_path: Path, method: str) -> None:
    graph, x = graph_of(perceptron(1), tmp_path), rows()
    found = prune(graph, asked(Sparsity("50%", method)), by(graph, [{"x": x}]))
    assert zeros(found) == {"w0": 0.5}
    (one,) = found.found
    w = np.asarray(graph.read(graph.nodes[0].inputs[1]))
    wanted = np.square(x @ (found.values["w0"] - w)).sum() / np.square(x @ w).sum()
    assert one == pruning.Pruned("w0", ("fc0",), method, one.error)
    assert one.error == pytest.approx(float(wanted), rel=1e-3)


def test_sparsegpt_costs_less_than_wanda_and_that_less_than_magnitude(tmp_path: Path) -> None:
    graph = graph_of(perceptron(1), tmp_path)
    errors = [prune(graph, asked(Sparsity("50%", method)), by(graph, [{"x": rows()}])).found[0].error
              for method in ("sparsegpt", "wanda", "magnitude")]
    assert errors == sorted(errors, key=lambda e: e or 0.0)


def test_groups_of_a_conv_are_channels_at_one_place_of_the_filter(tmp_path: Path) -> None:
    model = make_model([node("Conv", "x w", "h", name="conv"), node("Relu", "h", "r"),
                        node("Conv", "r v", "y", name="head")],
                       {"x": ["N", 8, 6, 6]}, {"y": None}, {"w": random(6, 8, 3, 2), "v": random(2, 6, 1, 1)})
    graph = graph_of(model, tmp_path)
    found = prune(graph, asked(Sparsity(pattern="2:4")), by(graph, [{"x": random(16, 8, 6, 6)}]))
    groups = (found.values["w"] != 0).reshape(6, 2, 4, 3, 2)
    assert (groups.sum(axis=2) == 2).all()


def test_rows_of_a_conv_are_those_of_its_weight(tmp_path: Path) -> None:
    """The change of the outputs is what the report says, which it is for matching orders alone."""
    weights = {"w": random(6, 4, 3, 2), "v": random(2, 6, 1, 1)}
    model = make_model([node("Conv", "x w", "h", name="conv", pads=[1, 0, 1, 0]), node("Relu", "h", "r"),
                        node("Conv", "r v", "y", name="head")], {"x": ["N", 4, 6, 6]}, {"y": None, "h": None}, weights)
    graph, x = graph_of(model, tmp_path), random(8, 4, 6, 6)
    found = prune(graph, asked(), by(graph, [{"x": x}]))
    before = run(tmp_path / "model.onnx", {"x": x})["h"]
    weights["w"] = found.values["w"]
    onnx.save(make_model([node("Conv", "x w", "h", pads=[1, 0, 1, 0])], {"x": ["N", 4, 6, 6]}, {"h": None},
                         {"w": weights["w"]}), tmp_path / "pruned.onnx")
    after = run(tmp_path / "pruned.onnx", {"x": x})["h"]
    assert found.found[0].error == pytest.approx(
        float(np.square(after - before).sum() / np.square(before).sum()), rel=1e-3)


def test_a_weight_that_two_layers_share_is_pruned_once_for_both(tmp_path: Path) -> None:
    model = make_model([node("MatMul", "x w", "a", name="one"), node("Relu", "a", "r"),
                        node("MatMul", "r w", "b", name="two"), node("MatMul", "b v", "y", name="head")],
                       {"x": ["rows", K]}, {"y": None, "r": None}, {"w": random(K, K) / 4, "v": random(K, N)})
    graph, x = graph_of(model, tmp_path), rows()
    found = prune(graph, asked(), by(graph, [{"x": x}]))
    assert [(one.weight, one.layers) for one in found.found] == [("w", ("one", "two"))]
    both = np.concatenate([x, run(tmp_path / "model.onnx", {"x": x})["r"]]).astype(np.float64)
    w = np.asarray(graph.read(graph.nodes[0].inputs[1]))
    hessian = both.T @ both
    alone = numerics.exchange(w, numerics.sparsegpt(w, hessian, 0.5), hessian)
    np.testing.assert_allclose(found.values["w"], alone, rtol=1e-3, atol=1e-4)


def test_small_models_are_pruned_in_turn_which_keeps_their_result_better(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, x = graph_of(perceptron(4), tmp_path), rows(256)
    wanted = run(tmp_path / "model.onnx", {"x": x})["y"]
    errors = []
    for work in (pruning._WORK, 0.0):
        monkeypatch.setattr(pruning, "_WORK", work)
        found = prune(graph, asked(), by(graph, [{"x": x}]))
        copy = graph.copy()
        PassManager([Prune()]).run(copy, Context(plan=Plan("", "", pruned=found.values)))
        save(copy, tmp_path / "pruned.onnx")
        errors.append(float(np.square(run(tmp_path / "pruned.onnx", {"x": x})["y"] - wanted).sum()))
    assert errors[0] < errors[1]


def test_a_large_model_runs_once_and_a_small_one_for_each_tensor(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, runs, fold = graph_of(perceptron(3), tmp_path), 0, observer.fold

    def counted(*args: Any, **options: Any) -> None:
        nonlocal runs
        runs += 1
        fold(*args, **options)

    monkeypatch.setattr(observer, "fold", counted)
    for work, method, wanted in ((pruning._WORK, "sparsegpt", 1 + 3), (0.0, "sparsegpt", 1 + 1),
                                 (pruning._WORK, "wanda", 1)):
        runs = 0
        monkeypatch.setattr(pruning, "_WORK", work)
        prune(graph, asked(Sparsity("50%", method)), by(graph, [{"x": rows()}]))
        assert runs == wanted


def test_a_large_model_s_layers_do_not_make_up_for_one_another(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that is observed at once would make up for the same error; what an earlier run did changes nothing."""
    monkeypatch.setattr(pruning, "_WORK", 0.0)
    graph, feeds, spool = graph_of(perceptron(3), tmp_path), [{"x": rows()}], Spool(tmp_path / "spool")
    whole = prune(graph, asked(), by(graph, feeds))
    interrupted_at(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        prune(graph, asked(), by(graph, feeds), spool)
    again = prune(graph, asked(), by(graph, feeds), spool)
    assert all(np.array_equal(again.values[name], values) for name, values in whole.values.items())


def test_a_budget_gives_layers_whose_zeros_cost_more_fewer_of_them(tmp_path: Path) -> None:
    """fc0 has a third of its inputs at 0: that many zeros cost nothing. All together have the share asked for."""
    graph, x = graph_of(perceptron(2), tmp_path), rows()
    x[:, ::3] = 0
    found = prune(graph, asked(Sparsity("50%", shares="budget")), by(graph, [{"x": x}]), Spool(tmp_path / "spool"))
    made = zeros(found)
    assert made["w0"] > 0.5 > made["w1"]
    assert np.mean(list(made.values())) == pytest.approx(0.5, abs=1 / K**2)
    even = prune(graph, asked(), by(graph, [{"x": x}]))
    assert sum(one.error or 0 for one in found.found) < sum(one.error or 0 for one in even.found)
    again = prune(graph, asked(Sparsity("50%", shares="budget")), None)  # nothing is known of what zeros cost
    assert zeros(again) == {"w0": 0.5, "w1": 0.5}


def test_what_is_wider_than_affordable_goes_by_magnitude(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "_WIDEST", K - 1)
    graph = graph_of(perceptron(1), tmp_path)
    (one,) = prune(graph, asked(), by(graph, [{"x": rows()}])).found
    assert (one.method, one.error) == ("magnitude", None)


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, feeds, spool = graph_of(perceptron(3), tmp_path), [{"x": rows()}], Spool(tmp_path / "spool")
    whole = prune(graph, asked(), by(graph, feeds))
    taken = interrupted_at(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        prune(graph, asked(), by(graph, feeds), spool)
    again = prune(graph, asked(), by(graph, feeds), spool)
    assert len(taken) == 4
    assert again.found == whole.found
    assert all(np.array_equal(again.values[name], values) for name, values in whole.values.items())
    prune(graph, asked(Sparsity("25%")), by(graph, feeds), spool)
    assert len(taken) == 7  # another share is other work


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = perceptron(1)
    broken = random(K, K)
    broken[2, 3] = np.nan
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(broken, "w0"))
    with pytest.raises(ModelError, match="w0"):
        prune(graph_of(model, tmp_path), asked(Sparsity("50%", "magnitude")), None)


def test_plans_for_another_model_are_refused(tmp_path: Path) -> None:
    graph = graph_of(perceptron(1), tmp_path)
    pruning.check_pruned(Plan("float", "cpu", pruned={"w0": random(K, K)}), graph)
    for pruned in ({"w0": random(K, N)}, {"other": random(K, K)}):
        with pytest.raises(UsageError, match="another model"):
            pruning.check_pruned(Plan("float", "cpu", pruned=pruned), graph)
