"""Targets: facts about where a model will run. One file each; they import nothing but this table's types."""

from __future__ import annotations

from dataclasses import replace

from onnxq.targets.ascend import ASCEND
from onnxq.targets.base import Target
from onnxq.targets.cann import CANN
from onnxq.targets.cpu import CPU, CPU_WITHOUT_VNNI
from onnxq.targets.cpu_arm64 import CPU_ARM64
from onnxq.targets.cpu_portable import CPU_PORTABLE
from onnxq.targets.cuda import CUDA
from onnxq.targets.portable import PORTABLE
from onnxq.targets.tensorrt import TENSORRT
from onnxq.targets.web import WEB

TARGETS = {t.name: t for t in (CPU, CPU_PORTABLE, CPU_ARM64, WEB, PORTABLE, CUDA, TENSORRT, CANN, ASCEND)}

# what target cpu is on x86-64 without VNNI instructions, and on 64-bit ARM
WITHOUT_VNNI = CPU_WITHOUT_VNNI
ON_ARM = replace(CPU_ARM64, name=CPU.name)

__all__ = ["ON_ARM", "TARGETS", "WITHOUT_VNNI", "Target"]
