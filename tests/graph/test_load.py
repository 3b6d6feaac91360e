"""Loading: what is refused and how, and that everything that exporters write differently comes out alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, assert_same, body, make_model, node, random, run, value
from half_support import HALVES, NUMPY, nearest, to_half
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from onnxq.errors import GraphError, ModelError
from onnxq.graph import Graph, dtype_of, is_constant, load, read_nodes, save, shape_of, stored_bytes

Written = Callable[[Graph], Path]
IDS = {"x": [2, 3]}
RELU = node("Relu", "x", "y")


def named(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Nodes by name, bodies included."""
    found = {}
    frontier = [model.graph]
    while frontier:
        for item in (graph := frontier.pop()).node:
            assert item.name not in found, f"{item.name} twice in {graph.name}"
            found[item.name] = item
            frontier += [a.g for a in item.attribute if a.type == AttributeProto.GRAPH]
    return found


def attribute(item: onnx.NodeProto, name: str) -> AttributeProto:
    return next(a for a in item.attribute if a.name == name)


# ------------------------------------------------------------------ refused


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing\.onnx does not exist; check the path"):
        load(tmp_path / "nothing.onnx")
    with pytest.raises(ModelError, match=r"is not a file; name the \.onnx file itself"):
        load(tmp_path)


def test_not_onnx(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="holds no ONNX graph"):
        load(path)
    path.write_bytes(np.random.default_rng(1).bytes(4096))
    with pytest.raises(ModelError, match="is not an ONNX model or is cut short; export or copy it again"):
        load(path)
    path.write_text("model: relu\n")
    with pytest.raises(ModelError, match="is not an ONNX model or is cut short"):
        load(path)


def test_a_truncated_model_is_never_loaded(tmp_path: Path) -> None:
    whole = make_model([node("MatMul", "x w", "h"), node("Relu", "h", "y")], IDS, {"y": [2, 4]},
                       {"w": random(3, 4)}).SerializeToString()
    path = tmp_path / "m.onnx"
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"cut short|holds no ONNX graph|has no nodes"):
            load(path)
    path.write_bytes(whole)
    assert [n.op for n in load(path).nodes] == ["MatMul", "Relu"]


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(make_model([RELU], IDS, {"y": [2, 3]}), path)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelError, match=r"can't be read \(Permission denied\); check its permissions"):
        load(path)


def test_no_nodes(opened: Opener) -> None:
    with pytest.raises(ModelError, match="has no nodes, so there is nothing to compile"):
        opened(make_model([], {"x": [1]}, {"x": [1]}))


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
def test_half_types_are_carried(opened: Opener, written: Written, capfd: pytest.CaptureFixture[str],
                                dtype: int) -> None:
    """Ports, weights, Constant nodes, those of bodies, too; read as arrays of the type, and nothing is printed."""
    numbers = np.array([1.5, -2, 6e-8], np.float32)
    branch = body([node("Add", "x half", "r")], {"r": None}, "b")
    model = to_half(make_model(
        [node("Constant", "", "k", value=numpy_helper.from_array(numbers)), node("Add", "k half", "s"),
         node("If", "c", "t", then_branch=branch, else_branch=branch), node("Add", "s t", "y")],
        {"x": [3], "c": (TensorProto.BOOL, [])}, {"y": [3]}, {"half": numbers}), dtype)
    numbers = nearest(numbers, dtype)
    graph = opened(model)
    assert [dtype_of(t) for t in (*graph.inputs[:1], *graph.outputs)] == [NUMPY[dtype]] * 2
    assert {t.name: graph.read(t).tolist() for t in graph.nodes[0].inputs} == {
        "k": numbers.tolist(), "half": numbers.tolist()}
    assert str(graph.ports()[0]) == f"{NUMPY[dtype].name} [3]"
    stored = onnx.load(written(graph)).graph
    assert {t.name: (t.data_type, numpy_helper.to_array(t).tolist()) for t in stored.initializer} == {
        name: (dtype, numbers.tolist()) for name in ("k", "half")}
    assert [v.type.tensor_type.elem_type for v in (stored.input[0], *stored.output)] == [dtype] * 2
    assert capfd.readouterr() == ("", "")


def test_opset_below_7_is_refused(opened: Opener) -> None:
    with pytest.raises(ModelError, match="uses opset 6; the oldest that onnxq reads is 7: export it anew"):
        opened(make_model([RELU], IDS, {"y": [2, 3]}, opset=6))


