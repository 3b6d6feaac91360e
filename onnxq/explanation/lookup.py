"""One node by what a user calls it: its name, a tensor of its, the end of either, or a glob."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence

from onnxq.errors import UsageError
from onnxq.recipe import matches

SHOWN = 5
_GLOB = frozenset("*?[{")


def find(wanted: str, known: Mapping[str, Sequence[Sequence[str]]], where: str, hint: str = "") -> str:
    """The node that `wanted` stands for.

    `known` maps each node to the names by which it may be called, in lists of falling rank (its own name, what it
    makes, ...). A name that is equal wins over those that a glob fits or, without a glob, that end in `wanted` ('.' and
    '/' are alike); among those the higher rank wins. Raises UsageError when no node or several are left, with up to
    SHOWN of them or of the nearest names; `hint` is a last clause for the former.
    """
    for fits in (lambda name: name == wanted, _pattern(wanted)):
        for rank in range(max((len(names) for names in known.values()), default=0)):
            found = [node for node, names in known.items() if rank < len(names) and any(map(fits, names[rank]))]
            if len(found) > 1:
                more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
                raise UsageError(f"{wanted!r} stands for {len(found)} nodes of {where}: "
                                 f"{', '.join(found[:SHOWN])}{more}; name one of them")
            if found:
                return found[0]
    near = _near(wanted, known)
    raise UsageError(f"{where} has no node {wanted!r}, and none that makes such a tensor"
                     f"{'; near: ' if near else ''}{', '.join(near)}"
                     f"{hint or '; onnxq inspect MODEL --json lists its nodes'}")


def _pattern(wanted: str) -> Callable[[str], bool]:
    if _GLOB & set(wanted):
        return lambda name: matches(wanted, [name])
    end = wanted.replace(".", "/")
    return lambda name: bool(end) and name.replace(".", "/").endswith(end)


def _near(wanted: str, known: Mapping[str, Sequence[Sequence[str]]]) -> list[str]:
    """Names that look like the wanted one, or have it or its last part within them, case aside."""
    plain = {name.lower(): name for names in known.values() for rank in names for name in rank}
    low = wanted.lower().replace("*", "")
    inside = [n for n in plain if low and low in n]
    close = difflib.get_close_matches(low, list(plain), SHOWN, 0.5)
    ends = difflib.get_close_matches(low, {n.rpartition("/")[2] for n in plain}, SHOWN, 0.75) if not close else []
    by_end = [n for n in plain if n.rpartition("/")[2] in ends]
    return [plain[n] for n in dict.fromkeys([*inside, *close, *by_end])][:SHOWN]
