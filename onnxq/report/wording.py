"""A report's figures in words, and its nodes in groups: what the terminal and the HTML page share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from onnxq import sizes
from onnxq.report.report import Accuracy, Latency, NodeRow, OutputAccuracy, PrunedRow, Size

INT8, STORED, GIVEN, FLOAT, FOLDED = "quantized", "stored", "given", "float", "folded"
KINDS = (INT8, STORED, GIVEN, FLOAT, FOLDED)
_LONGEST_PART = 100
_SHARES = re.compile(r"top\d+|topk|f1")  # metrics from 0 to 1 that people read in percent


def clean(text: str) -> str:
    """The text on one line without control characters: names come from files, and an escape code steers a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable(text: str) -> str:
    """The text as it is, line ends and tabs included, but without other control characters."""
    return "".join(c if c in "\n\t" else clean(c) for c in text)


def generated(found: Mapping[str, Any]) -> str:
    """How fast a language model was, and why it ended: 'prompt of 6 tokens at 221/s, 40 tokens at 62/s'."""
    rates, count = found["tokens_per_second"], len(found["ids"])
    decode = f" at {rates['decode']:.4g}/s" if rates["decode"] is not None else ""
    end = {"stop": f", ended by the token {found['ids'][-1]}", "context": ", where its context is full"}
    cache = "" if found["cached"] else ", without a cache"
    return (f"prompt of {plural(len(found['prompt_ids']), 'token')} at {rates['prefill']:.4g}/s, "
            f"{plural(count, 'token')}{decode}{end.get(found['ended'], '')}{cache}")


def size(count: int) -> str:
    """Bytes in decimal units: '519.3 kB'."""
    return sizes.text(count)


def size_change(found: Size) -> str:
    """'3.43x smaller' or '1.02x larger'."""
    if found.compiled_bytes <= found.float_bytes:
        return f"{found.float_bytes / max(found.compiled_bytes, 1):.2f}x smaller"
    return f"{found.ratio:.2f}x larger"


def milliseconds(ms: float) -> str:
    """Three significant digits from 1 to 100 ms, whole milliseconds above, microseconds below."""
    digits = 3 if ms < 1.0 else 2 if ms < 10.0 else 1 if ms < 100.0 else 0
    return f"{ms:.{digits}f} ms"


def raced(times: Mapping[str, float]) -> str:
    """The kernels that were timed against each other: 'float 0.52 ms, QLinearConv 0.21 ms (2.48x)'."""
    base = times.get("float")
    parts = []
    for name, ms in times.items():
        gain = f" ({base / ms:.2f}x)" if base is not None and name != "float" and ms > 0 else ""
        parts.append(f"{name} {milliseconds(ms)}{gain}")
    return ", ".join(parts)


def speed(ratio: float, low: float, high: float) -> str:
    """A ratio of times with its least and greatest round: '2.17x as fast (2.10x to 2.21x)'."""
    return f"{ratio:.2f}x as fast ({low:.2f}x to {high:.2f}x)"


def timed_on(found: Latency) -> str:
    """What was timed: 'image 32x1x16x16, 2 threads, calib.npz'."""
    shapes = ", ".join(f"{clean(name)} {shape(dims)}" for name, dims in found.shapes.items())
    return ", ".join(part for part in (shapes, threads(found.threads), clean(found.data)) if part)


def shape(dims: Iterable[int]) -> str:
    """'8x64'; 'scalar' for no dimensions."""
    return "x".join(str(d) for d in dims) or "scalar"


def threads(count: int) -> str:
    """'2 threads'; 0 stands for the runtime's own choice."""
    return "default threads" if not count else plural(count, "thread")


def encoding(found: Mapping[str, Any], scale_found: str = "") -> str:
    """Codes in words, from Encoding.to_dict(): 'uint8 codes, scale 0.0118, zero point 0: from 0 to 3'.

    `scale_found` is when the scale is known, where there is none: 'uint8 codes, a scale per token found at run time'.
    """
    codes = f"{found['dtype']} codes"
    if "scale" not in found:
        when = "by calibration" if scale_found == "calibration" else "at run time"
        return f"{codes}, {'one scale' if found['granularity'] == 'tensor' else 'a scale per token'} found {when}"
    if "scales" in found:
        each = f" in blocks of {found['block_size']}" if "block_size" in found else ""
        axis = f" along axis {found['axis']}" if "axis" in found else ""
        codes += f", {plural(found['scales'], 'scale')}{each}{axis}"
        if "least_scale" in found:
            codes += f" from {found['least_scale']:.3g} to {found['greatest_scale']:.3g}"
    else:
        codes += f", scale {found['scale']:.3g}"
    zero_point = f", zero point {found['zero_point']}" if "zero_point" in found else ""
    reach = f": from {found['low']:.3g} to {found['high']:.3g}" if "low" in found else ""
    bytes_ = f"; {size(found['float_bytes'])} -> {size(found['code_bytes'])}" if "code_bytes" in found else ""
    return f"{codes}{zero_point}{reach}{bytes_}"


