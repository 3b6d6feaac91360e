"""One node's story, put together from the rows of a report or of a graph: verdict, tensors, neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnxq.plan import FLOAT, GIVEN, STORED
from onnxq.report import wording
from onnxq.report.report import Encoding, NodeRow

REPORT, FLOAT_MODEL, COMPILED = "report", "float model", "compiled model"  # what a story was read from
INPUT, WEIGHT, CONSTANT, OUTPUT = "input", "weight", "constant", "output"  # what a tensor is to the node


@dataclass
class Neighbour:
    """A node at the other end of a tensor; `fate` is its kernel, `float` or so, `codes` whether it reads codes."""

    node: str
    op: str
    fate: str
    codes: bool = False


@dataclass
class Part:
    """A tensor that the node reads or makes.

    `codes` tells whether the kernel reads or makes codes; `encoding` may be there without, where the codes are for
    others; where it has no scale, `scale_found` tells when there will be one, by `calibration` or at `run time`.
    `nodes` are the maker of an input or the readers of an output. `statistics` and `values` are of stored tensors;
    `dtype` and `shape` (numbers, names and None for free axes) are None where only a report is known.
    """

    name: str
    role: str
    codes: bool = False
    encoding: dict[str, Any] | None = None
    scale_found: str = ""
    dtype: str | None = None
    shape: list[int | str | None] | None = None
    nodes: list[Neighbour] = field(default_factory=list)
    note: str = ""
    statistics: dict[str, Any] | None = None
    values: list[Any] | None = None


@dataclass
class Story:
    """What is known of a node; '' and None stand for what is not.

    `model` is the file asked about, or the one that a report is of; `computes` names the nodes that its kernel computes
    along, `inside` the node in whose body it stands; `notes` are sentences.
    """

    source: str
    model: str
    node: str
    op: str
    scheme: str
    lowering: str
    reason: str
    summary: str = ""
    ran_as: str = ""
    provider: str = ""
    ms: float | None = None
    part_of: str | None = None
    computes: list[str] = field(default_factory=list)
    inside: str | None = None
    inputs: list[Part] = field(default_factory=list)
    outputs: list[Part] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def assemble(source: str, model: str, rows: Sequence[NodeRow], encodings: Mapping[str, Encoding], name: str) -> Story:
    """The story of the row of that name among all rows of its model; shapes and values are for the caller to add."""
    by_name = {row.name: row for row in rows}
    row = by_name[name]
    members = [r for r in rows if r.part_of == name]
    story = Story(source, model, name, row.op, row.scheme, row.lowering, row.reason, "", row.ran_as, row.provider,
                  row.ms, row.part_of, [m.name for m in members])
    story.times = by_name[row.part_of].times if row.part_of in by_name else row.times
    group = [row, *members]
    made, weights = [t for r in group for t in r.outputs], [w for r in group for w in r.weights]
    makers = {t: r for r in rows if r.scheme != wording.FOLDED for t in r.outputs}
    kernels = {t: by_name.get(r.part_of or r.name, r) for t, r in makers.items()}
    for tensor in dict.fromkeys(t for r in group for t in r.inputs if t not in (*made, *weights)):
        maker, as_codes = makers.get(tensor), any(tensor in r.codes_in for r in group)
        stored = as_codes or (maker is not None and kernels[tensor].codes_out == tensor)
        story.inputs.append(Part(
            tensor, INPUT, as_codes, _plain(encodings.get(tensor)) if stored else None,
            nodes=[] if maker is None else [_neighbour(maker)],
            note="" if maker is not None else "an input of the model"))
    story.inputs += [Part(w, WEIGHT, row.scheme != STORED, _plain(encodings.get(w)),
                          nodes=[_neighbour(makers[w])] if w in makers else []) for w in weights]
    inner = {r.name for r in group}
    for tensor in made:
        readers = [r for r in rows if tensor in r.inputs]
        if not readers or any(r.name not in inner for r in readers):
            as_codes = kernels.get(tensor, row).codes_out == tensor
            told = as_codes or any(tensor in r.codes_in for r in readers)
            story.outputs.append(Part(
                tensor, OUTPUT, as_codes, _plain(encodings.get(tensor)) if told else None,
                nodes=[_neighbour(r, tensor) for r in readers if r.name not in inner]))
    for part in (*story.inputs, *story.outputs):
        part.scale_found = "run time" if part.encoding is not None and "scale" not in part.encoding else ""
    return story


def called(row: NodeRow) -> list[list[str]]:
    """The names by which a row's node may be called, for lookup.find; what a folded one made is made by others now."""
    outputs: list[str] = [] if row.scheme == wording.FOLDED else row.outputs
    return [[row.name], outputs, row.weights, row.outputs]


def summary(row: NodeRow, source: str, computes: Iterable[str], seen: bool = True) -> str:
    """What becomes of a node in a clause: 'would run as QLinearConv', 'stays float and ran as Softmax on ...'.

    `seen` tells whether the model was run at all.
    """
    planned, along = source == FLOAT_MODEL, list(computes)
    if row.scheme == wording.FOLDED:
        return "is folded away before anything is planned"
    if row.part_of is not None:
        kernel = f"{wording.short(row.lowering)}, the kernel of {row.part_of}"
        return f"{'would be' if planned else 'is'} computed by {kernel}"
    if row.scheme == FLOAT:
        return "stays float" if planned else f"stays float{_ran(row, ' and ')}"
    if row.scheme == GIVEN:
        return f"came quantized and is kept as it is{'' if planned else _ran(row, ', ')}"
    if row.scheme == STORED:
        kind = _stored_type(row)
        return f"{'would compute' if planned else 'computes'} in float, on weights stored as {kind}{_ran(row, ': it ')}"
    if not row.lowering:
        return _ran(row, "") or "was not seen when the model ran"
    also = f"; the same kernel computes {', '.join(along)}" if along else ""
    if planned:
        return f"would run as {row.lowering} under scheme {row.scheme}{also}"
    if not row.ran_as:
        unseen = ", and was not seen by itself when the model ran" if seen else ""
        return f"is planned as {row.lowering} under scheme {row.scheme}{unseen}{also}"
    same = wording.short(row.ran_as).removeprefix("Nhwc") == row.lowering
    return f"{'' if same else f'is planned as {row.lowering}, '}{_ran(row, '')}{also}"


def _ran(row: NodeRow, joint: str) -> str:
    if not row.ran_as:
        return ""
    where = f" on {row.provider}" if row.provider else ""
    time = f", {wording.milliseconds(row.ms)} a run" if row.ms is not None else ""
    return f"{joint}ran as {wording.short(row.ran_as)}{where}{time}"


def _neighbour(row: NodeRow, tensor: str | None = None) -> Neighbour:
    return Neighbour(row.name, row.op, _fate(row), tensor in row.codes_in)


def _stored_type(row: NodeRow) -> str:
    """Of the codes that are decoded; a reason that tells of blocks begins with it."""
    kind, blocks, _ = row.reason.partition(" weights in blocks of ")
    return kind if blocks else "int8"


def _fate(row: NodeRow) -> str:
    if row.part_of is not None:
        return f"in the kernel of {row.part_of}"
    if row.scheme == GIVEN:
        return "quantized already"
    if row.scheme == STORED:
        return f"float, weights stored as {_stored_type(row)}"
    fate = row.lowering or wording.short(row.ran_as)
    return fate if row.lowering or fate != wording.short(row.op) else ""


def _plain(encoding: Encoding | None) -> dict[str, Any] | None:
    return encoding.to_dict() if encoding is not None else None
