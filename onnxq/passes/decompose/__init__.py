"""Operators that a provider lacks, in those that it has."""

from __future__ import annotations

from onnxq.graph import Graph, full_name
from onnxq.passes.decompose.parts import Decomposition
from onnxq.passes.decompose.scale_first import ScaleFirst
from onnxq.passes.decompose.spell_out_activations import SpellOutActivations
from onnxq.passes.decompose.spell_out_attention import SpellOutAttention
from onnxq.passes.decompose.spell_out_einsum import SpellOutEinsum
from onnxq.passes.decompose.spell_out_group_norm import SpellOutGroupNorm
from onnxq.passes.decompose.spell_out_gru import SpellOutGru
from onnxq.passes.decompose.spell_out_norms import SpellOutNorms
from onnxq.passes.decompose.spell_out_rotary import SpellOutRotary
from onnxq.passes.decompose.spell_out_simple import SpellOutSimple
from onnxq.passes.manager import Pass

_STEPS: tuple[type[Decomposition], ...] = (
    SpellOutAttention, SpellOutNorms, SpellOutGroupNorm, SpellOutActivations, SpellOutRotary, SpellOutEinsum,
    SpellOutSimple, SpellOutGru)


def decompose(operators: frozenset[str]) -> list[Pass]:
    """Passes for a provider that has these operators of ONNX alone; they leave the outputs as they are within float
    rounding. Those that none of them replaces stay, see `lacking`."""
    return [*(step for kind in _STEPS if (step := kind.without(operators)) is not None), ScaleFirst()]


def lacking(graph: Graph, operators: frozenset[str]) -> dict[str, str]:
    """Node -> operator, with its domain unless that is ONNX's own, of what a provider with these operators lacks.

    Nodes in bodies of If, Loop and Scan, too.
    """
    return {node.name: name for node, _ in graph.walk() if (name := full_name(node)) not in operators}
