"""Which channels of a network can be taken out together, as far as weights can make up for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnxq.graph import Graph, Node, dtype_of, is_constant, shape_of
from onnxq.numerics.sampling import View
from onnxq.passes.channels import Family
from onnxq.passes.families import family, readers_of
from onnxq.planner.readers import view_of

Ids = npt.NDArray[np.int64]

WIDEST = 8192  # inputs of a layer: the work grows with the cube; layers that read one family have its square together


@dataclass(frozen=True, eq=False)
class Reading:
    """A layer that reads a tensor, as `view` says; `ids` int64 [C]: the group of each channel of that."""

    layer: str
    tensor: str
    view: View
    ids: Ids

    def groups(self) -> Ids:
        """That of each input of the layer's rows, int64 [K]."""
        return np.repeat(self.ids, self.view.repeat)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A family of which some groups may go, and the layers that read these, in execution order."""

    family: Family
    readings: tuple[Reading, ...]
    grouped: bool


@dataclass(frozen=True)
class Stays:
    """A layer that goes on reading all channels, or all `heads` of an attention, and why."""

    layer: str
    why: str
    heads: bool

    @property
    def reason(self) -> str:
        """For the report."""
        return f"all {'heads' if self.heads else 'channels'} of its input stay: {self.why}"


def candidates(graph: Graph, spared: frozenset[str]) -> tuple[list[Candidate], list[Stays]]:
    """Families with groups that may go, by the first layer that reads each, and the layers that read none of these.

    `spared` names nodes whose weights stay as they are. Heads that share keys and values with others go with these, or,
    where those have to stay, as one of each group.
    """
    found: list[Candidate] = []
    stays: list[Stays] = []
    known: dict[str, Stays | None] = {}  # tensors, with the reason why theirs stay
    for node in _layers(graph):
        tensor = node.inputs[0].name
        if tensor not in known:
            one = _candidate(graph, node, spared)
            if isinstance(one, Candidate):
                found.append(one)
                known |= dict.fromkeys(name for name, part in one.family.tensors.items() if not part.runs)
            else:
                known[tensor] = one
        why = known[tensor]
        if why is not None:
            stays.append(replace(why, layer=node.name))
    return found, stays


def _layers(graph: Graph) -> Iterator[Node]:
    for node in graph.nodes:
        if node.op not in ("MatMul", "Gemm", "Conv") or node.domain or is_constant(node.inputs[0]):
            continue
        if is_constant(node.inputs[1]):
            dims = shape_of(node.inputs[1]) or ()
            if dtype_of(node.inputs[1]) == np.float32 and len(dims) >= 2 and int(node.attrs.get("group", 1)) == 1:
                yield node


def _candidate(graph: Graph, node: Node, spared: frozenset[str]) -> Candidate | Stays:
    stays = Stays(node.name, f"the sizes of {node.inputs[0].name!r} are not known", heads=False)
    for grouped in (False, True):
        found = family(graph, node, grouped)
        if found is None:
            break
        found = replace(found, fixed=found.fixed | _fixed(graph, found, spared))
        if len(found.fixed) < found.count:
            readings = tuple(Reading(n.name, n.inputs[0].name, view, ids) for n, ids in readers_of(found, graph)
                             if (view := view_of(n)) is not None and not set(ids.tolist()) <= set(found.fixed))
            return Candidate(found, readings, grouped)
        why = stays.why if grouped else next(iter(found.fixed.values()))
        stays = Stays(node.name, why, stays.heads or found.attends)
        if found.count == len(found.readers[node.name]):  # no heads
            break
    return stays


def _fixed(graph: Graph, found: Family, spared: frozenset[str]) -> dict[int, str]:
    """Groups that stay for other reasons than what the network does with them."""
    fixed: dict[int, str] = {}
    work = 0
    for node, ids in readers_of(found, graph):
        view = view_of(node)
        size = len(ids) * (view.repeat if view is not None else 1)
        work += size**2
        shared = len(graph.consumers(node.inputs[1])) > 1
        if node.name in spared or view is None or shared or size > WIDEST:
            why = ("is to stay as it is" if node.name in spared else "has a weight that others read, too" if shared else
                   "pads in a way that is only known when it runs" if view is None else "reads too many to fit")
            fixed |= dict.fromkeys(ids.tolist(), f"{node.name} {why}")
    for (name, _), part in found.constants.items():
        if name in spared:
            fixed |= dict.fromkeys(part.ids.tolist(), f"{name} is to stay as it is")
    if work > WIDEST**2:
        fixed |= dict.fromkeys(range(found.count), "the layers that read it have too many inputs to fit")
    return fixed
