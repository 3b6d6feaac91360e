"""Convs of few channels that read channels of zeros besides: which do, and that nothing else comes out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lowering_support
import numpy as np
import onnx
import pytest
from conftest import make_model, node, random
from lowering_support import CPU, FORMATS, UNOPTIMIZED, Array, Made, codes_of, make

from onnxq.graph import load, save
from onnxq.passes.lower import lower
from onnxq.passes.manager import Context, PassManager
from onnxq.passes.quantize import quantize
from onnxq.plan import Plan
from onnxq.runtime.session import Session
from onnxq.targets import WITHOUT_VNNI

OPTIMIZED = pytest.mark.parametrize("optimize", [True, False], ids=["optimized", "plain"])


@pytest.fixture
def saturating(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planned for a processor without VNNI runs on any."""
    monkeypatch.setattr(lowering_support, "HERE", WITHOUT_VNNI)


def stem(*filters: int, **attrs: Any) -> onnx.ModelProto:
    return make_model([node("Conv", "x w b", "y", name="conv", **attrs)],
                      {"x": [2, filters[1] * attrs.get("group", 1), 12, 11]}, {"y": [None] * 4},
                      {"w": random(*filters, seed=1), "b": random(filters[0], seed=2)})


def images(channels: int) -> list[dict[str, Array]]:
    """Of a zero point that is neither 0 nor in the middle."""
    return [{"x": random(2, channels, 12, 11, seed=3) + np.float32(1.5)}]


def padded(made: Made) -> bool:
    return "Pad" in made.stored()


def off(made: Made, found: dict[str, Array]) -> Array:
    """Codes of y against those of the unoptimized QDQ form."""
    return np.abs(codes_of(made, "y", found["y"]) - codes_of(made, "y", made.run(made.twin, optimize=False)["y"]))


@OPTIMIZED
@pytest.mark.usefixtures("saturating")
@pytest.mark.parametrize("filters", [[16, 3, 3, 3], [8, 2, 3, 3], [5, 3, 1, 1], [32, 3, 2, 3]], ids=str)
def test_few_channels_are_padded_to_four(filters: list[int], optimize: bool, tmp_path: Path) -> None:
    model = stem(*filters, pads=[1, 1, 0, 1], strides=[2, 1])
    made = make(model, tmp_path, images(filters[1]))
    assert (padded(made), made.ran("conv"), made.skips) == (True, ["QLinearConv"], [])
    assert made.initializers()["w.q.wide"].shape == (filters[0], 4, *filters[2:])
    assert "w.q" not in made.initializers()
    wrong = off(made, made.run(made.compiled, optimize=optimize))
    assert wrong.max() <= 1
    assert np.mean(wrong) < 0.01, "more than a tie here and there"
    context = Context(lowering_support.HERE, made.plan)
    assert PassManager(lower("qoperator")).run(made.graph, context) is False


@pytest.mark.usefixtures("saturating")
def test_both_ways_of_pairing_weights_are_exact(tmp_path: Path) -> None:
    """Kernels take 3 channels of two positions as [0 1] [2 0] [1 2], and 4 as [0 1] [2 -]: each filter has large pairs
    in another place."""
    weight = np.full((4, 3, 2, 2), 0.1, np.float32)
    weight[0, :2, 0, 0] = weight[1, 1:, 0, 1] = weight[2, :2, 0, 1] = weight[3, 1:, 0, 0] = 1
    model = make_model([node("Conv", "x w", "y", name="conv")], {"x": [1, 3, 8, 8]}, {"y": [None] * 4}, {"w": weight})
    given = {"x": np.full((1, 3, 8, 8), 2, np.float32)}  # code 255 all over
    for fmt in FORMATS:
        made = make(model, tmp_path, [given], fmt)
        assert padded(made) == (fmt == "qoperator")
        for optimize in (True, False):
            assert off(made, made.run(made.compiled, optimize=optimize)).max() <= 1


@pytest.mark.usefixtures("saturating")
@pytest.mark.parametrize("model", [stem(8, 3, 7, 7), stem(8, 4, 3, 3), stem(8, 1, 3, 3), stem(6, 3, 3, 3, group=2)],
                         ids=["large window", "4 channels", "1 channel", "groups"])
def test_other_convs_keep_their_channels(model: onnx.ModelProto, tmp_path: Path) -> None:
    made = make(model, tmp_path, images(model.graph.input[0].type.tensor_type.shape.dim[1].dim_value))
    assert (padded(made), made.plan.nodes["conv"].extra_channels, made.skips) == (False, 0, [])


def test_none_are_padded_where_the_target_does_not_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering_support, "HERE", CPU)
    assert not padded(make(stem(8, 3, 3, 3), tmp_path, images(3)))


@pytest.mark.usefixtures("saturating")
def test_two_convs_share_their_wide_weights(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "a", name="one"), node("Conv", "x w", "b", name="two", strides=[2, 2])]
    model = make_model(nodes, {"x": [1, 3, 12, 11]}, {"a": [None] * 4, "b": [None] * 4}, {"w": random(8, 3, 3, 3)})
    made = make(model, tmp_path, [{"x": random(1, 3, 12, 11, seed=3)}])
    assert made.stored().count("Pad") == 2
    assert made.ran("one", "two") == ["QLinearConv"] * 2
    assert [name for name, v in made.initializers().items() if v.shape == (8, 4, 3, 3)] == ["w.q.wide"]


@pytest.mark.usefixtures("saturating")
def test_a_plan_says_it_wherever_it_is_replayed(tmp_path: Path) -> None:
    made = make(stem(8, 3, 3, 3), tmp_path, images(3))
    made.plan.save(tmp_path / "plan")
    graph, context = load(made.canonical), Context(CPU, Plan.load(tmp_path / "plan"))
    PassManager([*quantize(), *lower("qoperator")]).run(graph, context)
    save(graph, tmp_path / "again.onnx")
    wanted = made.run(made.compiled, optimize=False)["y"]
    np.testing.assert_array_equal(Session(tmp_path / "again.onnx", UNOPTIMIZED).run(made.feeds[0])["y"], wanted)
    assert (tmp_path / "again.onnx").read_bytes() == made.compiled.read_bytes()