@pytest.mark.parametrize("where", ["input", "output"])
def test_sequence_port_is_refused(opened: Opener, where: str) -> None:
    sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [2])
    if where == "input":
        model = make_model([node("ConcatFromSequence", "s", "y", axis=0)], {}, {"y": [None]})
        model.graph.input.append(sequence)
    else:
        model = make_model([node("SplitToSequence", "x", "s")], IDS, {})
        model.graph.output.append(sequence)
    with pytest.raises(GraphError, match="'s' is of kind sequence_type, which onnxq does not carry; export"):
        opened(model)


def test_list_of_graphs_is_refused(opened: Opener) -> None:
    odd = node("Odd", "x", "y", "odd", domain="custom")
    odd.attribute.append(helper.make_attribute("g", [body([RELU], {"y": [2, 3]})]))
    with pytest.raises(GraphError, match=r"node 'odd' \(Odd\) holds a list of graphs"):
        opened(make_model([odd], IDS, {"y": [2, 3]}, domains={"custom": 1}))


# ------------------------------------------------------------------ old opsets


def test_opset_8_is_raised(opened: Opener, written: Written) -> None:
    nodes = [
        node("Conv", "x w", "c", pads=[1, 1, 1, 1]),
        node("BatchNormalization", "c g b m v", "n", epsilon=1e-3, momentum=0.9),
        node("Dropout", "n", "d", ratio=0.3),
        node("Clip", "d", "k", min=-0.5, max=1.5),
        node("ReduceSum", "k", "r", axes=[3], keepdims=0),
        node("Unsqueeze", "r", "u", axes=[0]),
        node("Squeeze", "u", "q", axes=[0]),
        node("Slice", "q", "s", axes=[1], starts=[0], ends=[3]),
        node("Pad", "s", "p", pads=[0, 0, 1, 0, 0, 1], value=2.0),
        node("Softmax", "p", "y", axis=1),
    ]
    stored = {"w": random(4, 3, 3, 3), "g": random(4), "b": random(4), "m": random(4), "v": np.abs(random(4)) + 0.1}
    model = make_model(nodes, {"x": ["n", 3, 6, 6]}, {"y": ["n", 3, 8]}, stored, opset=8, ir_version=3)
    model.graph.input.extend(value(k, v.shape) for k, v in stored.items())  # as IR version 3 wants
    feed = {"x": random(2, 3, 6, 6)}
    graph = opened(model)
    assert graph.opset == 13
    assert [t.name for t in graph.inputs] == ["x"]
    assert [p.shape for p in graph.ports()] == [("n", 3, 6, 6)]
    # Softmax changed its meaning with opset 13, so the converter writes a chain for it
    assert_same(run(written(graph), feed), run(model, feed), rtol=1e-6)


def test_opset_9_upsample_and_loop_keep_what_they_compute(opened: Opener, written: Written) -> None:
    loop = body([node("Add", "state step", "next"), node("Identity", "cond", "more")], {"more": []}, "loop",
                {"step": np.float32([1.5])},
                [value("i", [], TensorProto.INT64), value("cond", [], TensorProto.BOOL), value("state", [1])])
    loop.output[0].type.tensor_type.elem_type = TensorProto.BOOL
    loop.output.append(value("next", [1]))
    model = make_model([
        node("Upsample", "x scales", "u", mode="nearest"), node("ReduceMean", "u", "m", axes=[0, 1, 2, 3], keepdims=0),
        node("Unsqueeze", "m", "start", axes=[0]), node("Loop", "trips true start", "y", body=loop)],
        {"x": [1, 1, 2, 2]}, {"y": [1]},
        {"scales": np.float32([1, 1, 2, 2]), "trips": np.int64(3), "true": np.bool_(True)}, opset=9, ir_version=4)
    feed = {"x": random(1, 1, 2, 2)}
    wanted = {"y": feed["x"].mean().reshape(1) + np.float32(4.5)}
    assert_same(run(model, feed), wanted, rtol=1e-6)
    graph = opened(model)
    assert graph.opset == 13
    assert_same(run(written(graph), feed), wanted, rtol=1e-6)


def test_raising_keeps_metadata_and_external_data(tmp_path: Path, written: Written) -> None:
    model = make_model([node("MatMul", "x w", "h"), node("Clip", "h", "y", "clip", min=-1.0, max=1.0)],
                       {"x": ["batch", 30]}, {"y": ["batch", 20]}, {"w": random(30, 20)}, opset=10, ir_version=5)
    model.metadata_props.add(key="author", value="me")
    model.graph.node[0].doc_string = "a product"
    feed = {"x": random(2, 30)}
    wanted = run(model, feed)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    graph = load(tmp_path / "m.onnx")
    assert graph.metadata == {"author": "me"}
    path = written(graph)
    assert_same(run(path, feed), wanted)
    assert onnx.load(path).graph.node[0].doc_string == "a product"
    assert shape_of(graph.inputs[0]) == ("batch", 30)


