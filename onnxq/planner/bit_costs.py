"""What fewer bits in each weight cost: at its layer's result, and through that at the model's output.

A weight's *error* in a format is the squared error of its layer's result relative to the power of that, over what the
layer reads of calibration data: e^T H e / w^T H w, with H = x^T x. In one format, the probe, each weight alone is
quantized and the model's output compared with float's. The damage in another format is the probe's times the ratio of
the errors: both grow with the square of what rounding changes, and add up over weights as long as it is little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq import language
from onnxq.calibration import observer
from onnxq.calibration.readers import Dataset
from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant, port_of, shape_of
from onnxq.numerics import affine, blocks, outliers
from onnxq.numerics.comparison import Comparison
from onnxq.numerics.divergence import Divergence
from onnxq.numerics.dtypes import by_name
from onnxq.numerics.rounding import Hessian
from onnxq.passes.blocks import inputs_first, matrix, matrix_shape
from onnxq.planner import hessians
from onnxq.planner.weight_only import LINEAR, axis, weight_of
from onnxq.progress import Progress
from onnxq.recipe import Calibration
from onnxq.runtime.session import SessionOptions
from onnxq.schemes import TensorSpec

Floats = npt.NDArray[np.float32]

_COLUMNS = 512  # outputs of a layer, or rows of a table, whose errors stand for all of them
_WIDEST = 8192  # inputs of a layer whose Hessian is held
_ROWS, _TOKENS = 16, 1024  # that outputs are compared on, once for each weight: whichever is reached first
_MOST_HELD = 1 << 30  # bytes of models whose sessions are open together
_MOST_TOGETHER = 8
_MOST_PROBED = 2 << 30  # bytes of a model that is written once for each weight
_HOPELESS = 1e6  # in place of a damage that is no number

NATS, OUTPUT, LAYER, WEIGHT = "nats per token", "of the output's power", "of its result's power", "of its own power"


@dataclass(frozen=True)
class Weight:
    """A matrix with the nodes that read it, each with the graph that holds it, and the formats that it may have."""

    name: str
    readers: tuple[tuple[Graph, Node], ...]
    formats: tuple[TensorSpec, ...]

    @property
    def tensor(self) -> Tensor:
        """The constant."""
        return weight_of(self.readers[0][1])

    @property
    def axis(self) -> int:
        """That of the blocks."""
        return axis(self.readers[0][1])

    @property
    def shape(self) -> tuple[int, int]:
        """Its sizes."""
        return matrix_shape(self.tensor)


@dataclass(frozen=True)
class Seeing:
    """The data, and how they are run."""

    data: Dataset
    how: Calibration
    options: SessionOptions


@dataclass
class Costs:
    """Weight -> the damage in each of its formats, in `unit`."""

    unit: str
    damages: dict[str, list[float]] = field(default_factory=dict)


def measure(graph: Graph, weights: Sequence[Weight], by: Seeing | None, progress: Progress) -> Costs:
    """The damage of all formats; without data a weight's own relative error. Raises ModelError and DataError."""
    if by is None:
        progress.total(len(weights))
        found = {}
        for done, weight in enumerate(weights):
            found[weight.name] = _errors(graph, weight, None)
            progress.step(done + 1)
        return Costs(WEIGHT, found)
    chunks = hessians.chunks({name: inputs for one in weights for name, inputs in [_read(one)] if name})
    fits = _bytes(graph) <= _MOST_PROBED
    groups = _groups(graph, weights) if fits else []
    few = _few(by)
    rows = [_rows(by)] * max(len(chunks), 1) + [_rows(few)] * len(groups)
    known = [count for count in rows if count is not None]
    progress.total(sum(known) if len(known) == len(rows) else None)
    steps = _Steps(progress)
    errors = _at_layers(graph, weights, chunks, by, steps)
    if not fits:
        return Costs(LAYER, errors)
    probes = {one.name: _probe(one.formats) for one in weights}
    unit, damages = _at_output(graph, groups, probes, few, steps)
    found = {}
    for name, own in errors.items():
        base = own[probes[name]]
        found[name] = [min(damages[name] * error / base, _HOPELESS) if base > 0 else 0.0 for error in own]
    return Costs(unit, found)