def storage(part: Mapping[str, Any]) -> Iterator[str]:
    """How a tensor of an explanation is stored, where anything is known of it."""
    if part["encoding"] is None:
        return
    codes = encoding(part["encoding"], part["scale_found"])
    if part["codes"]:
        yield f"as {codes}"
    else:
        yield f"in float, {'quantized for others to' if part['role'] == 'output' else 'decoded from'} {codes}"


def statistics(found: Mapping[str, Any]) -> Iterator[str]:
    """What is known of the values of a stored tensor, from an explanation."""
    if not found:
        return
    yield f"values from {found['min']:.3g} to {found['max']:.3g}"
    if found.get("spread") is not None:
        zeros = f", {found['zero_channels']} of them all zeros" if found["zero_channels"] else ""
        yield (f"max|w| of a channel: median {found['median_channel']:.3g}, greatest {found['greatest_channel']:.3g}, "
               f"{found['spread']:.1f}x the least ({plural(found['channels'], 'channel')} along axis {found['axis']}"
               f"{zeros})")
    if "sqnr_db" in found:
        tensor = found.get("sqnr_db_per_tensor")
        whole = f"; with one scale for the whole tensor {decibels(tensor)}" if "sqnr_db_per_tensor" in found else ""
        yield f"quantized it keeps an SQNR of {decibels(found['sqnr_db'])}{whole}"


def age(seconds: float) -> str:
    """'3 hours': the largest unit of which there is at least one."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            return plural(int(seconds // length), unit)
    return "less than a minute"


def measured_in(file: Mapping[str, Any]) -> str:
    """Where a file of kernel times comes from: 'AMD EPYC (avx2), onnxruntime 1.31.1, 2 threads, emitter 1'.

    What the environment names besides processor, runtime and threads stands behind them as it is, where it says
    anything: an empty set of options does not.
    """
    rest = dict(file["environment"])
    flags = ", ".join(map(str, rest.pop("cpu_flags", ())))
    parts = [f"{rest.pop('processor', '')}{f' ({flags})' if flags else ''}"]
    if "onnxruntime" in rest:
        parts.append(f"onnxruntime {rest.pop('onnxruntime')}")
    if "threads" in rest:
        parts.append(threads(rest.pop("threads")))
    parts += [f"{name} {value}" for name, value in rest.items() if value not in ({}, [], None)]
    if file["damaged_lines"]:
        parts.append(f"damaged: {plural(file['damaged_lines'], 'line')} of {file['path']} can't be read")
    return ", ".join(part for part in parts if part)


def described(description: Mapping[str, Any]) -> str:
    """A kernel in a line: 'op MatMul, shapes [[8, 64], [64, 64]]'; whole graphs are left out."""
    parts = (f"{name} {value}" for name, value in description.items())
    return ", ".join(part for part in parts if len(part) <= _LONGEST_PART)


def candidates(times: Mapping[str, Mapping[str, float]]) -> str:
    """Candidates of a kernel, the fastest first: 'int8 0.300 ms (0.299 ms to 0.310 ms), float 2.00 ms (...)'."""
    return ", ".join(f"{name} {milliseconds(found['ms'])} ({milliseconds(found['low'])} to "
                     f"{milliseconds(found['high'])})"
                     for name, found in sorted(times.items(), key=lambda item: item[1]["ms"]))


def plural(count: int, noun: str) -> str:
    """'1 node', '2 nodes'."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def score(metric: str, value: float | None) -> str:
    """A metric's value: shares in percent, others to five digits, '-' for none."""
    if value is None:
        return "-"
    return f"{value * 100:.2f} %" if _SHARES.fullmatch(metric) else f"{value:.5g}"


