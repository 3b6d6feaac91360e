"""Accuracy budgets: how much worse a compiled model may be than the float model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnxq.errors import UsageError

# Significant digits kept of an allowed drop: metrics.drop() is rounded likewise, so that a drop of exactly the budget
# is allowed in spite of binary fractions.
DIGITS = 12


@dataclass(frozen=True)
class Budget:
    """The largest drop: `value` in `unit`, which is "%", "pt" or "" (see parse_drop)."""

    value: float
    unit: str

    def allowed(self, float_value: float) -> float:
        """The largest drop in the metric's own unit when the float model reaches `float_value`, to 12 digits."""
        if self.unit == "%":
            exact = self.value / 100.0 * abs(float_value)
        else:
            exact = self.value / 100.0 if self.unit == "pt" else self.value
        return float(f"{exact:.{DIGITS}g}")

    def __str__(self) -> str:
        """The text that parse_drop() turns into this budget."""
        return f"{repr(self.value).removesuffix('.0')}{self.unit}"


def parse_drop(text: str) -> Budget:
    """The budget that `text` stands for.

    "0.5%" is relative: 0.005 times the magnitude of the float model's value. "0.5pt" is half a percentage point: 0.005
    of a metric that runs from 0 to 1. A plain number, "0.005", is in the metric's own unit.
    UsageError for anything else, and for a negative, infinite or NaN number.
    """
    stripped = text.strip()
    unit = next((suffix for suffix in ("%", "pt") if stripped.endswith(suffix)), "")
    try:
        value = float(stripped.removesuffix(unit))
    except ValueError:
        value = math.nan
    if not 0.0 <= value < math.inf:
        raise UsageError(f"a drop of {text!r} is not understood; write e.g. 0.5% (relative), 0.5pt or 0.005 (absolute)")
    return Budget(value, unit)
