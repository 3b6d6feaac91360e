"""One node by what a user calls it."""

from __future__ import annotations

import pytest

from onnxq.errors import UsageError
from onnxq.explanation.lookup import find

KNOWN = {
    "/layer.0/query/MatMul": [["/layer.0/query/MatMul"], ["q0"], ["shared"]],
    "/layer.1/query/MatMul": [["/layer.1/query/MatMul"], ["q1"], ["shared"]],
    "/layer.1/query/Add": [["/layer.1/query/Add"], ["/layer.1/query/sum"], []],
    "q1": [["q1"], ["other"], []],
    "[odd]*": [["[odd]*"], ["o"], ["/layer.1/query/weight"]],
}


@pytest.mark.parametrize(("wanted", "node"), [
    ("/layer.0/query/MatMul", "/layer.0/query/MatMul"),
    ("q0", "/layer.0/query/MatMul"),  # by what it makes
    ("q1", "q1"),  # a node's own name wins over a tensor's
    ("1/query/MatMul", "/layer.1/query/MatMul"),  # by its end
    ("1.query.MatMul", "/layer.1/query/MatMul"),  # '.' and '/' are alike
    ("sum", "/layer.1/query/Add"),
    ("*1*MatMul", "/layer.1/query/MatMul"),
    ("*1{.,/}query/A*", "/layer.1/query/Add"),
    ("*weight", "[odd]*"),
    ("[odd]*", "[odd]*"),  # equal wins over the glob, which would fit none
])
def test_what_is_found(wanted: str, node: str) -> None:
    assert find(wanted, KNOWN, "m.onnx") == node


@pytest.mark.parametrize(("wanted", "names"), [
    ("MatMul", ["/layer.0/query/MatMul", "/layer.1/query/MatMul"]),
    ("shared", ["/layer.0/query/MatMul", "/layer.1/query/MatMul"]),
    ("*query*", ["/layer.0/query/MatMul", "/layer.1/query/MatMul", "/layer.1/query/Add"]),
])
def test_several_are_listed(wanted: str, names: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        find(wanted, KNOWN, "m.onnx")
    assert str(caught.value) == (f"'{wanted}' stands for {len(names)} nodes of m.onnx: {', '.join(names)}; "
                                 "name one of them")


def test_of_many_five_are_shown() -> None:
    many = {f"n{k}": [[f"n{k}"]] for k in range(12)}
    with pytest.raises(UsageError, match=r"12 nodes of m.onnx: n0, n1, n2, n3, n4 and 7 more; name one"):
        find("n*", many, "m.onnx")


@pytest.mark.parametrize(("wanted", "near"), [
    ("layer.0/query/MatMull", "/layer.0/query/MatMul"),
    ("LAYER.1/QUERY/ADD", "/layer.1/query/Add"),  # case counts, and is told
    ("uery/A", "/layer.1/query/Add"),
    ("Mtmul", "MatMul"),
])
def test_near_names_are_given(wanted: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        find(wanted, KNOWN, "m.onnx", "; look there")
    text = str(caught.value)
    assert text.startswith(f"m.onnx has no node '{wanted}', and none that makes such a tensor; near: ")
    assert near in text
    assert text.endswith("; look there")


def test_nothing_near_and_nothing_known() -> None:
    for known in (KNOWN, {}):
        with pytest.raises(UsageError, match=r"such a tensor; onnxq inspect MODEL --json lists its nodes$"):
            find("%%%%", known, "m.onnx")
    with pytest.raises(UsageError, match="has no node ''"):
        find("", KNOWN, "m.onnx")
