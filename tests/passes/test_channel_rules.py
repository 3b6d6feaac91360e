"""What operators do with channels: without some, a network computes what it did with these unread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, make_model, node, random, run

from onnxq.graph import Graph, save, shape_of
from onnxq.passes.channels import Family
from onnxq.passes.families import family
from onnxq.passes.manager import Context
from onnxq.passes.transform.remove_channels import RemoveChannels
from onnxq.plan import Narrowed, Plan

Array = np.ndarray[Any, Any]
C = 6
NOTHING = np.zeros(0, np.float32)


def conv(inputs: str, output: str, **attrs: Any) -> onnx.NodeProto:
    return node("Conv", inputs, output, name=output, **attrs)


def picture(*nodes: onnx.NodeProto, outputs: str = "y", **stored: Array) -> onnx.ModelProto:
    """x [2, 4, 8, 8] through nodes; weights a, b, c, d of C filters on 4 or C channels, w and v that read C."""
    weights = {"a": random(C, 4, 3, 3), "b": random(C, seed=1), "c": random(C, C, 1, 1, seed=2),
               "d": random(C, 4, 3, 3, seed=3), "w": random(3, C, 1, 1, seed=4), "v": random(5, C, 2, 2, seed=5),
               "u": random(3, 2 * C, 1, 1, seed=6), "gain": random(C, seed=7), "var": np.abs(random(C, seed=8)) + 1,
               "f": random(C, 1, 3, 3, seed=9), **stored}
    return _model(nodes, [2, 4, 8, 8], outputs, weights)


def columns(*nodes: onnx.NodeProto, outputs: str = "y", **stored: Array) -> onnx.ModelProto:
    """x [2, 5, 8] through nodes; a and d [8, 12], w [12, 4]."""
    weights = {"a": random(8, 12), "d": random(8, 12, seed=1), "w": random(12, 4, seed=2), "gain": random(12, seed=3),
               **stored}
    return _model(nodes, [2, 5, 8], outputs, weights)


def _model(nodes: Sequence[onnx.NodeProto], x: list[int], outputs: str, weights: dict[str, Array]) -> onnx.ModelProto:
    used = {name for n in nodes for name in n.input}
    made = make_model(list(nodes), {"x": x}, dict.fromkeys(outputs.split()),
                      {k: v for k, v in weights.items() if k in used}, opset=21)
    return onnx.shape_inference.infer_shapes(made)


FIRST, SECOND, LAST = conv("x a b", "h", pads=[1] * 4), conv("x d", "g", pads=[1] * 4), conv("t w", "y")
JOINED = node("Concat", "h g", "j", axis=1)

# model, first layer that reads, how many groups there are of each bundle
FORMS: dict[str, tuple[onnx.ModelProto, str, list[int]]] = {
    "a residual": (picture(FIRST, node("Relu", "h", "r"), conv("r c", "k"), node("Add", "k r", "t"), LAST), "k", [C]),
    "two ways": (picture(FIRST, SECOND, node("Add", "h g", "t"), LAST, conv("t v", "z"), outputs="y z"), "y", [C]),
    "a trunk": (picture(FIRST, conv("h c", "k"), node("Sub", "h k", "r"), node("Sigmoid", "r", "s"), conv("s c2", "l"),
                        node("Add", "r l", "t"), node("GlobalAveragePool", "t", "p"), node("Flatten", "p", "q"),
                        node("Gemm", "q o", "y", name="y"), c2=random(C, C, 1, 1, seed=9), o=random(C, 3)), "k", [C]),
    "Concat": (picture(FIRST, SECOND, JOINED, node("Relu", "j", "t"), conv("t u", "y")), "y", [C, C]),
    "Concat of the same": (picture(FIRST, node("Concat", "h h", "t", axis=1), conv("t u", "y")), "y", [C]),
    "a dense block": (picture(FIRST, conv("h c", "k"), node("Concat", "h k", "m", axis=1), conv("m u2", "l"),
                              node("Concat", "m l", "n", axis=1), conv("n u3", "y"), u2=random(4, 2 * C, 1, 1),
                              u3=random(3, 2 * C + 4, 1, 1)), "k", [C, C, 4]),
    "Concat with what is stored": (picture(FIRST, node("Concat", "h s", "t", axis=1), conv("t u", "y"),
                                           s=random(2, C, 8, 8)), "y", [C, C]),
    "norms by channel": (picture(FIRST, node("Sigmoid", "h", "s"),
                                 node("BatchNormalization", "s gain b gain var", "m"), node("Relu", "m", "r"),
                                 node("InstanceNormalization", "r gain b", "t"), LAST), "y", [C]),
    "numbers by channel": (picture(FIRST, node("Mul", "h p", "m"), node("PRelu", "m q", "r"), node("Max", "r n", "t"),
                                   LAST, p=random(1, C, 1, 1), q=random(C, 1, 1), n=random(C, 1, 1)), "y", [C]),
    "pools and depthwise": (picture(FIRST, conv("h f", "k", group=C), node("MaxPool", "k", "t", kernel_shape=[2, 2]),
                                    LAST, conv("t v", "z"), outputs="y z"), "y", [C]),
    "gates": (picture(FIRST, node("GlobalAveragePool", "h", "p"), conv("p e", "q"), node("Relu", "q", "r"),
                      conv("r i", "k"), node("Sigmoid", "k", "s"), node("Mul", "h s", "t"), LAST,
                      e=random(2, C, 1, 1), i=random(C, 2, 1, 1)), "q", [C]),
    "places of a picture": (picture(FIRST, node("Flatten", "h", "t"), node("Gemm", "t o", "y", name="y"),
                                    o=random(C * 64, 3)), "y", [C]),
    "a Reshape to rows": (picture(FIRST, node("Reshape", "h s", "t"), node("MatMul", "t o", "y", name="y"),
                                  s=np.int64([2, C * 64]), o=random(C * 64, 3)), "y", [C]),
    "means of places": (picture(FIRST, node("ReduceMean", "h axes", "t", keepdims=0),
                                node("MatMul", "t o", "y", name="y"), axes=np.int64([2, 3]), o=random(C, 3)), "y", [C]),
    "channels last": (picture(FIRST, node("Transpose", "h", "t", perm=[0, 2, 3, 1]),
                              node("MatMul", "t o", "y", name="y"), o=random(C, 3)), "y", [C]),
    "Pad, Slice, Resize": (picture(FIRST, node("Pad", "h p", "m"), node("Slice", "m from to along", "n"),
                                   node("Resize", "n _ twice", "t", mode="nearest"), LAST, **{
                                       "p": np.int64([0, 0, 1, 1, 0, 0, 2, 0]), "from": np.int64([1]),
                                       "to": np.int64([7]), "along": np.int64([-1]),
                                       "twice": np.float32([1, 1, 2, 2])}), "y", [C]),
    "ConvTranspose": (picture(node("ConvTranspose", "x a2 b", "t", strides=[2, 2]), LAST, a2=random(4, C, 2, 2)), "y",
                      [C]),
    "Split": (picture(FIRST, node("Split", "h parts", "p q", axis=1), node("Sigmoid", "q", "s"),
                      node("Mul", "p s", "t"), conv("t o", "y"), parts=np.int64([C // 2, C // 2]),
                      o=random(3, C // 2, 1, 1)), "y", [C // 2]),
    "groups of a norm": (picture(FIRST, node("Reshape", "h s", "r"), node("InstanceNormalization", "r i j", "n"),
                                 node("Reshape", "n back", "m"), node("Mul", "m p", "t"), LAST, s=np.int64([0, 3, -1]),
                                 back=np.int64([0, C, 8, 8]), i=random(3), j=random(3), p=random(C, 1, 1)), "y", [3]),
    "rows of matrices": (columns(node("MatMul", "x a", "h"), node("Split", "h parts", "p q", axis=1),
                                 node("Concat", "q p", "t", axis=1), node("MatMul", "t w", "y", name="y"),
                                 parts=np.int64([2, 3])), "y", [12]),
    "a norm of rows beside": (columns(node("MatMul", "x a", "h"), node("Reshape", "h s", "r"),
                                      node("LayerNormalization", "r i", "n"), node("Reshape", "n back", "t"),
                                      node("MatMul", "t w", "y", name="y"), s=np.int64([0, 0, 3, 4]), i=random(4),
                                      back=np.int64([0, 0, 12])), "y", [3]),
    "sizes that are computed": (columns(
        node("Shape", "x", "n", start=0, end=2), node("Split", "n ones", "n0 n1", axis=0),
        node("Concat", "n0 n1 three four", "s", axis=0), node("Concat", "n0 n1 all", "back", axis=0),
        node("MatMul", "x a", "h"), node("Reshape", "h s", "r"), node("Softmax", "r", "n2"),
        node("Reshape", "n2 back", "t"), node("MatMul", "t w", "y", name="y"), ones=np.int64([1, 1]),
        three=np.int64([3]), four=np.int64([4]), all=np.int64([12])), "y", [3]),
    "Gemms": (picture(node("Flatten", "x", "q"), node("Gemm", "q o bias", "h"), node("Sigmoid", "h", "t"),
                      node("Gemm", "t n bias2", "y", name="y"), o=random(256, 12), bias=random(1, 12), n=random(12, 3),
                      bias2=random(3)), "y", [12]),
}


def walked(opened: Opener, model: onnx.ModelProto, layer: str, grouped: bool = False) -> tuple[Graph, Family]:
    graph = opened(model)
    [first] = [n for n in graph.nodes if n.name == layer]
    found = family(graph, first, grouped)
    assert found is not None
    return graph, found


def unread(model: onnx.ModelProto, found: Family, kept: Array) -> onnx.ModelProto:
    """The model with the weights of all other groups 0 in the layers that read them."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    stored = {one.name: one for one in twin.graph.initializer}
    for one in twin.graph.node:
        if one.name in found.readers:
            values = onnx.numpy_helper.to_array(stored[one.input[1]]).copy()
            gone = ~np.isin(found.readers[one.name], kept)
            values[(slice(None), gone) if one.op_type == "Conv" else gone] = 0
            name = f"{one.input[1]}.{one.name}"
            twin.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
            one.input[1] = name
    return twin


