"""explain(): one node's story, from a model or from the report of a compilation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import presets, verification
from onnxq.aiming import aim
from onnxq.calibration.readers import open_data
from onnxq.errors import ModelError, OnnxqError, UsageError
from onnxq.explanation import codes, lookup
from onnxq.explanation.story import (
    COMPILED,
    CONSTANT,
    FLOAT_MODEL,
    REPORT,
    WEIGHT,
    Part,
    Story,
    assemble,
    called,
    summary,
)
from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant, load, read_nodes, shape_of
from onnxq.numerics import affine
from onnxq.numerics.comparison import Comparison
from onnxq.numerics.dtypes import INT8, by_name
from onnxq.passes.canonicalize import canonicalize
from onnxq.passes.manager import Context, PassManager, Removals
from onnxq.plan import STATIC, NodePlan
from onnxq.planner import weight_only
from onnxq.planner.given import is_quantized
from onnxq.planner.outline import outline
from onnxq.planner.storing import channel_axis
from onnxq.ports import dtype_name
from onnxq.recipe import Recipe
from onnxq.report import wording
from onnxq.report.report import Encoding, NodeRow, plain
from onnxq.runtime.machine import session_options, target_here
from onnxq.runtime.observe import Executed, Planned, executed, match, optimized
from onnxq.runtime.session import SessionOptions
from onnxq.schemes import Scheme
from onnxq.targets import Target

_FEW = 8  # elements of a stored tensor that are shown one by one
_WITH_CHANNELS = frozenset({"Conv", "ConvTranspose", "GRU", "Gather", "Gemm", "LSTM", "MatMul", "RNN"})
# what compiling appends to a tensor's name
_PARTS = (".lstm.q", ".q", ".q.wide", ".raw", ".unfenced", ".dq", ".decoded")
_IN_REPORT = "; what passes folded and kernels absorbed is told by the report of onnxq compile --report DIR"


def explain(source: str | Path, node: str, *, scheme: str | None = None, target: str = "cpu") -> dict[str, Any]:
    """What becomes of one node and why: verdict, tensors with their scales and ranges, neighbours, what ran.

    `source` is a report.json of a compilation, the folder that holds it, or a model. Of a float model it gives the
    planner's verdict under `scheme` (None: the target's) and runs nothing; of a model that holds codes the operators as
    they are, and what onnxruntime makes of them on random inputs. `node` is the node's name, a tensor that it makes, a
    glob, or the end of a name that no other has. Raises UsageError when it stands for no node or for several, or when a
    scheme is given for what has one; ModelError for a source that can't be read.
    """
    here = target_here(target)
    path = Path(source)
    if _is_report(path):
        if scheme is not None:
            raise UsageError("a report tells of the scheme that was used; leave out --scheme, or name the float model")
        story = _of_report(path, node)
    else:
        graph = load(path)
        if "onnxq.plan" in graph.metadata or any(is_quantized(g, n) for n, g in graph.walk()):
            if scheme is not None:
                raise UsageError(f"{path} is quantized already; leave out --scheme, or name the float model")
            story = _of_compiled(path, graph, node, here)
        else:
            story = _of_float(path, graph, node, aim(presets.named(scheme or here.scheme), here), here)
    found: dict[str, Any] = plain(dataclasses.asdict(story))
    return found


# ------------------------------------------------------------------ a report


def _is_report(path: Path) -> bool:
    if path.is_dir() or path.suffix == ".json":
        return True
    try:
        with path.open("rb") as file:
            return file.read(64).lstrip().startswith(b"{")  # no ONNX file begins so
    except OSError:
        return False  # loading it as a model says what is wrong


def _of_report(path: Path, wanted: str) -> Story:
    if path.is_dir():
        path = path / "report.json"
    data = _read(path)
    try:
        rows = [NodeRow(**{k: v for k, v in row.items() if k in _fields(NodeRow)}) for row in data["nodes"]]
        encodings = {name: Encoding(**{k: v for k, v in found.items() if k in _fields(Encoding)})
                     for name, found in data.get("tensors", {}).items()}
    except (LookupError, TypeError, AttributeError):
        raise ModelError(f"{path} is no report of onnxq; name the report.json that --report DIR writes") from None
    name = lookup.find(wanted, {row.name: called(row) for row in rows}, str(path), "; report.html lists its nodes")
    story = assemble(REPORT, str(data.get("model", "")), rows, encodings, name)
    row = next(r for r in rows if r.name == name)
    seen = any(r.ran_as for r in rows)
    story.summary = summary(row, REPORT, story.computes, seen)
    if not seen:
        story.notes.append("the compiled model was not run: there is no word on which kernels ran")
    if not data.get("tensors") and any(r.lowering for r in rows):
        story.notes.append("nothing in this model is stored as codes")
    return story


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ModelError(f"{path} can't be read ({e.strerror}); name a model, a report.json or the folder that holds "
                         "one") from None
    except ValueError:
        raise ModelError(f"{path} is not JSON or is cut short; name the report.json that --report DIR writes") from None


def _fields(kind: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)}


# ------------------------------------------------------------------ a float model


def _of_float(path: Path, graph: Graph, wanted: str, recipe: Recipe, target: Target) -> Story:
    original, removals = graph.copy(), Removals(graph)
    PassManager(canonicalize(), [removals]).run(graph, Context(target))
    verdicts = outline(graph, recipe, target).nodes
    rows = [verification.row(n) for n in verdicts.values()]
    codes.connect(rows, verdicts, graph)
    rows += verification.removed_rows(removals)
    known = {row.name: called(row) for row in rows}
    for node, _ in original.walk():  # by the names in the file, too
        known[node.name][1:1] = [_outputs(node) if node.name not in removals.found else []]
        known[node.name].append(_weights(node))
    name = lookup.find(wanted, known, str(path))
    row = next(r for r in rows if r.name == name)
    holder = original if name in removals.found else graph
    if name in removals.found:
        row.inputs = codes.reads(_node(original, name))
    encodings, by_calibration = _to_come(rows, verdicts, recipe.scheme)
    story = assemble(FLOAT_MODEL, str(path), rows, encodings, name)
    story.summary = summary(row, FLOAT_MODEL, story.computes)
    for part in (p for p in (*story.inputs, *story.outputs) if p.name in by_calibration and p.scale_found):
        part.scale_found = "calibration"
    _describe(story, holder, recipe.scheme)
    if row.scheme != wording.FOLDED:
        story.notes.append("nothing was run or measured: onnxq compile finds ranges, times the result against float, "
                           "and leaves float what does not pay")
    return story


def _to_come(rows: Sequence[NodeRow], verdicts: Mapping[str, NodePlan],
             scheme: Scheme) -> tuple[dict[str, Encoding], set[str]]:
    """How activations will be encoded, as far as a plan without ranges can tell, and those that calibration decides."""
    found: dict[str, Encoding] = {}
    by_calibration: set[str] = set()
    for row in rows:
        verdict, spec = verdicts.get(row.name), scheme.activations
        if verdict is None or spec is None:
            continue
        static = verdict.activation == STATIC
        names = [t for t in (*row.codes_in, row.codes_out) if t]
        found |= {t: Encoding(spec.dtype, spec.granularity if static else verdict.activation) for t in names}
        by_calibration |= set(names) if static else set()
    return found, by_calibration


def _outputs(node: Node) -> list[str]:
    return [t.name for t in node.outputs if t.name]


def _weights(node: Node) -> list[str]:
    return [t.name for t in node.inputs if t.name and is_constant(t)]


def _node(graph: Graph, name: str) -> Node:
    return next(n for n, _ in graph.walk() if n.name == name)


# ------------------------------------------------------------------ a compiled model


def _of_compiled(path: Path, graph: Graph, wanted: str, target: Target) -> Story:
    encodings = codes.stored(graph)
    rows, known = [], {}
    for node, holder in graph.walk():
        row = codes.row_of(node, holder, encodings)
        rows.append(row)
        stems = [n.removesuffix(p) for n in (*row.outputs, *row.weights) for p in _PARTS if n.endswith(p)]
        known[node.name] = [[row.name], row.outputs, row.weights, stems]
    ours = "onnxq.plan" in graph.metadata
    name = lookup.find(wanted, known, str(path), _IN_REPORT if ours else "")
    kernel, seen = _kernel(path, graph, _node(graph, name), session_options(target, 0))
    story = assemble(COMPILED, str(path), rows, encodings, name)
    if "onnxq.recipe" in graph.metadata:
        story.scheme = str(json.loads(graph.metadata["onnxq.recipe"])["scheme"]["name"])
    _describe(story, graph, None)
    floats = {"DequantizeLinear": story.outputs, "QuantizeLinear": story.inputs}.get(story.op, [])
    for part in floats:  # what is codes stands on the other side of these
        part.encoding = None
    if kernel is not None:
        story.ran_as, story.provider = kernel.op, kernel.provider
        where = f" on {kernel.provider}" if kernel.provider else ""
        own = kernel.name.startswith(name) or kernel.op == story.op
        kind = wording.short(kernel.op)
        story.summary = f"onnxruntime runs it as {kind}{where}" if own else (
            f"onnxruntime computes it in {kernel.name or 'a node without a name'} ({kind}{where})")
        quantized = any(p.codes for p in (*story.inputs, *story.outputs))
        if quantized and story.op in target.pairs_with_q and not verification.is_integer(kernel.op):
            story.notes.append("it computes in float, on decoded codes: the runtime took no integer kernel for it")
    elif story.inside is not None:
        story.summary = "was not seen: its body was not entered on random inputs, or it is folded or fused there"
    else:
        story.summary = "onnxruntime does not run it by itself: it is folded, moved, or fused into its neighbours"
    story.notes += [seen] if seen else []
    if ours:
        story.notes.append("the reasons are in the report that onnxq compile --report DIR writes")
    return story


def _kernel(path: Path, graph: Graph, node: Node, options: SessionOptions) -> tuple[Executed | None, str]:
    """What executes a node in a session on random inputs, and a note where that could not be seen in full."""
    note = ""
    try:
        feeds = verification.first_feeds(open_data("random", graph.ports()), 1, 1)
        ran = executed(path, feeds, options, read_nodes)
    except OnnxqError:
        ran = optimized(path, options, read_nodes)
        note = "the model does not run on random inputs: this is from the optimized graph, which names no provider"
    behind, last = _outputs(node), node
    fused = verification.ACTIVATIONS | {"QuantizeLinear"} | ({"Add"} if node.op == "MatMul" else set())
    for _ in range(3):  # what a fusion takes in behind it: a bias, an activation, a QuantizeLinear
        reader = graph.only_consumer(last.outputs[0]) if len(last.outputs) else None
        if reader is None or reader.op not in fused:
            break
        behind, last = [*behind, *_outputs(reader)], reader
    alone = [t.name for t in node.inputs if t.name and is_constant(t) and len(graph.consumers(t)) == 1
             and codes.elements(t) > _FEW]
    alone += [s.name for t in node.inputs if (maker := graph.producer(t)) is not None
              and maker.op == "DequantizeLinear" and is_constant(s := maker.inputs[0])]
    found = match([Planned(node.name, tuple(behind), tuple(alone))], ran)[node.name]
    conversion = node.op in verification.CONVERSIONS and found is not None and found.op not in verification.CONVERSIONS
    if conversion and found is not None and not verification.is_integer(found.op):
        return None, note  # the runtime moved it; what makes its result now does not do its work
    return found, note


# ------------------------------------------------------------------ shapes and values


def _describe(story: Story, graph: Graph, scheme: Scheme | None) -> None:
    """Add what the graph knows: shapes, dtypes, stored tensors, attributes, bodies."""
    nodes = {n.name: (n, g) for n, g in graph.walk()}
    node, holder = nodes[story.node]
    tensors = {t.name: t for n, _ in graph.walk() for t in (*n.inputs, *n.outputs)}
    named = {p.name for p in story.inputs}
    for owner in [node, *(nodes[n][0] for n in story.computes)]:
        skipped = codes.parameters(owner)
        story.inputs += [Part(t.name, _role(t)) for k, t in enumerate(owner.inputs)
                         if k not in skipped and t.name and is_constant(t) and t.name not in named]
    for part in (*story.inputs, *story.outputs):
        tensor = tensors[part.name]
        dtype, shape = dtype_of(tensor), shape_of(tensor)
        part.dtype = dtype_name(dtype) if dtype is not None else None
        part.shape = list(shape) if shape is not None else None
        if is_constant(tensor):
            _values(part, holder, node, tensor, scheme if part.name in named else None)
    outputs = {t.name for t in graph.outputs}
    for part in story.outputs:
        part.note = "an output of the model" if part.name in outputs else ""
    for part in story.inputs:
        if part.note and part.name not in {t.name for t in graph.inputs}:
            part.note = "an input of the body" if holder is not graph else ""
    for owner, body in ((o, b) for n, g in nodes.values() for o, b in g.subgraphs() if o is n):
        if any(n is node for n in body.nodes):
            story.inside = f"{owner.op} {owner.name}"
    story.attributes = {k: v for k, v in node.attrs.items() if isinstance(v, (bool, int, float, str, list, tuple))}


def _role(tensor: Tensor) -> str:
    """A weight is a matrix of floats or more; what is long in one direction only is a bias or a factor."""
    dims = [size for size in shape_of(tensor) or () if size != 1]
    return WEIGHT if _is_float(tensor) and len(dims) > 1 else CONSTANT


def _is_float(tensor: Tensor) -> bool:
    dtype = dtype_of(tensor)
    return dtype is not None and dtype.kind == "f"


def _values(part: Part, graph: Graph, node: Node, tensor: Tensor, scheme: Scheme | None) -> None:
    """Add what a stored tensor holds; with a scheme, how its values would be as codes, too."""
    count = codes.elements(tensor)
    if count <= _FEW:
        values = np.asarray(graph.read(tensor)).reshape(-1)
        part.values = [v.decode(errors="replace") if isinstance(v, bytes) else v for v in values.tolist()]
        return
    if not _is_float(tensor):
        return
    values = np.asarray(graph.read(tensor), np.float32)
    part.statistics = {"min": float(values.min()), "max": float(values.max())}
    if not np.isfinite(values).all():
        part.note = "it holds NaN or infinite values"
        return
    axis = _channel_axis(node, tensor)
    if part.role == WEIGHT and axis is not None:
        part.statistics |= channel_statistics(values, axis)
    if scheme is not None and node.op not in weight_only.LINEAR:
        scheme = scheme.for_stored or scheme
    if scheme is not None and scheme.has_blocks and node.op in weight_only.TAKERS:
        matrix = values.reshape(len(values), -1)
        params = _block_params(matrix, node, scheme)
        part.encoding, part.statistics["sqnr_db"] = codes.of_params(params, count).to_dict(), _sqnr(matrix, params)
    elif scheme is not None and scheme.weights is not None:
        # what has no blocks under such a scheme is stored as int8, by channel
        dtype = INT8 if scheme.has_blocks else by_name(scheme.weights.dtype)
        chosen = axis if scheme.weights.granularity != "tensor" or not part.codes else None
        params = affine.weight_params(values, chosen, dtype)
        part.encoding = codes.of_params(params, count).to_dict()
        part.statistics["sqnr_db"] = _sqnr(values, params)
        if chosen is not None:
            part.statistics["sqnr_db_per_tensor"] = _sqnr(values, affine.weight_params(values, None, dtype))


def _block_params(values: np.ndarray[Any, Any], node: Node, scheme: Scheme) -> affine.QuantParams:
    """Those of a weight in blocks, by the simplest search; of a table, along its columns."""
    along = weight_only.axis(node)
    found = weight_only.block_params(values.T if along else values, scheme)
    return dataclasses.replace(found, scale=found.scale.T, zero_point=found.zero_point.T, axis=1) if along else found


def _channel_axis(node: Node, weight: Tensor) -> int | None:
    """The axis of a weight whose every index makes an output of its own; None for operators without such."""
    index = next((k for k, t in enumerate(node.inputs) if t.name == weight.name), 0)
    return channel_axis(node, index, len(shape_of(weight) or ())) if node.op in _WITH_CHANNELS else None


def channel_statistics(w: np.ndarray[Any, Any], axis: int) -> dict[str, Any]:
    """How unlike the channels of a weight (float32, any rank) are: the least, median and greatest max|w| of a channel.

    `spread` is greatest over least, of channels that are not all zeros (None when all are): one scale for the whole
    tensor would leave the smallest channel log2(spread) bits fewer than the largest.
    """
    largest = np.abs(w).max(axis=tuple(k for k in range(w.ndim) if k != axis))
    used = largest[largest > 0]
    return {"axis": axis, "channels": int(largest.size), "zero_channels": int(largest.size - used.size),
            "least_channel": float(largest.min()), "median_channel": float(np.median(largest)),
            "greatest_channel": float(largest.max()),
            "spread": float(used.max() / used.min()) if used.size else None}


def _sqnr(values: np.ndarray[Any, Any], params: affine.QuantParams) -> float | None:
    found = Comparison()
    found.update(values, affine.dequantize(affine.quantize(values, params), params))
    return found.sqnr_db
