"""The manager: order, hooks, the check after each pass; a pass: its printed form and its contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from conftest import Opener, body, make_model, node
from onnx import TensorProto

from onnxq.errors import PassError
from onnxq.graph import Graph, Node
from onnxq.passes.canonicalize import canonicalize
from onnxq.passes.canonicalize.fold_constants import FoldConstants
from onnxq.passes.canonicalize.share_duplicates import ShareDuplicates
from onnxq.passes.manager import Context, Pass, PassManager, Removals, Skip
from onnxq.passes.transform import transform
from onnxq.plan import NodePlan, Plan


@dataclass(frozen=True)
class Rename(Pass):
    """Turns one operator into another."""

    name: ClassVar[str] = "rename"
    old: str = "Relu"
    new: str = "Abs"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        if node.op != self.old:
            return context.skip(node, f"it is a {node.op}")
        node.op = self.new
        return True


@dataclass(frozen=True)
class Break(Pass):
    """Leaves a tensor that is read but never made."""

    name: ClassVar[str] = "break"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        graph.remove(node)
        return True


@dataclass(frozen=True)
class Shuffle(Pass):
    """Leaves the nodes in no order."""

    name: ClassVar[str] = "shuffle"

    def run(self, graph: Graph, context: Context) -> bool:
        graph.ir.nodes.reverse()
        return True


@dataclass(frozen=True)
class Cut(Pass):
    """Removes the node behind the first, which this walk still has before it."""

    name: ClassVar[str] = "cut"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        assert len(node.outputs), "a removed node is not visited"
        if node.op != "Relu":
            return context.skip(node, "visited")
        graph.bypass(graph.consumers(node.outputs[0])[0])
        return True


def three() -> object:
    return make_model([node("Relu", "x", "a"), node("Neg", "a", "b"), node("Exp", "b", "y")], {"x": [3]}, {"y": [3]})


def test_passes_run_in_order_with_hooks(opened: Opener) -> None:
    seen: list[tuple[str, str, bool]] = []
    passes = [Rename(), Rename("Abs", "Tanh")]
    graph = opened(three())
    manager = PassManager(passes, [lambda step, g, seconds: seen.append((step.name, g.nodes[0].op, seconds >= 0)),
                                   lambda step, g, _: seen.append((str(step), g.nodes[0].op, g is graph))])
    context = Context()
    assert manager.run(graph, context) is True
    assert seen == [("rename", "Abs", True), ("rename(old='Relu', new='Abs')", "Abs", True),
                    ("rename", "Tanh", True), ("rename(old='Abs', new='Tanh')", "Tanh", True)]
    assert [n.op for n in graph.nodes] == ["Tanh", "Neg", "Exp"]
    assert context.skips == [Skip("rename", name, f"it is a {op}") for name, op in (
        ("Neg_b", "Neg"), ("Exp_y", "Exp"))] * 2
    assert manager.run(graph, Context()) is False


def test_an_invalid_graph_names_the_pass_and_those_before(opened: Opener) -> None:
    with pytest.raises(PassError, match=r"pass break left an invalid graph \(output 'y' is never made\) after "
                                        r"rename, shuffle; please report") as caught:
        PassManager([Rename(), Shuffle(), Break(), Rename()]).run(opened(three()), Context())
    assert caught.value.exit_code == 70
    with pytest.raises(PassError, match=r"pass break left .* after no other pass"):
        PassManager([Break()]).run(opened(three()), Context())


def test_nodes_are_sorted_after_an_edit(opened: Opener) -> None:
    graph = opened(three())
    PassManager([Shuffle()]).run(graph, Context())
    assert [n.op for n in graph.nodes] == ["Relu", "Neg", "Exp"]


def test_a_node_that_a_visit_removed_is_not_visited(opened: Opener) -> None:
    graph, context = opened(three()), Context()
    PassManager([Cut()]).run(graph, context)
    assert [n.op for n in graph.nodes] == ["Relu", "Exp"]
    assert [s.node for s in context.skips] == ["Exp_y"]


def test_a_pass_without_a_body_says_so(opened: Opener) -> None:
    with pytest.raises(TypeError, match="Pass defines neither run nor visit"):
        Pass().run(opened(three()), Context())


def test_absorbed_nodes() -> None:
    plan = Plan("w8a8", "cpu", {
        "conv": NodePlan("conv", "Conv", "w8a8", "QLinearConv", "weights"),
        "relu": NodePlan("relu", "Relu", "w8a8", "QLinearConv", "absorbed", part_of="conv")})
    assert Context(plan=plan).absorbed == {"relu"}
    assert Context().absorbed == set()


def test_pipelines_print_as_what_rebuilds_them() -> None:
    assert [str(p) for p in canonicalize()] == [
        "widen-half", "remove-identity", "fold-dims", "fold-constants(max_bytes=67108864)", "hard-swish",
        "fold-batchnorm", "affine-to-conv", "affine-to-batchnorm", "batchnorm-to-conv", "conv-before-pool",
        "shuffle-to-gather", "sum-to-add", "normal-gemm", "prelu-to-leaky", "all-axes",
        "share-duplicates(min_elements=256)", "rotary-embedding", "share-kv-heads"]
    assert [str(p) for p in transform()] == ["correct-bias", "add-masks", "normal-masks", "keep-layer-norm"]
    assert [p.name for p in transform(("add-masks", "keep-layer-norm"))] == ["correct-bias", "normal-masks"]
    assert FoldConstants(max_bytes=67108864) in canonicalize()
    assert ShareDuplicates(min_elements=1) not in canonicalize()


def test_names_are_unique_and_those_of_the_files() -> None:
    for step in (*canonicalize(), *transform()):
        assert type(step).__module__.rsplit(".", 1)[1].replace("_", "-") == step.name
    names = [p.name for p in (*canonicalize(), *transform())]
    assert len(set(names)) == len(names)


def test_removals_name_the_pass_that_took_a_node_out(opened: Opener) -> None:
    """Nodes in bodies, too; one that a pass made and another removed was never the user's."""
    then = body([node("Relu", "x", "t0"), node("Abs", "t0", "t")], {"t": None}, "then")
    other = body([node("Neg", "x", "e")], {"e": None}, "other")
    graph = opened(make_model(
        [node("Relu", "x", "a"), node("Identity", "a", "b"), node("Abs", "b", "y"),
         node("If", "c", "o", then_branch=then, else_branch=other)],
        {"x": ["n"], "c": (TensorProto.BOOL, [])}, {"y": None, "o": None}))
    removals = Removals(graph)

    @dataclass(frozen=True)
    class Bypass(Pass):
        name: ClassVar[str] = "bypass"
        op: str = ""

        def run(self, graph: Graph, context: Context) -> bool:
            found = [(n, g) for n, g in graph.walk() if n.op == self.op]
            for item, holder in found:
                holder.bypass(item)
            return bool(found)

    PassManager([Bypass("Identity"), Rename("Neg", "Sqrt"), Bypass("Relu")], [removals]).run(graph, Context())
    assert removals.found == {"Identity_b": ("Identity", ("b",), "bypass"), "Relu_a": ("Relu", ("a",), "bypass"),
                              "Relu_t0": ("Relu", ("t0",), "bypass")}
