"""Which kernel an AveragePool on codes is given to, and that it is timed as such."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Opener, make_model, node, random
from lowering_support import CPU, HERE, ONE_THREAD, canonical, recipe

from onnxq.planner.candidates import emit, forms, units
from onnxq.planner.outline import outline
from onnxq.planner.pools import pool_kernel
from onnxq.planner.pricing import price
from onnxq.planner.scales import finish
from onnxq.runtime.timings import TimingCache
from onnxq.targets import Target

CONV, POOL = "QLinearConv", "QLinearAveragePool"
PADDED = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
FREE = ["n", 8, None, None]


def kernel(opened: Opener, attrs: dict[str, Any], shape: list[Any], target: Target = CPU) -> str:
    graph = opened(make_model([node("AveragePool", "x", "y", **attrs)], {"x": shape}, {"y": [None] * len(shape)}))
    return pool_kernel(graph.nodes[0], target)


@pytest.mark.parametrize(("attrs", "shape", "wanted"), [
    pytest.param({"kernel_shape": [2, 2], "strides": [2, 2]}, FREE, CONV, id="no padding"),
    pytest.param({"kernel_shape": [2, 2], "auto_pad": "VALID"}, FREE, CONV, id="none by name"),
    pytest.param({**PADDED, "count_include_pad": 1}, FREE, CONV, id="it counts"),
    pytest.param(PADDED, ["n", 8, 6, 6], CONV, id="sizes are known"),
    pytest.param(PADDED, [1, 8, "h", 6], POOL, id="height is not"),
    pytest.param({"kernel_shape": [2, 2]}, [1, "c", 6, 6], POOL, id="channels are not"),
    pytest.param({"kernel_shape": [5, 2]}, [1, 8, 6, 6], POOL, id="large"),
    pytest.param({"kernel_shape": [3]}, [1, 8, 6], POOL, id="1-D"),
    pytest.param({"kernel_shape": [2, 2, 2]}, [1, 8, 6, 6, 6], POOL, id="3-D"),
    pytest.param({"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}, [1, 8, 7, 7], POOL, id="ceil_mode"),
    pytest.param({"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}, [1, 8, 6, 6], POOL, id="auto_pad"),
    pytest.param({"kernel_shape": [2, 3], "pads": [1, 1, 1, 1]}, [1, 8, 6, 6], POOL, id="divided by 6, 4, 3 and 2"),
    pytest.param({"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, [1, 8, 2, 2], CONV, id="divided by 4 everywhere"),
])
def test_small_windows_are_summed_by_a_conv(attrs: dict[str, Any], shape: list[Any], wanted: str,
                                            opened: Opener) -> None:
    assert kernel(opened, attrs, shape) == wanted


def test_a_target_may_have_no_such_kernel(opened: Opener) -> None:
    plain = {key: name for key, name in CPU.lowerings.items() if key != ("AveragePool", "sum")}
    assert kernel(opened, PADDED, [1, 8, 6, 6], replace(CPU, lowerings=plain)) == POOL


@pytest.mark.parametrize(("attrs", "written"), [
    ({"kernel_shape": [2, 2], "strides": [2, 2]}, [CONV]),
    (PADDED, [CONV, CONV, "Where", CONV, "Where"]),
], ids=["apart", "padded"])
def test_a_pool_is_timed_in_the_form_that_is_written(attrs: dict[str, Any], written: list[str], opened: Opener,
                                                     tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "a"), node("AveragePool", "a", "p", name="pool", **attrs),
             node("Relu", "p", "r", name="relu"), node("Conv", "r w", "y")]
    model = make_model(nodes, {"x": [2, 8, 6, 6]}, {"y": None}, {"w": random(8, 8, 1, 1)})
    graph = canonical(opened(model))
    found = outline(graph, recipe(), HERE)
    plan = finish(found, graph, dict.fromkeys(found.ranges_of, (-4.0, 4.0)), recipe(), HERE)
    assert plan.nodes["pool"].reason.startswith("between int8 operators; over so few elements a Conv of ones is")
    unit = units(plan, graph)[1]
    assert (unit.members, list(forms(unit, plan, HERE))) == (("pool", "relu"), ["float", CONV])
    form, _ = emit(graph, unit, forms(unit, plan, HERE)[CONV], HERE, {"a": random(2, 8, 6, 6)}, "qoperator")
    assert [n.op for n in form.graph.nodes] == written
    prices = price(graph, plan, HERE, [{"x": random(2, 8, 6, 6)}], ONE_THREAD, TimingCache({"on": "this"}, tmp_path))
    assert prices.faults == []
    assert prices.of("pool").keys() == {"float", CONV}
