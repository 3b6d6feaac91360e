"""The verbs that passes edit with: each keeps the graph valid and its outputs in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Opener, assert_same, body, make_model, node, random, run
from onnx import TensorProto, helper, numpy_helper

from onnxq.errors import GraphError
from onnxq.graph import Graph, dtype_of, is_constant, save, shape_of
from onnxq.ports import Port

Written = Callable[[Graph], Path]
X = {"x": [2, 3]}


def names(graph: Graph) -> list[str]:
    return [n.name for n in graph.nodes]


def by_name(graph: Graph, name: str) -> object:
    return next(n for n in graph.nodes if n.name == name)


def chain(*ops: str) -> onnx.ModelProto:
    """x -> op -> op ... -> y, nodes and tensors named by letters in order."""
    tensors = ["x", *"abcdefg"[:len(ops) - 1], "y"]
    return make_model([node(op, tensors[k], tensors[k + 1], f"{op}{k}") for k, op in enumerate(ops)], X, {"y": [2, 3]})


# ------------------------------------------------------------------ looking


def test_ports(opened: Opener) -> None:
    graph = opened(make_model([node("Cast", "ids", "f", to=1), node("Mul", "f s", "y")],
                              {"ids": (TensorProto.INT64, ["batch", None, 7]), "s": [], "free": None}, {"y": None}))
    assert graph.ports() == [Port("ids", np.dtype(np.int64), ("batch", None, 7)), Port("s", np.dtype(np.float32), ()),
                             Port("free", np.dtype(np.float32), None)]
    assert graph.opset == 17
    assert [t.name for t in graph.outputs] == ["y"]


def test_producer_and_consumers(opened: Opener) -> None:
    graph = opened(make_model([node("Relu", "x", "h"), node("Mul", "h h", "m"), node("Add", "h m", "y")], X,
                              {"y": [2, 3], "m": [2, 3]}))
    relu, mul, add = graph.nodes
    h, m = relu.outputs[0], mul.outputs[0]
    assert graph.producer(h) is relu
    assert graph.producer(graph.inputs[0]) is None
    assert [n.name for n in graph.consumers(h)] == ["Mul_m", "Add_y"], "a node that reads twice counts once"
    assert graph.only_consumer(h) is None
    assert graph.only_consumer(m) is None, "it is an output, too"
    assert graph.only_consumer(graph.inputs[0]) is relu
    assert graph.only_consumer(add.outputs[0]) is None
    assert graph.is_output(m)
    assert not graph.is_output(h)


def test_consumers_in_bodies(opened: Opener) -> None:
    inner = body([node("Neg", "h", "r")], {"r": [2, 3]})
    nested = body([node("If", "c", "s", then_branch=inner, else_branch=inner)], {"s": [2, 3]})
    graph = opened(make_model([node("Relu", "x", "h"), node("If", "c", "y", then_branch=nested, else_branch=inner)],
                              {"c": (TensorProto.BOOL, []), **X}, {"y": [2, 3]}))
    h = graph.nodes[0].outputs[0]
    assert [n.op for n in graph.consumers(h)] == ["Neg"] * 3
    assert [(n.op, g is graph) for n, g in graph.walk()] == [
        ("Relu", True), ("If", True), ("Neg", False), ("If", False), ("Neg", False), ("Neg", False)]
    assert graph.only_consumer(h) is None
    assert graph.prune() is False, "a body reads it"


def test_scalar(opened: Opener) -> None:
    graph = opened(make_model([node("Sum", "x a b c", "y")], X, {"y": [2, 3]},
                              {"a": np.float32(2.5), "b": np.float32([[4]]), "c": np.float32([1, 2, 3])}))
    x, a, b, c = graph.nodes[0].inputs
    assert [graph.scalar(t) for t in (x, a, b, c, None)] == [None, 2.5, 4.0, None, None]
    assert dtype_of(a) == np.float32
    assert shape_of(c) == (3,)


# pkg.torch.onnx.name_scopes as torch 2.13 (dynamo=True) writes them, and the innermost module's path that they tell;
# the last entry is the value's own name
TORCH = {
    "['', 'layers', 'layers.0', 'layers.0.lin', 'linear']": "layers/0/lin",
    "['', 'layers', 'layers.0', 'relu']": "layers/0",
    "['', 'head', 'linear_2']": "head",
    "['', 'mul_18']": "",
}


def test_scope_of_torch_exports(opened: Opener) -> None:
    model = chain("Relu", "Neg", "Abs", "Exp", "Tanh")
    for item, scopes in zip(model.graph.node, TORCH, strict=False):
        item.metadata_props.add(key="namespace", value=": __main__.Net/whatever: aten.whatever.default")
        item.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    graph = opened(model)
    assert [graph.scope(n) for n in graph.nodes] == [*TORCH.values(), ""]


def test_scope_from_a_plain_namespace(opened: Opener) -> None:
    model = chain("Relu")
    model.graph.node[0].metadata_props.add(key="namespace", value="encoder.layer.0")
    graph = opened(model)
    assert graph.scope(graph.nodes[0]) == "encoder/layer/0"


# ------------------------------------------------------------------ bypass and redirect


def test_bypass_in_the_middle(opened: Opener, written: Written) -> None:
    graph = opened(chain("Relu", "Identity", "Neg"))
    graph.bypass(by_name(graph, "Identity1"))
    assert names(graph) == ["Relu0", "Neg2"]
    assert graph.check() == []
    x = random(2, 3)
    assert_same(run(written(graph), {"x": x}), {"y": -np.maximum(x, 0)})


def test_bypass_of_a_graph_output_keeps_its_name(opened: Opener, written: Written) -> None:
    """Relu writes y itself; its other readers, one in a body, follow."""
    inner = body([node("Exp", "h", "r")], {"r": [2, 3]})
    model = make_model([node("Relu", "x", "h"), node("Identity", "h", "y"), node("Neg", "h", "z"),
                        node("If", "c", "w", then_branch=inner, else_branch=inner)],
                       {"c": (TensorProto.BOOL, []), **X}, {"y": [2, 3], "z": [2, 3], "w": [2, 3]})
    graph = opened(model)
    graph.bypass(by_name(graph, "Identity_y"))
    assert [n.op for n in graph.nodes] == ["Relu", "Neg", "If"]
    assert graph.nodes[0].outputs[0].name == "y"
    assert graph.check() == []
    feed = {"c": np.array(True), "x": random(2, 3)}
    assert_same(run(written(graph), feed), run(model, feed))


@pytest.mark.parametrize("source", ["input", "constant", "output"])
def test_bypass_leaves_what_must_stay(opened: Opener, written: Written, source: str) -> None:
    """An output needs a node of its own when what it copies is an input, a weight or another output."""
    if source == "output":
        model = make_model([node("Relu", "x", "z"), node("Identity", "z", "y")], X, {"z": [2, 3], "y": [2, 3]})
    else:
        model = make_model([node("Identity", "x" if source == "input" else "w", "y"), node("Neg", "x", "z")], X,
                           {"y": [2, 3], "z": [2, 3]}, {"w": random(2, 3, seed=5)} if source == "constant" else {})
    graph = opened(model)
    before = names(graph)
    graph.bypass(next(n for n in graph.nodes if n.op == "Identity"))
    assert names(graph) == before
    feed = {"x": random(2, 3)}
    assert_same(run(written(graph), feed), run(model, feed))


def test_bypass_of_an_input(opened: Opener, written: Written) -> None:
    graph = opened(chain("Identity", "Neg"))
    graph.bypass(graph.nodes[0])
    assert names(graph) == ["Neg1"]
    assert graph.nodes[0].inputs[0] is graph.inputs[0]
    x = random(2, 3)
    assert_same(run(written(graph), {"x": x}), {"y": -x})


def test_redirect(opened: Opener) -> None:
    inner = body([node("Add", "h h", "r")], {"r": [2, 3]})
    graph = opened(make_model([node("Relu", "x", "h"), node("Abs", "x", "k"), node("Mul", "h h", "m"),
                               node("If", "c", "y", then_branch=inner, else_branch=inner)],
                              {"c": (TensorProto.BOOL, []), **X}, {"y": [2, 3], "m": [2, 3]}))
    relu, other, mul, branching = graph.nodes
    graph.redirect(relu.outputs[0], other.outputs[0])
    assert [t.name for t in mul.inputs] == ["k", "k"]
    assert [t.name for n in branching.attrs["then_branch"].nodes for t in n.inputs] == ["k", "k"]
    assert graph.consumers(relu.outputs[0]) == []
    with pytest.raises(GraphError, match="'m' is a graph output and can't be redirected"):
        graph.redirect(mul.outputs[0], other.outputs[0])


# ------------------------------------------------------------------ sort, prune, check


def test_sort_is_stable(opened: Opener) -> None:
    graph = opened(make_model([node("Relu", "x", "a"), node("Neg", "x", "b"), node("Abs", "x", "c"),
                               node("Add", "a b", "d"), node("Add", "c d", "y")], X, {"y": [2, 3]}))
    wanted = names(graph)
    graph.sort()
    assert names(graph) == wanted
    nodes = graph.ir.nodes
    nodes.insert(0, nodes.pop(3))  # Add_d first: it moves behind Neg_b only, the rest keeps its order
    graph.sort()
    assert names(graph) == ["Relu_a", "Neg_b", "Add_d", "Abs_c", "Add_y"]


def test_sort_counts_what_bodies_read(opened: Opener) -> None:
    inner = body([node("Neg", "late", "r")], {"r": [2, 3]})
    nested = body([node("If", "c", "s", then_branch=inner, else_branch=inner)], {"s": [2, 3]})
    graph = opened(make_model([node("Relu", "x", "late"), node("If", "c", "y", then_branch=nested, else_branch=nested)],
                              {"c": (TensorProto.BOOL, []), **X}, {"y": [2, 3]}))
    graph.ir.nodes.reverse()
    assert graph.check() == ["If_y reads 'late' before it is made"] * 4
    graph.sort()
    assert names(graph) == ["Relu_late", "If_y"]
    assert graph.check() == []


def test_sort_refuses_a_cycle(opened: Opener) -> None:
    graph = opened(chain("Relu", "Neg", "Abs"))
    graph.replace_input(graph.nodes[0], 0, graph.nodes[1].outputs[0])
    before = names(graph)
    with pytest.raises(GraphError, match="the graph has a cycle"):
        graph.sort()
    assert names(graph) == before


def test_prune(opened: Opener, written: Written) -> None:
    model = make_model([node("Relu", "x", "a"), node("Neg", "a", "dead1"), node("Abs", "dead1", "dead2"),
                        node("Split", "a", "s1 s2", axis=1, num_outputs=2), node("Exp", "s1", "y")], {"x": [2, 4]},
                       {"y": [2, 2]}, opset=18)
    graph = opened(model)
    assert graph.prune() is True
    assert names(graph) == ["Relu_a", "Split_s1", "Exp_y"], "one of two results in use keeps the node"
    assert graph.prune() is False
    feed = {"x": random(2, 4)}
    assert_same(run(written(graph), feed), run(model, feed))


def test_prune_of_a_branch_frees_what_it_read(opened: Opener) -> None:
    inner = body([node("Neg", "h", "r")], {"r": [2, 3]})
    nested = body([node("If", "c", "s", then_branch=inner, else_branch=inner)], {"s": [2, 3]})
    graph = opened(make_model([node("Relu", "x", "h"), node("If", "c", "dead", then_branch=nested, else_branch=inner),
                               node("Abs", "x", "y")], {"c": (TensorProto.BOOL, []), **X}, {"y": [2, 3]}))
    assert graph.prune()
    assert names(graph) == ["Abs_y"]


def test_check_finds_faults(opened: Opener) -> None:
    graph = opened(chain("Relu", "Neg", "Abs"))
    assert graph.check() == []
    first, second, third = graph.nodes
    second.name = "Relu0"
    assert graph.check() == ["two nodes are named 'Relu0'"]
    second.name = "Neg1"
    graph.set_output(second, 0, first.outputs[0])
    assert graph.check() == ["'a' is made twice", "Abs2 reads 'b' before it is made"]
    graph = opened(chain("Relu", "Neg"))
    graph.remove(graph.nodes[1])
    assert graph.check() == ["output 'y' is never made"]
    graph = opened(chain("Relu", "Neg"))
    graph.set_output(graph.nodes[1], 0, graph.inputs[0])
    assert graph.check() == ["'x' is made twice", "output 'y' is never made"]
    assert third.op == "Abs"


def test_check_allows_omitted_outputs(opened: Opener) -> None:
    """Two nodes that each leave an output out make nothing twice."""
    def gru(source: str, result: str) -> onnx.NodeProto:
        return node("GRU", f"{source} w r", f"_ {result}", f"gru_{result}", hidden_size=4)

    graph = opened(make_model([gru("x", "h1"), gru("x", "h2"), node("Add", "h1 h2", "y")], {"x": [2, 1, 3]},
                              {"y": [1, 1, 4]}, {"w": random(1, 12, 3), "r": random(1, 12, 4)}))
    assert graph.check() == []


# ------------------------------------------------------------------ new tensors and nodes


def test_constants_keep_rank_and_type(opened: Opener, written: Written) -> None:
    graph = opened(chain("Relu", "Neg"))
    half = graph.constant("half", np.float32(0.5))
    assert shape_of(half) == ()
    turned = graph.constant("turned", random(3, 2).T)
    result = graph.variable("scaled", np.float32, [2, 3])
    total = graph.like(result, "total")
    graph.add_node("Mul", "scale", [graph.nodes[0].outputs[0], half], [result])
    graph.add_node("Add", "shift", [result, turned], [total])
    graph.replace_input(by_name(graph, "Neg1"), 0, total)
    assert shape_of(total) == (2, 3)
    assert dtype_of(total) == np.float32
    graph.sort()
    path = written(graph)
    assert {t.name: list(t.dims) for t in onnx.load(path).graph.initializer} == {"half": [], "turned": [2, 3]}
    x = random(2, 3)
    assert_same(run(path, {"x": x}), {"y": -(np.maximum(x, 0) / 2 + random(3, 2).T)}, rtol=1e-6)


def test_taken_names_are_refused(opened: Opener) -> None:
    inner = body([node("Neg", "x", "inside", "node_inside")], {"inside": [2, 3]})
    graph = opened(make_model([node("If", "c", "y", "branching", then_branch=inner, else_branch=inner),
                               node("Add", "x w", "z", "adding")],
                              {"c": (TensorProto.BOOL, []), **X}, {"y": [2, 3], "z": [2, 3]}, {"w": random(3)}))
    for name in ("x", "y", "w", "inside"):
        assert graph.has(name)
        with pytest.raises(GraphError, match=f"a tensor named '{name}' exists already; rename it in the model"):
            graph.constant(name, random(2))
        with pytest.raises(GraphError, match=f"a tensor named '{name}' exists already"):
            graph.variable(name)
    with pytest.raises(GraphError, match="a node named 'adding' exists already"):
        graph.add_node("Relu", "adding", [], [])
    made = graph.constant("w.q", random(2))
    assert graph.has("w.q")
    assert graph.made("w.q") is made
    with pytest.raises(KeyError):
        graph.made("w")
    node_gone = by_name(graph, "adding")
    graph.remove(node_gone)
    graph.add_node("Relu", "adding", [graph.inputs[1]], [graph.variable("fresh")])


def test_shared_constant(opened: Opener) -> None:
    graph = opened(chain("Relu"))
    one = graph.shared_constant("s", np.float32([1, 2]))
    assert graph.shared_constant("s", np.float32([1, 2])) is one
    with pytest.raises(GraphError, match="'s' exists already"):
        graph.shared_constant("s", np.float32([1, 3]))


def test_remove_rewires_nothing_else(opened: Opener) -> None:
    graph = opened(make_model([node("Relu", "x", "a"), node("Neg", "x", "b"), node("Add", "a b", "y")], X,
                              {"y": [2, 3]}))
    graph.remove(by_name(graph, "Neg_b"))
    assert names(graph) == ["Relu_a", "Add_y"]
    assert [n.name for n in graph.consumers(graph.inputs[0])] == ["Relu_a"]
    assert graph.check() == ["Add_y reads 'b' before it is made"]


# ------------------------------------------------------------------ evaluate, copy


def test_evaluate(opened: Opener) -> None:
    graph = opened(make_model([node("Split", "w cut", "a b", axis=0), node("Clip", "w _ top", "c"),
                               node("Sum", "x a b c", "y")], {"x": [3]}, {"y": [3]},
                              {"w": np.float32([1, 2, 3, 4, 5, 6]), "cut": np.int64([3, 3]), "top": np.float32(2.5)}))
    split, clip, _ = graph.nodes
    np.testing.assert_array_equal(graph.evaluate(split), [[1, 2, 3], [4, 5, 6]])
    (clipped,) = graph.evaluate(clip)
    np.testing.assert_array_equal(clipped, np.float32([1, 2, 2.5, 2.5, 2.5, 2.5]), strict=True)


def test_evaluate_refuses_what_is_no_tensor(opened: Opener) -> None:
    graph = opened(make_model([node("SequenceConstruct", "w w", "s"), node("SequenceAt", "s k", "y")], {}, {"y": [2]},
                              {"w": random(2), "k": np.int64(0)}))
    with pytest.raises(NotImplementedError, match="its result is no tensor"):
        graph.evaluate(graph.nodes[0])


def test_evaluate_refuses_attributes_that_it_does_not_see(opened: Opener) -> None:
    odd = node("Transpose", "w", "t")
    odd.attribute.add(name="perm", type=onnx.AttributeProto.INTS)
    graph = opened(make_model([odd, node("Mul", "x t", "y")], X, {"y": [2, 3]}, {"w": np.float32(2)}))
    with pytest.raises(NotImplementedError, match="attributes that only the runtime understands"):
        graph.evaluate(graph.nodes[0])


def test_copy_is_independent(tmp_path: Path, opened: Opener, written: Written) -> None:
    inner = body([node("MatMul", "h w", "r")], {"r": [2, 3]})
    model = make_model([node("Relu", "x", "h"), node("If", "c", "y", then_branch=inner, else_branch=inner)],
                       {"c": (TensorProto.BOOL, []), **X}, {"y": [2, 3]}, {"w": random(3, 3)})
    model.graph.node[0].metadata_props.add(key="namespace", value="net")
    model.producer_name = "exporter"
    graph = opened(model)
    made = graph.constant("k", random(3))
    graph.add_node("Add", "add", [graph.nodes[0].outputs[0], made], [graph.variable("unread", np.float32)])
    feed = {"c": np.array(True), "x": random(2, 3)}
    before = written(graph).read_bytes()
    twin = graph.copy()
    assert written(twin).read_bytes() == before
    assert twin.scope(twin.nodes[0]) == "net"
    assert twin.made("k") is twin.nodes[-1].inputs[1], "what passes made is known in the copy"
    assert np.shares_memory(twin.read(twin.made("k")), graph.read(made)), "but weights are not copied"
    for item in twin.nodes:
        item.attrs["note"] = 1
    inside = twin.nodes[1].attrs["then_branch"].nodes[0]
    twin.replace_input(inside, 1, twin.constant("w2", random(3, 3, seed=1)))
    twin.add_node("Gelu", "gelu", [twin.inputs[1]], [twin.variable("g")], domain="com.microsoft")
    twin.remove(twin.nodes[2])
    twin.metadata["author"] = "me"
    save(twin, tmp_path / "twin.onnx")
    assert written(graph).read_bytes() == before
    assert graph.metadata == {}
    assert not graph.has("w2")
    assert_same(run(written(graph), feed), run(model, feed))


def test_removed_nodes_take_their_metadata_along(opened: Opener, written: Written) -> None:
    model = chain("Relu", "Neg")
    model.graph.node[0].metadata_props.add(key="namespace", value="net")
    graph = opened(model)
    first = graph.nodes[0]
    graph.bypass(first)
    graph.add_node("Abs", "Relu0", [graph.inputs[0]], [graph.variable("fresh", np.float32, [2, 3])])
    assert graph.scope(by_name(graph, "Relu0")) == ""
    assert not onnx.load(written(graph)).graph.node[-1].metadata_props


def test_constants_in_a_body_are_constants(opened: Opener) -> None:
    inner = helper.make_graph([node("Add", "x w", "r")], "b", [], [helper.make_empty_tensor_value_info("r")],
                              [numpy_helper.from_array(random(3), "w")])
    graph = opened(make_model([node("If", "c", "y", then_branch=inner, else_branch=inner)],
                              {"c": (TensorProto.BOOL, []), **X}, {"y": [2, 3]}))
    (then, _) = (inside for _, inside in graph.subgraphs())
    weight = then.nodes[0].inputs[1]
    assert is_constant(weight)
    np.testing.assert_array_equal(then.read(weight), random(3))
    assert then.is_output(then.nodes[0].outputs[0])
