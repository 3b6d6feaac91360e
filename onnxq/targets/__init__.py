"""Targets: facts about where a model will run. One file each; they import nothing but this table's types."""

from __future__ import annotations

from onnxq.targets.base import Target
from onnxq.targets.cpu import CPU

TARGETS = {t.name: t for t in (CPU,)}

__all__ = ["TARGETS", "Target"]