def test_an_operator_that_cannot_be_raised_is_an_error_with_a_remedy(opened: Opener) -> None:
    model = make_model([node("Vanished", "x", "y")], IDS, {"y": [2, 3]}, opset=9)
    with pytest.raises(ModelError, match=r"uses opset 9 and onnx can't raise it to 13 .*export the model at opset 13"):
        opened(model)


# ------------------------------------------------------------------ weights


def test_initializers_listed_as_inputs_are_no_inputs(opened: Opener, written: Written) -> None:
    model = make_model([node("MatMul", "x w", "y")], {"w": [3, 4], "x": [2, 3]}, {"y": [2, 4]}, {"w": random(3, 4)})
    graph = opened(model)
    assert [t.name for t in graph.inputs] == ["x"]
    assert is_constant(graph.nodes[0].inputs[1])
    feed = {"x": random(2, 3)}
    assert_same(run(written(graph), feed), run(model, feed))


CONSTANTS = {
    "value": ({"value": numpy_helper.from_array(np.int32([[1, 2]]))}, np.int32([[1, 2]])),
    "float": ({"value_float": 1.5}, np.float32(1.5)),
    "floats": ({"value_floats": [1.5, -2.0]}, np.float32([1.5, -2.0])),
    "int": ({"value_int": -7}, np.int64(-7)),
    "ints": ({"value_ints": [2**40, 3]}, np.int64([2**40, 3])),
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_constant_nodes_become_initializers(opened: Opener, written: Written, kind: str) -> None:
    attrs, wanted = CONSTANTS[kind]
    dtype = helper.np_dtype_to_tensor_dtype(wanted.dtype)
    model = make_model([node("Constant", "", "k", **attrs), node("Reshape", "k flat", "y")], {},
                       {"y": (dtype, [wanted.size])}, {"flat": np.int64([-1])})
    graph = opened(model)
    assert [n.op for n in graph.nodes] == ["Reshape"]
    stored = graph.nodes[0].inputs[0]
    assert is_constant(stored)
    assert graph.read(stored).dtype == wanted.dtype
    np.testing.assert_array_equal(graph.read(stored), wanted, strict=True)
    assert_same(run(written(graph), {}), {"y": np.asarray(wanted).reshape(-1)})


def test_text_constants_stay_nodes(opened: Opener, written: Written) -> None:
    nodes = [node("Constant", "", "k", value_string="hello"), node("Constant", "", "l", value_strings=["a", "b"]),
             node("Equal", "k k", "same"), node("Concat", "l l", "y", axis=0)]
    model = make_model(nodes, {}, {"y": (TensorProto.STRING, [4]), "same": (TensorProto.BOOL, [])}, opset=19,
                       ir_version=9)
    graph = opened(model)
    assert [n.op for n in graph.nodes] == ["Constant", "Constant", "Equal", "Concat"]
    got = run(written(graph), {})
    assert got["y"].tolist() == ["a", "b", "a", "b"]
    assert got["same"]


def test_constant_that_is_a_graph_output_stays_a_node(opened: Opener, written: Written) -> None:
    model = make_model([node("Constant", "", "k", value_float=2.0), node("Add", "x k", "y")], {"x": [2]},
                       {"k": [], "y": [2]})
    graph = opened(model)
    assert [n.op for n in graph.nodes] == ["Constant", "Add"]
    feed = {"x": random(2)}
    assert_same(run(written(graph), feed), run(model, feed))


@pytest.mark.parametrize("layout", ["linear", "coordinates"])
def test_sparse_initializers_become_dense(opened: Opener, written: Written, layout: str) -> None:
    dense = np.zeros((3, 4), np.float32)
    dense[[0, 1, 2], [3, 0, 2]] = [1.5, -2.0, 4.0]
    at = np.int64([3, 4, 10]) if layout == "linear" else np.int64([[0, 3], [1, 0], [2, 2]])
    sparse = helper.make_sparse_tensor(numpy_helper.from_array(np.float32([1.5, -2.0, 4.0]), "w"),
                                       numpy_helper.from_array(at, "w_at"), [3, 4])
    model = make_model([node("MatMul", "x w", "y")], {"x": [2, 3]}, {"y": [2, 4]})
    model.graph.sparse_initializer.append(sparse)
    graph = opened(model)
    np.testing.assert_array_equal(graph.read(graph.nodes[0].inputs[1]), dense, strict=True)
    x = random(2, 3)
    path = written(graph)
    assert not onnx.load(path).graph.sparse_initializer
    assert_same(run(path, {"x": x}), {"y": x @ dense}, rtol=1e-6)


def test_zero_size_and_rank_zero_initializers(opened: Opener, written: Written) -> None:
    model = make_model([node("Concat", "x none", "c", axis=0), node("Mul", "c two", "y")], IDS, {"y": [2, 3]},
                       {"none": np.empty((0, 3), np.float32), "two": np.float32(2.0)})
    graph = opened(model)
    concat, mul = graph.nodes
    assert shape_of(concat.inputs[1]) == (0, 3)
    assert graph.read(concat.inputs[1]).shape == (0, 3)
    assert shape_of(mul.inputs[1]) == ()
    assert graph.scalar(mul.inputs[1]) == 2.0
    assert graph.scalar(concat.inputs[1]) is None
    path = written(graph)
    stored = {t.name: list(t.dims) for t in onnx.load(path).graph.initializer}
    assert stored == {"none": [0, 3], "two": []}
    x = random(2, 3)
    assert_same(run(path, {"x": x}), {"y": x * 2})


@pytest.mark.parametrize("name", ["INT4", "UINT4", "FLOAT8E4M3FN", "FLOAT8E5M2"])
@pytest.mark.parametrize("external", [False, True])
def test_types_without_a_numpy_name_pass_through(tmp_path: Path, name: str, external: bool) -> None:
    dtype = getattr(TensorProto, name)
    codes = helper.make_tensor("q", dtype, [3, 5], np.arange(15) % 8)
    model = make_model([node("DequantizeLinear", "q s", "w"), node("MatMul", "x w", "y")], {"x": [2, 3]},
                       {"y": [2, 5]}, {"q": codes, "s": np.float32(0.5)}, opset=21, ir_version=10)
    feed = {"x": random(2, 3)}
    source, target = tmp_path / "m.onnx", tmp_path / "out.onnx"
    wanted = run(model, feed)
    onnx.save(model, source, save_as_external_data=external, location="q.bin", size_threshold=0)
    graph = load(source)
    np.testing.assert_array_equal(np.asarray(graph.read(graph.nodes[0].inputs[0]), np.float32).reshape(-1),
                                  np.arange(15, dtype=np.float32) % 8)
    save(graph, target)
    assert next(t for t in onnx.load(target).graph.initializer if t.name == "q").data_type == dtype
    assert_same(run(target, feed), wanted)


# ------------------------------------------------------------------ external data


def external_model(folder: Path, locations: dict[str, str]) -> tuple[Path, onnx.ModelProto]:
    """A model with weights `a` [30, 40] and `b` [40, 20] stored in the named files; also the model with them inside."""
    stored = {"a": random(30, 40), "b": random(40, 20)}
    model = make_model([node("MatMul", "x a", "h"), node("MatMul", "h b", "y")], {"x": ["n", 30]}, {"y": ["n", 20]},
                       stored)
    inside = onnx.ModelProto()
    inside.CopyFrom(model)
    for proto in model.graph.initializer:
        file = folder / locations[proto.name]
        file.parent.mkdir(parents=True, exist_ok=True)
        raw = proto.raw_data
        offset = file.stat().st_size if file.exists() else 64
        with file.open("r+b" if file.exists() else "wb") as stream:
            stream.seek(offset)
            stream.write(raw)
        proto.ClearField("raw_data")
        proto.data_location = TensorProto.EXTERNAL
        for key, item in (("location", locations[proto.name]), ("offset", offset), ("length", len(raw))):
            proto.external_data.add(key=key, value=str(item))
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path, inside


@pytest.mark.parametrize("locations", [{"a": "w.bin", "b": "w.bin"}, {"a": "a.bin", "b": "b.bin"},
                                       {"a": "deep/er/a.bin", "b": "b.bin"}])
def test_external_data(tmp_path: Path, written: Written, locations: dict[str, str]) -> None:
    path, inside = external_model(tmp_path / "in", locations)
    graph = load(path)
    first = graph.nodes[0].inputs[1]
    assert isinstance(graph.read(first), np.memmap), "mapped, not read"
    np.testing.assert_array_equal(graph.read(first), random(30, 40))
    feed = {"x": random(2, 30)}
    assert_same(run(written(graph), feed), run(inside, feed))
    files = {path, *(path.parent / v for v in locations.values())}
    assert stored_bytes(path) == sum(f.stat().st_size for f in files)


def test_missing_and_short_external_files(tmp_path: Path) -> None:
    path, _ = external_model(tmp_path, {"a": "a.bin", "b": "b.bin"})
    graph = load(path)
    (tmp_path / "a.bin").write_bytes(bytes(64 + 30 * 40 * 4 - 1))
    with pytest.raises(ModelError, match=r"the external data of 'a' are shorter than its shape \[30, 40\] needs"):
        graph.read(graph.nodes[0].inputs[1])
    (tmp_path / "a.bin").write_bytes(bytes(64 + 30 * 40 * 4))
    assert graph.read(graph.nodes[0].inputs[1]).sum() == 0
    declared = next(e for e in graph.nodes[0].inputs[1]._values.tensor.external_data if e.key == "length")
    declared.value = str(30 * 40 * 4 - 4)
    with pytest.raises(ModelError, match="are shorter than its shape"):
        graph.read(graph.nodes[0].inputs[1])
    declared.value = str(30 * 40 * 4)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(ModelError, match=r"the external data file 'a\.bin' is missing; put it beside the model again"):
        graph.read(graph.nodes[0].inputs[1])
    target = tmp_path / "out.onnx"
    with pytest.raises(ModelError, match=r"'a\.bin' is missing"):
        save(graph, target)
    assert not target.exists()
    with pytest.raises(ModelError, match=r"'a\.bin' is missing"):
        stored_bytes(path)


@pytest.mark.parametrize("location", ["../a.bin", "/etc/hostname", "in/../../a.bin", ""])
def test_external_data_outside_of_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(5000))
    path, _ = external_model(tmp_path / "in", {"a": "a.bin", "b": "b.bin"})
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = location
    path.write_bytes(model.SerializeToString())
    graph = load(path)
    with pytest.raises(ModelError, match=r"of 'a' lie at .* outside of the model's folder; move them beside the model"):
        graph.read(graph.nodes[0].inputs[1])


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    path, _ = external_model(tmp_path / "in", {"a": "a.bin", "b": "b.bin"})
    (tmp_path / "in" / "a.bin").rename(tmp_path / "a.bin")
    (tmp_path / "in" / "a.bin").symlink_to(tmp_path / "a.bin")
    graph = load(path)
    with pytest.raises(ModelError, match="outside of the model's folder"):
        graph.read(graph.nodes[0].inputs[1])


