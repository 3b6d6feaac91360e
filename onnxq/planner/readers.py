"""Tensors and the layers that read them as codes: what scales of activations are searched by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.calibration import observer
from onnxq.calibration.observer import Statistic
from onnxq.calibration.readers import Dataset
from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant, shape_of
from onnxq.numerics import affine
from onnxq.numerics.dtypes import by_name
from onnxq.numerics.filters import from_matrix, to_matrix
from onnxq.numerics.histogram import Histogram
from onnxq.numerics.sampling import Sample, Sampled, View
from onnxq.numerics.smoothing import Activation, Reader
from onnxq.plan import STATIC, TOKEN, UNTOUCHED, NodePlan
from onnxq.planner.scales import finite, weight_params
from onnxq.planner.weight_only import block_params
from onnxq.recipe import Calibration
from onnxq.runtime.session import SessionOptions
from onnxq.schemes import Scheme
from onnxq.targets import Target

Floats = npt.NDArray[np.float32]

_MOST_BYTES = 256 << 20  # of rows that are held at once; a larger model is sampled in several runs
_ROWS = 512  # per half of the data; more change nothing (measured: 384 to 2,000 rows)
_OUTPUTS = 1024  # of a layer, as many as are tried out: a head's vocabulary has a hundred times more
BINS = 2048
_PATCH_BYTES = 8 << 20  # of one Conv's patches, whose rows are long


@dataclass(frozen=True)
class Group:
    """A computed tensor with the layers that read it as codes and have weights of their own; channels along `axis`."""

    tensor: Tensor
    layers: tuple[Node, ...]
    views: tuple[View, ...]
    axis: int

    @property
    def name(self) -> str:
        """That of the tensor."""
        return str(self.tensor.name)

    @property
    def channels(self) -> int:
        """How many the tensor has."""
        weight = self.layers[0].inputs[1]
        dims = shape_of(weight) or ()
        return int(dims[1] or 0) * int(self.layers[0].attrs.get("group", 1)) if self.axis == 1 else int(dims[0] or 0)

    def rows(self) -> int:
        """How many rows of each half are drawn."""
        widest = max(self.channels * view.repeat for view in self.views)
        return _ROWS if self.axis != 1 else max(min(_ROWS, _PATCH_BYTES // (4 * widest)), 64)

    def bytes(self) -> int:
        """What both halves of its rows take."""
        return 8 * self.rows() * self.channels * sum(view.repeat for view in dict.fromkeys(self.views))


def groups(graph: Graph, nodes: dict[str, NodePlan]) -> list[Group]:
    """Those of a Plan's layers that quantize what they read at a scale per tensor in advance, or per row; in execution
    order. A Conv of several groups, whose filters each see a part of the channels, is not among them."""
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        verdict = nodes.get(node.name)
        if verdict is None or verdict.part_of is not None or verdict.weight is None:
            continue
        if not verdict.is_int and verdict.activation != UNTOUCHED:
            continue
        fits = node.op in ("MatMul", "Gemm", "Conv") and verdict.weight == node.inputs[1].name
        alone = {n.name for n in graph.consumers(node.inputs[1])} == {node.name} if fits else False
        if alone and verdict.activation in (STATIC, TOKEN, UNTOUCHED) and not is_constant(node.inputs[0]):
            found.setdefault(node.inputs[0].name, []).append(node)
    made = [_group(layers) for layers in found.values()]
    return [group for group in made if group is not None]


def every_group(graph: Graph) -> list[Group]:
    """The same of all layers of a float graph with weights of their own, where all that reads a tensor is such."""
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op in ("MatMul", "Gemm", "Conv") and not node.domain and len(node.inputs) > 1 and is_constant(
                node.inputs[1]) and not is_constant(node.inputs[0]) and all(
                is_constant(t) for t in node.inputs[2:] if t.name):
            found.setdefault(node.inputs[0].name, []).append(node)
    whole = [layers for layers in found.values()
             if {n.name for n in graph.consumers(layers[0].inputs[0])} == {n.name for n in layers}
             and all({n.name for n in graph.consumers(layer.inputs[1])} == {layer.name} for layer in layers)]
    made = [_group(layers) for layers in whole]
    return [group for group in made if group is not None]


def _group(layers: list[Node]) -> Group | None:
    views = [view_of(node) for node in layers]
    kinds = {node.op == "Conv" for node in layers}
    if len(kinds) > 1 or any(view is None for view in views):
        return None
    known = tuple(view for view in views if view is not None)
    return Group(layers[0].inputs[0], tuple(layers), known, 1 if layers[0].op == "Conv" else -1)


def view_of(node: Node) -> View | None:
    """How a layer sees its input; None for forms that have no rows of their own."""
    dims = shape_of(node.inputs[1]) or ()
    if dtype_of(node.inputs[1]) != np.float32 or any(not isinstance(d, int) or d < 1 for d in dims):
        return None
    if node.op != "Conv":
        return View() if len(dims) == 2 and not node.attrs else None
    spatial, kernel = len(dims) - 2, tuple(int(d) for d in dims[2:] if isinstance(d, int))
    if node.attrs.get("group", 1) != 1 or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    ones = (1,) * spatial
    return View(kernel, tuple(node.attrs.get("strides", ones)),
                tuple(node.attrs.get("pads", (0,) * (2 * spatial))), tuple(node.attrs.get("dilations", ones)))


class _Half:
    """One half of what a group reads: sampled, and counted in a histogram where that is wanted."""

    def __init__(self, group: Group, histogram: bool) -> None:
        self.sample = Sampled(group.views, group.rows())
        self.histogram = Histogram(BINS) if histogram else None

    def update(self, x: npt.NDArray[Any]) -> None:
        self.sample.update(x)
        if self.histogram is not None:
            self.histogram.update(x)


class Halves:
    """What a group reads of the even and of the odd samples."""

    def __init__(self, group: Group, histograms: bool) -> None:
        self.halves = _Half(group, histograms), _Half(group, histograms)

    def results(self) -> tuple[Sample, Sample] | None:
        """(even, odd); None unless both saw something."""
        first, second = (half.sample.result() for half in self.halves)
        return (first, second) if first is not None and second is not None else None

    @property
    def histograms(self) -> tuple[Histogram, Histogram]:
        """(even, odd), where they were asked for."""
        first, second = (half.histogram for half in self.halves)
        assert first is not None
        assert second is not None
        return first, second


def sampled(graph: Graph, wanted: Sequence[Group], data: Dataset, how: Calibration, options: SessionOptions,
            progress: Callable[[int], None] | None = None, beside: Sequence[Mapping[str, Statistic]] = (),
            histograms: bool = False) -> Iterator[tuple[Group, Halves]]:
    """Each group with what its layers read, in as many streamed runs as memory needs; `beside` is observed in the
    first of them."""
    chunks: list[list[Group]] = [[]]
    for group in wanted:
        if sum(g.bytes() for g in [*chunks[-1], group]) > _MOST_BYTES and chunks[-1]:
            chunks.append([])
        chunks[-1].append(group)
    for chunk in chunks:
        held = {g.name: Halves(g, histograms) for g in chunk}
        if held or any(beside):
            observer.fold(graph, held, data, how, options, progress, beside)
        beside = ()
        for member in chunk:
            yield member, held.pop(member.name)


def activation(scheme: Scheme) -> Activation:
    """How a scheme quantizes what its layers read."""
    spec = scheme.activations
    if spec is None:
        return Activation(None)
    return Activation(by_name(spec.dtype), spec.symmetric, spec.granularity == "token")


def readers(graph: Graph, group: Group, sample: Sample, scheme: Scheme, target: Target) -> list[Reader]:
    """The group's layers on rows of a sample. Raises ModelError for weights with NaN or infinities."""
    return [_reader(graph, node, view, sample, scheme, target)
            for node, view in zip(group.layers, group.views, strict=True)]


def _reader(graph: Graph, node: Node, view: View, sample: Sample, scheme: Scheme, target: Target) -> Reader:
    """One layer; of more than _OUTPUTS outputs as many are looked at, evenly spread."""
    weight = finite(graph, node.inputs[1], node)
    along = 0 if node.op == "Conv" else 1
    if weight.shape[along] > _OUTPUTS:
        weight = weight.take(np.linspace(0, weight.shape[along] - 1, _OUTPUTS).astype(int), along)
    conv, kernel = node.op == "Conv", weight.shape[2:]

    def decoded(matrix: Floats) -> Floats:
        values = from_matrix(matrix, kernel, conv)
        params = block_params(values, scheme) if scheme.has_blocks else weight_params(node, values, scheme, target)
        return to_matrix(affine.dequantize(affine.quantize(values, params), params), conv)

    return Reader(sample.rows[view], to_matrix(weight, conv), decoded, view.repeat)
