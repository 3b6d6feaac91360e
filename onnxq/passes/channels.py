"""Which channels of a network can only go together: those that layers make, hand on, join and read.

From a tensor that layers read the walk goes both ways: up to the layers that make its channels, and down to all that
reads what is made of them. What works channel by channel ties the channels of what it reads and makes; an Add ties
those of two branches, a Concat puts them side by side, a Reshape ties the columns of a head. Layers end the walk:
their columns or filters make channels, their rows read them. Channels that meet anything else stay.
Source: dependency graphs (DepGraph, arXiv 2301.12900).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from onnxq.graph import Graph, Node, Tensor, shape_of

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Part:
    """One axis of a tensor, or of input `index` of a node: slice k of it belongs to group ids[k], int64 [C].

    Where `runs`, the axis holds C runs of as many slices each, whose length nobody needs to know.
    """

    axis: int
    ids: Ids
    runs: bool = False


@dataclass(frozen=True, eq=False)
class Family:
    """Groups of channels, 0 to `count` - 1, in each of which all go or stay.

    tensors: name -> the axis of a computed tensor that gets narrower. constants: (node, index) -> that of a stored
    input. readers: layer -> the group of each channel that it reads, int64 [C]. sizes: (node, index, entry) -> the
    ids of the axis whose size is that entry of a stored list of sizes. depthwise: Convs with a filter for each channel.
    fixed: group -> why it stays. attends: whether the groups are heads of an attention.
    """

    count: int
    tensors: dict[str, Part]
    constants: dict[tuple[str, int], Part]
    readers: dict[str, Ids]
    sizes: dict[tuple[str, int, int], Ids]
    depthwise: tuple[str, ...]
    fixed: dict[int, str]
    attends: bool

    def bundles(self) -> Ids:
        """int64 [count]: groups of the same number lie in the same tensors; -1 for those that stay."""
        lies: list[list[int]] = [[] for _ in range(self.count)]
        for number, part in enumerate(self.tensors.values()):
            for one in np.unique(part.ids):
                lies[one].append(number)
        known: dict[tuple[int, ...], int] = {}
        found = [known.setdefault(tuple(places), len(known)) for places in lies]
        return np.array([-1 if k in self.fixed else b for k, b in enumerate(found)], np.int64)


class Groups:
    """Sets of channels that grow together (union-find); the least member stands for all."""

    def __init__(self) -> None:
        self._up: Ids = np.empty(0, np.int64)

    def more(self, count: int) -> Ids:
        """New channels, each by itself."""
        first = len(self._up)
        made = np.arange(first, first + count)
        self._up = np.concatenate([self._up, made])
        return made

    def of(self, ids: Ids) -> Ids:
        """Who stands for each."""
        found = self._up[ids]
        while not np.array_equal(found, self._up[found]):
            found = self._up[found]
        self._up[ids] = found
        return found

    def tie(self, a: Ids, b: Ids) -> None:
        """Bring a[k] and b[k] together, for every k."""
        first, second = self.of(a), self.of(b)
        for x, y in np.unique(np.stack([first, second], 1)[first != second], axis=0):
            p, q = (int(self.of(np.array([one]))[0]) for one in (x, y))
            self._up[max(p, q)] = min(p, q)


@dataclass(frozen=True, eq=False)
class Mark:
    """The channels of a computed tensor of `rank` dimensions, as far as the walk has come."""

    tensor: Tensor
    rank: int
    part: Part

    @property
    def axis(self) -> int:
        """That of the channels, from the front."""
        return self.part.axis

    @property
    def ids(self) -> Ids:
        """int64 [C]."""
        return self.part.ids


@dataclass
class Walk:
    """What the walk has found; `grouped`: of grouped heads those at the same place in each group go together, and not
    all that share a head of K and V."""

    graph: Graph
    grouped: bool = False
    groups: Groups = field(default_factory=Groups)
    marks: dict[str, Mark] = field(default_factory=dict)
    constants: dict[tuple[str, int], Part] = field(default_factory=dict)
    readers: dict[str, Ids] = field(default_factory=dict)
    sizes: dict[tuple[str, int, int], Ids] = field(default_factory=dict)
    depthwise: list[str] = field(default_factory=list)
    stay: list[tuple[Ids, str]] = field(default_factory=list)
    waiting: list[Mark] = field(default_factory=list)
    attends: bool = False

    def meet(self, tensor: Tensor, rank: int, part: Part) -> None:
        """Channels of a tensor that belong to known ones."""
        dims, known = shape_of(tensor), self.marks.get(tensor.name)
        size = dims[part.axis] if dims is not None and len(dims) == rank else None
        if (dims is not None and len(dims) != rank) or (
                not part.runs and isinstance(size, int) and size != len(part.ids)):
            self.keep(part.ids, f"{tensor.name!r} has other sizes than what it is made of")
        elif known is None:
            self.marks[tensor.name] = Mark(tensor, rank, part)
            self.waiting.append(self.marks[tensor.name])
        elif (known.axis, len(known.ids), known.part.runs) == (part.axis, len(part.ids), part.runs):
            self.groups.tie(known.ids, part.ids)
        else:
            self.keep(np.concatenate([known.ids, part.ids]), f"{tensor.name!r} has channels along two axes")

    def take(self, node: Node, index: int, part: Part) -> None:
        """Slices of a stored input that belong to known channels."""
        known = self.constants.setdefault((node.name, index), part)
        if (known.axis, len(known.ids)) == (part.axis, len(part.ids)):
            self.groups.tie(known.ids, part.ids)
        else:
            self.keep(np.concatenate([known.ids, part.ids]), f"{node.name} has channels along two axes")

    def read(self, node: Node, ids: Ids) -> None:
        """Channels that a layer's rows read."""
        self.groups.tie(self.readers.setdefault(node.name, ids), ids)

    def keep(self, ids: Ids, reason: str) -> None:
        """Channels that stay, with the reason."""
        self.stay.append((ids, reason))

    @property
    def over(self) -> bool:
        """Whether all that was found stays, and so will what there is beyond."""
        every = np.unique(self.groups.of(np.concatenate([mark.ids for mark in self.marks.values()])))
        fixed = self.groups.of(np.concatenate([ids for ids, _ in self.stay])) if self.stay else every[:0]
        return not np.setdiff1d(every, fixed).size

    def result(self) -> Family:
        """With groups numbered in the order in which they were met."""
        known = np.unique(self.groups.of(np.concatenate([mark.ids for mark in self.marks.values()])))

        def numbered(ids: Ids) -> Ids:
            return np.searchsorted(known, self.groups.of(ids))

        def part(old: Part) -> Part:
            return Part(old.axis, numbered(old.ids), old.runs)

        fixed: dict[int, str] = {}
        for ids, reason in self.stay:
            fixed |= {int(one): reason for one in numbered(ids) if int(one) not in fixed}
        return Family(known.size, {name: part(mark.part) for name, mark in self.marks.items()},
                      {key: part(one) for key, one in self.constants.items()},
                      {name: numbered(ids) for name, ids in self.readers.items()},
                      {key: numbered(ids) for key, ids in self.sizes.items()},
                      tuple(dict.fromkeys(self.depthwise)), fixed, self.attends)
