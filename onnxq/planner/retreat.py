"""Plans of last resort."""

from __future__ import annotations

from dataclasses import replace

from onnxq.plan import FLOAT, STORED, NodePlan, Plan
from onnxq.planner import masks


def all_float(plan: Plan, reason: str) -> Plan:
    """The Plan without anything quantized or stored; what the model's maker quantized stays, and rewrites of masks, and
    zeros."""
    return Plan(plan.scheme, plan.target, {
        n.node: NodePlan(n.node, n.op, FLOAT, FLOAT, reason) if n.is_int or n.scheme == STORED else n
        for n in plan.nodes.values()}, added=dict(plan.added), maskings=dict(plan.maskings),
        pruned=dict(plan.pruned))


def without_masks(plan: Plan) -> Plan:
    """The Plan with the masks of Softmax as they came."""
    return replace(plan, added={}, maskings={}, nodes={
        n.node: replace(n, reason=masks.unsaid(n.reason)) if n.node in plan.added or n.node in plan.maskings else n
        for n in plan.nodes.values()})
