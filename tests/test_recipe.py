"""Recipes: what is refused and by which path, what globs name, and that YAML and back changes nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from onnxq import recipe, request, schemes
from onnxq.errors import RecipeError, UsageError
from onnxq.numerics import dtypes
from onnxq.numerics.sparsity import Pattern
from onnxq.recipe import BudgetSpec, Calibration, Fallback, Match, Recipe, Rule
from onnxq.schemes import Scheme, TensorSpec
from onnxq.sparsity import Sparsity

FULL = """
version: 1
scheme: w8a8
rules:
  - match: {op: MatMul, name: "*lm_head*"}
    scheme: float
    reason: output logits
  - match: {name: "*down*"}
    scheme: w8a8
calibration: {samples: 64, batch: 8, ranges: percentile, percentile: 99.9}
fallback: {keep_float: ["*mlp.down_proj*", "Conv_{1,2}"]}
budget: {metric: top1, max_drop: 0.5%}
"""


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe.parse(text)
    assert caught.value.exit_code == 2
    return str(caught.value)


# ------------------------------------------------------------------ reading


def test_a_full_recipe() -> None:
    found = recipe.parse(FULL)
    assert found.scheme == schemes.scheme("w8a8")
    assert found.rules == (Rule(Match("MatMul", "*lm_head*"), "float", "output logits"),
                           Rule(Match(None, "*down*"), "w8a8", ""))
    assert found.calibration == Calibration(64, 8, "percentile", 99.9)
    assert found.fallback == Fallback(("*mlp.down_proj*", "Conv_{1,2}"))
    assert found.budget == BudgetSpec("top1", "0.5%")


def test_defaults() -> None:
    found = recipe.parse("scheme: w8a8")
    assert found == Recipe(schemes.scheme("w8a8"))
    assert (found.version, found.rules, found.fallback.keep_float) == (1, (), ())
    assert found.calibration.samples == 128


def test_a_scheme_spelled_out() -> None:
    found = recipe.parse("""
scheme:
  name: mine
  activations: {dtype: uint8, symmetric: false}
  weights: {granularity: channel}
  operators: [MatMul]