def drop(found: Accuracy) -> str:
    """How much worse: '0.20 points worse', '0.013 better', 'the same', '' when there is nothing to compare."""
    if found.drop is None:
        return ""
    if not math.isfinite(found.drop):
        return "no number to compare"
    if found.drop == 0:
        return "the same"
    way = "worse" if found.drop > 0 else "better"
    if _SHARES.fullmatch(found.metric):
        return f"{abs(found.drop) * 100:.2f} points {way}"
    return f"{abs(found.drop):.3g} {way}"


PRUNED_TITLES = ("pruned layer", "weights", "zeros", "method", "error")


def pruned(rows: Sequence[PrunedRow]) -> str:
    """'56 weights pruned: 50.0 % of 6.74 M numbers are 0'."""
    count = sum(row.count for row in rows)
    zeros = sum(row.zeros * row.count for row in rows) / max(count, 1)
    return f"{plural(len(rows), 'weight')} pruned: {zeros:.1%} of {count:,} numbers are 0"


def pruned_cells(row: PrunedRow) -> list[str]:
    """One pruned weight, as PRUNED_TITLES say; the error is that of what its layers make."""
    error = "not observed" if row.error is None else f"{row.error:.2%}"
    return [clean(", ".join(row.layers)), f"{row.count:,}", f"{row.zeros:.1%}", row.method, error]


def decibels(db: float | None) -> str:
    """'35.2 dB'; None means identical."""
    return "identical" if db is None else f"{db:.1f} dB"


def agreement(found: OutputAccuracy) -> str:
    """One output against float's."""
    if found.sqnr_db is None and found.max_abs == 0:
        return "identical"
    return f"SQNR {decibels(found.sqnr_db)}, cosine {found.cosine:.6g}, max error {found.max_abs:.3g}"


@dataclass(frozen=True)
class Group:
    """Nodes that met the same fate; `kind` is one of KINDS, `text` a line without the kind."""

    kind: str
    text: str
    nodes: tuple[NodeRow, ...]

    @property
    def line(self) -> str:
        """The group on a line: '36 MatMul -> MatMulIntegerToFloat', 'float: 12 Softmax: Softmax stays float'."""
        return self.text if self.kind == INT8 else f"{self.kind}: {self.text}"


def groups(nodes: Iterable[NodeRow]) -> list[Group]:
    """Nodes of one kind, operator, and kernel (quantized ones) or reason (the others); the largest groups first."""
    every = list(nodes)
    seen = any(node.ran_as for node in every)  # else none was read back, which a note says
    keyed = sorted(((_key(node, seen), node) for node in every), key=lambda pair: pair[0])
    found = []
    for (kind, op, fate), members in groupby(keyed, key=lambda pair: pair[0]):
        rows = tuple(node for _, node in members)
        joint = " -> " if kind == INT8 else ": "
        found.append(Group(kind, f"{len(rows)} {op}{joint if fate else ''}{fate}", rows))
    # of two that are equally large, the one with kernels of its own before the one that was absorbed by them
    return sorted(found, key=lambda g: (-len(g.nodes), g.nodes[0].ms is None))


def tally(found: Iterable[Group]) -> str:
    """Nodes by kind: '64 nodes: 36 quantized, 28 float'."""
    counts = dict.fromkeys(KINDS, 0)
    for group in found:
        counts[group.kind] += len(group.nodes)
    parts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{plural(sum(counts.values()), 'node')}: {parts}"


def kind(node: NodeRow) -> str:
    """Which of KINDS a node is."""
    return node.scheme if node.scheme in KINDS else INT8


def _key(node: NodeRow, seen: bool) -> tuple[str, str, str]:
    of_kind = kind(node)
    if of_kind == INT8:
        return of_kind, short(node.op), _kernel(node, seen)
    # a node that came quantized needs no reason
    return of_kind, short(node.op), "" if of_kind == GIVEN else clean(node.reason)


def _kernel(node: NodeRow, seen: bool) -> str:
    ran = short(node.ran_as)
    if not node.lowering:  # a model of unknown making: nothing was planned
        return ran if ran != short(node.op) else ""
    if not ran:
        return f"{clean(node.lowering)} (planned; not seen by itself when it ran)" if seen else clean(node.lowering)
    # NhwcMaxPool is MaxPool in another layout
    return ran if ran in (node.lowering, f"Nhwc{node.lowering}") else f"{ran} (planned {clean(node.lowering)})"


def short(op: str) -> str:
    """An operator without its domain: 'com.microsoft.QGemm' -> 'QGemm'."""
    return clean(op.rpartition(".")[2])