# ------------------------------------------------------------------ functions, names, bodies


def test_functions_are_inlined(opened: Opener, written: Written) -> None:
    scaled = helper.make_function("local", "Scaled", ["a"], ["b"],
                                  [node("Constant", "", "k", value_float=3.0), node("Mul", "a k", "b")],
                                  [helper.make_opsetid("", 17)])
    twice = helper.make_function("local", "Twice", ["a"], ["c"],
                                 [node("Scaled", "a", "b", domain="local"), node("Scaled", "b", "c", domain="local")],
                                 [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)])
    model = make_model([node("Twice", "x", "h", domain="local"), node("Twice", "h", "y", domain="local")], IDS,
                       {"y": [2, 3]}, domains={"local": 1})
    model.functions.extend([scaled, twice])
    graph = opened(model)
    assert [n.op for n in graph.nodes] == ["Mul"] * 4
    assert len({n.name for n in graph.nodes}) == 4
    x = random(2, 3)
    assert_same(run(written(graph), {"x": x}), {"y": x * 3 * 3 * 3 * 3})


def test_empty_and_duplicate_names_become_unique(opened: Opener, written: Written) -> None:
    model = make_model([node("Relu", "x", "a", ""), node("Neg", "a", "b", "same"), node("Abs", "b", "c", "same"),
                        node("Exp", "c", "d", "Relu_a"), node("Neg", "d", "y", "")], IDS, {"y": [2, 3]})
    graph = opened(model)
    assert [n.name for n in graph.nodes] == ["Relu_a_2", "same", "Abs_c", "Relu_a", "Neg_y"]
    x = random(2, 3)
    wanted = -np.exp(np.abs(np.maximum(x, 0)))
    assert_same(run(written(graph), {"x": x}), {"y": wanted}, rtol=1e-6)  # onnxruntime refuses the model as it came


