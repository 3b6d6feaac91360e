"""Unique names for nodes and tensors, bodies of If, Loop and Scan included: identity is the name everywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx


def with_bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and the bodies of If, Loop and Scan in it, outer ones first."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from with_bodies(attribute.g)


def name_nodes(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Give every node, those of subgraphs too, a unique name; an exporter's name stays where it is unique."""
    nodes = [n for g in with_bodies(graph) for n in g.node]
    given = {n.name for n in nodes}
    named: dict[str, onnx.NodeProto] = {}
    for node in nodes:
        if not node.name or node.name in named:
            base = f"{node.op_type}_{next((o for o in node.output if o), 'x')}"
            node.name = next(name for name in (base, *(f"{base}_{k}" for k in range(2, len(nodes) + 3)))
                             if name not in named and name not in given)
        named[node.name] = node
    return named


def name_tensors(graph: onnx.GraphProto) -> None:
    """Give the tensors of If, Loop and Scan bodies unique names; ONNX lets two branches use the same ones.

    A tensor keeps its name where it is unique, else that of its node and branch is put in front.
    """
    taken = _local_names(graph)
    for node in graph.node:
        _name_body_tensors(node, {}, taken)


def _name_body_tensors(owner: onnx.NodeProto, outer: dict[str, str], taken: set[str]) -> None:
    """Rename within the bodies of one node; `outer` maps names of the enclosing bodies to their new ones."""
    for attribute in owner.attribute:
        if attribute.type != onnx.AttributeProto.GRAPH:
            continue
        graph, renamed = attribute.g, dict(outer)
        for name in sorted(_local_names(graph)):
            renamed[name] = name
            while renamed[name] in taken:
                renamed[name] = f"{owner.name}.{attribute.name}.{renamed[name]}"
            taken.add(renamed[name])
        named: list[Any] = [*graph.initializer, *graph.input, *graph.output, *graph.value_info]
        for tensor in named:
            tensor.name = renamed.get(tensor.name, tensor.name)
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [renamed.get(n, n) for n in names]
            _name_body_tensors(node, renamed, taken)


def _local_names(graph: onnx.GraphProto) -> set[str]:
    """Names of what a graph itself stores, takes and computes."""
    return {t.name for t in graph.initializer} | {i.name for i in graph.input} | {
        o for n in graph.node for o in n.output if o}
