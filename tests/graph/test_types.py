"""Element types by the operators around a tensor."""

from __future__ import annotations

from conftest import Opener, body, make_model, node, random
from onnx import TensorProto

from onnxq.graph import element_types

FLOAT16, INT64 = TensorProto.FLOAT16, TensorProto.INT64


def test_types_reach_across_operators_of_unknown_domains(opened: Opener) -> None:
    """Forward from y through Relu; backward from w through MatMul, and Where's branches but not its condition."""
    graph = opened(make_model(
        [node("Op", "x", "a b", domain="custom"), node("Relu", "a", "r"), node("MatMul", "r w", "m"),
         node("Where", "b m k", "y"), node("Op", "y", "lost", domain="custom"), node("Shape", "lost", "s")],
        {"x": [2, 4]}, {"s": (INT64, [1])}, {"w": random(4, 3), "k": random(3)}, domains={"custom": 1}))
    found = {name: str(dtype) for name, dtype in element_types(graph).items()}
    assert found == {"x": "float32", "a": "float32", "r": "float32", "w": "float32", "m": "float32", "k": "float32",
                     "y": "float32", "s": "int64"}


def test_a_reshape_shares_its_data_type_only(opened: Opener) -> None:
    graph = opened(make_model(
        [node("Op", "x", "a", domain="custom"), node("Reshape", "a shape", "y")],
        {"x": [4]}, {"y": (FLOAT16, [2, 2])}, {"shape": [2, 2]}, domains={"custom": 1}))
    found = element_types(graph)
    assert (str(found["a"]), str(found["shape"])) == ("float16", "int64")


def test_bodies_are_seen_and_control_flow_shares_nothing(opened: Opener) -> None:
    then = body([node("Op", "x", "a", domain="custom"), node("Add", "a x", "t")], {"t": None}, "then")
    other = body([node("Identity", "x", "e")], {"e": None}, "other")
    graph = opened(make_model([node("If", "c", "y", then_branch=then, else_branch=other)],
                              {"c": (TensorProto.BOOL, []), "x": (FLOAT16, [2])}, {"y": (FLOAT16, [2])},
                              domains={"custom": 1}))
    found = {name: str(dtype) for name, dtype in element_types(graph).items()}
    assert (found["a"], found["c"]) == ("float16", "bool")


def test_bfloat16_is_a_type_and_float8_is_none(opened: Opener) -> None:
    model = make_model([node("Cast", "x", "b", to=TensorProto.BFLOAT16), node("Cast", "b", "y", to=1),
                        node("Cast", "x", "f", to=TensorProto.FLOAT8E4M3FN), node("Cast", "f", "z", to=1)],
                       {"x": [2]}, {"y": [2], "z": [2]}, opset=19, ir_version=9)
    found = {name: str(dtype) for name, dtype in element_types(opened(model)).items()}
    assert found == {"x": "float32", "b": "bfloat16", "y": "float32", "z": "float32"}