def conditional(*, weight_in: str) -> onnx.ModelProto:
    """y = c ? x @ w : -(x @ w) with a branch-local shift; both branches use the same names inside."""
    inner = {"shift": random(400)}
    stored = {}
    if weight_in == "outer":
        stored["w"] = random(3, 400)
    else:
        inner["w"] = random(3, 400)

    def branch(last: str, seed: int) -> onnx.GraphProto:
        local = {k: v * (seed + 1) for k, v in inner.items()}
        return body([node("MatMul", "h w", "p", "mm"), node("Add", "p shift", "s", "add"), node(last, "s", "r", "end")],
                    {"r": [2, 400]}, last, local)

    return make_model([node("Relu", "x", "h"), node("If", "c", "y", then_branch=branch("Neg", 0),
                                                    else_branch=branch("Abs", 1))],
                      {"c": (TensorProto.BOOL, []), "x": [2, 3]}, {"y": [2, 400]}, stored)


@pytest.mark.parametrize("weight_in", ["outer", "branches"])
@pytest.mark.parametrize("external", [False, True])
def test_branches_keep_their_own_weights(tmp_path: Path, written: Written, weight_in: str, external: bool) -> None:
    model = conditional(weight_in=weight_in)
    path = tmp_path / "m.onnx"
    feeds = [{"c": np.array(c), "x": random(2, 3)} for c in (True, False)]
    wanted = [run(model, feed) for feed in feeds]
    if external:
        offset = 0
        graphs = [model.graph, *(a.g for a in model.graph.node[1].attribute)]
        with (tmp_path / "w.bin").open("wb") as stream:
            for proto in [t for g in graphs for t in g.initializer]:
                raw = proto.raw_data
                stream.write(raw)
                proto.ClearField("raw_data")
                proto.data_location = TensorProto.EXTERNAL
                for key, item in (("location", "w.bin"), ("offset", offset), ("length", len(raw))):
                    proto.external_data.add(key=key, value=str(item))
                offset += len(raw)
    path.write_bytes(model.SerializeToString())
    graph = load(path)
    everything = list(graph.walk())
    assert len(everything) == 8
    assert len({n.name for n, _ in everything}) == 8
    made = [t.name for n, _ in everything for t in n.outputs]
    assert len(set(made)) == len(made), "computed tensors of different branches have names of their own"
    for k, write in enumerate((written, written, lambda g: _saved_outside(g, tmp_path / "sub" / "out.onnx"))):
        out = write(graph if k != 1 else graph.copy())
        for feed, expected in zip(feeds, wanted, strict=True):
            assert_same(run(out, feed), expected)


