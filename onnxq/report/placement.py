"""Where the nodes of a model will run, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from onnxq.report import drawing, wording

MOST_ROWS = 30


def summary(found: Mapping[str, Any]) -> str:
    """Nodes by operator, provider and kernel; cuts, copies, and what to change."""

    def draw(console: Console) -> None:
        drawing.line(console, f"{wording.clean(found['model'])} on {found['target']} ({found['provider']})", "bold")
        drawing.line(console)
        groups = Counter((n["op"], n["provider"] or "-", n["kernel"] or "-") for n in found["nodes"])
        rows = [(str(count), wording.clean(op), provider, wording.clean(kernel))
                for (op, provider, kernel), count in groups.most_common(MOST_ROWS)]
        console.print(drawing.table(("nodes", "operator", "provider", "kernel"), rows))
        if len(groups) > MOST_ROWS:
            drawing.line(console, f"+{len(groups) - MOST_ROWS} more kinds, see --json", "dim")
        drawing.line(console)
        parts = [f"{count} on {name}" for name, count in found["providers"].items()]
        gone = sum(not n["provider"] for n in found["nodes"])
        drawing.line(console, f"{wording.plural(len(found['nodes']), 'node')}: {', '.join(parts)}"
                              f"{f', {gone} folded or fused away' if gone else ''}", "bold")
        drawing.line(console, f"{wording.plural(found['cuts'], 'change')} between providers, "
                              f"{wording.plural(found['copies'], 'tensor')} copied")
        if found["agreement"] is not None:
            a = found["agreement"]
            drawing.line(console, f"run here: {a['provider']} of {a['nodes']} on the expected provider, "
                                  f"{a['kernel']} by the expected kernel", "green")
        for said in found["advice"]:
            drawing.line(console, wording.clean(said), "yellow")

    return drawing.text(draw)
