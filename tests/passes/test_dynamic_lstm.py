"""LSTMs on int8 weights: the kernel against numpy and against float, every form of the operator, bodies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from conftest import Opener, apply, body, make_model, node, random, run, text
from onnx import TensorProto, numpy_helper

from onnxq.graph import Graph
from onnxq.numerics import affine
from onnxq.numerics.comparison import Comparison
from onnxq.numerics.dtypes import UINT8
from onnxq.passes.manager import Context
from onnxq.passes.quantize.dynamic_lstm import QuantizeLSTM
from onnxq.plan import NodePlan, Plan

Array = npt.NDArray[Any]
Writer = Callable[[Graph], Path]

S, N, K, H = 7, 3, 20, 16  # steps, sequences, input size, hidden size


def uniform(*shape: int, seed: int = 0) -> Array:
    """Weights as an LSTM begins its training with: uniform in +-1 / sqrt(H)."""
    return np.random.default_rng([seed, *shape]).uniform(-H ** -0.5, H ** -0.5, shape).astype(np.float32)


def weights(directions: int = 1, seed: int = 0) -> dict[str, Array]:
    return {"w": uniform(directions, 4 * H, K, seed=seed), "r": uniform(directions, 4 * H, H, seed=seed),
            "b": uniform(directions, 8 * H, seed=seed)}


def sequence(directions: int = 1) -> list[int | str]:
    return ["s", directions, "n", H]


def lstm_model(inputs: str = "x w r b", outputs: str = "y h c", ports: dict[str, Any] | None = None,
               more: dict[str, Any] | None = None, directions: int = 1, **attrs: Any) -> onnx.ModelProto:
    made = {name: sequence(directions) if name == "y" else [directions, "n", H]
            for name in outputs.split() if name != "_"}
    stored = {k: v for k, v in (weights(directions) | (more or {})).items() if k in inputs.split()}
    return make_model([node("LSTM", inputs, outputs, name="lstm", hidden_size=H, **attrs)],
                      {"x": ["s", "n", K], **(ports or {})}, made, stored)


def planned(graph: Graph, *names: str) -> Context:
    """A Plan that gives LSTMs to the kernel, the scales of their weights per row of a gate."""
    plan = Plan("by hand", "cpu")
    for item, _ in graph.walk():
        if item.name in names:
            plan.nodes[item.name] = NodePlan(item.name, "LSTM", plan.scheme, "DynamicQuantizeLSTM", "")
            for weight in item.inputs[1:3]:
                values = graph.read(weight)
                pairs = affine.largest_pair(values.transpose(1, 0, 2))  # exact without VNNI instructions, too
                plan.weights[weight.name] = affine.weight_params(values, axis=1, least=pairs)
    return Context(plan=plan)


def sqnr(exact: Array, found: Array) -> float:
    fold = Comparison()
    fold.update(exact, found)
    assert fold.sqnr_db is not None
    return fold.sqnr_db


def stored(path: Path) -> dict[str, Array]:
    model = onnx.load(path)
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


# ------------------------------------------------------------------ the kernel in numpy


def product(x: Array, codes: Array, scale: Array) -> Array:
    """x [M, K] @ the decoded codes [K, 4H], with x as uint8 codes of one scale for all of it."""
    found = affine.choose(x.min(), x.max(), UINT8)
    centred = affine.quantize(x, found).astype(np.int64) - int(found.zero_point)
    return (centred @ codes.astype(np.int64)).astype(np.float32) * (found.scale * scale)


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def direction(x: Array, d: int, q: dict[str, Array]) -> tuple[Array, Array, Array]:
    """One direction of ONNX LSTM-14 with the default activations, on codes; gates in the order i, o, f, c."""
    x = x[::-1] if d else x
    steps, batch, inputs = x.shape
    before = product(x.reshape(-1, inputs), q["w.lstm.q"][d], q["w.lstm.scale"][d]).reshape(steps, batch, 4 * H)
    bias = q["b"][d][:4 * H] + q["b"][d][4 * H:]
    h, c, y = np.zeros((batch, H), np.float32), np.zeros((batch, H), np.float32), []
    for step in before:
        i, o, f, g = np.split(step + product(h, q["r.lstm.q"][d], q["r.lstm.scale"][d]) + bias, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = (sigmoid(o) * np.tanh(c)).astype(np.float32)
        y.append(h)
    return np.stack(y[::-1] if d else y), h, c


@pytest.mark.parametrize("directions", [1, 2])
def test_the_kernel_computes_what_its_codes_say(directions: int, opened: Opener, written: Writer) -> None:
    graph = opened(lstm_model(directions=directions, direction=["forward", "bidirectional"][directions - 1]))
    assert apply(QuantizeLSTM(), graph, planned(graph, "lstm")) == (True, [])
    path = written(graph)
    q = stored(path)
    assert (q["w.lstm.q"].shape, q["r.lstm.q"].shape) == ((directions, K, 4 * H), (directions, H, 4 * H))
    for name, weight in (("w", weights(directions)["w"]), ("r", weights(directions)["r"])):
        assert q[f"{name}.lstm.q"].dtype == q[f"{name}.lstm.zero_point"].dtype == np.int8
        assert q[f"{name}.lstm.scale"].shape == q[f"{name}.lstm.zero_point"].shape == (directions, 4 * H)
        assert not q[f"{name}.lstm.zero_point"].any()
        decoded = (q[f"{name}.lstm.q"] * q[f"{name}.lstm.scale"][:, None]).transpose(0, 2, 1)
        assert (np.abs(decoded - weight) <= q[f"{name}.lstm.scale"][..., None] * 0.5001).all()
    assert not {"w", "r"} & q.keys()

    x = random(S, N, K, seed=1) + np.float32(0.5)
    wanted = [np.stack(parts, axis=axis) for parts, axis in
              zip(zip(*(direction(x, d, q) for d in range(directions)), strict=True), (1, 0, 0), strict=True)]
    # a hidden state half way between two codes may go either way; with at most 1 / 255 of a weight below 1 / 4 for it
    for found, exact in zip(run(path, {"x": x}).values(), wanted, strict=True):
        np.testing.assert_allclose(found, exact, rtol=0, atol=2e-3)
        assert np.median(np.abs(found - exact)) < 1e-5


# ------------------------------------------------------------------ the operator's forms

FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {  # inputs, outputs, attributes
    "plain": ("x w r b", "y h c", {}),
    "no bias": ("x w r", "y", {}),
    "last state alone": ("x w r b", "_ h", {}),
    "reverse": ("x w r b", "y h c", {"direction": "reverse"}),
    "both ways": ("x w r b", "y h c", {"direction": "bidirectional"}),
    "lengths": ("x w r b l", "y h c", {}),
    "states": ("x w r b _ h0 c0", "y h c", {}),
    "everything": ("x w r b l h0 c0 p", "y h c", {"direction": "bidirectional", "clip": 0.3}),
    "coupled": ("x w r b", "y h c", {"input_forget": 1, "activations": ["HardSigmoid", "Tanh", "Tanh"],
                                     "activation_alpha": [0.3], "activation_beta": [0.4]}),
    "steps first": ("x w r b", "y h c", {"layout": 0}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_stays_near_float(form: str, opened: Opener, written: Writer) -> None:
    inputs, outputs, attrs = FORMS[form]
    directions = 2 if attrs.get("direction") == "bidirectional" else 1
    state = [directions, "n", H]
    ports = {"l": (TensorProto.INT32, ["n"]), "h0": state, "c0": state}
    model = lstm_model(inputs, outputs, {k: v for k, v in ports.items() if k in inputs.split()},
                       {"p": uniform(directions, 3 * H, seed=7)}, directions, **attrs)
    feed = {"x": random(S, N, K, seed=1), "l": np.array([S, 1, 4], np.int32),
            "h0": np.tanh(random(directions, N, H, seed=2)), "c0": random(directions, N, H, seed=3)}
    feed = {k: v for k, v in feed.items() if k in inputs.split()}
    graph = opened(model)
    assert apply(QuantizeLSTM(), graph, planned(graph, "lstm")) == (True, [])
    path = written(graph)
    exact, found = run(model, feed), run(path, feed)
    assert list(found) == list(exact)
    for name, values in exact.items():
        assert found[name].shape == values.shape
        assert sqnr(values, found[name]) > 30, name
        assert (found[name][values == 0] == 0).all()  # behind a sequence's end
    kernel = onnx.load(path).graph.node[0]
    assert (kernel.op_type, kernel.domain, kernel.name) == ("DynamicQuantizeLSTM", "com.microsoft", "lstm")


# ------------------------------------------------------------------ where it fires


def test_the_graph_in_text_and_a_second_run(opened: Opener, golden: Callable[[str, str], None]) -> None:
    graph = opened(lstm_model("x w r b _ h0 c0", "y _ c", {"h0": [1, "n", H], "c0": [1, "n", H]}))
    context = planned(graph, "lstm")
    assert apply(QuantizeLSTM(), graph, context)[0]
    golden("dynamic-lstm", text(graph))
    assert apply(QuantizeLSTM(), graph, context) == (False, [])


def test_what_the_plan_leaves_alone_stays(opened: Opener) -> None:
    graph = opened(lstm_model())
    before = text(graph)
    assert apply(QuantizeLSTM(), graph) == (False, [])
    context = planned(graph, "lstm")
    context.plan.nodes["lstm"] = NodePlan("lstm", "LSTM", "by hand", "stored", "")
    assert apply(QuantizeLSTM(), graph, context) == (False, [])
    assert text(graph) == before


def test_a_batch_first_layout_is_a_near_miss(opened: Opener) -> None:
    graph = opened(lstm_model(layout=1))
    assert apply(QuantizeLSTM(), graph, planned(graph, "lstm")) == (
        False, [("lstm", "its layout is batch first, which the kernel does not take")])


def test_layers_that_share_weights_store_them_once(opened: Opener, written: Writer) -> None:
    model = make_model([node("LSTM", "x w r b", "y", name="one", hidden_size=H),
                        node("LSTM", "z w r", "v", name="two", hidden_size=H)],
                       {"x": ["s", "n", K], "z": ["s", "n", K]}, {"y": sequence(), "v": sequence()}, weights())
    graph = opened(model)
    assert apply(QuantizeLSTM(), graph, planned(graph, "one", "two")) == (True, [])
    path = written(graph)
    assert sum(v.size for v in stored(path).values() if v.ndim == 3) == 4 * H * (K + H)
    feed = {"x": random(S, N, K, seed=1), "z": random(S, N, K, seed=2)}
    for exact, found in zip(run(model, feed).values(), run(path, feed).values(), strict=True):
        assert sqnr(exact, found) > 30


@pytest.mark.parametrize("shared", [True, False], ids=["shared weights", "weights of their own"])
def test_lstms_inside_if_bodies(shared: bool, opened: Opener, written: Writer) -> None:
    first, other = weights(), weights(seed=5)
    own = {"w2": other["w"], "r2": other["r"]}
    then = body([node("Neg", "x", "xn"), node("LSTM", "xn w r b", "a", name="a", hidden_size=H)],
                {"a": sequence()}, "then")
    names = "w r" if shared else "w2 r2"
    otherwise = body([node("LSTM", f"x {names} b", "t", name="b", hidden_size=H), node("Neg", "t", "n")],
                     {"n": sequence()}, "other", {} if shared else own)
    model = make_model([node("If", "k", "y", then_branch=then, else_branch=otherwise)],
                       {"k": (TensorProto.BOOL, []), "x": ["s", "n", K]}, {"y": sequence()}, first)
    graph = opened(model)
    context = planned(graph, "a", "b")
    assert apply(QuantizeLSTM(), graph, context) == (True, [])
    assert apply(QuantizeLSTM(), graph, context) == (False, [])
    path = written(graph)
    count = 1 if shared else 2
    assert path.stat().st_size < count * (4 * H * (K + H) + 8 * 8 * H) + 4 * 8 * H + 2000
    for flag in (True, False):
        feed = {"k": np.array(flag), "x": random(S, N, K, seed=1)}
        assert sqnr(run(model, feed)["y"], run(path, feed, optimize=True)["y"]) > 30
