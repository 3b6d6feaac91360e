"""Is it right, is it fast, did it run as planned: the checks behind `verify` and the end of `compile`."""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import plugins, sizes
from onnxq.calibration.readers import Dataset
from onnxq.errors import DataError, ModelError, UsageError
from onnxq.graph import read_nodes
from onnxq.numerics.budget import parse_drop
from onnxq.numerics.metrics import Metric, drop, make_metric
from onnxq.passes.manager import Removals
from onnxq.plan import FLOAT, MOVES_CODES, STORED, NodePlan, Plan
from onnxq.progress import Progress, Silent
from onnxq.report.report import (
    Accuracy,
    Latency,
    NodeRow,
    OutputAccuracy,
    Report,
    Semantic,
    Size,
    Stage,
    Verdict,
)
from onnxq.report.wording import FOLDED
from onnxq.runtime import compare, measure
from onnxq.runtime.observe import Executed, Planned, executed, match
from onnxq.runtime.session import Session, SessionOptions

Feed = Mapping[str, "np.ndarray[Any, Any]"]

# two sessions in one process: the idle one's threads would spin beside the other's work
_QUIET = (("session.intra_op.allow_spinning", "0"),)
_ON_CODES = re.compile(r"(QLinear|QGemm|QAttention|MatMulInteger|MatMulNBits|MatMulBnb4|GatherBlockQuantized|"
                       r"ConvInteger|DynamicQuantize(MatMul|LSTM)|NhwcMaxPool)")
