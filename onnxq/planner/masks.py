"""What becomes of the masks of Softmax: which are added instead of selected, which fills stay in the range of exp.

Ranges of scores and masks are observed by reductions put into a copy of the graph, two numbers per tensor, so that one
streamed run gives them along with all other ranges. Bounds: onnxq.numerics.masking.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.graph import Graph, Node, Tensor, shape_of
from onnxq.numerics import masking
from onnxq.numerics.extremes import MinMax
from onnxq.numerics.masking import Scores
from onnxq.passes import masks
from onnxq.passes.manager import Context
from onnxq.passes.transform.add_masks import AddMasks
from onnxq.plan import BOUNDED, FLOORED, ROW_FLOORED, Masking, Plan

_ROW_FLOOR = -30.0  # below the greatest of a row: exact for up to five million keys
_MASKS = "; its mask "  # between a node's reason and what is said on masks
_OPSET = 11  # of Clip with a computed bound and of axes counted from the end
_BEYOND = -1e9  # no scores lie near that, calibrated or not
_SHALLOW = -80.0  # a mask that adds no less makes no denormals worth mending


class Extremes:
    """The extremes of a tensor that may hold NaN, which `nan` tells."""

    def __init__(self) -> None:
        self.range = MinMax()
        self.nan = False

    def update(self, x: npt.NDArray[Any]) -> None:
        """Fold in one batch of any shape."""
        try:
            self.range.update(x)
        except ValueError:
            self.nan = True

    @property
    def sane(self) -> bool:
        """Whether something was seen, and finite numbers alone."""
        return bool(self.range.count) and not self.nan and not self.range.infinite


class _Keys:
    """The greatest length of the last axis, from shapes."""

    def __init__(self) -> None:
        self.most = 0

    def update(self, x: npt.NDArray[Any]) -> None:
        self.most = max(self.most, int(x[-1]))


@dataclass
class _Observed:
    """What is measured at one Softmax: its scores before the masks, the length of its rows, each mask."""

    scores: Extremes
    keys: _Keys
    masks: dict[str, Extremes]

    @property
    def known(self) -> Scores:
        return Scores(self.scores.range.low, self.scores.range.high, max(self.keys.most, 1))


@dataclass
class Masks:
    """The masks of a graph: `graph` is a copy with reductions, `statistics` what their results are folded into.

    `added` are the Wheres that become Adds, `hidden` the numbers that they select where another one is added, with the
    Softmax behind, whose scores must lie above; `selected` the Softmaxes behind Wheres that stay. `floors` are maskings
    that the Plan does not hold, since they cost passes over the scores: they pay where denormals are slow, which only a
    measurement tells.
    """

    graph: Graph
    added: dict[str, float] = field(default_factory=dict)
    hidden: dict[str, tuple[float, str]] = field(default_factory=dict)
    selected: list[str] = field(default_factory=list)
    observed: dict[str, _Observed] = field(default_factory=dict)
    statistics: dict[str, Extremes | _Keys] = field(default_factory=dict)
    floors: dict[str, Masking] = field(default_factory=dict)


# ------------------------------------------------------------------ finding


def find(graph: Graph) -> Masks:
    """The masks of a canonical graph, which stays as it is; those in bodies of If and Loop are left alone."""
    found = Masks(graph)
    softmaxes = [n for n in graph.nodes if masks.over_last_axis(graph, n)] if graph.opset >= _OPSET else []
    for node in softmaxes:
        _add(found, node)
    if not found.added and all(masks.added(graph, n) is None for n in softmaxes):
        return found
    found.graph = copy = graph.copy()
    AddMasks().run(copy, Context(plan=Plan("", "", added=found.added)))
    for node in copy.nodes:
        parts = masks.added(copy, node) if masks.over_last_axis(copy, node) else None
        if parts is not None and node.name not in found.selected and \
                all(shape_of(m) and not masks.bounded(copy, m) for m in parts.masks):
            _observe(found, parts)
    copy.sort()
    return found


def _add(found: Masks, softmax: Node) -> None:
    """Note the Where above a Softmax that may add, and the number that it adds.

    It is the one next to the scores. A fill that absorbs them is added as it is: the same bits, whatever else is added
    behind. One that merely hides them gives way to one that absorbs where it is the only mask: hidden scores weigh
    nothing either way, and a row that sees nothing holds one number everywhere, either way.
    """
    graph, chain = found.graph, list(masks.selected(found.graph, softmax))
    if not chain:
        return
    last = chain[-1]
    above = graph.producer(last.scores)
    if (above is None or masks.apart(graph, above) is None) and _smaller(graph, last):
        if last.fill <= masks.ABSORBING:
            found.added[last.where.name] = last.fill
        elif last.fill <= masks.HIDING and softmax.inputs[0] is last.where.outputs[0]:
            found.added[last.where.name] = float(np.finfo(np.float32).min)
            found.hidden[last.where.name] = last.fill, softmax.name
    if any(s.where.name not in found.added and s.fill < _SHALLOW for s in chain):
        found.selected.append(softmax.name)


def _smaller(graph: Graph, found: masks.Selected) -> bool:
    """Whether layers or heads share a mask: one more Where for each layer's own would gain nothing."""
    if sum(1 for n in graph.consumers(found.condition) if n.op == "Where") > 1:
        return True
    mask, scores = shape_of(found.condition), shape_of(found.scores)
    return mask is not None and scores is not None and (
        len(mask) < len(scores) or any(a == 1 != b for a, b in zip(mask, scores, strict=False)))