class _Steps:
    """Steps of runs that follow one another."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.before, self.last = progress, 0, 0

    def begin(self) -> Callable[[int], None]:
        """What hears of the rows of the next run."""
        self.before += self.last
        self.last = 0
        return self._hear

    def _hear(self, rows: int) -> None:
        self.last = rows
        self.progress.step(self.before + rows)


def _few(by: Seeing) -> Seeing:
    """As many rows as tell how far an output is from float's."""
    feed = next(by.data.batches(1)).feed
    length = max((values.shape[1] for values in feed.values() if values.dtype.kind in "iu" and values.ndim == 2),
                 default=1)
    return replace(by, how=replace(by.how, samples=min(_ROWS, -(-_TOKENS // length), by.how.samples or _ROWS)))


def _rows(by: Seeing) -> int | None:
    known = [n for n in (by.data.rows, by.how.samples) if n is not None]
    return min(known) if by.data.rows is not None else None


# ------------------------------------------------------------------ at the layer


def _read(weight: Weight) -> tuple[str, int]:
    """(what the first layer with this weight reads, its inputs); '' where that is not seen or too wide."""
    for graph, node in weight.readers:
        seen = node.op in LINEAR and not is_constant(node.inputs[0])
        if seen and any(n.name == node.name for n in graph.consumers(node.inputs[0])) and weight.shape[0] <= _WIDEST:
            return str(node.inputs[0].name), weight.shape[0]
    return "", 0


def _at_layers(graph: Graph, weights: Sequence[Weight], chunks: Sequence[Sequence[str]], by: Seeing,
               steps: _Steps) -> dict[str, list[float]]:
    """Weight -> its error in each format."""
    inside = {n.name for _, body in graph.subgraphs() for n, _ in body.walk()}
    seen = {one.name: _read(one)[0] for one in weights if not any(n.name in inside for _, n in one.readers)}
    found = {one.name: _errors(graph, one, None) for one in weights if not seen.get(one.name)}
    for chunk in chunks:
        running = {name: Hessian() for name in chunk if name in seen.values()}
        observer.fold(graph, running, by.data, by.how, by.options, steps.begin())
        for one in weights:
            statistic = running.get(seen.get(one.name, ""))
            if statistic is not None:
                found[one.name] = _errors(graph, one, statistic.result() if statistic.count else None)
    return found


def _errors(graph: Graph, weight: Weight, hessian: npt.NDArray[np.float64] | None) -> list[float]:
    """The squared error in each format relative to the power; of the weight itself without a Hessian."""
    values = _inputs_first(graph, weight)
    if values.shape[1] > _COLUMNS:
        values = values[:, np.linspace(0, values.shape[1] - 1, _COLUMNS).astype(int)]
    power = _power(values, hessian)
    return [_power(_decoded(values, spec) - values, hessian) / power if power > 0 else 0.0 for spec in weight.formats]


def _power(x: Floats, hessian: npt.NDArray[np.float64] | None) -> float:
    """Sum of x^T H x over the columns of x [K, N]."""
    x = x.astype(np.float64)
    return max(float(np.einsum("kn,kn->", x, x if hessian is None else hessian @ x)), 0.0)


def _inputs_first(graph: Graph, weight: Weight) -> Floats:
    return inputs_first(np.asarray(matrix(graph, weight.tensor), np.float32), weight.axis)


def _decoded(values: Floats, spec: TensorSpec) -> Floats:
    """What a weight [K, N] becomes; ranges of 2 bits are searched, or outliers would decide on them."""
    dtype = by_name(spec.dtype)
    if spec.block_size is None:
        params = (affine.weight_params(values, 1, dtype) if spec.bits is None else
                  outliers.choose(values, 1, spec.bits, spec.fraction, spec.sigma_factor))
        return affine.dequantize(affine.quantize(values, params), params)
    params = blocks.choose(values, dtype, spec.block_size, spec.symmetric, "mse" if dtype.bits == 2 else "absmax")
    return affine.dequantize(affine.quantize(values, params), params)


# ------------------------------------------------------------------ at the model's output


def _probe(formats: Sequence[TensorSpec]) -> int:
    """The coarsest format of 4 bits or more: what is left of 2 bits is no small change any more, of 8 hardly one."""
    def coarseness(k: int) -> tuple[bool, int, int]:
        bits = formats[k].bits or by_name(formats[k].dtype).bits
        return bits < 4, bits, -(formats[k].block_size or 0)

    return min(range(len(formats)), key=coarseness)


def _bytes(graph: Graph) -> int:
    sizes = {t.name: int(np.prod([int(d or 0) for d in shape_of(t) or ()], dtype=np.int64))
             for node, _ in graph.walk() for t in node.inputs if is_constant(t)}
    return 4 * sum(sizes.values())


def _groups(graph: Graph, weights: Sequence[Weight]) -> list[Sequence[Weight]]:
    """Weights whose models are run side by side."""
    size = int(np.clip(_MOST_HELD // max(_bytes(graph), 1), 1, _MOST_TOGETHER))
    return [weights[start:start + size] for start in range(0, len(weights), size)]


def _at_output(graph: Graph, groups: Sequence[Sequence[Weight]], probes: Mapping[str, int], by: Seeing,
               steps: _Steps) -> tuple[str, dict[str, float]]:
    """(unit, damage of each weight's probe): of the logits of a language model, or of all float outputs alike."""
    try:
        logits = language.causal_model(graph.ports(), [port_of(t) for t in graph.outputs]).logits.name
    except language.Unrecognised:
        logits = None
    outputs = [logits] if logits else [t.name for t in graph.outputs if dtype_of(t) == np.float32]
    found = {}
    for group in groups:
        graphs = [graph, *(_quantized(graph, one, one.formats[probes[one.name]]) for one in group)]
        pairs = {(one.name, name): (name, k, name) for k, one in enumerate(group, 1) for name in outputs}
        running: dict[tuple[str, str], Any] = {key: Divergence() if logits else Comparison() for key in pairs}
        observer.fold_pairs(graphs, pairs, running, by.data, by.how, by.options, steps.begin())
        for one in group:
            parts = [_figure(running[one.name, name]) for name in outputs]
            found[one.name] = min(float(np.mean(parts)) if parts else 0.0, _HOPELESS)
    return (NATS if logits else OUTPUT), found


def _figure(seen: Divergence | Comparison) -> float:
    if isinstance(seen, Divergence):
        return seen.mean
    return 0.0 if seen.sqnr_db is None else float(min(10.0 ** min(-seen.sqnr_db / 10, 300.0), _HOPELESS))


def _quantized(graph: Graph, weight: Weight, spec: TensorSpec) -> Graph:
    """A copy in which this one weight is what a format makes of it, found as the copy is written."""
    copy = graph.copy()

    def compute() -> Floats:
        values = _decoded(_inputs_first(graph, weight), spec)
        return np.ascontiguousarray(values.T if weight.axis else values).reshape(dims)

    dims = [int(d or 0) for d in shape_of(weight.tensor) or ()]
    made = copy.computed(f"{weight.name}.probe", np.float32, dims, compute)
    names = {node.name for _, node in weight.readers}
    for node, holder in list(copy.walk()):
        if node.name in names:
            position = [t.name for t in node.inputs].index(weight.name)
            holder.replace_input(node, position, made)
    return copy
