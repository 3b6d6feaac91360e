"""python -m benchmarks.worker STEP JOB.json ANSWER.json: one step in a process of its own.

A step that crashes then costs one cell of a table, and its memory is its own. Steps: `make` a model with a tool,
`judge` it beside the float model (or only `score` it, or only `clock` it), compile and score a `variant` of a recipe,
`memory` of a percentile compilation. The answer is what the step found, or an `error` in one line.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.models import Array, Case, read
from onnxq.runtime.measure import compare, peak_memory_bytes
from onnxq.runtime.measure import time as time_alone
from onnxq.runtime.session import Session, SessionOptions

STATIC, LINEARS, DYNAMIC = "onnxruntime static", "onnxruntime linears", "onnxruntime dynamic"
UNSIGNED = "onnxruntime static u8 x s8"
OPENVINO, OPENVINO_HALF, OPENVINO_INT8 = "OpenVINO float", "OpenVINO bf16", "OpenVINO int8"
OPENVINOS = (OPENVINO, OPENVINO_HALF, OPENVINO_INT8)
ONNXQ, PER_TOKEN, UNMEASURED = "onnxq", "onnxq per token", "onnxq --no-measure"
TIMED_ROWS = 8
_QUIET = (("session.intra_op.allow_spinning", "0"),)  # while two models take turns run by run, to be scored
_PLANNED_FLOAT = ("float", "folded", "stored")


class Timed(Protocol):
    """What can be timed and scored, see onnxq.runtime.session.Session."""

    def run(self, feed: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]: ...
    def runner(self, feed: Mapping[str, Array]) -> Callable[[], None]: ...


def make(case: Case, tool: str, output: str, threads: int, samples: int) -> dict[str, Any]:
    """Quantize: `seconds` without the imports, `peak_bytes` of this process; for onnxq what its report says."""
    path = Path(output)
    tool_of = _tool(tool)
    start = time.perf_counter()
    found = tool_of(case, path, threads, samples)
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak_memory_bytes(), **found}


def judge(case: Case, model: str | None, threads: int, limit: int | None, rounds: int, block_seconds: float,
          ) -> dict[str, Any]:
    """Score a model (None: the float one alone), then time it in a plain default session against the float model."""
    from benchmarks import scoring

    data = scoring.Data(case, limit)
    quiet = SessionOptions(threads=threads, config=_QUIET)
    figures = scoring.score(case, data, Session(case.model, quiet), Session(model, quiet) if model else None)
    return {"score": figures, "speed": _speed(case, model, data.first(TIMED_ROWS), threads, rounds, block_seconds)}


def score(case: Case, tool: str, model: str, kept: str, threads: int, limit: int | None) -> dict[str, Any]:
    """Score what a tool made; the file `kept` holds the float model's answers once the first tool has been scored."""
    from benchmarks import scoring
    from benchmarks.kept import Kept

    data = scoring.Data(case, limit)
    options = SessionOptions(threads=threads, config=() if Path(kept).exists() else _QUIET)
    with Kept(Path(kept), lambda: Session(case.model, options)) as reference:
        return {"score": scoring.score(case, data, reference, _opened(tool, model, options))}


def variant(case: Case, recipe: dict[str, Any], output: str, kept: str, threads: int, samples: int, limit: int | None,
            ) -> dict[str, Any]:
    """Compile by a recipe, as plain data, without measuring kernels, and score what it makes: see `score`."""
    import yaml

    import onnxq
    from onnxq.recipe import parse

    start = time.perf_counter()
    onnxq.compile(case.model, output, recipe=parse(yaml.safe_dump(recipe)), calib=case.calib, samples=samples,
                  threads=threads, measure=False, force=True)
    return {"seconds": time.perf_counter() - start, **score(case, ONNXQ, output, kept, threads, limit)}


def clock(case: Case, tool: str, model: str, wanted: list[str] | None, threads: int, rounds: int, block_seconds: float,
          ) -> dict[str, Any]:
    """Time what a tool made against the float model in onnxruntime, with the `wanted` loads of the case (None: all)."""
    from benchmarks import loads

    options = SessionOptions(threads=threads)
    reference, other = Session(case.model, options), _opened(tool, model, options)
    data, found = read(case.evaluation), {}
    for load in loads.of(case):
        feed = load.feed(case, data)
        if wanted is None or loads.name(feed) in wanted:
            found[loads.name(feed)] = _compared(reference, other, feed, rounds, block_seconds)
    return {"speeds": found}


