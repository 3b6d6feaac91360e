"""The target as it is on this machine."""

from __future__ import annotations

import platform

from onnxq.errors import UsageError
from onnxq.runtime.measure import environment
from onnxq.targets import TARGETS, WITHOUT_VNNI, Target

_X86 = frozenset({"AMD64", "i386", "i686", "x86", "x86_64"})
_VNNI = frozenset({"amx_int8", "avx512_vnni", "avx_vnni"})


def target_here(name: str) -> Target:
    """A target by name, with what this machine's processor lacks taken into account. Raises UsageError."""
    if name not in TARGETS:
        raise UsageError(f"there is no target {name!r}; known: {', '.join(TARGETS)}")
    return WITHOUT_VNNI.get(name, TARGETS[name]) if saturates() else TARGETS[name]


def saturates() -> bool:
    """Whether the integer kernels add two products in 16 bits: on x86 without VNNI, or where that is not known."""
    return platform.machine() in _X86 and not _VNNI & set(map(str, _flags()))


def _flags() -> list[object]:
    found = environment()["cpu_flags"]
    return list(found) if isinstance(found, list) else []
