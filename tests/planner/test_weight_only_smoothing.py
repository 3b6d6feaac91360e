"""Outliers moved into weights that alone are quantized: where that costs nothing at run time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from search_support import LARGE, Case, K, case, compiled, linear, normed, plain, reasons, sqnr

from onnxq.numerics import affine, blocks
from onnxq.numerics.dtypes import UINT4
from onnxq.planner import smoothing
from onnxq.planner.readers import groups, readers, sampled
from onnxq.planner.smoothing import Smoothed
from onnxq.planner.weight_only import block_params
from onnxq.recipe import Outliers
from onnxq.schemes import scheme


def found(of: Case) -> dict[str, Smoothed]:
    return {s.rewrite.tensor: s for s in smoothing.find(of.graph, of.found.nodes, frozenset(), of.by)}


def test_layers_that_read_floats_are_grouped_by_what_they_read(tmp_path: Path) -> None:
    of = case(normed(), tmp_path, plain(), "w4a16")
    [group] = groups(of.graph, of.found.nodes)
    assert (group.name, [n.name for n in group.layers], group.axis, group.channels) == ("t", ["fc"], -1, K)


def test_a_reader_has_weights_in_blocks_and_reads_floats(tmp_path: Path) -> None:
    of = case(normed(), tmp_path, plain(), "w4a16")
    [group] = groups(of.graph, of.found.nodes)
    [(_, halves)] = sampled(of.graph, [group], of.by.data, of.by.how, of.by.options)
    samples = halves.results()
    assert samples is not None
    chosen = scheme("w4a16")
    [reader] = readers(of.graph, group, samples[0], chosen, of.by.target)
    w = np.asarray(of.graph.read(group.layers[0].inputs[1]), np.float32)
    params = blocks.choose(w, UINT4, 32, False)
    for part in ("scale", "zero_point"):
        np.testing.assert_array_equal(getattr(block_params(w, chosen), part), getattr(params, part))
    np.testing.assert_array_equal(reader.decoded(w), affine.dequantize(affine.quantize(w, params), params))


def test_a_norm_above_takes_the_factors(tmp_path: Path) -> None:
    """Channels that what is read is large in get finer weights."""
    of = case(normed(), tmp_path, plain(), "w4a16")
    rewrite = found(of)["t"].rewrite
    assert (rewrite.absorbed, rewrite.source, rewrite.layers) == (True, None, ("fc",))
    others = np.delete(rewrite.factors, LARGE)
    assert rewrite.factors[list(LARGE)].min() > np.median(others)


def test_nothing_is_divided_at_run_time(tmp_path: Path) -> None:
    """A layer that reads the model's input has no constants above; a Mul would cost more than weights gain."""
    assert found(case(linear(), tmp_path, plain(), "w4a16")) == {}
    assert found(case(linear(), tmp_path, plain(), "w8a8")), "codes of activations gain more"


def test_the_result_is_nearer_and_of_the_same_operators(tmp_path: Path) -> None:
    errors = {}
    for method in ("none", "smooth"):
        report = compiled(normed(), tmp_path, plain(), "w4a16", outliers=Outliers(method), rounding="nearest")
        errors[method] = sqnr(report)
        assert [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node] == ["LayerNormalization", "MatMulNBits"]
        assert ("outliers are moved into its weights" in reasons(report)["fc"]) == (method == "smooth")
    assert errors["smooth"] > errors["none"] + 0.3


def test_even_channels_gain_nothing(tmp_path: Path) -> None:
    assert found(case(normed(large=False), tmp_path, plain(large=False), "w4a16")) == {}
