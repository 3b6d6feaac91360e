"""The result of onnxq.analyze as a table, the worst layer first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxq.report import wording

# what layers are sorted by -> its key in a layer, and whether the least of it is the worst
SORTS = {"sqnr": ("sqnr_db", True), "accumulated": ("accumulated_db", True), "range_parm": ("range_parm", False),
         "kurtosis": ("kurtosis", False), "clipped": ("clipped", False)}
TITLES = ("layer", "operator", "alone", "accumulated", "range_parm", "kurtosis", "clipped", "range", "scale")

Layer = Mapping[str, Any]


def worst_first(layers: Sequence[Layer], sort: str) -> list[Layer]:
    """Layers by one of SORTS; equal ones in execution order, those without the figure (no error, no range) last."""
    key, least = SORTS[sort]
    return sorted(layers, key=lambda layer: (layer[key] is None, (layer[key] or 0.0) * (1 if least else -1)))


def cells(layer: Layer) -> list[str]:
    """A layer's row under TITLES."""
    at_run_time = layer["scale"] is None
    return [wording.clean(layer["name"]), layer["op"], wording.decibels(layer["sqnr_db"]),
            wording.decibels(layer["accumulated_db"]), f"{layer['range_parm']:.1f}", f"{layer['kurtosis']:.1f}",
            "-" if layer["clipped"] is None else share(layer["clipped"]),
            "at run time" if at_run_time else f"{layer['low']:.3g} to {layer['high']:.3g}",
            "-" if at_run_time else f"{layer['scale']:.3g}"]


def heading(found: Mapping[str, Any]) -> str:
    """What was analyzed, on which data."""
    rows = "" if found["rows"] is None else f"{wording.plural(found['rows'], 'row')} of "
    count = wording.plural(len(found["layers"]), "layer")
    return wording.clean(f"{found['model']}: {count} under {found['scheme']} on {found['target']}, "
                         f"{rows}{found['data']}")


def outputs(found: Mapping[str, Any]) -> list[str]:
    """The model's outputs, all layers quantized."""
    return [wording.clean(f"output {name}: SQNR {wording.decibels(db)} with all of them quantized")
            for name, db in found["outputs"].items()]


def share(value: float) -> str:
    """'0.02 %'; '0' for none at all."""
    return "0" if value == 0 else f"{100 * value:.2g} %"