def _observe(found: Masks, parts: masks.Added) -> None:
    """Put the reductions of one Softmax's scores and masks into the copy."""
    name = f"{parts.softmax.name}.keys"
    found.graph.add_node("Shape", name, [parts.softmax.inputs[0]], [found.graph.variable(name, np.int64)])
    found.statistics[name] = keys = _Keys()
    found.observed[parts.softmax.name] = _Observed(_extremes(found, parts.scores), keys,
                                                   {m.name: _extremes(found, m) for m in parts.masks})


def _extremes(found: Masks, tensor: Tensor) -> Extremes:
    """What the extremes of a tensor are folded into; one for all layers that read it."""
    names = [f"{tensor.name}.{op}" for op in ("ReduceMin", "ReduceMax")]
    known = found.statistics.get(names[0])
    if isinstance(known, Extremes):
        return known
    into = Extremes()
    for name in names:
        result = found.graph.variable(name, np.float32, [])
        found.graph.add_node(name.rpartition(".")[2], name, [tensor], [result], {"keepdims": 0})
        found.statistics[name] = into
    return into


# ------------------------------------------------------------------ deciding


def decide(found: Masks, plan: Plan) -> None:
    """Enter what was decided into a Plan, with a reason for each Softmax, and fill `found.floors`.

    Nothing is chosen by ranges that were not observed. All layers that share a mask get the fill of the one whose
    scores are the widest, so that the mask is bounded once.
    """
    _decide_added(found, plan)
    for name in found.selected:
        found.floors[name] = Masking(name, ROW_FLOORED, _ROW_FLOOR)
        _say(plan, name, "keeps its fill: it selects scores")
    fills: dict[tuple[str, ...], float] = {}
    for name, seen in found.observed.items():
        stays = _stays(seen)
        fill = masking.added(seen.known) if stays is None else None
        if fill is not None:
            fills[tuple(seen.masks)] = min(fill.value, fills.get(tuple(seen.masks), 0.0))
        else:
            _say(plan, name, stays if stays is not None else _no_fill(found, name))
    for name, seen in found.observed.items():
        value = fills.get(tuple(seen.masks))
        if value is not None and _stays(seen) is None and masking.added(seen.known) is not None:
            plan.maskings[name] = Masking(name, BOUNDED, value)
            reach = masking.added_reach(seen.known, value)
            _say(plan, name, f"hides with {value:g}{_exact(seen.known, reach)}")


