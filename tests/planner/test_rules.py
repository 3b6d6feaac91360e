"""Globs and rules: every name by which a node may be called, and what happens when nothing is called so."""

from __future__ import annotations

import onnx
import pytest
from conftest import Opener, make_model, node, random
from lowering_support import canonical, recipe

from onnxq.errors import UsageError
from onnxq.planner.rules import names_of, verdicts
from onnxq.recipe import Match, Recipe, Rule
from onnxq.schemes import scheme

WEIGHTS = {"encoder.layer.0.w": random(32, 32), "encoder.layer.1.w": random(16, 32, seed=1), "b": random(16)}


def model() -> onnx.ModelProto:
    """Two layers: one with the dynamo exporter's scope, one with another's, a Relu between."""
    first = node("MatMul", "x encoder.layer.0.w", "/encoder/layer.0/out", name="/encoder/layer.0/MatMul")
    first.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'encoder', 'encoder.layer.0', 'matmul']")
    second = node("Gemm", "r encoder.layer.1.w b", "y", name="node_linear", transB=1)
    second.metadata_props.add(key="namespace", value="encoder/layer.1/head")
    return make_model([first, node("Relu", "/encoder/layer.0/out", "r", name="act"), second], {"x": [4, 32]},
                      {"y": [4, 16]}, WEIGHTS)


ALL = {"/encoder/layer.0/MatMul", "act", "node_linear"}


@pytest.mark.parametrize(("glob", "named"), [
    ("act", {"act"}),
    ("/encoder/layer.0/MatMul", {"/encoder/layer.0/MatMul"}),  # the node's name
    (".encoder.layer.0.MatMul", {"/encoder/layer.0/MatMul"}),  # '.' and '/' are alike
    ("/encoder/layer/0/MatMul", {"/encoder/layer.0/MatMul"}),
    ("encoder.layer.1.w", {"node_linear"}),  # the weight's name, though canonicalizing turned the weight
    ("encoder/layer/1/w", {"node_linear"}),
    ("b", {"node_linear"}),  # a bias
    ("y", {"node_linear"}),  # an output
    ("r", {"act"}),
    ("encoder.layer.0", {"/encoder/layer.0/MatMul"}),  # the scope
    ("encoder/layer/1/head", {"node_linear"}),
    ("encoder*", {"/encoder/layer.0/MatMul", "node_linear"}),
    ("*layer?[01]*", {"/encoder/layer.0/MatMul", "node_linear"}),
    ("{act,*linear}", {"act", "node_linear"}),
    ("encoder.layer.{0,1}.w", {"/encoder/layer.0/MatMul", "node_linear"}),
    ("*", ALL),
])
def test_a_glob_matches_each_name_of_a_node(glob: str, named: set[str], opened: Opener) -> None:
    graph = canonical(opened(model()))
    found = verdicts(graph, recipe(keep=[glob]))
    assert found == dict.fromkeys(named, f"kept float as asked ({glob})")


def test_names_of_a_node(opened: Opener) -> None:
    graph = canonical(opened(model()))
    gemm = next(n for n in graph.nodes if n.op == "Gemm")
    assert names_of(graph, gemm) == ["node_linear", "y", "encoder.layer.1.w.kn", "encoder.layer.1.w", "b",
                                     "encoder/layer/1/head"]


@pytest.mark.parametrize(("glob", "near"), [
    ("node_liner", "node_linear"), ("*encoder.layer.0.MatMull*", "/encoder/layer.0/MatMul"),
    ("ACT", "act"), ("Encoder.layer.0.w", "encoder.layer.0.w"), ("zzzzzz", None)])
def test_a_glob_without_a_match_names_near_ones(glob: str, near: str | None, opened: Opener) -> None:
    with pytest.raises(UsageError) as caught:
        verdicts(canonical(opened(model())), recipe(keep=["act", glob]))
    text = str(caught.value)
    assert text.startswith(f"--keep-float {glob!r} matches no node; near: ")
    if glob != "ACT":  # case counts, and nothing of another case is near
        assert near is None or near in text


def test_the_first_rule_that_matches_decides(opened: Opener) -> None:
    rules = [Rule(Match(op="Gemm"), "w8a8", "not reached by the next"), Rule(Match(name="*"), "float", "the rest"),
             Rule(Match(op="Relu"), "float", "never reached")]
    assert verdicts(canonical(opened(model())), recipe(rules=rules)) == {
        "/encoder/layer.0/MatMul": "the rest", "act": "the rest"}


def test_a_rule_of_operator_and_name_wants_both(opened: Opener) -> None:
    rules = [Rule(Match(op="Gemm", name="*layer.0*"), "float"), Rule(Match(op="MatMul", name="*layer.0*"), "float")]
    assert verdicts(canonical(opened(model())), recipe(rules=rules)) == {
        "/encoder/layer.0/MatMul": "kept float by a rule of the recipe"}


def test_keep_float_comes_before_rules(opened: Opener) -> None:
    rules = [Rule(Match(name="act"), "w8a8")]
    assert verdicts(canonical(opened(model())), recipe(rules=rules, keep=["act"])) == {
        "act": "kept float as asked (act)"}


def test_a_rule_whose_glob_matches_nothing_is_named(opened: Opener) -> None:
    graph = opened(make_model([node("Relu", "x", "y")], {"x": ["n", 4]}, {"y": ["n", 4]}))
    chosen = Recipe(scheme("w8a8"), rules=(Rule(Match(name="y"), "float"), Rule(Match(name="*lm_head*"), "float")))
    with pytest.raises(UsageError, match=r"rules\[1\]\.match\.name: '\*lm_head\*' matches no node; near: "):
        verdicts(graph, chosen)