def without(graph: Graph, found: Family, kept: Array, grouped: bool = False) -> Narrowed:
    """What takes the other groups out and leaves weights as they are."""
    nodes = {n.name: n for n in graph.nodes}
    stays = np.isin(np.arange(found.count), kept)
    names = tuple(found.readers)
    weights = []
    for name in names:
        values = np.asarray(graph.read(nodes[name].inputs[1]))
        values = values.compress(stays[found.readers[name]], axis=1 if nodes[name].op == "Conv" else 0)
        makes = found.constants.get((name, 1))
        weights.append(values if makes is None else values.compress(stays[makes.ids], makes.axis))
    return Narrowed(nodes[names[0]].inputs[0].name, names, found.count, kept, tuple(weights),
                    (NOTHING,) * len(names), grouped)


def check(graph: Graph, model: onnx.ModelProto, found: Family, kept: Array, feed: dict[str, Array], folder: Path,
          grouped: bool = False) -> None:
    """Take groups out of a graph, and compare what it computes with the model that does not read them."""
    first = without(graph, found, kept, grouped)
    context = Context(plan=Plan("", "", narrowed={first.tensor: first}))
    assert RemoveChannels().run(graph, context) == (len(kept) < found.count)
    assert not RemoveChannels().run(graph, context), "a second run edits nothing"
    save(graph, folder / "narrow.onnx")
    onnx.checker.check_model(str(folder / "narrow.onnx"), full_check=True)
    made, wanted = run(folder / "narrow.onnx", feed), run(unread(model, found, kept), feed)
    assert made.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(made[name], values, rtol=0, atol=1e-4 * max(np.abs(values).max(), 1))
    inferred = onnx.shape_inference.infer_shapes(onnx.load(folder / "narrow.onnx"), strict_mode=True)
    told = {t.name: shape_of(t) for n in graph.nodes for t in n.outputs}
    for one in inferred.graph.value_info:
        dims = one.type.tensor_type.shape.dim
        sizes = [(mine, d.dim_value) for mine, d in zip(told[one.name] or (), dims, strict=False)
                 if isinstance(mine, int) and d.HasField("dim_value")]
        assert all(mine == size for mine, size in sizes), one.name


