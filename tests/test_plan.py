"""The Plan: saved and loaded it is the same, and its digest tells every decision apart."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnxq.errors import OutputError, UsageError
from onnxq.numerics.affine import QuantParams
from onnxq.numerics.dtypes import INT8, UINT4, UINT8, DType
from onnxq.plan import BOUNDED, FLOORED, GIVEN, STORED, Blocks, Masking, NodePlan, Plan, Smoothing


def params(scale: object, zero: object, dtype: DType, axis: int | None = None, block: int | None = None) -> QuantParams:
    return QuantParams(np.asarray(scale, np.float32), np.asarray(zero, dtype.storage), dtype, axis, block)


def example() -> Plan:
    return Plan(
        "w8a8", "cpu",
        {n.node: n for n in (
            NodePlan("conv/1", "Conv", "w8a8", "QLinearConv", "it holds weights", (0, 1), True, "relu:0", "w"),
            NodePlan("relu", "Relu", "w8a8", "QLinearConv", "absorbed by conv/1", part_of="conv/1"),
            NodePlan("soft max", "Softmax", "float", "float", "normalisations stay float"),
            NodePlan("gru", "GRU", STORED, STORED, "its weights stored as int8", stored=("w4", "r")),
            NodePlan("q", "QuantizeLinear", GIVEN, GIVEN, "as the model has it"))},
        {"x": params(0.1, 128, UINT8), "../relu:0": params(np.float32(1e-38), 0, UINT8)},
        {"w": params([0.1, 0.2, 0.3], [0, 0, 0], INT8, axis=0),
         "w4": params(np.full((4, 2), 0.25), np.full((4, 2), 8), UINT4, axis=1, block=32)},
        added={"where": -np.inf, "where/2": float(np.finfo(np.float32).min)},
        maskings={"soft max": Masking("soft max", BOUNDED, -51.125)},
        smoothings={s.tensor: s for s in (
            Smoothing("x/1:0", ("conv/1", "conv/2"), np.float32([0.5, 2]), 1, True),
            Smoothing("h", ("fc",), np.float32([0.5, 1, 2]), -1, False, np.array([0, 1, 1])))},
        rounded={"w": np.int8([[1], [-127], [3]]), "layers.0/w:0": np.int8([[5]])},
        blocks={"w:8": Blocks(UINT4, 32, 0, "mse"), "table": Blocks(INT8, 128, 1, "absmax")},
        pruned={"w:8": np.float32([[0, 1.5], [-2, 0]])})


def smoothing(plan: Plan, **fields: object) -> None:
    plan.smoothings["h"] = dataclasses.replace(plan.smoothings["h"], **fields)  # type: ignore[arg-type]


def changed(edit: Callable[[Plan], None]) -> Plan:
    plan = example()
    edit(plan)
    return plan


def verdict(plan: Plan, **fields: object) -> None:
    plan.nodes["conv/1"] = dataclasses.replace(plan.nodes["conv/1"], **fields)  # type: ignore[arg-type]


def blocks(plan: Plan, **fields: object) -> None:
    plan.blocks["w:8"] = dataclasses.replace(plan.blocks["w:8"], **fields)  # type: ignore[arg-type]


def weight(plan: Plan, **fields: object) -> None:
    plan.weights["w"] = dataclasses.replace(plan.weights["w"], **fields)  # type: ignore[arg-type]


def test_round_trip(tmp_path: Path) -> None:
    plan = example()
    plan.save(tmp_path)
    again = Plan.load(tmp_path)
    assert again.digest() == plan.digest()
    assert (again.scheme, again.target, again.nodes) == (plan.scheme, plan.target, plan.nodes)
    assert (again.added, again.maskings, again.blocks) == (plan.added, plan.maskings, plan.blocks)
    assert [b.symmetric for b in again.blocks.values()] == [False, True]
    assert list(again.nodes) == list(plan.nodes)
    assert list(again.smoothings) == list(plan.smoothings)
    for name, one in again.smoothings.items():
        like = plan.smoothings[name]
        assert (one.tensor, one.layers, one.axis, one.absorbed) == (like.tensor, like.layers, like.axis, like.absorbed)
        np.testing.assert_array_equal(one.factors, like.factors, strict=True)
        assert (one.source is None) == (like.source is None)
        if one.source is not None:
            np.testing.assert_array_equal(one.source, like.source, strict=True)
    assert again.rounded.keys() == plan.rounded.keys()
    for name, codes in again.rounded.items():
        np.testing.assert_array_equal(codes, plan.rounded[name], strict=True)
    assert again.pruned.keys() == plan.pruned.keys()
    np.testing.assert_array_equal(again.pruned["w:8"], plan.pruned["w:8"], strict=True)
    for table, wanted in ((again.activations, plan.activations), (again.weights, plan.weights)):
        assert list(table) == list(wanted)
        for name, found in table.items():
            np.testing.assert_array_equal(found.scale, wanted[name].scale, strict=True)
            np.testing.assert_array_equal(found.zero_point, wanted[name].zero_point, strict=True)
            assert (found.dtype, found.axis, found.block_size) == (
                wanted[name].dtype, wanted[name].axis, wanted[name].block_size)


def test_the_same_plan_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        example().save(tmp_path / name)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["plan.json", "plan.npz"]
    for name in ("plan.json", "plan.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "plan.json").read_text())["nodes"][0]["int_inputs"] == [0, 1]


def test_what_is_timed_has_scales_that_are_found_quickly() -> None:
    plan = example()
    quick = plan.to_time()
    assert {b.search for b in quick.blocks.values()} == {"absmax"}
    assert {k: dataclasses.replace(b, search="absmax") for k, b in plan.blocks.items()} == quick.blocks
    assert plan.blocks["w:8"].search == "mse", "the plan itself stays"


def test_an_empty_plan(tmp_path: Path) -> None:
    Plan("float", "cpu").save(tmp_path)
    assert Plan.load(tmp_path) == Plan("float", "cpu")


EDITS: dict[str, Callable[[Plan], None]] = {
    "scheme": lambda p: setattr(p, "scheme", "w4a8"),
    "target": lambda p: setattr(p, "target", "gpu"),
    "lowering": lambda p: verdict(p, lowering="float"),
    "reason": lambda p: verdict(p, reason="because"),
    "inputs": lambda p: verdict(p, int_inputs=(0,)),
    "output": lambda p: verdict(p, int_output=False),
    "result": lambda p: verdict(p, result="other"),
    "bias": lambda p: verdict(p, bias_add="relu"),
    "channels": lambda p: verdict(p, extra_channels=1),
    "fewer nodes": lambda p: p.nodes.pop("relu"),  # type: ignore[arg-type, return-value]
    "scale": lambda p: weight(p, scale=np.float32([0.1, 0.2, np.nextafter(np.float32(0.3), np.float32(1))])),
    "zero point": lambda p: weight(p, zero_point=np.int8([0, 0, 1])),
    "dtype": lambda p: weight(p, dtype=UINT8, zero_point=np.uint8([0, 0, 0])),
    "axis": lambda p: weight(p, axis=1),
    "block": lambda p: weight(p, block_size=16),
    "shape": lambda p: weight(p, scale=p.weights["w"].scale[None], zero_point=p.weights["w"].zero_point[None]),
    "name": lambda p: p.weights.update(w2=p.weights.pop("w")),
    "activation": lambda p: p.activations.update(x=params(0.1, 127, UINT8)),
    "blocks": lambda p: p.blocks.pop("table"),  # type: ignore[arg-type, return-value]
    "block size": lambda p: blocks(p, block_size=64),
    "block type": lambda p: blocks(p, dtype=INT8),
    "block axis": lambda p: blocks(p, axis=1),
    "search": lambda p: blocks(p, search="absmax"),
    "added": lambda p: p.added.update(where=-1e30),
    "not added": lambda p: p.added.pop("where"),  # type: ignore[arg-type, return-value]
    "form": lambda p: p.maskings.update({"soft max": Masking("soft max", FLOORED, -51.125)}),
    "fill": lambda p: p.maskings.update({"soft max": Masking("soft max", BOUNDED, -51.0)}),
    "masking": lambda p: p.maskings.clear(),
    "factors": lambda p: smoothing(p, factors=np.float32([0.5, 1, 2.5])),
    "source": lambda p: smoothing(p, source=np.array([0, 0, 1])),
    "no source": lambda p: smoothing(p, source=None),
    "layers": lambda p: smoothing(p, layers=("fc", "fc2")),
    "channels' axis": lambda p: smoothing(p, axis=1),
    "absorbed": lambda p: smoothing(p, absorbed=True),
    "fewer smoothings": lambda p: p.smoothings.pop("h"),  # type: ignore[arg-type, return-value]
    "codes": lambda p: p.rounded.update(w=np.int8([[1], [-127], [2]])),
    "zeros": lambda p: p.pruned.update({"w:8": np.float32([[0, 1.5], [0, -2]])}),
    "rounded to nearest": lambda p: p.rounded.pop("w"),  # type: ignore[arg-type, return-value]
    "which table": lambda p: p.activations.update(w=p.weights.pop("w")),
}


@pytest.mark.parametrize("edit", EDITS)
def test_every_decision_is_in_the_digest(edit: str) -> None:
    assert changed(EDITS[edit]).digest() != example().digest()


def test_a_plan_may_change_masks_alone() -> None:
    assert not Plan("", "").changes
    for plan in (Plan("", "", added={"where": -1e30}),
                 Plan("", "", maskings={"softmax": Masking("softmax", FLOORED, -50.0)})):
        assert plan.changes
        assert not plan.quantizes
    assert example().quantizes


def test_copies_of_channels() -> None:
    assert Smoothing("x", ("a",), np.ones(3, np.float32), -1, True).copies.tolist() == [1, 1, 1]
    source = np.array([0, 1, 1, 1, 2, 2])
    assert Smoothing("x", ("a",), np.ones(6, np.float32), -1, True, source).copies.tolist() == [1, 3, 3, 3, 2, 2]


def test_digests_of_equal_plans_are_equal() -> None:
    assert example().digest() == example().digest()
    assert len(example().digest()) == 64
    reordered = changed(lambda p: p.weights.update(w=p.weights.pop("w")))
    assert list(reordered.weights) == ["w4", "w"]
    assert reordered.digest() == example().digest(), "the order of scales decides nothing"


def test_looking_up() -> None:
    plan = example()
    assert plan.node("relu") == plan.nodes["relu"]
    assert plan.node("x.q") is None
    assert [n.node for n in plan.quantized()] == ["conv/1"], "not what is absorbed, float or given"


BROKEN: dict[str, Callable[[Path], object]] = {
    "nothing": lambda f: [p.unlink() for p in f.iterdir()],
    "no arrays": lambda f: (f / "plan.npz").unlink(),
    "empty arrays": lambda f: (f / "plan.npz").write_bytes(b""),
    "other arrays": lambda f: (f / "plan.npz").write_bytes(b"PK\x03\x04 not a zip"),
    "cut arrays": lambda f: (f / "plan.npz").write_bytes((f / "plan.npz").read_bytes()[:-40]),
    "too few arrays": lambda f: np.savez(f / "plan.npz", x=np.zeros(1)),
    "no JSON": lambda f: (f / "plan.json").write_text("{"),
    "other JSON": lambda f: (f / "plan.json").write_text("[]"),
    "less JSON": lambda f: (f / "plan.json").write_text("{}"),
    "bytes": lambda f: (f / "plan.json").write_bytes(b"\xff\xfe"),
    "a field too many": lambda f: (f / "plan.json").write_text(
        (f / "plan.json").read_text().replace('"op": "Conv"', '"op": "Conv", "later": 1')),
    "another type": lambda f: (f / "plan.json").write_text(
        (f / "plan.json").read_text().replace('"int8"', '"int9"')),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_plan(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "plan"
    folder.mkdir()
    example().save(folder)
    BROKEN[case](folder)
    with pytest.raises(UsageError, match=r"plan holds no plan \(.+\); name a folder with plan.json and plan.npz"):
        Plan.load(folder)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError, match=r"can't be written .*; name another folder"):
        example().save(tmp_path / "file")
    example().save(tmp_path / "deep" / "new")
    assert Plan.load(tmp_path / "deep" / "new").digest() == example().digest()
    with pytest.raises(UsageError, match="holds no plan"):
        Plan.load(tmp_path / "nowhere")