""").scheme
    assert found == Scheme("mine", "", TensorSpec("uint8", False), TensorSpec(granularity="channel"), ("MatMul",))
    assert not found.is_float
    assert not found.is_dynamic


def test_numbers_stand_for_text_and_whole_numbers_for_floats() -> None:
    found = recipe.parse("scheme: w8a8\nbudget: {max_drop: 0.005}\ncalibration: {percentile: 99, samples: null}")
    assert found.budget.max_drop == "0.005"
    assert found.calibration.percentile == 99.0
    assert isinstance(found.calibration.percentile, float)
    assert found.calibration.samples is None


def test_files(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(FULL)
    assert recipe.read(tmp_path / "r.yaml") == recipe.parse(FULL)
    with pytest.raises(UsageError, match=r"none\.yaml can't be read .*; check the path"):
        recipe.read(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00scheme")
    with pytest.raises(UsageError, match=r"b\.yaml can't be read"):
        recipe.read(tmp_path / "b.yaml")


@pytest.mark.parametrize("text", [FULL, "scheme: w8a8-dynamic-tensor", "scheme: float", "scheme: {name: mine}",
                                  "scheme: w8a8\nfallback: {keep_float: ['a: b', \"it's\", '#x', 'y\nz']}"])
def test_yaml_and_back(text: str) -> None:
    found = recipe.parse(text)
    assert recipe.parse(found.to_yaml()) == found
    assert yaml.safe_load(found.to_yaml()) == found.to_dict()
    assert recipe.parse(recipe.parse(found.to_yaml()).to_yaml()).to_yaml() == found.to_yaml()


def test_recipes_are_values() -> None:
    assert hash(recipe.parse(FULL)) == hash(recipe.parse(FULL))
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.parse(FULL).version = 2  # type: ignore[misc]


@pytest.mark.parametrize(("given", "found"), [
    ("{}", Fallback()),
    ("{keep_float: [a], level: 10, rank: kurtosis}", Fallback(("a",), 10, "kurtosis")),
    ("{disable_names: [a, 'b*'], disable_level: L10}", Fallback(("a", "b*"), 10)),
    ("{disable_level: L0}", Fallback()),
    ("{disable_level: 3}", Fallback(level=3)),
    ("{disable_level: '3'}", Fallback(level=3)),
])
def test_other_names_of_fallback_are_read_and_not_printed(given: str, found: Fallback) -> None:
    read = recipe.parse(f"scheme: w8a8\nfallback: {given}")
    assert read.fallback == found
    assert yaml.safe_load(read.to_yaml())["fallback"] == {
        "keep_float": list(found.keep_float), "level": found.level, "rank": found.rank}
    assert recipe.parse(read.to_yaml()) == read


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize(("text", "message"), [
    ("scheme: w8a8\nfalback: {}", "falback: there is no such key; did you mean 'fallback'?"),
    ("scheme: w8a8\ncalibration: {sample: 3}", "calibration.sample: there is no such key; did you mean 'samples'?"),
    ("scheme: w8a8\nrules: [{match: {op: Conv}, scheme: float}, {match: {opp: Conv}, scheme: float}]",
     "rules[1].match.opp: there is no such key; did you mean 'op'?"),
    ("scheme: {name: mine, weights: {dtype: int8, per_channel: true}}",
     "scheme.weights.per_channel: there is no such key; known keys: dtype, symmetric, granularity, dynamic"),
    ("scheme: w8a8\n7: x", "7: there is no such key"),
    ("scheme: w8a8\nbudget: {null: x}", "budget.None: there is no such key"),
])
def test_unknown_keys_are_refused_by_path(text: str, message: str) -> None:
    assert refusal(text).startswith(message)


@pytest.mark.parametrize(("text", "message"), [
    ("scheme: w8a8\ncalibration: {samples: many}", "calibration.samples: int is wanted, not 'many'"),
    ("scheme: w8a8\ncalibration: {samples: true}", "calibration.samples: int is wanted, not True"),
    ("scheme: w8a8\ncalibration: {samples: 1.5}", "calibration.samples: int is wanted, not 1.5"),
    ("scheme: w8a8\ncalibration: {percentile: true}", "calibration.percentile: float is wanted, not True"),
    ("scheme: w8a8\ncalibration: {percentile: high}", "calibration.percentile: float is wanted, not 'high'"),
    ("scheme: w8a8\ncalibration: {ranges: [minmax]}", "calibration.ranges: str is wanted, not ['minmax']"),
    ("scheme: w8a8\ncalibration: 128", "calibration: a mapping is wanted, not 128"),
    ("scheme: w8a8\nfallback: {keep_float: '*a*'}", "fallback.keep_float: a list is wanted, not '*a*'"),
    ("scheme: w8a8\nfallback: {keep_float: [a, true]}", "fallback.keep_float[1]: str is wanted, not True"),
    ("scheme: w8a8\nfallback: [a]", "fallback: a mapping is wanted, not ['a']"),
    ("scheme: w8a8\nfallback: {level: L10}", "fallback.level: int is wanted, not 'L10'"),
    ("scheme: w8a8\nfallback: {level: -1}", "fallback.level: -1 layers can't stay float; give 0 or more"),
    ("scheme: w8a8\nfallback: {rank: mse}", "fallback.rank: 'mse' is not known; use range_parm, kurtosis, sqnr"),
    ("scheme: w8a8\nfallback: {disable_level: ten}",
     "fallback.disable_level: 'ten' is no level; write L10 or 10 for ten layers"),
    ("scheme: w8a8\nfallback: {disable_level: L-1}", "fallback.disable_level: 'L-1' is no level"),
    ("scheme: w8a8\nfallback: {level: 1, disable_level: L1}",
     "fallback.disable_level: another name of level, which is given, too; keep one"),
    ("scheme: w8a8\nfallback: {keep_float: [], disable_names: []}",
     "fallback.disable_names: another name of keep_float, which is given, too; keep one"),
    ("scheme: w8a8\nfallback: {disable_name: [a]}", "fallback.disable_name: there is no such key"),
    ("scheme: w8a8\nrules: {match: {op: Conv}}", "rules: a list is wanted, not {'match': {'op': 'Conv'}}"),
    ("scheme: w8a8\nrules: [Conv]", "rules[0]: a mapping is wanted, not 'Conv'"),
    ("scheme: w8a8\nrules: [{scheme: float}]", "rules[0].match: missing; add it"),
    ("scheme: w8a8\nrules: [{match: {op: Conv}}]", "rules[0].scheme: missing; add it"),
    ("scheme: w8a8\nrules: [{match: {op: Conv}, scheme: w4a4}]",
     "rules[0].scheme: 'w4a4' can't be mixed into w8a8; use float or w8a8"),
    ("scheme: {name: mine, weights: {symmetric: 1}}", "scheme.weights.symmetric: bool is wanted, not 1"),
    ("scheme: {name: mine, activations: {dtype: uint8}, weights: {symmetric: false}}",
     "scheme.weights.symmetric: false has no kernel here; use true"),
    ("scheme: {name: mine, activations: {dtype: uint8}, weights: {granularity: row}}",
     "scheme.weights.granularity: row has no kernel here; use tensor, channel"),
    ("scheme: {name: mine, activations: {dtype: uint8}, weights: {block_size: 32}}",
     "scheme.weights.block_size: 32 has no kernel here; use none"),
    ("scheme: {name: mine, weights: {granularity: channel}}",
     "scheme.weights.granularity: channel has no kernel here; use block"),
    ("scheme: {name: mine, weights: {granularity: block, block_size: 48}}",
     "scheme.weights.block_size: 48 has no kernel here; use 16, 32, 64, 128, 256"),
    ("scheme: {name: mine, weights: {dtype: uint4, granularity: block, block_size: 32}}",
     "scheme.weights.symmetric: uint4 is the type of asymmetric codes; use that of symmetric ones"),
    ("scheme: w4a16\nrules: [{match: {op: MatMul}, scheme: w8a8}]",
     "rules[0].scheme: 'w8a8' can't be mixed into w4a16; use float or w4a16"),
    ("scheme: {name: mine, weights: {}, activations: {dtype: int16}}",
     "scheme.activations.dtype: int16 has no kernel here; use uint8"),
    ("scheme: {name: mine, weights: {}, activations: {dtype: uint8, granularity: token}}",
     "scheme.activations.granularity: a scale per token is found at run time; add dynamic: true"),
    ("scheme: {summary: no name}", "scheme.name: missing; add it"),
    ("scheme: 8", "scheme: a mapping is wanted, not 8"),
    ("scheme: w8a9", "scheme: there is no scheme 'w8a9'; known: w8a8"),
    ("version: 1", "scheme: missing; name one of "),
    ("version: 2\nscheme: w8a8", "version: 2 is not known; this onnxq reads version 1"),
    ("version: '1'\nscheme: w8a8", "version: '1' is not known"),
    ("", "the recipe must be a mapping with at least `scheme:`"),
    ("- w8a8", "the recipe must be a mapping"),
    ("w8a8", "the recipe must be a mapping"),
    ("scheme: [w8a8", "the recipe is not valid YAML"),
    ("scheme: !!python/object:os.system {}", "the recipe is not valid YAML"),
    ("scheme: w8a8\nscheme: float", "scheme: given twice; keep one"),
    ("scheme: w8a8\ncalibration: {samples: 1, samples: 2}", "samples: given twice; keep one"),
])
def test_what_does_not_fit_is_refused_by_path(text: str, message: str) -> None:
    assert refusal(text).startswith(message)


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(("glob", "pieces"), [
    ("a", ["a"]), ("a{b,c}d", ["abd", "acd"]), ("{a,b}{c,d}", ["ac", "ad", "bc", "bd"]), ("a{b}", ["ab"]),
    ("{a,b{c,d}}e", ["ae", "bce", "bde"]), ("a{,b}", ["a", "ab"]), ("a{b,c", ["a{b,c"]), ("a}b", ["a}b"]), ("{}", [""]),
    ("a{b,{c,d}e}f{g,h}", ["abfg", "abfh", "acefg", "acefh", "adefg", "adefh"]),
])
def test_braces(glob: str, pieces: list[str]) -> None:
    assert recipe.expand_braces(glob) == pieces


@pytest.mark.parametrize(("glob", "name", "fits"), [
    ("conv1", "conv1", True), ("conv1", "conv10", False), ("conv?", "conv1", True), ("*", "", True), ("", "a", False),
    ("*.mlp.*", "layers/0/mlp/up", True), ("layers/*/mlp", "layers.0.mlp", True), ("Layers*", "layers.0", False),
    ("*_{1,2}", "Conv_2", True), ("*_{1,2}", "Conv_3", False),
    ("layers.[01].*", "layers.1.x", True), ("layers.[01].*", "layers.2.x", False),
    ("layers.{0,1{0,1}}.w", "layers/11/w", True), ("layers.{0,1{0,1}}.w", "layers/1/w", False),
])
def test_globs(glob: str, name: str, fits: bool) -> None:
    assert recipe.matches(glob, [name]) is fits
    assert recipe.matches(glob, ["somewhere else/entirely!", name]) is (fits or glob == "*")
    assert not recipe.matches(glob, [])


# ------------------------------------------------------------------ shipped schemes


@pytest.mark.parametrize("name", schemes.scheme_names())
def test_shipped_schemes(name: str) -> None:
    found = schemes.scheme(name)
    assert found.name == name
    assert found.summary
    assert found.operators
    assert not found.is_float
    for spec in (found.activations, found.weights, found.stored):
        if spec is not None:
            assert dtypes.by_name(spec.dtype)
            assert spec.granularity in ("block", "tensor", "channel", "token")
    assert found.is_dynamic is ("dynamic" in name or name == "w4a8")
    assert recipe.parse(f"scheme: {name}").scheme == found
    assert name in schemes.scheme_text(name)


def test_scheme_names() -> None:
    assert "w8a8" in schemes.scheme_names()
    assert schemes.scheme("float").is_float
    with pytest.raises(UsageError, match=r"there is no scheme 'w8a8-dynamics'; known: w8a8-dynamic.*\(onnxq sch"):
        schemes.scheme("w8a8-dynamics")
    with pytest.raises(UsageError, match=r"there is no scheme '\.\./w8a8'"):
        schemes.scheme("../w8a8")


def test_a_name_fits_itself_whatever_brackets_are_in_it() -> None:
    assert recipe.matches("layer[0]/{x}", ["layer[0]/{x}"])
    assert not recipe.matches("layer[0]", ["layer[1]"])


# ------------------------------------------------------------------ other blocks


@pytest.mark.parametrize(("name", "block_size", "symmetric", "wanted"), [
    ("w4a16", None, None, ("uint4", False, 32)), ("w4a16", 128, None, ("uint4", False, 128)),
    ("w4a16", None, True, ("int4", True, 32)), ("w4a16", 16, False, ("uint4", False, 16)),
    ("w8a16", 64, False, ("uint8", False, 64)), ("w2a16", None, True, ("int2", True, 32)),
    ("w4a8", 32, None, ("int4", True, 32)), ("w4a8", None, True, ("int4", True, 16))])
def test_blocks_are_replaced(name: str, block_size: int | None, symmetric: bool | None,
                             wanted: tuple[str, bool, int]) -> None:
    found = schemes.in_blocks(schemes.scheme(name), block_size, symmetric)
    weights = found.weights
    assert weights is not None
    assert (weights.dtype, weights.symmetric, weights.block_size) == wanted
    assert dataclasses.replace(found, weights=schemes.scheme(name).weights) == schemes.scheme(name)
    assert request.resolve(scheme=name, group_size=block_size, symmetric=symmetric).scheme == found


@pytest.mark.parametrize(("name", "block_size", "symmetric", "option"), [
    ("w8a8", 64, None, "--group-size"), ("w8a8-dynamic", None, False, "--asymmetric"), ("float", 32, True, "--group"),
    ("w8a8", None, True, "--symmetric"), ("w4a8", None, False, "--asymmetric"), ("w4a8", 32, False, "--group-size")])
def test_other_schemes_have_no_blocks_to_replace(name: str, block_size: int | None, symmetric: bool | None,
                                                 option: str) -> None:
    with pytest.raises(UsageError, match=rf"^{option}.* scheme {name} does not have; choose w2a16, w4a16, w8a16"):
        request.resolve(scheme=name, group_size=block_size, symmetric=symmetric)
    assert request.resolve(scheme=name).scheme == schemes.scheme(name)


@pytest.mark.parametrize(("change", "path"), [
    ({"activations": {"dtype": "uint8", "symmetric": False}}, "weights.granularity: blocks beside uint8 activations"),
    ({"weights": {"dtype": "uint4", "granularity": "block", "block_size": 16}}, "weights.dtype: uint4 has no kernel"),
    ({"stored": {"dtype": "uint4", "granularity": "block", "block_size": 32}}, "stored.symmetric: uint4 is the type"),
    ({"stored": {"dtype": "int8", "granularity": "channel"}}, "stored.granularity: channel has no kernel"),
    ({"weights": {"dtype": "int8", "granularity": "channel"}}, "stored: only weights in blocks beside")])
def test_two_levels_of_scales_have_kernels_in_one_form(change: dict[str, object], path: str) -> None:
    given = yaml.safe_load(schemes.scheme_text("w4a8")) | change
    with pytest.raises(RecipeError, match=rf"^scheme\.{path}"):
        recipe.parse(yaml.safe_dump({"scheme": given}))


def test_a_size_of_blocks_without_a_kernel_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^scheme\.weights\.block_size: 48 has no kernel here; use 16, 32"):
        request.resolve(scheme="w4a16", group_size=48)


# ---------------------------------------------------------------- sparsity


@pytest.mark.parametrize(("section", "wanted"), [
    ("{share: 50%}", 0.5), ("{share: 0.25, method: wanda}", 0.25), ("{pattern: '2:4'}", Pattern(2, 4)),
    ("{pattern: '1:4', share: 75%}", Pattern(1, 4)), ("{share: 0%}", None), ("{}", None)])
def test_shares_and_patterns_of_zeros(section: str, wanted: object) -> None:
    found = recipe.parse(f"scheme: w8a8\nsparsity: {section}")
    assert found.sparsity.wanted == wanted
    assert recipe.parse(found.to_yaml()) == found


@pytest.mark.parametrize(("section", "words"), [
    ("{share: 50}", r"^sparsity\.share: '50' is no share of zeros; write e\.g\. 50% or 0\.5"),
    ("{share: lots}", r"^sparsity\.share: 'lots' is no share"), ("{share: 100%}", r"^sparsity\.share: '100%' is no"),
    ("{pattern: 4}", r"^sparsity\.pattern: '4' is no pattern"), ("{pattern: '4:4'}", r"^sparsity\.pattern: 4:4 prunes"),
    ("{pattern: '2:4', share: 60%}", r"^sparsity\.share: 60% is not what the pattern 2:4 makes, 0\.5"),
    ("{method: obs}", r"^sparsity\.method: 'obs' is not known; use sparsegpt, wanda, magnitude"),
    ("{share: 50%, shares: best}", r"^sparsity\.shares: 'best' is not known; use uniform or budget"),
    ("{pattern: '2:4', shares: budget}", r"^sparsity\.shares: a budget needs a share, not a pattern"),
    ("{share: 50%, method: magnitude, shares: budget}", r"^sparsity\.shares: a budget needs .* sparsegpt or wanda"),
    ("{shar: 50%}", r"^sparsity\.shar: there is no such key; did you mean 'share")])
def test_other_sparsity_is_refused(section: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe.parse(f"scheme: w8a8\nsparsity: {section}")


def test_weights_in_blocks_are_not_pruned() -> None:
    for name in ("w4a16", "w4a8"):
        with pytest.raises(RecipeError, match=rf"^sparsity: scheme {name} stores weights in blocks"):
            recipe.parse(f"scheme: {name}\nsparsity: {{share: 50%}}")
    assert recipe.parse("scheme: w4a16\nsparsity: {share: 0%}").sparsity.wanted is None


def test_options_go_before_the_recipe() -> None:
    given = Recipe(schemes.scheme("w8a8"), sparsity=Sparsity(pattern="2:4", method="wanda", embeddings=True))
    assert request.resolve(recipe=given).sparsity == given.sparsity
    assert request.resolve(recipe=given, sparsity="30%").sparsity == Sparsity("30%", "wanda", embeddings=True)
    by_size = request.resolve(recipe=given, prune="magnitude").sparsity
    assert by_size == Sparsity(None, "magnitude", "2:4", embeddings=True)
    with pytest.raises(UsageError, match=r"^--prune wanda says how, but not how much"):
        request.resolve(scheme="w8a8", prune="wanda")