def _saved_outside(graph: Graph, path: Path) -> Path:
    path.parent.mkdir()
    save(graph, path, external_above=0)
    return path


def test_a_body_may_hide_an_outer_weight(opened: Opener, written: Written) -> None:
    """onnx.checker lets it pass, and onnxruntime takes the inner one."""
    inner = body([node("Constant", "", "k", value_float=0.5), node("Mul", "w k", "v"), node("MatMul", "x v", "r")],
                 {"r": [2, 4]}, "then", {"w": random(3, 4, seed=1)})
    nested = body([node("If", "c", "r", then_branch=inner, else_branch=inner)], {"r": [2, 4]}, "outer",
                  {"w": random(3, 4, seed=2)})
    model = make_model([node("MatMul", "x w", "h"), node("If", "c", "i", then_branch=nested, else_branch=inner),
                        node("Add", "h i", "y")],
                       {"c": (TensorProto.BOOL, []), "x": [2, 3]}, {"y": [2, 4]}, {"w": random(3, 4)})
    x = random(2, 3)
    wanted = {"y": x @ (random(3, 4) + random(3, 4, seed=1) / 2)}
    graph = opened(model)
    assert {t.name for n, _ in graph.walk() if n.op in ("Mul", "MatMul") for t in n.inputs if is_constant(t)} > {"w"}
    for c in (True, False):
        assert_same(run(model, {"c": np.array(c), "x": x}), wanted, rtol=1e-6)
        assert_same(run(written(graph), {"c": np.array(c), "x": x}), wanted, rtol=1e-6)


def test_a_nested_body_reads_the_renamed_tensors_of_the_one_around_it(opened: Opener, written: Written) -> None:
    inner = body([node("Mul", "h w", "r")], {"r": [3]}, "inner")

    def branch(op: str, seed: int) -> onnx.GraphProto:
        return body([node(op, "x", "h"), node("If", "c", "s", then_branch=inner, else_branch=inner)], {"s": [3]}, op,
                    {"w": random(3, seed=seed)})

    model = make_model([node("If", "c", "y", then_branch=branch("Neg", 1), else_branch=branch("Exp", 2))],
                       {"c": (TensorProto.BOOL, []), "x": [3]}, {"y": [3]})
    path, x = written(opened(model)), random(3)
    assert_same(run(path, {"c": np.array(True), "x": x}), {"y": -x * random(3, seed=1)}, rtol=1e-6)
    assert_same(run(path, {"c": np.array(False), "x": x}), {"y": np.exp(x) * random(3, seed=2)}, rtol=1e-6)


def test_a_weight_that_branches_share_is_stored_once(tmp_path: Path, opened: Opener, written: Written) -> None:
    weight = random(64, 64)
    branch = body([node("MatMul", "x w", "r")], {"r": [1, 64]})
    other = body([node("Gemm", "x w", "r")], {"r": [1, 64]})
    model = make_model([node("If", "c", "i", then_branch=branch, else_branch=other), node("MatMul", "i w", "y")],
                       {"c": (TensorProto.BOOL, []), "x": [1, 64]}, {"y": [1, 64]}, {"w": weight})
    graph = opened(model)
    shared = graph.nodes[1].inputs[1]
    assert len(graph.consumers(shared)) == 3, "both bodies and the outer MatMul"
    feed = {"c": np.array(True), "x": random(1, 64)}
    for twin in (graph, graph.copy()):
        path = written(twin)
        assert path.stat().st_size < weight.nbytes * 1.5
        assert_same(run(path, feed), run(model, feed))
        assert len(twin.consumers(twin.nodes[1].inputs[1])) == 3


