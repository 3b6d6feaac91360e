"""Presets: recipes by name, which layers Q4_K_M keeps at more bits, and who can read them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from lowering_support import CPU, MODELS, canonical

import onnxq
from onnxq import presets, recipe, request, schemes
from onnxq.errors import RecipeError, UsageError
from onnxq.graph import Graph, load
from onnxq.inspection import inspect
from onnxq.planner.outline import outline
from onnxq.planner.rules import layer_number, named
from onnxq.recipe import Layers, Match, Recipe, Rule

LIKE = "q4_k_m-like"
DECODER = MODELS / "decoder" / "model.onnx"


def use_more_bits(i: int, n: int) -> bool:
    """As in llama.cpp, in whole numbers."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


@pytest.mark.parametrize("count", [1, 3, 8, 12, 16, 22, 26, 32, 40, 80])
def test_an_eighth_at_both_ends_and_every_third_between(count: int) -> None:
    layers = Layers(0.125, 0.125, 3)
    assert [layers.holds(i, count) for i in range(count)] == [use_more_bits(i, count) for i in range(count)]


def test_sixteen_of_the_32_layers_of_a_7b() -> None:
    found = [i for i in range(32) if Layers(0.125, 0.125, 3).holds(i, 32)]
    assert found == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


@pytest.mark.parametrize(("layers", "wanted"), [
    (Layers(), []), (Layers(first=0.5), [0, 1]), (Layers(last=0.25), [3]), (Layers(every=2), [1, 3]),
    (Layers(every=1), [0, 1, 2, 3]), (Layers(first=0.25, every=2), [0, 2])])
def test_layers(layers: Layers, wanted: list[int]) -> None:
    assert [i for i in range(4) if layers.holds(i, 4)] == wanted


@pytest.mark.parametrize(("text", "message"), [
    ("{first: 2}", "layers.first: 2.0 is no share"), ("{last: -0.5}", "layers.last"), ("{every: -1}", "layers.every"),
    ("{each: 1}", "rules[0].match.layers.each: there is no such key")])
def test_layers_that_cannot_be_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.parse(f"scheme: w4a16\nrules: [{{match: {{layers: {text}}}, scheme: float}}]")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("names", "number"), [
    (["/model/layers.3/self_attn/v_proj/MatMul"], 3), (["onnx::MatMul_12", "blk.10.attn_v.weight"], 10),
    (["node_MatMul_9", "val_9", "m/encoder/layer/7/output/dense"], 7), (["n_MatMul_29", "MatMul_29", "l0.wv"], 0),
    (["h_4/attn"], 4), (["conv1/layer/2/x"], 2), (["MatMul_5", "layers.3"], None), ([], None), (["lm_head"], None)])
def test_the_number_of_a_layer(names: list[str], number: int | None) -> None:
    assert layer_number(names) == number


def test_rules_by_layer_count_what_the_rest_of_the_match_fits() -> None:
    graph = canonical(load(DECODER))
    rules = (Rule(Match("MatMul", "*down_proj*", Layers(last=0.33)), "w8a16"),
             Rule(Match(name="*_proj*", layers=Layers(first=0.34)), "float"))
    found = {name: rule.scheme for name, rule in named(graph, Recipe(schemes.scheme("w4a16"), rules=rules)).items()
             if name.endswith("MatMul")}
    first = [f"/layers.0/{part}_proj/MatMul" for part in
             ("attention/q", "attention/k", "attention/v", "attention/o", "gate", "up", "down")]
    assert found == {**dict.fromkeys(first, "float"), "/layers.2/down_proj/MatMul": "w8a16"}


def test_an_optional_rule_may_match_nothing() -> None:
    graph = canonical(load(DECODER))
    own = schemes.scheme("w4a16")
    absent = Rule(Match(name="*nowhere*"), "float")
    with pytest.raises(UsageError, match="nowhere"):
        outline(graph, Recipe(own, rules=(absent,)), CPU)
    spared = Rule(Match(name="*nowhere*"), "float", optional=True)
    assert outline(graph, Recipe(own, rules=(spared,)), CPU).nodes == outline(graph, Recipe(own), CPU).nodes


# ------------------------------------------------------------------ what ships


@pytest.mark.parametrize("name", presets.preset_names())
def test_shipped_presets(name: str) -> None:
    found = presets.named(name)
    assert found.scheme.name == name
    assert found.scheme.summary
    assert found.rules
    assert all(rule.reason for rule in found.rules)
    assert found == recipe.parse(presets.text(name))
    assert request.resolve(scheme=name) == found
    assert recipe.parse(found.to_yaml()) == found
    assert name not in schemes.scheme_names()


def test_names() -> None:
    assert presets.names() == [*schemes.scheme_names(), *presets.preset_names()]
    assert presets.named("w4a16") == Recipe(schemes.scheme("w4a16"))
    assert presets.text("w8a8") == schemes.scheme_text("w8a8")
    with pytest.raises(UsageError, match=rf"there is no scheme 'q4_k_s-like'; known: {LIKE} \(onnxq schemes"):
        presets.named("q4_k_s-like")
    with pytest.raises(UsageError, match="there is no scheme 'w4a17'; known: w4a16"):
        presets.named("w4a17")


def kept(graph: Graph) -> set[str]:
    """Nodes that get 8 bits."""
    found = outline(canonical(graph), presets.named(LIKE), CPU)
    return {name for name, v in found.nodes.items()
            if v.weight in found.formats and found.formats[v.weight].dtype == "int8"}


def test_more_bits_where_q4_k_m_has_them() -> None:
    """Of 3 layers the last one is among them: 3 // 8 is 0, and 7 * 3 // 8 is 2, which is also the third."""
    graph = load(DECODER)
    assert kept(graph) == {"/layers.2/attention/v_proj/MatMul", "/layers.2/down_proj/MatMul", "/lm_head/MatMul"}
    verdicts = outline(canonical(load(DECODER)), presets.named(LIKE), CPU).nodes
    assert verdicts["/lm_head/MatMul"].reason.endswith("; the head keeps more bits in Q4_K_M")


def test_a_preset_compiles_and_is_shown(tmp_path: Path) -> None:
    judged = {"eval": str(DECODER.parent / "eval.npz"), "metric": "perplexity"}
    report = onnxq.compile(DECODER, scheme=LIKE, output=tmp_path / "o.onnx", measure=False, save_plan=tmp_path / "plan",
                           **judged)
    assert report.ok, report.verdict.failures
    assert report.scheme == LIKE
    assert report.accuracy is not None
    assert report.accuracy.compiled < 1.03 * 15.358
    onnxq.compile(DECODER, plan=tmp_path / "plan", output=tmp_path / "again.onnx", measure=False, **judged)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "o.onnx").read_bytes()
    shown = {row["name"]: row["reason"] for row in inspect(DECODER, scheme=LIKE)["nodes"]}
    assert "int8 weights in blocks of 128" in shown["/lm_head/MatMul"]
    assert yaml.safe_load(presets.text(LIKE))["scheme"]["name"] == LIKE