def _decide_added(found: Masks, plan: Plan) -> None:
    """Enter the Wheres that become Adds; a fill that scores might reach is not replaced by a lower one."""
    for name, number in found.added.items():
        fill, softmax = found.hidden.get(name, (-math.inf, ""))
        seen = found.observed.get(softmax)
        if fill > _BEYOND and (seen is None or _stays(seen) is not None or not masking.hides(fill, seen.known)):
            found.observed.pop(softmax, None)
            found.selected += [] if softmax in found.selected else [softmax]
            _say(plan, name, f"is selected still: scores may lie near {fill:g}")
        else:
            plan.added[name] = number
            _say(plan, name, "is added instead, which is faster")


def _stays(seen: _Observed) -> str | None:
    """Why a mask stays whatever its scores are; None where it may change."""
    if not seen.keys.most:
        return "keeps its fill: another one takes calibration data"
    if not seen.scores.sane or any(m.nan for m in seen.masks.values()):
        return "keeps its fill: scores were infinite or no number"
    if all(not m.range.infinite and _SHALLOW <= m.range.low < 0.0 for m in seen.masks.values()):
        return "hides with numbers in the range of exp"
    return None


def _no_fill(found: Masks, name: str) -> str:
    """Enter the floor of a Softmax whose mask has no fill that is exact; tells why."""
    seen = found.observed[name]
    floor = masking.floor(seen.known) if all(m.range.high <= 0.0 for m in seen.masks.values()) else None
    form, value = (ROW_FLOORED, _ROW_FLOOR) if floor is None else (FLOORED, floor.value)
    found.floors[name] = Masking(name, form, value)
    return (f"keeps its fill: none in the range of exp is exact for scores {masking.REACH:g} times those of the "
            f"calibration data ({seen.known.low:.3g} to {seen.known.high:.3g})")


def use_floor(found: Masks, plan: Plan, name: str) -> None:
    """Enter a Softmax's floor into a Plan after all."""
    floor = plan.maskings[name] = found.floors[name]
    if floor.form == ROW_FLOORED:
        told = f"hides {-floor.fill:g} below the greatest score of each row, exact to {masking.ERROR:g}"
    else:
        known = found.observed[name].known
        exact = _exact(known, masking.floor_reach(known, floor.fill))
        told = f"hides by a floor of {floor.fill:g} under all scores{exact}"
    _say(plan, name, told)


def drop(plan: Plan, name: str, why: str) -> None:
    """Take a Where or a Softmax out of a Plan's rewrites; `why` is told of the node."""
    plan.added.pop(name, None)
    plan.maskings.pop(name, None)
    _say(plan, name, why)


def _exact(scores: Scores, reach: float) -> str:
    grown = f"scores {min(reach, 99.0):.1f} times those of the calibration data"
    return f", exact to {masking.ERROR:g} for {grown} in rows of up to {scores.longest} keys"


def notice(plan: Plan) -> str | None:
    """What a Plan does to masks, in a sentence; None for nothing."""
    told = []
    if plan.added:
        told.append(f"{len(plan.added)} are added instead of selected, the same bit for bit")
    if plan.maskings:
        told.append(f"{len(plan.maskings)} hide with numbers in the range of exp, exact to {masking.ERROR:g} within "
                    "the margin that the report gives for each Softmax")
    return f"masks of attention scores: {'; '.join(told)}" if told else None


def unsaid(reason: str) -> str:
    """A reason without what was said on masks."""
    return reason.partition(_MASKS)[0]


def _say(plan: Plan, name: str, told: str) -> None:
    plan.nodes[name] = replace(plan.nodes[name], reason=f"{unsaid(plan.nodes[name].reason)}{_MASKS}{told}")