def test_outer_tensors_are_captured(opened: Opener) -> None:
    graph = opened(conditional(weight_in="outer"))
    relu = graph.nodes[0]
    assert sorted(n.op for n in graph.consumers(relu.outputs[0])) == ["MatMul", "MatMul"]
    assert graph.only_consumer(relu.outputs[0]) is None
    owners = [(owner.op, inner.parent is graph) for owner, inner in graph.subgraphs()]
    assert owners == [("If", True), ("If", True)]


def test_a_sequence_that_a_loop_carries_survives(opened: Opener, written: Written) -> None:
    inner = body([node("SequenceInsert", "s x", "t"), node("Identity", "go", "more")], {}, "loop",
                 inputs=[value("i", [], TensorProto.INT64), value("go", [], TensorProto.BOOL)])
    inner.input.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None))
    inner.output.append(value("more", [], TensorProto.BOOL))
    inner.output.append(helper.make_tensor_sequence_value_info("t", TensorProto.FLOAT, None))
    model = make_model([node("SequenceEmpty", "", "s0"), node("Loop", "trips true s0", "all", body=inner),
                        node("ConcatFromSequence", "all", "y", axis=0)], IDS, {"y": [6, 3]},
                       {"trips": np.int64(3), "true": np.bool_(True)})
    graph = opened(model)
    x = random(2, 3)
    for twin in (graph, graph.copy()):
        assert_same(run(written(twin), {"x": x}), {"y": np.concatenate([x, x, x])})


def test_sequences_inside_survive(opened: Opener, written: Written) -> None:
    model = make_model([node("SplitToSequence", "x", "parts", axis=0, keepdims=0),
                        node("SequenceAt", "parts one", "y"), node("Optional", "x", "maybe"),
                        node("OptionalGetElement", "maybe", "z")], IDS, {"y": [3], "z": [2, 3]},
                       {"one": np.int64(1)})
    graph = opened(model)
    x = random(2, 3)
    for twin in (graph, graph.copy()):
        assert_same(run(written(twin), {"x": x}), {"y": x[1], "z": x})


# ------------------------------------------------------------------ what the graph library drops


def odd_node(name: str) -> onnx.NodeProto:
    item = node("Odd", "x", "y", name, domain="custom", kept=[1, 2])
    item.attribute.add(name="empty", type=AttributeProto.INTS)
    item.attribute.add(name="no_floats", type=AttributeProto.FLOATS)
    item.attribute.append(helper.make_attribute("kind", helper.make_tensor_type_proto(TensorProto.FLOAT, [2])))
    item.attribute.add(name="raw", type=AttributeProto.STRING, s=b"\xff\xfe\x00")
    item.attribute.add(name="raws", type=AttributeProto.STRINGS, strings=[b"ok", b"\xff"])
    item.attribute.append(helper.make_attribute("tensors", [numpy_helper.from_array(np.float32([1, 2]), "t")]))
    return item


@pytest.mark.parametrize("place", ["graph", "body"])
def test_odd_attributes_survive(tmp_path: Path, opened: Opener, place: str) -> None:
    item = odd_node("odd")
    item.metadata_props.add(key="source", value="layer.0")
    item.doc_string = "as it was"
    before = onnx.NodeProto()
    before.CopyFrom(item)
    nodes = [item]
    if place == "body":
        branch = body([item], {"y": [2, 3]}, "b")
        nodes = [node("If", "c", "z", then_branch=branch, else_branch=body([RELU], {"y": [2, 3]}))]
    model = make_model(nodes, {"c": (TensorProto.BOOL, []), **IDS}, {"z" if place == "body" else "y": [2, 3]},
                       domains={"custom": 3})
    graph = opened(model)
    for twin in (graph, graph.copy()):
        save(twin, tmp_path / "out.onnx")
        after = named(onnx.load(tmp_path / "out.onnx"))["odd"]
        assert {a.name: a.SerializeToString() for a in after.attribute} == {
            a.name: a.SerializeToString() for a in before.attribute}
        assert [(p.key, p.value) for p in after.metadata_props] == [("source", "layer.0")]
        assert after.doc_string == "as it was"