def memory(case: Case, output: str, rows: int, threads: int) -> dict[str, Any]:
    """See benchmarks.memory.compile_percentile."""
    from benchmarks.memory import compile_percentile

    return compile_percentile(case, Path(output), rows, threads)


def _speed(case: Case, model: str | None, feed: dict[str, Any], threads: int, rounds: int, block_seconds: float,
           ) -> dict[str, Any]:
    options = SessionOptions(threads=threads)
    reference = Session(case.model, options)
    if model is None:
        float_ms = time_alone(reference.runner(feed), block_seconds=block_seconds, rounds=rounds)
        return {"float_ms": float_ms, "ms": float_ms, "ratio": 1.0, "low": 1.0, "high": 1.0, "shapes": _shapes(feed)}
    return _compared(reference, Session(model, options), feed, rounds, block_seconds)


def _compared(reference: Timed, other: Timed, feed: dict[str, Any], rounds: int, block_seconds: float,
              ) -> dict[str, Any]:
    timing = compare(reference.runner(feed), other.runner(feed), block_seconds=block_seconds, rounds=rounds)
    return {"float_ms": timing.a_ms, "ms": timing.b_ms, "ratio": timing.ratio, "low": timing.ratio_low,
            "high": timing.ratio_high, "shapes": _shapes(feed)}


def _shapes(feed: Mapping[str, Array]) -> dict[str, list[int]]:
    return {name: list(array.shape) for name, array in feed.items()}


def _opened(tool: str, model: str, options: SessionOptions) -> Timed:
    """What a tool made, in the runtime that it is for."""
    if tool not in OPENVINOS:
        return Session(model, options)
    from benchmarks import peers_openvino as peer

    return peer.Compiled(Path(model), options.threads, {OPENVINO: peer.FLOAT, OPENVINO_HALF: peer.HALF}.get(tool, ""))


def _tool(name: str) -> Callable[[Case, Path, int, int], dict[str, Any]]:
    """The tool by name; the peers are imported only for themselves."""
    if name in (ONNXQ, PER_TOKEN, UNMEASURED):
        return _onnxq("w8a8-dynamic" if name == PER_TOKEN else "w8a8", measure=name != UNMEASURED)
    if name == OPENVINO_INT8:
        from benchmarks import peers_openvino

        quantize = peers_openvino.quantize
    else:
        from benchmarks import peers_ort

        quantize = {STATIC: peers_ort.static_default, UNSIGNED: peers_ort.static_unsigned,
                    LINEARS: peers_ort.static_linears, DYNAMIC: peers_ort.dynamic}[name]

    def run(case: Case, output: Path, threads: int, samples: int) -> dict[str, Any]:
        quantize(case, output, samples)
        return {}

    return run


def _onnxq(scheme: str, measure: bool) -> Callable[[Case, Path, int, int], dict[str, Any]]:
    import onnxq

    def run(case: Case, output: Path, threads: int, samples: int) -> dict[str, Any]:
        report = onnxq.compile(case.model, output, scheme=scheme, calib=case.calib, samples=samples, threads=threads,
                               measure=measure, force=True)
        return {"scheme": report.scheme, "notices": report.verdict.notices, "failures": report.verdict.failures,
                "left_float": all(node.scheme in _PLANNED_FLOAT for node in report.nodes),
                "int8_slower": any("nothing pays" in notice for notice in report.verdict.notices),
                "stages": {stage.name: stage.seconds for stage in report.stages}}

    return run


def main(step: str, job: str, answer: str) -> int:
    """Run a step and write its answer; status 1 with an error in it."""
    arguments = json.loads(Path(job).read_text(encoding="utf-8"))
    steps: dict[str, Callable[..., dict[str, Any]]] = {
        "make": make, "judge": judge, "score": score, "clock": clock, "variant": variant, "memory": memory}
    try:
        found = steps[step](Case.from_dict(arguments.pop("case")), **arguments)
    except Exception as error:
        traceback.print_exc()
        words = " ".join(str(error).split())
        found = {"error": f"{type(error).__name__}: {words}" if words else type(error).__name__}
    Path(answer).write_text(json.dumps(found), encoding="utf-8")
    return 1 if "error" in found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
