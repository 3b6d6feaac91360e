"""Spelled-out normalisations and Gelus: every member is found, and nothing around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, make_model, node, random

from onnxq.planner import composites

WIDTH = 16
SCALARS = {**{k: np.float32(v) for k, v in {
    "zero": 0, "half": 0.5, "minus_half": -0.5, "one": 1, "two": 2, "three": 3, "eps": 1e-5, "share": 1 / WIDTH,
    "root2": 2**0.5, "root_half": 0.5**0.5, "cubic": 0.044715, "root2pi": (2 / np.pi)**0.5}.items()},
    "axes": np.int64([-1]), "last_one": np.int64([0, 0, 1 - WIDTH])}
WEIGHTS = {"gamma": random(WIDTH), "beta": random(WIDTH, seed=1), "w": random(WIDTH, WIDTH), "w0": random(WIDTH, WIDTH),
           "bias": random(WIDTH, seed=2), "bias0": random(WIDTH, seed=3), "scale": np.float32(0.125)}


def model(nodes: Sequence[onnx.NodeProto], opset: int = 17) -> onnx.ModelProto:
    """`nodes` between a MatMul with bias and a residual Add that make `x`, and a MatMul with bias behind `out`.

    Around them: a Mul and an Add of constants that belong to nothing, and `x` read by the next residual Add.
    """
    front = [node("MatMul", "in w0", "p"), node("Add", "p bias0", "q"), node("Add", "q in", "x", "residual"),
             node("Shape", "in", "whole", "shape"), node("Add", "whole last_one", "column", "shape arithmetic")]
    behind = [node("MatMul", "out w", "r"), node("Add", "r bias", "s"), node("Mul", "s scale", "t", "scaling"),
              node("Add", "t x", "y", "next_residual")]
    used = {n for item in (*front, *nodes, *behind) for n in item.input}
    return make_model([*front, *nodes, *behind], {"in": ["n", 7, WIDTH]}, {"y": ["n", 7, WIDTH]},
                      {k: v for k, v in {**SCALARS, **WEIGHTS}.items() if k in used}, opset)


def check(opened: Opener, nodes: Sequence[onnx.NodeProto], label: str, opset: int = 17) -> None:
    found = composites.find(opened(model(nodes, opset)))
    assert found == {n.name: label for n in nodes}


def parsed(text: str) -> list[onnx.NodeProto]:
    """`mean=ReduceMean(x); d=Sub(x mean)`: reductions run over the last axis, Casts make float."""
    nodes = []
    for item in text.replace("\n", " ").split(";"):
        result, call = item.strip().split("=")
        op, inputs = call.rstrip(")").split("(")
        attrs: dict[str, Any] = {"axes": [-1]} if op == "ReduceMean" else {"to": 1} if op == "Cast" else {}
        nodes.append(node(op, inputs, result, **attrs))
    return nodes


CENTRE = "mean=ReduceMean(x); d=Sub(x mean); "
VARIANCE = CENTRE + "dd=Pow(d two); var=ReduceMean(dd); ve=Add(var eps); sd=Sqrt(ve); "
LAYER_NORMS = {k: parsed(v) for k, v in {
    "torch": VARIANCE + "n=Div(d sd); g=Mul(n gamma); out=Add(g beta)",
    "square by Mul": CENTRE + """dd=Mul(d d); var=ReduceMean(dd); ve=Add(eps var); sd=Sqrt(ve); n=Div(d sd);
        g=Mul(gamma n); out=Add(beta g)""",
    "centred twice": CENTRE + """d2=Sub(x mean); dd=Pow(d2 two); var=ReduceMean(dd); ve=Add(var eps); sd=Sqrt(ve);
        n=Div(d sd); g=Mul(n gamma); out=Add(g beta)""",
    "reciprocal": VARIANCE + "rs=Reciprocal(sd); n=Mul(d rs); g=Mul(n gamma); out=Add(g beta)",
    # x * (gamma / sd) + (beta - mean * (gamma / sd))
    "tensorflow": VARIANCE + """rs=Reciprocal(sd); k=Mul(rs gamma); xk=Mul(x k); mk=Mul(mean k); shift=Sub(beta mk);
        out=Add(xk shift)""",
    # E[x * x] - E[x] * E[x], shapes spelled out
    "flax": """sum=ReduceSum(x axes); xx=Mul(x x); sum2=ReduceSum(xx axes); m2=Mul(sum2 share); m=Mul(sum share);
        mm=Mul(m m); v0=Sub(m2 mm); v=Max(zero v0); vr=Reshape(v column); vb=Expand(vr whole); ve=Add(vb eps);
        sd=Sqrt(ve); rs=Reciprocal(sd); k=Mul(rs gamma); mr=Reshape(m column); mb=Expand(mr whole); d=Sub(x mb);
        n=Mul(d k); out=Add(n beta)""",
    "without gamma and beta": VARIANCE + "out=Div(d sd)",
}.items()}
SQUARE = "xx=Pow(x two); ms=ReduceMean(xx); me=Add(ms eps); "
RMS_NORMS = {k: parsed(v) for k, v in {
    "square by Mul": "xx=Mul(x x); ms=ReduceMean(xx); me=Add(ms eps); rms=Sqrt(me); n=Div(x rms); out=Mul(n gamma)",
    "square by Pow": SQUARE + "rms=Sqrt(me); n=Div(x rms); out=Mul(gamma n)",
    "reciprocal": SQUARE + "rms=Sqrt(me); r1=Reciprocal(rms); n=Mul(x r1); out=Mul(gamma n)",
    "one over": SQUARE + "rms=Sqrt(me); r1=Div(one rms); n=Mul(x r1); out=Mul(gamma n)",
    "power": SQUARE + "r1=Pow(me minus_half); n=Mul(x r1); out=Mul(gamma n)",
    "casts": """xc=Cast(x); xx=Pow(xc two); ms=ReduceMean(xx); me=Add(ms eps); rms=Sqrt(me); r1=Reciprocal(rms);
        n=Mul(xc r1); nc=Cast(n); out=Mul(gamma nc)""",
}.items()}
CUBE = "c=Pow(x three); cc=Mul(c cubic); i=Add(x cc); j=Mul(i root2pi); t1=Tanh(j); f=Add(t1 one); "
GELUS = {k: parsed(v) for k, v in {
    "torch": "a=Div(x root2); e=Erf(a); f=Add(e one); g=Mul(x f); out=Mul(g half)",
    "half first": "h=Mul(x half); a=Div(x root2); e=Erf(a); f=Add(e one); out=Mul(h f)",
    "half inside": "a=Mul(x root_half); e=Erf(a); f=Add(e one); g=Mul(half f); out=Mul(g x)",
    "tanh": "h=Mul(x half); " + CUBE + "out=Mul(h f)",
    "tanh, half last": CUBE + "g=Mul(x f); out=Mul(half g)",
    "tanh, cube by Mul": """b=Mul(x x); c=Mul(b x); cc=Mul(c cubic); i=Add(x cc); j=Mul(i root2pi); t1=Tanh(j);
        f=Add(t1 one); h=Mul(x half); out=Mul(h f)""",
    # jax: 0.044715 * x * x * x, and 0.5 * (1 + tanh) * x
    "tanh, jax": """c1=Mul(cubic x); c2=Mul(x c1); cc=Mul(x c2); i=Add(x cc); j=Mul(root2pi i); t1=Tanh(j);
        f=Add(one t1); h=Mul(half f); out=Mul(x h)""",
}.items()}


@pytest.mark.parametrize("form", LAYER_NORMS)
def test_layer_norm(opened: Opener, form: str) -> None:
    check(opened, LAYER_NORMS[form], "LayerNorm")


def test_layer_norm_with_axes_as_an_input(opened: Opener) -> None:
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in LAYER_NORMS["torch"]]
    for item in nodes:
        if item.op_type == "ReduceMean":
            del item.attribute[:]
            item.input.append("axes")
    check(opened, nodes, "LayerNorm", opset=18)


@pytest.mark.parametrize("form", RMS_NORMS)
def test_rms_norm(opened: Opener, form: str) -> None:
    check(opened, RMS_NORMS[form], "RMSNorm")


@pytest.mark.parametrize("form", GELUS)
def test_gelu(opened: Opener, form: str) -> None:
    check(opened, GELUS[form], "Gelu")


def test_all_in_one_graph(opened: Opener) -> None:
    """A block of a transformer: one does not leak into another through the residuals."""
    def renamed(nodes: Sequence[onnx.NodeProto], prefix: str, source: str, stored: set[str]) -> list[onnx.NodeProto]:
        twins = []
        for item in nodes:
            twin = onnx.NodeProto.FromString(item.SerializeToString())
            names = {"x": source, **{n: n for n in stored}}
            twin.input[:] = [names.get(n, prefix + n) for n in twin.input]
            twin.output[:] = [prefix + n for n in twin.output]
            twin.name = prefix + item.name
            twins.append(twin)
        return twins

    stored = {**SCALARS, **WEIGHTS}
    norm = renamed(LAYER_NORMS["torch"], "norm_", "x", set(stored))
    gelu = renamed(GELUS["tanh"], "gelu_", "up", set(stored))
    rms = renamed(RMS_NORMS["power"], "rms_", "x2", set(stored))
    nodes = [*norm, node("MatMul", "norm_out w", "m"), node("Add", "m bias", "up"), *gelu,
             node("MatMul", "gelu_out w0", "down"), node("Add", "down x", "x2"), *rms, node("Add", "rms_out x2", "y")]
    used = {n for item in nodes for n in item.input}
    graph = opened(make_model(nodes, {"x": ["n", 7, WIDTH]}, {"y": ["n", 7, WIDTH]},
                              {k: v for k, v in stored.items() if k in used}))
    assert composites.find(graph) == {**{n.name: "LayerNorm" for n in norm}, **{n.name: "Gelu" for n in gelu},
                                      **{n.name: "RMSNorm" for n in rms}}


UNRELATED = {k: parsed(v) for k, v in {
    "tanh alone": "a=Mul(x scale); b=Tanh(a); out=Add(b bias)",
    "gated tanh": "a=MatMul(x w); b=Tanh(a); c=Mul(b x); out=Mul(c bias)",
    "tanh twice": "a=Tanh(x); b=Mul(a half); out=Tanh(b)",
    "one plus tanh of another": "a=Tanh(in); b=Add(a one); c=Mul(b x); out=Mul(c half)",
    "one plus tanh, not halved": "a=Tanh(x); b=Add(a one); c=Mul(b x); out=Mul(c scale)",
    "tanh plus a vector": "a=Tanh(x); b=Add(a bias); c=Mul(b x); out=Mul(c half)",
    "root of a weighted mean": "a=Mul(x gamma); b=ReduceMean(a); c=Add(b eps); d=Sqrt(c); out=Div(x d)",
    "sqrt alone": "a=Abs(x); b=Add(a eps); c=Sqrt(b); out=Div(x c)",
    "root of a mean": "a=ReduceMean(x); b=Add(a eps); c=Sqrt(b); out=Div(x c)",
    "mean of another": "a=Mul(in in); b=ReduceMean(a); c=ReduceMean(x); d=Mul(b c); e=Sqrt(d); out=Mul(x e)",
    "erf alone": "a=Erf(x); out=Mul(a scale)",
    "pow": "a=Pow(x two); b=Mul(a scale); out=Add(b bias)",
}.items()}


@pytest.mark.parametrize("form", UNRELATED)
def test_what_is_none(opened: Opener, form: str) -> None:
    assert composites.find(opened(model(UNRELATED[form]))) == {}


def test_elementwise_work_behind_is_no_member(opened: Opener) -> None:
    """Behind the norm's own Mul and Add, further ones belong to something else."""
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in LAYER_NORMS["torch"]]
    nodes[-1].output[0] = "normal"
    behind = [node("Add", "normal bias0", "positions"), node("Mul", "positions scale", "out")]
    found = composites.find(opened(model([*nodes, *behind])))
    assert found == {n.name: "LayerNorm" for n in nodes}


@pytest.mark.parametrize("op", ["Mul", "Div"])
def test_a_scaling_behind_gamma_is_no_member(opened: Opener, op: str) -> None:
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in RMS_NORMS["square by Mul"]]
    nodes[-1].output[0] = "normal"
    found = composites.find(opened(model([*nodes, node(op, "normal scale", "out", "after")])))
    assert found == {n.name: "RMSNorm" for n in nodes}


def test_a_residual_around_the_norm_is_no_member(opened: Opener) -> None:
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in RMS_NORMS["square by Mul"]]
    nodes[-1].output[0] = "normal"
    found = composites.find(opened(model([*nodes, node("Add", "normal x", "out", "around")])))
    assert found == {n.name: "RMSNorm" for n in nodes}
