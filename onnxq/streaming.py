"""Compiling a model whose weights don't fit into memory: one weight at a time, and no run of the whole."""

from __future__ import annotations

import os

from onnxq.graph import Graph, save, weight_bytes
from onnxq.plan import Plan
from onnxq.planner.layer_check import check
from onnxq.progress import Progress
from onnxq.report.report import Verdict
from onnxq.request import Request
from onnxq.sizes import text

_COPIES = 3  # of the float weights: two sessions, and what the runtime packs for its kernels
_SHARE = 0.8  # of the memory that there is


def too_large(request: Request, graph: Graph) -> bool:
    """Whether running the float model beside the compiled one takes more memory than there may be."""
    return request.recipe.scheme.is_weight_only and _COPIES * weight_bytes(graph) > limit(request)


def limit(request: Request) -> int:
    """Bytes: what was asked for, or most of what the machine has."""
    if request.max_memory is not None:
        return request.max_memory
    return int(_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def saved(graph: Graph, request: Request, progress: Progress) -> None:
    """Write the result, weights found as they are written, with the bytes as the progress."""
    def heard(done: int, total: int) -> None:
        progress.total(total)
        progress.step(done)

    save(graph, request.output, progress=heard)


def verified(graph: Graph, plan: Plan, request: Request, verdict: Verdict) -> None:
    """Check kernels on their own, and say what was not done; `graph` is the canonical float one."""
    needs, most = text(_COPIES * weight_bytes(graph)), text(limit(request))
    verdict.notices.append(f"not verified end to end: running the model takes about {needs}, more than the {most} that "
                           "--max-memory allows; nothing was timed, and weights were rounded by themselves")
    if request.calib is not None or request.evaluation is not None:
        verdict.notices.append("the data were not used, as the model was not run; give --max-memory more to use them")
    found = check(graph, plan, request.target, request.options, request.format, limit(request))
    verdict.failures += found.faults
    if found.kernels:
        verdict.notices.append(f"{found.kernels} kernels, one of each form, agree with decoded weights to "
                               f"{found.least_db:.1f} dB and more on random rows")
