"""Targets: facts about where a model will run. One file each; they import nothing but this table's types."""

from __future__ import annotations

from onnxq.targets.base import Target
from onnxq.targets.cpu import CPU, CPU_WITHOUT_VNNI

TARGETS = {t.name: t for t in (CPU,)}

# what takes the place of a target of x86-64 on a machine without VNNI instructions
WITHOUT_VNNI = {CPU.name: CPU_WITHOUT_VNNI}

__all__ = ["TARGETS", "WITHOUT_VNNI", "Target"]
