"""Sizes of files and of memory, as people write them: decimal units, 1 MB is a million bytes."""

from __future__ import annotations

import re

from onnxq.errors import UsageError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse(text: str) -> int:
    """Bytes of '40MB', '1.5 GB', '512MiB' or a plain number. Raises UsageError for anything else and for 0."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([A-Za-z]*)\s*", text)
    count = int(float(found[1]) * _UNITS.get(found[2].upper(), 0)) if found else 0
    if count < 1:
        raise UsageError(f"a size of {text!r} is not understood; write e.g. 40MB, 1.5GB or 512MiB")
    return count


def text(count: int) -> str:
    """Bytes in decimal units: '519.3 kB'."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 999.95:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000.0
    return f"{value:.2f} GB"