CONVERSIONS = frozenset({"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"})
_IN_FLOAT = (FLOAT, STORED)
# what the runtime fuses into a kernel in front of it
ACTIVATIONS = frozenset({"Clip", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh"})
# right kernels differ by a rounding here and there, which a deep model amplifies, but not beyond what int8 itself costs
_READ_BACK = 3  # runs of which the median tells a kernel's time; the first one allocates
BLOCK_SECONDS, ROUNDS = 0.3, 5  # of the timing beside float
LEAST_SEMANTIC_DB = 20.0
COMPARISONS = ("cosine", "sqnr")  # metrics that need no labels: how far from the float model


@dataclass(frozen=True)
class Goal:
    """What is asked of the accuracy: a metric by name or MODULE:FUNCTION, the drop allowed, the least SQNR in dB."""

    metric: str | None = None
    max_drop: str | None = None
    min_sqnr: float | None = None

    def check(self) -> None:
        """Refuse what can't be asked, before any work. Raises UsageError."""
        if self.metric is not None and self.metric not in COMPARISONS:
            make(self.metric)
        if self.max_drop is not None:
            parse_drop(self.max_drop)
            if self.metric == "sqnr":
                raise UsageError("sqnr has no float value to drop from; ask for onnxq verify --min-sqnr DB instead")


@contextmanager
def stage(report: Report, progress: Progress, name: str) -> Iterator[None]:
    """Tell the progress that a stage begins, and note in the report how long it took."""
    progress.stage(name)
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    for known in report.stages:
        if known.name == name:  # entered again: what measuring found wrong is planned anew
            known.seconds += seconds
            return
    report.stages.append(Stage(name, seconds))


def make(name: str) -> Metric:
    """A fresh metric by name or MODULE:FUNCTION. Raises UsageError."""
    if not plugins.is_reference(name):
        return make_metric(name)
    function = plugins.load(name, UsageError)
    higher = getattr(function, "higher_is_better", None)
    if not isinstance(higher, bool):
        raise UsageError(f"{name} does not say which way is better; set {name.split(':')[1]}.higher_is_better = True "
                         "or False")
    return compare.FunctionMetric(function, name, higher)


def check_labels(goal: Goal, data: Dataset) -> None:
    """Refuse data whose labels are missing or of the wrong number for the metric, before any work. Raises DataError.

    A generator's labels come with its feeds and are seen then.
    """
    if goal.metric is None or goal.metric in COMPARISONS or plugins.is_reference(goal.metric) or data.rows is None:
        return
    per_label = make(goal.metric).rows_per_label
    if data.labels is None:
        raise DataError(f"metric {goal.metric} needs labels, and {data.name} has none; add an array named labels")
    if len(data.labels) * per_label != data.rows:
        raise DataError(f"{data.name} has {len(data.labels)} labels for {data.rows} rows; metric {goal.metric} wants "
                        f"{'one label per row' if per_label == 1 else f'one label per {per_label} rows'}")


def runs(model: str | Path, options: SessionOptions) -> bool:
    """Whether the runtime has kernels for a model; it has none for most operators on bfloat16."""
    try:
        Session(model, SessionOptions(threads=options.threads))
    except ModelError:
        return False
    return True


def told_against_float32(half: Sequence[str]) -> str:
    """The notice on a half model that the runtime does not run itself."""
    return (f"onnxruntime does not run the {' and '.join(half)} model itself: everything is compared with its float32 "
            "form")


def accuracy(reference: str | Path, compiled: str | Path, data: Dataset, goal: Goal, options: SessionOptions,
             verdict: Verdict, *, batch: int | None = None, samples: int | None = None, note: str = "",
             progress: Callable[[int], None] | None = None) -> Accuracy:
    """Compare the deployed model with the float model over the data; failures go into the verdict."""
    quiet = replace(options, config=(*options.config, *_QUIET))
    named = goal.metric is not None and goal.metric not in COMPARISONS
    metrics = (make(str(goal.metric)), make(str(goal.metric))) if named else None
    found = compare.evaluate(Session(reference, SessionOptions(threads=options.threads, config=_QUIET)),
                             Session(compiled, quiet), data.batches(batch, samples), metrics, data.labels, progress)
    outputs = {k: OutputAccuracy(c.sqnr_db, c.cosine, c.max_abs) for k, c in found.outputs.items()}
    worst = min((o.sqnr_db for o in outputs.values() if o.sqnr_db is not None), default=None)
    if metrics is not None:
        name, before, after = str(goal.metric), found.float_metric, found.compiled_metric
        assert before is not None
        assert after is not None
        lost: float | None = drop(metrics[0], before, after)
    elif goal.metric == "sqnr":
        name, before, after, lost = "sqnr", None, worst if worst is not None else float("inf"), None
    else:
        name, before, after = "cosine", 1.0, found.mean_cosine
        lost = drop(True, before, after)
    if metrics is None and not outputs:
        before, after, lost = None, float("nan"), None
        note = "no output is of floats, so that there is nothing to compare; give --metric with a function of your own"
        if goal.max_drop is not None or goal.min_sqnr is not None:
            verdict.failures.append(note)
    result = Accuracy(name, before, after, lost, outputs, data.name, found.rows, note)
    _judge(result, goal, worst, verdict)
    return result


def _judge(result: Accuracy, goal: Goal, worst: float | None, verdict: Verdict) -> None:
    if goal.max_drop is not None and result.float is not None and result.drop is not None:
        budget = parse_drop(goal.max_drop)
        if result.drop > budget.allowed(result.float):
            verdict.failures.append(
                f"{result.metric} went from {result.float:.6g} to {result.compiled:.6g} on {result.data}, "
                f"a drop of {result.drop:.3g}, above the {budget} allowed")
    if goal.min_sqnr is not None and worst is not None and worst < goal.min_sqnr:
        verdict.failures.append(f"the least SQNR of an output is {worst:.1f} dB, below the {goal.min_sqnr:g} dB wanted")


def check_size(found: Size, most_bytes: int | None, verdict: Verdict) -> None:
    """A file that is larger than was asked for is a failure."""
    if most_bytes is not None and found.compiled_bytes > most_bytes:
        taken, allowed = sizes.text(found.compiled_bytes), sizes.text(most_bytes)
        verdict.failures.append(f"the file takes {taken}, above the {allowed} allowed")


def semantic(reference: str | Path, compiled: str | Path, twin: str | Path, feeds: Sequence[Feed],
             options: SessionOptions, verdict: Verdict) -> Semantic:
    """The compiled graph against its QDQ twin, both unoptimized; and against itself optimized (dB, worst output).

    A disagreement is a failure when it is below LEAST_SEMANTIC_DB and no better than the agreement with float, which
    is what the roundings of int8 alone may cost.
    """
    plain = replace(options, optimize=False)
    unoptimized, deployed = Session(compiled, plain), Session(compiled, options)
    against_twin = compare.least_sqnr(Session(twin, plain), unoptimized, feeds)
    against_itself = compare.least_sqnr(unoptimized, deployed, feeds)
    for what, db in (("its QDQ form", against_twin), ("itself without optimization", against_itself)):
        if db is not None and db < LEAST_SEMANTIC_DB:
            whole = Session(reference, SessionOptions(threads=options.threads))
            with_float = compare.least_sqnr(whole, deployed, feeds)
            if with_float is None or db <= with_float:
                verdict.failures.append(f"the compiled graph and {what} agree to {db:.1f} dB only: a kernel computes "
                                        "something else; please report this")
    return Semantic(against_twin, against_itself, len(feeds))


def latency(reference: str | Path, compiled: str | Path, feeds: Sequence[Feed], options: SessionOptions, data: str,
            *, progress: Progress | None = None) -> Latency:
    """Both models as deployed, in alternating blocks, the float model fully optimized, too."""
    done = itertools.count(1)
    bar = progress or Silent()
    bar.total(ROUNDS)
    timing = measure.compare_models(Session(reference, replace(options, config=())),
                                    Session(compiled, options), list(feeds), block_seconds=BLOCK_SECONDS, rounds=ROUNDS,
                                    progress=lambda: bar.step(next(done)))
    shapes = {k: list(v.shape) for k, v in feeds[0].items()}
    return Latency(timing.a_ms, timing.b_ms, timing.ratio, timing.ratio_low, timing.ratio_high, shapes,
                   options.threads, data)


def slower(found: Latency) -> bool:
    """Slower than float beyond noise: 3 % in the median and slower in every round."""
    return found.speedup < 0.97 and found.high < 1.0


def first_feeds(data: Dataset, batch: int | None, count: int) -> list[dict[str, Any]]:
    """The first `count` batches, for timing and reading back."""
    return [b.feed for b in itertools.islice(data.batches(batch), count)]


def what_ran(plan: Plan, compiled: str | Path, feeds: Sequence[Feed], options: SessionOptions, verdict: Verdict,
             outputs: Mapping[str, tuple[str, ...]]) -> list[NodeRow]:
    """Every planned node with the kernel and provider that really ran it.

    `outputs` gives the tensors that each node of the top graph made before compilation. A node planned int8 that did
    not run as an integer kernel on the wanted provider, or one planned float that ran as one of its own, is a failure.
    Of a body that these feeds don't enter, nothing is known: a notice says so.
    """
    found = _kernels(plan, executed(compiled, list(feeds) * _READ_BACK, options, read_nodes), outputs)
    shared = {id(found[n.node]) for n in plan.nodes.values() if n.scheme not in _IN_FLOAT and n.node in found
              and n.op not in ("DequantizeLinear", "QuantizeLinear")}
    rows, unseen = [], []
    for node in plan.nodes.values():
        kernel = found[node.part_of or node.node]
        rows.append(row(node, kernel))
        if kernel is None and node.is_int and node.node not in outputs:
            unseen.append(node.node)
            continue
        fault = _fault(node, kernel, options.provider)
        # a float bias or factor that the runtime fused into the kernel of an int8 node is no fault
        if fault is not None and not (node.scheme in _IN_FLOAT and id(kernel) in shared):
            verdict.failures.append(fault)
    if unseen:
        verdict.notices.append(f"no kernel was seen for {', '.join(unseen)}: the data take other branches")
    return rows


def _kernels(plan: Plan, ran: Sequence[Executed], outputs: Mapping[str, tuple[str, ...]]) -> dict[str, Executed | None]:
    """The executed node of each planned one: by a weight that it alone reads, else by what it makes.

    The weight is the surer sign: the runtime may put a Reshape behind its kernel, which then makes the result. What a
    fenced node makes is called `unfenced`; the runtime appends _T to blocks that it brings into its kernel's order.
    """
    uses = Counter(n.weight for n in plan.quantized())
    float_results = {name: tuple(f"{t}{end}" for end in (".unfenced", "") for t in made)
                     for name, made in outputs.items()}
    makes = [Planned(n.node, tuple(t for t in (n.result, f"{n.result}.q") if t) if n.is_int else
                     float_results.get(n.node, ()), ()) for n in plan.nodes.values()]
    reads = [Planned(n.node, (), (f"{n.weight}.q", f"{n.weight}.q.wide", f"{n.weight}.blocks",
                                 f"{n.weight}.blocks_T"))
             for n in plan.quantized() if n.weight and uses[n.weight] == 1]
    return {**match(makes, ran), **{name: kernel for name, kernel in match(reads, ran).items() if kernel is not None}}


def row(node: NodePlan, kernel: Executed | None = None) -> NodeRow:
    """A node's verdict and, where it was read back, the kernel."""
    alone = kernel is not None and node.part_of is None
    return NodeRow(node.node, node.op, node.scheme, node.lowering, kernel.op if kernel else "",
                   kernel.provider if kernel else "", node.reason, kernel.ms if kernel is not None and alone else None)


def removed_rows(removals: Removals) -> list[NodeRow]:
    """A row for each node that was gone before anything was planned."""
    return [NodeRow(name, op, FOLDED, "", "", "", f"folded into its neighbours or into a constant ({step})",
                    outputs=list(made)) for name, (op, made, step) in removals.found.items()]


def _fault(node: NodePlan, kernel: Executed | None, provider: str) -> str | None:
    if node.is_int and node.part_of is None:
        if kernel is None:
            return None if node.op in MOVES_CODES else f"{node.node}: planned as {node.lowering}, but no kernel ran it"
        if node.op not in MOVES_CODES and not is_integer(kernel.op):
            return f"{node.node}: planned as {node.lowering}, but the runtime ran {kernel.op}"
        if kernel.provider not in ("", provider):
            return f"{node.node}: ran on {kernel.provider}, not on {provider}"
    if node.scheme in _IN_FLOAT and node.op not in MOVES_CODES and kernel is not None and is_integer(kernel.op):
        return f"{node.node}: planned {node.scheme}, but the runtime ran {kernel.op}"
    return None


def is_integer(op: str) -> bool:
    """Whether an executed operator computes on codes."""
    return _ON_CODES.match(op.removeprefix("com.microsoft.")) is not None


def ran_rows(compiled: str | Path, feeds: Sequence[Feed], options: SessionOptions) -> list[NodeRow]:
    """What ran in a model of unknown making: one row per executed node."""
    def kind(op: str) -> str:
        return "int8" if is_integer(op) or op in CONVERSIONS else FLOAT

    return [NodeRow(e.name, e.op, kind(e.op), "", e.op, e.provider, "", e.ms)
            for e in executed(compiled, feeds, options, read_nodes)]

