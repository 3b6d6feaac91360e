"""What a report says in sentences about a Plan and about data."""

from __future__ import annotations

import numpy as np

from onnxq.calibration.readers import Dataset
from onnxq.plan import GIVEN, Plan
from onnxq.planner import masks, smoothing
from onnxq.planning import Planning
from onnxq.report.report import PrunedRow


def of_plan(plan: Plan, planning: Planning, able: bool) -> list[str]:
    """`able`: whether anything could be quantized, whatever measuring made of it."""
    found, scheme = [], planning.recipe.scheme
    given = sum(1 for n in plan.nodes.values() if n.scheme == GIVEN)
    if given:
        found.append(f"{given} nodes were quantized already and are kept")
    if not able:
        found.append(f"nothing {'more ' if given else ''}in this model can be quantized under this scheme; each node's "
                     "reason is in the report")
    if plan.pruned:
        found.append("zeros save bytes once they are packed (--pack), not time: kernels multiply them like any other "
                     "number")
    found += planning.notices
    found += [said for said in (smoothing.notice(plan), masks.notice(plan)) if said is not None]
    if scheme.is_dynamic:
        convs = sum(1 for n in plan.nodes.values() if n.op == "Conv" and not n.is_int and n.scheme != GIVEN)
        left = f", {convs} Conv compute in float" if convs else ""
        hint = "; --calib DATA brings static int8, faster and for Conv, too" if planning.calib is None else ""
        found.append(f"scheme {plan.scheme}: {', '.join(scheme.operators)} only{left}{hint}")
    return found


def pruned(plan: Plan, planning: Planning) -> list[PrunedRow]:
    """A row for each weight of a Plan that has zeros; how they came about is not known of a saved one."""
    made = {one.weight: one for one in planning.pruning.found} if planning.pruning is not None else {}
    layers: dict[str, list[str]] = {name: [] for name in plan.pruned}
    for node in planning.base.nodes:
        for tensor in node.inputs:
            if tensor.name in layers and node.name not in layers[tensor.name]:
                layers[tensor.name].append(node.name)
    return [PrunedRow(name, layers[name], values.size, 1 - np.count_nonzero(values) / max(values.size, 1),
                      made[name].method if name in made else "saved plan", made[name].error if name in made else None)
            for name, values in plan.pruned.items()]


def of_data(data: Dataset, use: str) -> list[str]:
    """`use` is what the data were for."""
    random = [f"{use} ran on random data, as asked: its figures tell nothing about accuracy"] if data.random else []
    return [*random, *(f"{use} data: {note}" for note in data.notes)]
