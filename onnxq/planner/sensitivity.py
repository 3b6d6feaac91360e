"""Which layers int8 hurts most: a ranking of those that a Plan would quantize, by what calibration saw.

Ranks: `range_parm` and `kurtosis` of what a layer reads (the larger, the coarser the codes of its bulk), or `sqnr` of
what it makes when it alone is quantized (the lower, the worse; see `alone`).
Source: msModelSlim's disable_level, which keeps the first of such a ranking float.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from onnxq.graph import Graph, is_constant
from onnxq.numerics.comparison import Comparison
from onnxq.numerics.moments import Moments
from onnxq.plan import NodePlan
from onnxq.recipe import SQNR

MANY = 0.2  # of the layers: beyond, a notice warns


@dataclass(frozen=True)
class Layer:
    """A node with weights that runs on codes: `reads` names the tensor that becomes codes, `makes` what its kernel
    hands on, behind a bias Add, Relu or Clip that it computes along."""

    node: str
    op: str
    kernel: str
    reads: str
    makes: str


def layers(nodes: Mapping[str, NodePlan], graph: Graph) -> list[Layer]:
    """The layers among verdicts, in execution order; bodies of If and Loop, where nothing is observed, are left out."""
    found = []
    for node in graph.nodes:
        verdict = nodes.get(node.name)
        if verdict is None or not verdict.is_int or verdict.part_of is not None or verdict.result is None:
            continue
        reads = node.inputs[verdict.int_inputs[0] if verdict.int_inputs else 0]
        if (verdict.weight is not None or verdict.stored) and not is_constant(reads):
            found.append(Layer(node.name, node.op, verdict.lowering, reads.name, verdict.result))
    return found


def figures(rank: str, found: Sequence[Layer], moments: Mapping[str, Moments],
            alone: Mapping[str, Comparison]) -> dict[str, float]:
    """Node -> its figure of a rank: of `moments` (by the tensor read) or `alone` (by node; infinite for no error)."""
    if rank != SQNR:
        return {layer.node: float(getattr(moments[layer.reads], rank)) for layer in found}
    return {layer.node: float("inf") if (db := alone[layer.node].sqnr_db) is None else db for layer in found}


def most_sensitive(by_node: Mapping[str, float], rank: str, level: int) -> dict[str, str]:
    """Node -> why it stays float, for the `level` most sensitive ones; of equal ones the first."""
    ranked = sorted(by_node, key=lambda node: by_node[node] if rank == SQNR else -by_node[node])
    return {node: f"kept float: {_ordinal(k)} most sensitive by {rank} ({_figure(rank, by_node[node])}) of --fallback "
                  f"{level}" for k, node in enumerate(ranked[:level], 1)}


def notices(level: int, kept: Collection[str], ranked: int, every: int) -> list[str]:
    """What to tell of layers kept float: `kept` by name or rank, out of `ranked` that had a rank and `every` one."""
    found = []
    if level > ranked:
        found.append(f"--fallback {level} keeps all {ranked} layers float, since there are no more")
    if len(kept) > MANY * every:
        found.append(f"{len(kept)} of {every} layers ({len(kept) / every:.0%}) stay float by --keep-float and "
                     f"--fallback; beyond {MANY:.0%} little is left of what int8 saves: try other --ranges, or a finer "
                     "scheme")
    return found


def _ordinal(k: int) -> str:
    last = "th" if k % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(k % 10, "th")
    return f"{k}{last}"


def _figure(rank: str, value: float) -> str:
    if rank != SQNR:
        return f"{value:.1f}"
    return f"{value:.1f} dB" if value < float("inf") else "identical"
