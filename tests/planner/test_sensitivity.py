"""The ranking of layers: what counts as one, in which order they come, and what is said of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import Opener, body, make_model, node, random
from lowering_support import outlined
from onnx import TensorProto

from onnxq.numerics.comparison import Comparison
from onnxq.numerics.moments import Moments
from onnxq.planner import sensitivity
from onnxq.planner.outline import outline
from onnxq.planner.sensitivity import Layer

LSTM = {"lw": random(1, 256, 32), "lr": random(1, 256, 64)}


def model() -> onnx.ModelProto:
    """A Conv with its Relu, an Add that joins it, MatMuls with the constant on either side, an LSTM, one in a body."""
    inside = body([node("LSTM", "s lw lr", "t", name="inner", hidden_size=64)], {"t": None})
    other = body([node("Exp", "s", "u")], {"u": None}, name="other")
    return make_model(
        [node("Conv", "x w", "c", name="conv", pads=[1, 1, 1, 1]), node("Relu", "c", "r"), node("Add", "r r", "a"),
         node("Conv", "a w", "d", name="conv2"),
         node("MatMul", "z m", "p", name="right"), node("Add", "p b", "q"), node("MatMul", "l z", "k", name="left"),
         node("LSTM", "s lw lr", "y", name="lstm", hidden_size=64),
         node("If", "flag", "o", name="if", then_branch=inside, else_branch=other)],
        {"x": ["n", 32, 8, 8], "z": [128, 128], "s": ["t", "n", 32], "flag": (TensorProto.BOOL, [])},
        dict.fromkeys("dqkyo"),
        {"w": random(32, 32, 3, 3), "m": random(128, 64), "b": random(64), "l": random(128, 128), **LSTM})


def test_layers_are_nodes_with_weights_that_run_on_codes(opened: Opener) -> None:
    graph = opened(model())
    found = sensitivity.layers(outlined(graph).nodes, graph)
    assert found == [
        Layer("conv", "Conv", "QLinearConv", "x", "r"), Layer("conv2", "Conv", "QLinearConv", "a", "d"),
        Layer("right", "MatMul", "MatMulIntegerToFloat", "z", "q"),
        Layer("left", "MatMul", "MatMulIntegerToFloat", "z", "k"),
        Layer("lstm", "LSTM", "DynamicQuantizeLSTM", "s", "y")]
    dynamic = sensitivity.layers(outlined(opened(model()), "w8a8-dynamic").nodes, graph)
    assert [layer.node for layer in dynamic] == ["right"]


def test_a_sensitive_layer_stays_float_with_its_weights(opened: Opener) -> None:
    from lowering_support import CPU, recipe

    graph = opened(model())
    outlined(graph)
    reasons = dict.fromkeys(("conv", "right", "left", "lstm"), "kept")
    found = outline(graph, recipe(), CPU, sensitive=reasons).nodes
    assert {n: (found[n].scheme, found[n].reason) for n in reasons} == dict.fromkeys(reasons, ("float", "kept"))
    assert [layer.node for layer in sensitivity.layers(found, graph)] == ["conv2"]
    named = outline(graph, recipe(keep=["right"]), CPU, sensitive=reasons).nodes
    assert named["right"].reason == "kept float as asked (right)"


def comparison(noise: float) -> Comparison:
    found = Comparison()
    found.update(np.float32([10.0, 0.0]), np.float32([10.0, noise]))
    return found


LAYERS = [Layer(name, "Conv", "QLinearConv", f"{name}.x", f"{name}.y") for name in "abcd"]


@pytest.mark.parametrize(("rank", "reasons"), [
    ("range_parm", {"b": "1st most sensitive by range_parm (5.0)", "d": "2nd most sensitive by range_parm (5.0)",
                    "c": "3rd most sensitive by range_parm (1.0)"}),
    ("kurtosis", {"b": "1st most sensitive by kurtosis (22.0)", "d": "2nd most sensitive by kurtosis (22.0)",
                  "a": "3rd most sensitive by kurtosis (0.0)"}),
    ("sqnr", {"c": "1st most sensitive by sqnr (0.0 dB)", "a": "2nd most sensitive by sqnr (20.0 dB)",
              "d": "3rd most sensitive by sqnr (40.0 dB)"}),
])
def test_the_most_sensitive_come_first_and_of_equals_the_first(rank: str, reasons: dict[str, str]) -> None:
    moments = {layer.reads: Moments() for layer in LAYERS}
    spiky = np.float32([5.0, -5.0] + [0.0] * 48)  # std 1, fourth moment 25
    for name, values in {"a.x": [3.0, 3.0], "b.x": spiky, "c.x": [1.0, -1.0], "d.x": spiky}.items():
        moments[name].update(np.float32(values))
    alone = {name: comparison(noise) for name, noise in zip("abcd", (1.0, 0.0, 10.0, 0.1), strict=True)}
    found = sensitivity.most_sensitive(sensitivity.figures(rank, LAYERS, moments, alone), rank, 3)
    assert found == {name: f"kept float: {reason} of --fallback 3" for name, reason in reasons.items()}


def test_no_error_at_all_is_the_least_sensitive() -> None:
    by_node = sensitivity.figures("sqnr", LAYERS, {}, {name: comparison(k) for k, name in enumerate("abcd")})
    found = sensitivity.most_sensitive(by_node, "sqnr", 9)
    assert list(found) == ["d", "c", "b", "a"]
    assert found["a"] == "kept float: 4th most sensitive by sqnr (identical) of --fallback 9"


def test_ordinals() -> None:
    words = [reason.split()[2] for reason in
             sensitivity.most_sensitive(dict.fromkeys(map(str, range(113)), 0.0), "kurtosis", 113).values()]
    assert [words[k - 1] for k in (1, 2, 3, 4, 10, 11, 12, 13, 21, 22, 23, 101, 111, 112, 113)] == [
        "1st", "2nd", "3rd", "4th", "10th", "11th", "12th", "13th", "21st", "22nd", "23rd", "101st", "111th", "112th",
        "113th"]


def test_notices() -> None:
    assert sensitivity.notices(2, ["a", "b"], 10, 10) == []
    [many] = sensitivity.notices(2, ["a", "b", "c"], 10, 10)
    assert many.startswith("3 of 10 layers (30%) stay float by --keep-float and --fallback; beyond 20% little is left")
    [all_of_them, _] = sensitivity.notices(11, list("abcdefghij"), 10, 10)
    assert all_of_them == "--fallback 11 keeps all 10 layers float, since there are no more"
    assert sensitivity.notices(0, [], 0, 0) == []
