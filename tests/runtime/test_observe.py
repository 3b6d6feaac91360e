"""What ran: integer kernels seen as such, renamed and fused nodes found again, nested and unnamed ones told apart."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxq.errors import DataError, ModelError
from onnxq.runtime import observe
from onnxq.runtime.observe import Executed, NodeRow, Planned, executed, match
from onnxq.runtime.session import CPU, Session, SessionOptions

FLOAT, UINT8 = TensorProto.FLOAT, TensorProto.UINT8
RNG = np.random.default_rng(0)


def read_nodes(path: str) -> list[NodeRow]:
    graph = onnx.load(path, load_external_data=False).graph
    return [(n.name, n.op_type, n.domain, tuple(n.input), tuple(n.output)) for n in graph.node]


def value(name: str, shape: Sequence[int | str], dtype: int = FLOAT) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def save(
    folder: Path, nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], weights: dict[str, Any]
) -> str:
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, initializers), opset_imports=opsets, ir_version=9
    )
    path = folder / "model.onnx"
    onnx.save(model, str(path))
    return str(path)


def by_name(ran: Sequence[Executed]) -> dict[str, Executed]:
    return {node.name: node for node in ran}


@pytest.fixture
def own_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def qlinear_chain(folder: Path) -> tuple[str, list[Planned]]:
    """Two QLinearConv, uint8 [1, 8, 6, 6] by int8 [8, 8, 1, 1], between a Quantize- and a DequantizeLinear."""
    weights: dict[str, Any] = {"s": np.float32(0.05), "z": np.uint8(128), "ws": np.full(8, 0.01, np.float32)}
    weights["wz"] = np.zeros(8, np.int8)
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["x.q"], name="x.quantize")]
    planned = []
    for i, (tensor, result) in enumerate((("x.q", "h.q"), ("h.q", "y.q"))):
        weights[f"w{i}.q"] = RNG.integers(-127, 128, (8, 8, 1, 1), dtype=np.int8)
        inputs = [tensor, "s", "z", f"w{i}.q", "ws", "wz", "s", "z"]
        nodes.append(helper.make_node("QLinearConv", inputs, [result], name=f"conv{i}", kernel_shape=[1, 1]))
        planned.append(Planned(f"conv{i}", (result,), (f"w{i}.q",)))
    nodes.append(helper.make_node("DequantizeLinear", ["y.q", "s", "z"], ["y"], name="y.dequantize"))
    path = save(folder, nodes, [value("x", [1, 8, 6, 6])], [value("y", [1, 8, 6, 6])], weights)
    return path, planned


def test_a_chain_of_qlinearconv_is_seen_as_integer_kernels(tmp_path: Path) -> None:
    path, planned = qlinear_chain(tmp_path)
    ran = executed(path, [{"x": np.ones((1, 8, 6, 6), np.float32)}], SessionOptions(), read_nodes)
    found = match(planned, ran)
    assert set(found) == {"conv0", "conv1"}
    for node in found.values():
        assert node is not None
        assert node.op.rsplit(".", 1)[-1] == "QLinearConv"
        assert node.provider == CPU
        assert node.ms > 0
    assert found["conv0"] != found["conv1"]
    if "Transpose" in [node.op for node in ran]:  # what the layout transformation leaves on x86-64 and arm64
        assert [node.op for node in found.values() if node] == ["com.microsoft.QLinearConv"] * 2
        assert by_name(ran).keys().isdisjoint({"conv0", "conv1"})


def test_without_optimization_the_nodes_are_those_of_the_file(tmp_path: Path) -> None:
    path, _ = qlinear_chain(tmp_path)
    ran = executed(path, [{"x": np.ones((1, 8, 6, 6), np.float32)}], SessionOptions(optimize=False), read_nodes)
    assert [(node.name, node.op) for node in ran] == [
        ("x.quantize", "QuantizeLinear"),
        ("conv0", "QLinearConv"),
        ("conv1", "QLinearConv"),
        ("y.dequantize", "DequantizeLinear"),
    ]
    assert ran[1].inputs == ("x.q", "s", "z", "w0.q", "ws", "wz", "s", "z")
    assert ran[1].outputs == ("h.q",)
    assert {node.provider for node in ran} == {CPU}


def test_a_fused_matmul_and_add_are_one_node(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="/layer/matmul"),
        helper.make_node("Add", ["m", "b"], ["y"], name="/layer/add"),
    ]
    weights = {"w": np.ones((4, 400), np.float32), "b": np.ones(400, np.float32)}
    path = save(tmp_path, nodes, [value("x", [2, 4])], [value("y", [2, 400])], weights)
    ran = executed(path, [{"x": np.ones((2, 4), np.float32)}] * 3, SessionOptions(), read_nodes)
    assert [node.op for node in ran] == ["Gemm"]
    planned = [
        Planned("/layer/matmul", ("m",), ("w",)),
        Planned("/layer/add", ("y",), ("b",)),
        Planned("gone", ("z",), ()),
    ]
    assert match(planned, ran) == {"/layer/matmul": ran[0], "/layer/add": ran[0], "gone": None}


def test_a_float_convolution_in_blocked_layout_is_found(tmp_path: Path) -> None:
    """On x86-64 the node takes the name of its output tensor, and a ReorderOutput produces that tensor."""
    weights = {"w": np.ones((16, 16, 3, 3), np.float32)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="conv", kernel_shape=[3, 3])]
    path = save(tmp_path, nodes, [value("x", [1, 16, 8, 8])], [value("y", [1, 16, 6, 6])], weights)
    ran = executed(path, [{"x": np.ones((1, 16, 8, 8), np.float32)}], SessionOptions(), read_nodes)
    node = match([Planned("conv", ("y",), ("w",))], ran)["conv"]
    assert node is not None
    assert node.op.rsplit(".", 1)[-1] == "Conv"


def nested_model(folder: Path) -> str:
    """Exp, a Loop of 3 turns over Sin, an If with Cos or Tan, and Exp, then three Sin; names missing, shared, wrong."""
    one = [value("t", [2])]
    then_branch = helper.make_graph([helper.make_node("Cos", ["v1"], ["t"])], "then", [], one)
    else_branch = helper.make_graph([helper.make_node("Tan", ["v1"], ["t"], name="same")], "else", [], one)
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["c"], ["c2"]),
            helper.make_node("Sin", ["v"], ["v1"]),
            helper.make_node("If", ["c"], ["v2"], name="inner", then_branch=then_branch, else_branch=else_branch),
            helper.make_node("Exp", ["v2"], ["v3"], name="same"),
        ],
        "body",
        [value("i", [], TensorProto.INT64), value("c", [], TensorProto.BOOL), value("v", [2])],
        [value("c2", [], TensorProto.BOOL), value("v3", [2])],
    )
    nodes = [
        helper.make_node("Exp", ["x"], ["x1"], name="same"),
        helper.make_node("Loop", ["n", "go", "x1"], ["y"], body=body),
        helper.make_node("Sin", ["y"], ["z0"]),
        helper.make_node("Sin", ["z0"], ["z1"], name="Sin_2"),  # what onnxruntime calls the one before
        helper.make_node("Sin", ["z1"], ["z2"]),
    ]
    inputs = [value("x", [2]), value("go", [], TensorProto.BOOL)]
    return save(folder, nodes, inputs, [value("z2", [2])], {"n": np.int64(3)})


@pytest.mark.parametrize("optimize", [True, False])
def test_unnamed_and_nested_nodes_are_told_apart(tmp_path: Path, optimize: bool) -> None:
    feed = {"x": np.zeros(2, np.float32), "go": np.array(True)}
    ran = executed(nested_model(tmp_path), [feed, feed], SessionOptions(optimize=optimize), read_nodes)
    top, nested = ran[:5], ran[5:]
    assert [(node.op, node.outputs) for node in top] == [
        ("Exp", ("x1",)),
        ("Loop", ("y",)),
        ("Sin", ("z0",)),
        ("Sin", ("z1",)),
        ("Sin", ("z2",)),
    ]
    assert [node.name for node in top] == ["same", "Loop_1", "", "Sin_2", "Sin_4"]
    assert {node.provider for node in ran} == {CPU}
    assert sorted(node.op for node in nested) == ["Cos", "Exp", "Identity", "If", "Sin"]
    assert all(node.inputs == node.outputs == () for node in nested)


def events(rows: Sequence[tuple[str, str, int, int, int]]) -> list[dict[str, Any]]:
    """Profile events of (name, op, index, ts, dur) rows; an empty op makes a Session event of that name."""
    return [
        {
            "cat": "Node" if op else "Session",
            "name": f"{name}_kernel_time" if op else name,
            "ts": ts,
            "dur": dur,
            "args": {"op_name": op, "node_index": str(index), "provider": "P"} if op else {},
        }
        for name, op, index, ts, dur in rows
    ]


RUN = "model_run"
GRAPH = "SequentialExecutor::Execute"


def fake_session(monkeypatch: pytest.MonkeyPatch, profile: Path, *, compiles: bool = False) -> list[str | None]:
    """A Session that runs nothing and leaves `profile`; returns the list of optimized paths it will be asked for."""
    asked: list[str | None] = []

    class Fake:
        def __init__(self, *_: Any, profile_prefix: str, optimized_path: str | None = None) -> None:
            asked.append(optimized_path)
            if compiles and optimized_path is not None:
                raise ModelError("onnxruntime can't load m: Unable to serialize model as it contains compiled nodes; x")

        def run(self, feed: Any) -> None:
            pass

        def end_profiling(self) -> str:
            return str(profile)

    monkeypatch.setattr(observe, "Session", Fake)
    return asked


def test_times_are_medians_with_all_turns_of_a_loop_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_run = [("a", "Exp", 0, 10, 4), ("b", "Sin", 0, 20, 3), (GRAPH, "", 0, 19, 5), ("b", "Sin", 0, 30, 5)]
    one_run += [(GRAPH, "", 0, 29, 7), ("loop", "Loop", 1, 15, 25), (GRAPH, "", 0, 9, 40), (RUN, "", 0, 8, 42)]
    later = [(name, op, index, ts + 100, dur * 3) for name, op, index, ts, dur in one_run]
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(events(one_run + later)))
    fake_session(monkeypatch, profile)
    rows: list[NodeRow] = [("a", "Exp", "", ("x",), ("y",)), ("loop", "Loop", "", ("y",), ("z",))]
    rows.append(("never", "Gelu", "com.microsoft", ("z",), ("u",)))
    assert executed("m", [{}, {}], SessionOptions(), lambda _: rows) == [
        Executed("a", "Exp", "P", 0.008, ("x",), ("y",)),
        Executed("loop", "Loop", "P", 0.05, ("y",), ("z",)),
        Executed("never", "com.microsoft.Gelu", "", 0.0, ("z",), ("u",)),
        Executed("b", "Sin", "P", 0.014, (), ()),  # four turns with a median of 7, in two runs
    ]


def test_a_provider_that_compiles_subgraphs_is_observed_by_its_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(events([("TRT_0", "TRT", 0, 10, 4), (GRAPH, "", 0, 9, 6), (RUN, "", 0, 8, 8)])))
    asked = fake_session(monkeypatch, profile, compiles=True)
    assert executed("m", [{}], SessionOptions(), read_nodes) == [Executed("TRT_0", "TRT", "P", 0.004, (), ())]
    assert len(asked) == 2
    assert asked[1] is None


def test_a_profile_that_is_not_json_is_a_model_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text('[{"name": "a"b_kernel_time"}]')
    fake_session(monkeypatch, profile)
    with pytest.raises(ModelError, match=r"not valid JSON.*update onnxruntime or rename"):
        executed("m", [{}], SessionOptions(), lambda _: [])


def test_temporary_files_are_removed_and_weights_lie_beside_the_graph(own_temporary: Path, tmp_path: Path) -> None:
    weights = {"w": np.ones((8, 40), np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = save(tmp_path, nodes, [value("x", [1, 8])], [value("y", [1, 40])], weights)
    seen: dict[str, int] = {}

    def looking(saved: str) -> list[NodeRow]:
        assert Path(saved).is_relative_to(own_temporary)
        seen.update({file.name: file.stat().st_size for file in Path(saved).parent.iterdir()})
        return read_nodes(saved)

    executed(path, [{"x": np.ones((1, 8), np.float32)}], SessionOptions(), looking)
    assert seen["optimized.onnx"] < 1000
    assert seen["optimized.onnx.data"] >= weights["w"].nbytes
    assert list(own_temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("feeds", "message"), [([], "no feeds"), ([{"x": np.ones((1, 8), np.float32)}], "'x' was given float32")]
)
def test_feeds_that_do_not_fit_leave_nothing_behind(
    own_temporary: Path, tmp_path: Path, feeds: list[Any], message: str
) -> None:
    path, _ = qlinear_chain(tmp_path)
    with pytest.raises(DataError, match=message):
        executed(path, feeds, SessionOptions(), read_nodes)
    assert list(own_temporary.iterdir()) == []


def test_a_model_that_does_not_load_leaves_nothing_behind(own_temporary: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="check the path"):
        executed(tmp_path / "nothing.onnx", [{}], SessionOptions(), read_nodes)
    assert list(own_temporary.iterdir()) == []


@pytest.mark.parametrize("named", [True, False])
def test_a_transformer_block_joins_completely(tmp_path: Path, named: bool) -> None:
    """40 layers with parallel branches and slashed or no names: each output is seen on its own kernel."""
    nodes: list[Any] = []
    weights: dict[str, Any] = {}
    tensor = "x"
    for i in range(40):
        pre = f"/model/layers.{i}/"
        weights[pre + "w"] = RNG.standard_normal((8, 8)).astype(np.float32) * 0.1
        steps = [("MatMul", [tensor, pre + "w"], "m"), ("Sigmoid", [pre + "m"], "g"), ("Tanh", [tensor], "t")]
        steps += [
            ("Mul", [pre + "m", pre + "g"], "p"),
            ("Softmax", [pre + "t"], "q"),
            ("Add", [pre + "p", pre + "q"], "o"),
        ]
        nodes += [helper.make_node(op, ins, [pre + out], name=pre + op if named else "") for op, ins, out in steps]
        tensor = pre + "o"
    path = save(tmp_path, nodes, [value("x", ["n", 8])], [value(tensor, ["n", 8])], weights)
    for options in (SessionOptions(), SessionOptions(optimize=False)):
        ran = executed(path, [{"x": np.ones((4, 8), np.float32)}], options, read_nodes)
        assert all(node.provider == CPU and node.outputs for node in ran)
        assert len({node.name for node in ran}) == len(ran)
    # Unoptimized, the generated names count the file's nodes: an independent check of the pairing.
    for node in ran:
        position = next(i for i, n in enumerate(nodes) if n.output[0] == node.outputs[0])
        assert node.name == (nodes[position].name if named else f"{nodes[position].op_type}_{position}")


def node_of(name: str, op: str = "Conv", inputs: tuple[str, ...] = (), outputs: tuple[str, ...] = ()) -> Executed:
    return Executed(name, op, CPU, 0.1, inputs, outputs)


@pytest.mark.parametrize(
    ("ran", "expected"),
    [
        ([node_of("other", outputs=("y",)), node_of("conv_token_3"), node_of("conv")], 2),
        ([node_of("other", outputs=("y",)), node_of("conv_token_3")], 1),
        (
            [
                node_of("conv2"),
                node_of("conv_token_x"),
                node_of("reader", inputs=("w",)),
                node_of("last", outputs=("y",)),
            ],
            3,
        ),
        ([node_of("tr", "Transpose", ("t",), ("y",)), node_of("reader", inputs=("x", "w"))], 1),
        ([node_of("dq", "DequantizeLinear", ("w",)), node_of("r", "com.microsoft.nchwc.ReorderInput", ("w",))], 0),
        ([node_of("y_nchwc", outputs=("r",)), node_of("ro", "com.microsoft.nchwc.ReorderOutput", ("r",), ("y",))], 0),
        ([node_of("conv_token_1", "Transpose"), node_of("z", inputs=("", "v"), outputs=("",))], None),
        ([], None),
    ],
)
def test_match_looks_for_name_then_output_then_weight(ran: list[Executed], expected: int | None) -> None:
    found = match([Planned("conv", ("y", ""), ("w",))], ran)
    assert found == {"conv": None if expected is None else ran[expected]}


def test_a_nested_node_gives_way_to_one_of_that_name_in_the_top_graph() -> None:
    ran = [node_of("conv", outputs=("y",)), node_of("conv")]
    assert match([Planned("conv", (), ())], ran) == {"conv": ran[0]}


def test_the_observed_run_computes_what_a_plain_one_does(tmp_path: Path) -> None:
    """Observation must not change the model: the same session options give finite, equal results."""
    path, _ = qlinear_chain(tmp_path)
    feed = {"x": RNG.standard_normal((1, 8, 6, 6)).astype(np.float32)}
    before = Session(path).run(feed)["y"]
    executed(path, [feed], SessionOptions(), read_nodes)
    after = Session(path).run(feed)["y"]
    assert np.isfinite(before).all()
    np.testing.assert_array_equal(before, after)