@pytest.mark.parametrize("form", FORMS)
def test_without_some_channels_all_else_is_computed(opened: Opener, tmp_path: Path, form: str) -> None:
    model, layer, sizes = FORMS[form]
    graph, found = walked(opened, model, layer)
    assert found.fixed == {}
    bundles = found.bundles()
    assert sorted(np.bincount(bundles)) == sorted(sizes)
    rng = np.random.default_rng(0)
    kept = np.sort(np.concatenate([rng.permutation(np.flatnonzero(bundles == b))[: -(-(bundles == b).sum() // 2)]
                                   for b in range(bundles.max() + 1)]))
    feed = {"x": random(*[d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim], seed=11)}
    check(graph, model, found, kept, feed, tmp_path)


# model, the layer that reads, and why the channels of what it reads stay
STAYS: dict[str, tuple[onnx.ModelProto, str]] = {
    "an input": (picture(node("Relu", "x", "t"), LAST, w=random(3, 4, 1, 1)), "'x' is an input of the model"),
    "an output": (picture(FIRST, node("Relu", "h", "t"), LAST, outputs="y t"), "'t' is an output of the model"),
    "another reader": (picture(FIRST, node("Relu", "h", "t"), LAST, node("CumSum", "t one", "z"), one=np.int64(1),
                               outputs="y z"), "CumSum CumSum_z reads 't': what it does with channels is not known"),
    "groups of filters": (picture(FIRST, conv("h g2", "t", group=2), LAST, g2=random(C, C // 2, 1, 1)),
                          "it has groups of filters"),
    "a norm of rows": (columns(node("MatMul", "x a", "h"), node("LayerNormalization", "h gain", "t"),
                               node("MatMul", "t w", "y", name="y")), "its statistics are those of all channels"),
    "a norm in parts": (columns(node("MatMul", "x a", "h"), node("ReduceMean", "h last", "m"),
                                node("Sub", "h m", "t"), node("MatMul", "t w", "y", name="y"), last=np.int64([-1])),
                        "it sums over them"),
    "a norm of groups": (picture(FIRST, node("GroupNormalization", "h gain b", "t", num_groups=3), LAST),
                         "what it does with channels is not known"),
    "a Softmax over channels": (picture(FIRST, node("Softmax", "h", "t", axis=1), LAST),
                                "its statistics are those of all channels"),
    "an even Split": (picture(FIRST, node("Split", "h", "p q", axis=1, num_outputs=2), node("Mul", "p q", "t"),
                              conv("t o", "y"), o=random(3, C // 2, 1, 1)), "the sizes of its parts are not stored"),
    "more channels by Pad": (picture(FIRST, node("Pad", "h p", "t"), conv("t u", "y"),
                                     p=np.int64([0, 0, 0, 0, 0, C, 0, 0])), "it changes them"),
    "some channels": (picture(FIRST, node("Slice", "h from to along", "t"), conv("t o", "y"), **{
        "from": np.int64([1]), "to": np.int64([3]), "along": np.int64([1]), "o": random(3, 2, 1, 1)}),
        "it changes them"),
    "how many there are": (picture(FIRST, node("Shape", "h", "n"), node("Gather", "n one", "c"),
                                   node("Cast", "c", "f", to=1), node("Mul", "h f", "t"), LAST, one=np.int64(1)),
                           "it asks how many there are"),
    "a body that reads them": (picture(
        FIRST, node("If", "yes", "t", then_branch=onnx.helper.make_graph(
            [node("Relu", "h", "i")], "a", [], [onnx.helper.make_tensor_value_info("i", 1, [2, C, 8, 8])]),
            else_branch=onnx.helper.make_graph(
            [node("Abs", "h", "e")], "b", [], [onnx.helper.make_tensor_value_info("e", 1, [2, C, 8, 8])])), LAST,
        yes=np.bool_(True)), "what it does with channels is not known"),
    "channels across places": (picture(FIRST, node("Reshape", "h s", "m"), node("Reshape", "m back", "t"), LAST,
                                       s=np.int64([2, 4, -1]), back=np.int64([2, C, 8, 8])),
                               "its sizes are not known to keep them apart"),
}


@pytest.mark.parametrize("form", STAYS)
def test_why_channels_stay(opened: Opener, form: str) -> None:
    model, why = STAYS[form]
    _, found = walked(opened, model, "y")
    assert len(found.fixed) == found.count
    assert any(reason.endswith(why) for reason in found.fixed.values()), found.fixed


def test_what_some_stay_for_keeps_no_others(opened: Opener, tmp_path: Path) -> None:
    """One input of a Concat is an output of the model, too."""
    model = picture(FIRST, SECOND, JOINED, conv("j u", "y"), outputs="y g")
    graph, found = walked(opened, model, "y")
    assert found.bundles().tolist() == [0] * C + [-1] * C
    check(graph, model, found, np.r_[1, 4, C:2 * C], {"x": random(2, 4, 8, 8, seed=3)}, tmp_path)
