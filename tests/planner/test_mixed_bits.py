"""Formats under a budget: which are offered, what they take on disk, who keeps its own, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import Opener, make_model, node, random
from lowering_support import CPU

from onnxq.errors import GraphError, UsageError
from onnxq.graph import Graph
from onnxq.numerics import affine, blocks, packing
from onnxq.numerics.dtypes import by_name
from onnxq.planner import mixed_bits
from onnxq.planner.bit_costs import Costs
from onnxq.planner.mixed_bits import MixedBits, described, options
from onnxq.planner.outline import outline
from onnxq.planner.weight_only import stored_bytes
from onnxq.progress import Silent
from onnxq.recipe import Bits, Match, Recipe, Rule
from onnxq.schemes import TensorSpec, in_blocks, scheme

W4 = scheme("w4a16")
K, N = 64, 32


def graph_of(opened: Opener) -> Graph:
    return opened(make_model(
        [node("MatMul", "x a", "b", name="first"), node("Tanh", "b", "c"), node("MatMul", "c d", "y", name="second")],
        {"x": ["n", K]}, {"y": None}, {"a": random(K, N), "d": random(N, K)}))


def mixed(graph: Graph, bits: Bits, damages: dict[str, list[float]], rules: tuple[Rule, ...] = ()) -> MixedBits:
    recipe = Recipe(W4, bits=bits, rules=rules)
    found = MixedBits(graph, outline(graph, recipe, CPU), recipe, CPU, kernels=True)
    found.costs = Costs("of the output's power", damages)
    return found


@pytest.mark.parametrize("dtype", ["uint2", "int4", "uint4", "int8", "uint8"])
@pytest.mark.parametrize(("inputs", "outputs", "size"), [(64, 32, 16), (100, 7, 32), (48, 5, 64)])
def test_stored_bytes_are_those_that_are_packed(dtype: str, inputs: int, outputs: int, size: int) -> None:
    kind = by_name(dtype)
    spec = TensorSpec(dtype, kind.signed, "block", block_size=size)
    w = random(inputs, outputs)
    params = blocks.choose(w, kind, size, kind.signed)
    codes, scales, zeros = packing.pack_matmul(affine.quantize(w, params), params)
    zero_bytes = 0 if kind.signed else outputs * -(-scales.shape[1] * kind.bits // 8)
    assert zeros is None or zeros.nbytes == zero_bytes
    assert stored_bytes((inputs, outputs), 0, spec, True) == codes.nbytes + scales.nbytes + zero_bytes
    blocks_in_all = params.scale.size
    decoded = [packing.pack_flat(np.zeros(count, kind.storage), kind).nbytes
               for count in (blocks_in_all * size, 0 if kind.signed else blocks_in_all)]
    assert stored_bytes((outputs, inputs), 1, spec, False) == sum(decoded) + 4 * blocks_in_all
    assert stored_bytes((outputs, inputs), 1, spec, False, 8) == blocks_in_all * (size + 4 + (not kind.signed))


@pytest.mark.parametrize(("name", "bits", "wanted"), [
    ("w4a16", Bits(4.5), ["uint4/32", "uint4/64", "uint4/128", "int8/32", "int8/64", "int8/128"]),
    ("w2a16", Bits(3, block_sizes=(32,)), ["uint2/32", "uint4/32", "int8/32"]),
    ("w8a16", Bits(9, block_sizes=(16, 256)), ["int8/16", "int8/256"]),
    ("w4a16", Bits(4, choices=("w2a16", "w4a16"), block_sizes=(64,)), ["uint2/64", "uint4/64"])])
def test_what_is_chosen_from(name: str, bits: Bits, wanted: list[str]) -> None:
    found = [s.weights for s in options(Recipe(scheme(name), bits=bits))]
    assert [f"{spec.dtype}/{spec.block_size}" for spec in found if spec is not None] == wanted


def test_a_symmetric_scheme_stays_symmetric() -> None:
    own = in_blocks(W4, symmetric=True)
    found = [s.weights for s in options(Recipe(own, bits=Bits(4.5, choices=("w4a16",), block_sizes=(32,))))]
    assert found == [own.weights]


def test_the_more_sensitive_weight_gets_the_bits(opened: Opener) -> None:
    bits = Bits(7.1, choices=("w4a16", "w8a16"), block_sizes=(32,))
    found = mixed(graph_of(opened), bits, {"a": [0.1, 0.001], "d": [0.4, 0.002]})
    chosen = found.choose({}, 0)
    assert {name: one.scheme.name for name, one in chosen.items()} == {"first": "w4a16", "second": "w8a16"}
    assert chosen["first"].reason == "chosen within 7.1 bits per weight, where it costs 0.1 of the output's power"
    assert chosen["second"].reason == ("chosen within 7.1 bits per weight, where it costs 0.002 of the output's power "
                                       "and uint4 in blocks of 32 would 0.4")
    # of 32 columns 2 blocks of 16 + 4 bytes and a byte for both zero points; of 64 one block of 32 + 4
    assert pytest.approx(7.06, abs=0.005) == 8 * (32 * 41 + 64 * 36) / (2 * K * N)
    assert found.notice == ("formats of weights were chosen within 7.1 bits per weight: 1 of uint4 in blocks of 32, 1 "
                            "of int8 in blocks of 32; 7.06 bits per weight, which cost 0.1 of the output's power by "
                            "estimate")


@pytest.mark.parametrize(("bits", "asked"), [
    (Bits(9.0), "9 bits per weight"), (Bits(max_size="40MB"), "40MB"), (Bits(max_size="40000000"), "40000000 bytes"),
    (Bits(9.0, "40MB"), "9 bits per weight and 40MB")])
def test_the_budget_in_words(bits: Bits, asked: str, opened: Opener) -> None:
    found = mixed(graph_of(opened), replace(bits, choices=("w8a16",), block_sizes=(32,)), {"a": [0.1], "d": [0.2]})
    assert found.choose({}, 0)["first"].reason == f"chosen within {asked}, where it costs 0.1 of the output's power"


def test_what_a_rule_names_keeps_the_rules_scheme(opened: Opener) -> None:
    bits = Bits(20.0, choices=("w4a16",), block_sizes=(32, 128))
    rules = (Rule(Match(name="second"), "w8a16"),)
    graph = graph_of(opened)
    found = mixed(graph, bits, {"a": [0.1, 0.2]}, rules)
    chosen = found.choose({}, 0)
    assert chosen.keys() == {"first"}
    verdicts = outline(graph, found.recipe, CPU, chosen=chosen)
    assert described(verdicts.formats["a"]) == "uint4 in blocks of 32"
    assert described(verdicts.formats["d"]) == "int8 in blocks of 128"
    assert verdicts.nodes["first"].reason.endswith(chosen["first"].reason)
    assert "chosen" not in verdicts.nodes["second"].reason


def test_decoded_weights_take_a_byte_for_each_code_without_the_opset_for_less(
        opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by its kernel, a weight of 4 bits is then as large as one of 8, of which the better one is taken."""
    bits = Bits(9.5, choices=("w4a16", "w8a16"), block_sizes=(32,))
    damages = {"a": [0.1, 0.001], "d": [0.4, 0.002]}
    refused = {"first": "slower", "second": "slower"}
    few = replace(bits, target=7.2)
    assert {one.scheme.name for one in mixed(graph_of(opened), few, damages).choose(refused, 0).values()} == {
        "w4a16", "w8a16"}

    def no_opset(graph: Graph, version: int) -> Graph:
        raise GraphError(f"no opset {version} here; choose another")

    monkeypatch.setattr(mixed_bits, "raise_opset", no_opset)
    assert {one.scheme.name for one in mixed(graph_of(opened), bits, damages).choose(refused, 0).values()} == {"w8a16"}
    with pytest.raises(UsageError, match="can't be met"):
        mixed(graph_of(opened), few, damages).choose(refused, 0)


