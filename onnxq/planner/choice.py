"""Which units run in integers: the cheapest choice, by kernel times and by what converting between them costs.

A minimum cut. Every unit is a vertex; on the source's side it runs in integers, on the sink's in float. Edges cost what
a choice takes: a kernel's time, a QuantizeLinear once per tensor that any integer unit reads and that comes as float, a
DequantizeLinear once per tensor of codes that anything float reads. Source: Kolmogorov and Zabih, What Energy Functions
Can Be Minimized via Graph Cuts (2004); Stone, Multiprocessor Scheduling with the Aid of Network Flow Algorithms (1977).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import networkx as nx

from onnxq.graph import Graph
from onnxq.plan import FLOAT, Plan
from onnxq.planner.candidates import Unit
from onnxq.planner.joining import WEIGHTED
from onnxq.planner.pricing import Prices

Net: TypeAlias = "nx.DiGraph[Any]"

_INT, _FLOAT = "int", "float"  # source and sink
_OTHER_SCHEME = 0.05  # share of its time
_NANOSECONDS = 1_000_000  # in a millisecond; capacities are whole numbers, so that equal costs are equal


@dataclass(frozen=True)
class Choice:
    """What was chosen: `refused` maps a node that the table would run in integers to why it stays float; those in
    `at_run_time` run in integers all the same, by the kernel that finds its scale at run time."""

    refused: dict[str, str]
    at_run_time: frozenset[str]


def choose(graph: Graph, prices: Prices, tie: float) -> Choice:
    """The cheapest choice. Integers have to gain the share `tie` of a unit's float time (below 0: may lose it)."""
    units = {u.name: u for u in prices.units}
    makers = {t: u.name for u in prices.units for t in u.makes}
    net: Net = nx.DiGraph()
    net.add_nodes_from((_INT, _FLOAT))
    costs: dict[str, tuple[float, float]] = {}
    fastest: dict[str, str] = {}
    for unit in prices.units:
        costs[unit.name], fastest[unit.name] = _costs(unit, prices)
        as_float, as_int = costs[unit.name]
        net.add_edge(_INT, ("unit", unit.name), capacity=_whole(as_float))
        net.add_edge(("unit", unit.name), _FLOAT, capacity=_whole(as_int + tie * as_float))
    for unit in prices.units:
        _reading(net, unit, units, makers, prices)
        _making(net, graph, unit, prices)
    chosen = _int_side(net)
    left = [u for u in prices.units if u.name not in chosen]
    return Choice({node: _why(*costs[u.name]) for u in left for node in u.nodes},
                  frozenset(node for u in left for node in u.nodes if fastest[u.name] != FLOAT))


def by_gain(prices: Prices, plan: Plan) -> list[list[str]]:
    """The regions of what a Plan runs in integers, as the names of their nodes, those that save most time first."""
    units = {u.name: u for u in prices.units if plan.nodes[u.name].is_int}
    net: nx.Graph[tuple[str, str]] = nx.Graph()
    net.add_nodes_from(("unit", name) for name in units)
    for unit in units.values():
        net.add_edges_from((("unit", unit.name), ("tensor", t)) for t in unit.reads + unit.makes)
    found: list[tuple[float, list[str]]] = []
    for region in nx.connected_components(net):
        members = [units[name] for kind, name in sorted(region) if kind == "unit"]
        costs = [_costs(unit, prices)[0] for unit in members]
        found.append((sum(a - b for a, b in costs), [node for unit in members for node in unit.nodes]))
    return [nodes for _, nodes in sorted(found, reverse=True)]


def _costs(unit: Unit, prices: Prices) -> tuple[tuple[float, float], str]:
    """((milliseconds on the float side, on the integer side), the kernel on the float side).

    A kernel that quantizes what it reads itself stands on the float side: it takes and gives floats. It has to gain
    something over a kernel of the scheme's own, whose results don't depend on the other rows of a batch.
    """
    times = prices.times.get(unit.name)
    if times is None:
        return (0.0, 0.0), FLOAT
    sides = {name: time.ms * (1 + _OTHER_SCHEME * (name not in (FLOAT, unit.kernel)))
             for name, time in times.items() if name != unit.kernel}
    as_float = min(sides, key=lambda name: sides[name])
    as_int = times[unit.kernel].ms if unit.kernel in times else float("inf")
    return (sides[as_float], as_int), as_float


def _reading(net: Net, unit: Unit, units: Mapping[str, Unit], makers: Mapping[str, str],
             prices: Prices) -> None:
    """Q of what a unit reads; one that has no weights only joins where what it reads is codes already."""
    for tensor in unit.reads:
        maker = makers.get(tensor)
        read = ("read", tensor)
        if not net.has_node(read):
            cost = prices.to_codes(tensor)
            net.add_edge(read, ("unit", maker) if maker is not None else _FLOAT, capacity=_whole(cost))
        net.add_edge(("unit", unit.name), read)  # without a capacity: never cut
        if unit.op not in WEIGHTED and maker is not None:
            net.add_edge(("unit", unit.name), ("unit", maker))


def _making(net: Net, graph: Graph, unit: Unit, prices: Prices) -> None:
    """DQ of what a unit makes as codes, where anything float reads it."""
    for tensor in unit.makes:
        readers = {u.name for u in prices.units if tensor in u.reads}
        taken = {member for u in prices.units if u.name in readers for member in u.members}
        users = {n.name for n in graph.nodes for t in n.inputs if t.name == tensor}
        cost = _whole(prices.conversion.to_float(prices.elements[tensor], prices.ranks[tensor]))
        decoded = ("decoded", tensor)
        net.add_edge(("unit", unit.name), decoded, capacity=cost)
        if not users <= taken or any(o.name == tensor for o in graph.outputs):
            net.add_edge(decoded, _FLOAT)
        for reader in readers:
            net.add_edge(decoded, ("unit", reader))


def _int_side(net: Net) -> Collection[str]:
    _, (side, _) = nx.minimum_cut(net, _INT, _FLOAT)
    return {vertex[1] for vertex in side if isinstance(vertex, tuple) and vertex[0] == "unit"}


def _whole(ms: float) -> int:
    return round(min(ms, 1e6) * _NANOSECONDS)


def _why(as_float: float, as_int: float) -> str:
    if as_int < as_float:
        return "measured faster in int8, but by less than it costs to convert what is around it"
    return "measured as fast or faster in float"
