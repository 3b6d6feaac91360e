"""What ONNX's schemas let be float16."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import Opener, make_model, node

from onnxq.graph import HALF, Slot, slots


def test_each_input_and_output_has_its_slot(opened: Opener) -> None:
    graph = opened(make_model([node("Resize", "x _ s", "y"), node("Range", "a a a", "r")],
                              {"x": [1, 1, 2, 2], "a": []}, {"y": [1, 1, "h", "w"], "r": ["n"]},
                              {"s": np.float32([1, 1, 2, 2])}))
    resize, ranged = graph.nodes
    assert slots(resize, 17, HALF[0]) == (
        [Slot("T1", True), Slot("T2", True), Slot("tensor(float)", False)], [Slot("T1", True)])
    assert slots(ranged, 17, HALF[0]) == ([Slot("T", False)] * 3, [Slot("T", False)])
    assert slots(ranged, 17, np.dtype(np.float32)) == ([Slot("T", True)] * 3, [Slot("T", True)])


@pytest.mark.parametrize(("opset", "allowed"), [(13, False), (14, True)])
def test_schemas_are_those_of_the_opset(opset: int, allowed: bool, opened: Opener) -> None:
    graph = opened(make_model([node("CumSum", "x a", "y")], {"x": [3]}, {"y": [3]}, {"a": np.int64(0)}, opset))
    found = slots(graph.nodes[0], opset, HALF[0])
    assert found == ([Slot("T", allowed), Slot("T2", False)], [Slot("T", allowed)])


def test_operators_that_onnx_lacks(opened: Opener) -> None:
    graph = opened(make_model([node("Gelu", "x", "y", domain="com.microsoft")], {"x": [3]}, {"y": [3]},
                              domains={"com.microsoft": 1}))
    assert slots(graph.nodes[0], 17, HALF[0]) is None
