"""Which LSTMs the dynamic kernel gets, under which schemes, and why not the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, body, make_model, node, random
from lowering_support import CPU, canonical, outlined, recipe, verdicts
from onnx import TensorProto

from onnxq.errors import ModelError
from onnxq.planner.outline import outline
from onnxq.planner.scales import finish
from onnxq.recipe import Match, Rule

H = CPU.least_hidden
SCHEMES = ("w8a8", "w8a8-dynamic-tensor")
STORED = "stored: weights stored as int8 to save space, computed in float"


def weights(hidden: int = H, directions: int = 1, inputs: int = 24, seed: int = 0) -> dict[str, Any]:
    return {"w": random(directions, 4 * hidden, inputs, seed=seed) / 5,
            "r": random(directions, 4 * hidden, hidden, seed=seed) / 8}


def model(stored: dict[str, Any] | None = None, hidden: int = H, **attrs: Any) -> onnx.ModelProto:
    return make_model([node("LSTM", "x w r", "y", name="lstm", hidden_size=hidden, **attrs)], {"x": ["s", "n", 24]},
                      {"y": None}, weights(hidden) if stored is None else stored)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_large_lstm_runs_on_codes_found_at_run_time(scheme: str, opened: Opener) -> None:
    graph = canonical(opened(model(weights(directions=2), direction="bidirectional")))
    found = outline(graph, recipe(scheme), CPU)
    plan = found.nodes["lstm"]
    assert (plan.scheme, plan.lowering, plan.activation) == (scheme, "DynamicQuantizeLSTM", "tensor")
    assert (plan.stored, plan.result, plan.int_output) == (("w", "r"), "y", False)
    assert found.ranges_of == []  # no range of it is calibrated
    scales = finish(found, graph, {}, recipe(scheme), CPU).weights
    for name, values in weights(directions=2).items():
        assert (scales[name].axis, scales[name].dtype.name) == (1, "int8")
        np.testing.assert_allclose(scales[name].scale, np.abs(values).max(axis=(0, 2)) / 127, rtol=1e-6)


def test_schemes_with_finer_scales_or_without_lstms_leave_it_float(opened: Opener) -> None:
    assert verdicts(opened(model()), "float") == {"lstm": "float: the scheme is float"}
    assert verdicts(opened(model()), "w8a8-dynamic") == {
        "lstm": f"{STORED}: scheme w8a8-dynamic quantizes MatMul, Gemm alone"}


FORMS = {  # model, reason
    "small": (model(hidden=H - 1),
              f"hidden size {H - 1} is below {H}: quantizing each step costs more than int8 gains"),
    "batch first": (model(layout=1), "its layout is batch first, which the int8 kernel does not take"),
    "computed": (make_model([node("Exp", "z", "w"), node("LSTM", "x w r", "y", name="lstm", hidden_size=H)],
                            {"x": ["s", "n", 24], "z": [1, 4 * H, 24]}, {"y": None}, {"r": weights()["r"]}),
                 "its weights are computed"),
    "taken name": (make_model([node("LSTM", "x w r", "y", name="lstm", hidden_size=H), node("Exp", "y", "r.lstm.q")],
                              {"x": ["s", "n", 24]}, {"r.lstm.q": None}, weights()),
                   "the model has a tensor 'r.lstm.q' already, a name that its codes would take"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_forms_that_the_kernel_does_not_take(form: str, scheme: str, opened: Opener) -> None:
    source, reason = FORMS[form]
    found = verdicts(opened(source), scheme)["lstm"]
    assert found == f"{STORED}: {reason}"


def test_doubles_are_left_alone(opened: Opener) -> None:
    stored = {name: values.astype(np.float64) for name, values in weights().items()}
    double = make_model([node("LSTM", "x w r", "y", name="lstm", hidden_size=H)],
                        {"x": (TensorProto.DOUBLE, ["s", "n", 24])}, {"y": (TensorProto.DOUBLE, None)}, stored)
    assert verdicts(opened(double))["lstm"] == "float: it does not work on float32"


def test_what_a_user_keeps_float_stays_float(opened: Opener) -> None:
    assert verdicts(opened(model()), keep=["lstm"]) == {"lstm": "float: kept float as asked (lstm)"}
    rule = Rule(Match(op="LSTM"), "float", "too delicate")
    assert verdicts(opened(model()), rules=[rule]) == {"lstm": "float: too delicate"}


def test_lstms_in_bodies_are_taken_too(opened: Opener) -> None:
    then = body([node("LSTM", "x w r", "a", name="inner", hidden_size=H)], {"a": None}, "then")
    other = body([node("LSTM", "x w2 r2", "b", name="kept", hidden_size=H)], {"b": None}, "other",
                 {f"{k}2": v for k, v in weights(seed=1).items()})
    graph = opened(make_model([node("If", "c", "y", name="if", then_branch=then, else_branch=other)],
                              {"x": ["s", "n", 24], "c": (TensorProto.BOOL, [])}, {"y": None}, weights()))
    assert outlined(graph, keep=["kept"]).nodes["inner"].lowering == "DynamicQuantizeLSTM"
    assert outlined(graph, keep=["kept"]).nodes["kept"].scheme == "float"


def test_a_weight_that_is_no_number_names_its_node(opened: Opener) -> None:
    stored = weights()
    stored["r"][0, 3, 5] = np.nan
    graph = canonical(opened(model(stored)))
    with pytest.raises(ModelError, match="the weights 'r' of lstm hold NaN or infinite values; export the model again"):
        finish(outline(graph, recipe(), CPU), graph, {}, recipe(), CPU)