@pytest.mark.parametrize(("bits", "file_bytes", "message"), [
    (Bits(4.2), 0, r"^--target-bits 4\.2 can't be met: the smallest formats, down to uint4 in blocks of 128, reach 4"),
    (Bits(max_size="3kB"), 5000, r"^--max-size 3kB can't be met: .* uint4 in blocks of 128, make a file of 4\.9 kB"),
])
def test_a_budget_that_cannot_be_met_names_the_least(opened: Opener, bits: Bits, file_bytes: int, message: str) -> None:
    found = mixed(graph_of(opened), bits, {})
    with pytest.raises(UsageError, match=message):
        found.check({}, file_bytes)


def test_costs_are_measured_of_what_is_free(opened: Opener) -> None:
    recipe = Recipe(W4, bits=Bits(9.0), rules=(Rule(Match(name="second"), "w8a16"),))
    graph = graph_of(opened)
    found = MixedBits(graph, outline(graph, recipe, CPU), recipe, CPU, kernels=True)
    found.measure(None, Silent())
    assert found.costs is not None
    assert found.costs.damages.keys() == {"a"}
    assert len(found.costs.damages["a"]) == 6
    assert np.isfinite(found.costs.damages["a"]).all()


def test_a_float_layer_is_not_chosen_for(opened: Opener) -> None:
    graph = graph_of(opened)
    found = mixed(graph, Bits(20.0), {"a": [0.1] * 6}, (Rule(Match(name="second"), "float"),))
    assert [w.name for w in found.weights] == ["a"]
    assert found.choose({}, 0).keys() == {"first"}
