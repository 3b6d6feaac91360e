"""What is left of a Plan whose int8 kernels do not pay on the target."""

from __future__ import annotations

from dataclasses import replace

from onnxq.graph import Graph
from onnxq.plan import FLOAT, STORED, NodePlan, Plan
from onnxq.planner import masks
from onnxq.planner.rules import verdicts
from onnxq.planner.scales import stored_weights
from onnxq.planner.storing import store
from onnxq.recipe import Recipe


def without_int8(plan: Plan, graph: Graph, recipe: Recipe, reason: str) -> Plan:
    """The Plan with float kernels only, their weights stored as int8 where that makes the file smaller.

    `graph` is the canonical one that the Plan was made for; `reason` is noted for the nodes that change. Rewrites of
    masks stay, here and in `all_float`: they pay without int8, too.
    """
    found = Plan(plan.scheme, plan.target, {
        n.node: NodePlan(n.node, n.op, FLOAT, FLOAT, reason) if n.is_int else n for n in plan.nodes.values()},
        added=dict(plan.added), maskings=dict(plan.maskings))
    store(graph, found.nodes, verdicts(graph, recipe))
    stored_weights(graph, found, recipe)
    return found


def all_float(plan: Plan, reason: str) -> Plan:
    """The Plan without anything quantized or stored; what the model's maker quantized stays."""
    return Plan(plan.scheme, plan.target, {
        n.node: NodePlan(n.node, n.op, FLOAT, FLOAT, reason) if n.is_int or n.scheme == STORED else n
        for n in plan.nodes.values()}, added=dict(plan.added), maskings=dict(plan.maskings))


def without_masks(plan: Plan) -> Plan:
    """The Plan with the masks of Softmax as they came."""
    return replace(plan, added={}, maskings={}, nodes={
        n.node: replace(n, reason=masks.unsaid(n.reason)) if n.node in plan.added or n.node in plan.maskings else n
        for n in plan.nodes.values()})