def test_odd_attributes_of_a_node_and_of_its_body_survive(tmp_path: Path, opened: Opener) -> None:
    inner = body([odd_node("odd"), node("Relu", "e", "o")], {"s": [3], "y": [2, 3], "o": [3]}, "scan",
                 inputs=[value("s", [3]), value("e", [3])])
    scan = node("Scan", "s0 x", "last other all", "scan", body=inner, num_scan_inputs=1)
    scan.attribute.add(name="scan_input_directions", type=AttributeProto.INTS)
    save(opened(make_model([scan], {"s0": [3], **IDS}, {"all": [2, 3]}, domains={"custom": 1})), tmp_path / "out.onnx")
    found = named(onnx.load(tmp_path / "out.onnx"))
    assert attribute(found["scan"], "scan_input_directions").type == AttributeProto.INTS
    assert {a.name for a in found["odd"].attribute} == {a.name for a in odd_node("odd").attribute}
    assert attribute(found["odd"], "raw").s == b"\xff\xfe\x00"


def test_model_metadata_and_annotations_survive(opened: Opener, written: Written) -> None:
    model = make_model([node("Relu", "x", "h"), node("Neg", "h", "y")], IDS, {"y": [2, 3]})
    model.metadata_props.add(key="author", value="me")
    model.producer_name, model.producer_version = "exporter", "1.2"
    model.doc_string, model.domain, model.model_version = "what it is", "org.example", 7
    model.graph.doc_string = "the graph"
    note = model.graph.quantization_annotation.add(tensor_name="h")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    gone = model.graph.quantization_annotation.add(tensor_name="nowhere")
    gone.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    graph = opened(model)
    for twin in (graph, graph.copy()):
        out = onnx.load(written(twin))
        assert [(p.key, p.value) for p in out.metadata_props] == [("author", "me")]
        assert (out.producer_name, out.producer_version) == ("exporter", "1.2")
        assert (out.doc_string, out.domain, out.model_version) == ("what it is", "org.example", 7)
        assert out.graph.doc_string == "the graph"
        assert [a.tensor_name for a in out.graph.quantization_annotation] == ["h"]
        assert out.graph.quantization_annotation[0].quant_parameter_tensor_names[0].key == "SCALE_TENSOR"


def test_custom_domains_keep_their_versions(tmp_path: Path, opened: Opener) -> None:
    theirs = node("Constant", "", "k", domain="custom", value=numpy_helper.from_array(np.float32([1])))
    model = make_model([theirs, node("Known", "x k", "h", domain="custom", mode="fast"),
                        node("Gelu", "h", "y", domain="com.microsoft")],
                       IDS, {"y": [2, 3]}, domains={"custom": 4, "com.microsoft": 1})
    graph = opened(model)
    save(graph, tmp_path / "out.onnx")
    out = onnx.load(tmp_path / "out.onnx")
    assert {(o.domain, o.version) for o in out.opset_import} == {("", 17), ("custom", 4), ("com.microsoft", 1)}
    assert [(n.domain, n.op_type) for n in out.graph.node] == [("custom", "Constant"), ("custom", "Known"),
                                                               ("com.microsoft", "Gelu")]
    assert attribute(out.graph.node[1], "mode").s == b"fast"


def test_inferred_shapes_and_free_dimensions(opened: Opener) -> None:
    graph = opened(make_model([node("MatMul", "x w", "h"), node("Relu", "h", "y")],
                              {"x": ["batch", None, 3]}, {"y": None}, {"w": random(3, 4)}))
    assert shape_of(graph.inputs[0]) == ("batch", None, 3)
    inferred = shape_of(graph.nodes[0].outputs[0])
    assert inferred is not None
    assert (inferred[0], inferred[2]) == ("batch", 4)
    assert not isinstance(inferred[1], int)
    negative = opened(make_model([RELU], {"x": [-1, 3]}, {"y": [-1, 3]}))
    assert shape_of(negative.inputs[0]) == (None, 3), "some exporters write -1 for a free dimension"


def test_read_nodes(tmp_path: Path) -> None:
    onnx.save(make_model([node("MatMul", "x w", "h", "first"), node("Relu", "h", "y", "")], IDS, {"y": [2, 4]},
                         {"w": random(3, 4)}), tmp_path / "m.onnx")
    assert read_nodes(tmp_path / "m.onnx") == [("first", "MatMul", "", ("x", "w"), ("h",)),
                                               ("", "Relu", "", ("h",), ("y",))]


def test_an_exporters_stack_trace_is_left_behind_and_the_scope_kept(tmp_path: Path, written: Written) -> None:
    model = make_model([node("Relu", "x", "y")], {"x": [4]}, {"y": [4]})
    for key in ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.name_scopes"):
        model.graph.node[0].metadata_props.add(key=key, value=f"the {key}")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    kept = onnx.load(written(load(tmp_path / "m.onnx"))).graph.node[0].metadata_props
    assert [p.key for p in kept] == ["pkg.torch.onnx.name_scopes"]
