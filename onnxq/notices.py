"""What a report says in sentences about a Plan and about data."""

from __future__ import annotations

from onnxq.calibration.readers import Dataset
from onnxq.plan import GIVEN, Plan
from onnxq.planner import masks, smoothing
from onnxq.planning import Planning


def of_plan(plan: Plan, planning: Planning, able: bool) -> list[str]:
    """`able`: whether anything could be quantized, whatever measuring made of it."""
    found, scheme = [], planning.recipe.scheme
    given = sum(1 for n in plan.nodes.values() if n.scheme == GIVEN)
    if given:
        found.append(f"{given} nodes were quantized already and are kept")
    if not able:
        found.append(f"nothing {'more ' if given else ''}in this model can be quantized under this scheme; each node's "
                     "reason is in the report")
    found += planning.notices
    found += [said for said in (smoothing.notice(plan), masks.notice(plan)) if said is not None]
    if scheme.is_dynamic:
        convs = sum(1 for n in plan.nodes.values() if n.op == "Conv" and not n.is_int and n.scheme != GIVEN)
        left = f", {convs} Conv compute in float" if convs else ""
        hint = "; --calib DATA brings static int8, faster and for Conv, too" if planning.calib is None else ""
        found.append(f"scheme {plan.scheme}: {', '.join(scheme.operators)} only{left}{hint}")
    return found


def of_data(data: Dataset, use: str) -> list[str]:
    """`use` is what the data were for."""
    random = [f"{use} ran on random data, as asked: its figures tell nothing about accuracy"] if data.random else []
    return [*random, *(f"{use} data: {note}" for note in data.notes)]
