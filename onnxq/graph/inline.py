"""A body of If in place of the node that holds it."""

from __future__ import annotations

from onnxq.graph.graph import Graph, Node


def inline(graph: Graph, node: Node, branch: str) -> None:
    """Put the nodes of a body without inputs, that of attribute `branch`, in place of a node; an Identity for each of
    its results gives that its name."""
    body, name = node.attrs.pop(branch), node.name
    pairs = list(zip(body.outputs, node.outputs, strict=True))
    graph.remove(node)
    graph.ir.nodes.extend(body.nodes)
    graph._node_names |= {n.name for n in body.nodes}
    for index, (inner, result) in enumerate(pairs):
        graph.add_node("Identity", f"{name}/{index}", [inner], [result])
