"""The Plan of last resort."""

from __future__ import annotations

from onnxq.plan import FLOAT, STORED, NodePlan, Plan


def all_float(plan: Plan, reason: str) -> Plan:
    """The Plan without anything quantized or stored; what the model's maker quantized stays."""
    return Plan(plan.scheme, plan.target, {
        n.node: NodePlan(n.node, n.op, FLOAT, FLOAT, reason) if n.is_int or n.scheme == STORED else n
        for n in plan.nodes.values()})
