"""Where an axis of channels goes in a Reshape, and stored lists of sizes that hold how many there are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxq.graph import Graph, Node, Tensor, is_constant, shape_of
from onnxq.passes.channels import Ids, Part, Walk

Dims = tuple[int | str | None, ...]


@dataclass(frozen=True, eq=False)
class Mapped:
    """An axis behind a Reshape; `part.ids` are indices of the channels before it that its slices belong to. So many as
    `count` consecutive parts of the channels are tied in each; -1: those of the same place in each group are."""

    count: int
    part: Part


def result_dims(graph: Graph, node: Node) -> Dims | None:
    """Dimensions of what a Reshape makes, in the names of those of what it reads where they are the same."""
    source, known = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    if node.op != "Reshape" or source is None or not is_constant(node.inputs[1]) or node.attrs.get("allowzero"):
        return known
    wanted = [int(size) for size in np.asarray(graph.read(node.inputs[1])).reshape(-1)]
    dims: list[int | str | None] = [source[k] if not d else d if d > 0 else None for k, d in enumerate(wanted)]
    rest = [d for d, size in zip(dims, wanted, strict=True) if size != -1]
    if -1 in wanted:
        place = wanted.index(-1)
        every = [d for d in (*source, *rest) if isinstance(d, int)]
        if len(every) == len(source) + len(rest) and all(every):
            dims[place] = int(np.prod(every[: len(source)])) // int(np.prod(every[len(source):]))
        elif known is not None:
            dims[place] = known[place]
    return tuple(dims)


def mapped(before: Dims, part: Part, after: Dims, grouped: bool) -> Mapped | None:
    """Where the channels of dimensions `before` lie in `after`, the same numbers in the same order; None where that
    can't be told.

    What they are divided into, or joined with, is tied: [.., H D] to [.., H, D] to [.., H D] gives heads. Where
    `grouped`, [B, H, S, D] to [B, G, H/G S, D] or [B, G, H/G, S, D] gives the places in a group, and not the groups.
    """
    count, axis = len(part.ids), part.axis
    groups = _groups(before, axis, after, count) if grouped else None
    if groups is not None:
        each, follows = count // groups, after[axis + 1]
        return Mapped(-1, Part(axis + 1, np.arange(each), len(after) == len(before) or follows != each))
    if part.runs or (grouped and _in_groups(before, axis, after, count)):
        return _out_of_groups(before, part, after, count)
    place = _place(before, axis, after, count)
    if place is None:
        return None
    size = int(after[place] or 0)
    few = min(size, count)
    if max(size, count) % few:
        return None
    return Mapped(few, Part(place, np.repeat(np.arange(count), size // few)[:: count // few]))


def _groups(before: Dims, axis: int, after: Dims, count: int) -> int | None:
    """How many groups heads are brought into: [B, H, S, D] to [B, G, H/G S, D] or [B, G, H/G, S, D]."""
    if axis >= len(before) - 2 or len(after) - len(before) not in (0, 1) or before[:axis] != after[:axis]:
        return None
    groups = after[axis]
    fits = isinstance(groups, int) and groups < count and count % groups == 0 and after[-1] == before[-1]
    return int(groups or 0) if fits else None


def _in_groups(before: Dims, axis: int, after: Dims, count: int) -> bool:
    """Whether an axis is that of places in a group, [B, G, H/G, S, D], which the axis before it joins."""
    groups = before[axis - 1] if axis else None
    return isinstance(groups, int) and len(after) == len(before) - 1 and after[axis - 1] == groups * count and (
        before[: axis - 1] == after[: axis - 1])


def _out_of_groups(before: Dims, part: Part, after: Dims, count: int) -> Mapped | None:
    """[B, G, H/G S, D] or [B, G, H/G, S, D] to [B, H, S, D]."""
    axis = part.axis - 1
    groups = before[axis] if axis >= 0 else None
    if not isinstance(groups, int) or axis >= len(after) or after[axis] != groups * count:
        return None
    return Mapped(count, Part(axis, np.tile(np.arange(count), groups)))


def _place(before: Dims, axis: int, after: Dims, count: int) -> int | None:
    """The axis of `after` that begins where `axis` does, counted from the front or from the end."""
    front = 0
    while front < axis and front < len(after) and before[front] is not None and before[front] == after[front]:
        front += 1
    while front < len(after) and after[front] == 1:
        front += 1
    # all sizes before the axis are passed, and those of 1 behind them
    if all(d == 1 for d in before[front:axis]) and front >= axis and front < len(after) and isinstance(
            after[front], int) and _same(before[:axis], after[:front]):
        return front
    back = 0
    while back < min(len(before) - axis - 1, len(after)) and before[-1 - back] is not None and (
            before[-1 - back] == after[-1 - back]):
        back += 1
    inner, known = before[axis + 1 : len(before) - back], 1
    if not all(isinstance(d, int) for d in inner):
        return None
    wanted = count * int(np.prod([int(d or 0) for d in inner], dtype=np.int64))
    for place in range(len(after) - back - 1, -1, -1):
        size = after[place]
        if not isinstance(size, int):
            return None
        known *= size
        if known == wanted:
            return place
    return None


def _same(first: Dims, second: Dims) -> bool:
    """Whether dimensions are alike but for those of 1."""
    return [d for d in first if d != 1] == [d for d in second if d != 1] and None not in first


def entry(walk: Walk, node: Node, axis: int, ids: Ids, silent: tuple[int, ...], copied: bool = False,
          runs: bool = False) -> bool:
    """Note the entry of a node's list of sizes, input 1, that is the number of channels; whether the list is right for
    any number of them then.

    It needs no change where the entry is one of `silent`, which say nothing of the size, or, where the axis is
    `copied`, a 0. `runs`: the axis holds more than the channels.
    """
    stored = _entry(walk, node.inputs[1], axis)
    if stored is None:
        return False
    if stored in silent or (stored == 0 and copied):
        return True
    if stored != len(ids) or runs:
        return False
    walk.sizes[node.name, 1, axis] = ids
    return True


def _entry(walk: Walk, sizes: Tensor, axis: int) -> int | None:
    if is_constant(sizes):
        values = np.asarray(walk.graph.read(sizes)).reshape(-1)
        return int(values[axis]) if axis < values.size else None
    joins = walk.graph.producer(sizes)
    if joins is None or joins.op != "Concat" or any(shape_of(t) != (1,) for t in joins.inputs) or (
            axis >= len(joins.inputs)):
        return None
    return _entry(walk, joins.inputs[axis], 0) if is_constant(joins.inputs[axis]) else None
