"""Weights in fewer bytes than their type has, decoded once when the model is loaded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Shared, Tensor, constants, decoder_bytes, dtype_of, pack_weight, shape_of
from onnxq.numerics.encoding_choice import BASE, Choice, choices, choose, peak
from onnxq.passes.manager import Context, Packed, Packing, Pass
from onnxq.passes.pack.codes import takes

OPSET = 21  # the first in which Cast takes 4 bits
# What a model may take over an empty process, times what it takes dense, or this many bytes, if they are more. By the
# first a load takes less than 3 times as long as the dense model's.
TIMES_DENSE, ANYHOW = 2.5, 16_000_000
_TYPES = ("int8", "uint8", "float32")
_UNLIMITED = 1 << 62
_NODE_BYTES = 80  # a node that decodes and what declares its arrays, besides their names


@dataclass(frozen=True)
class PackWeights(Pass):
    """w (constant) -> onnxq.packed.DECODER(arrays) -> w, for weights that an encoding makes smaller.

    Which encoding is by size, so that the peak of loading, as onnxq.numerics.encoding_choice estimates it, stays within
    `load_memory` bytes (None: over an empty process 2.5 times what the model takes as it is, or 16 MB). Weights are
    read one by one. A decoder is a model-local function of standard operators; the runtime computes it when the model
    is loaded and is left with w.
    """

    name: ClassVar[str] = "pack-weights"
    load_memory: int | None = None
    min_elements: int = 2048

    def run(self, graph: Graph, context: Context) -> bool:
        """Choose for all weights together, then rewrite one after the other."""
        weights = self._weights(graph) if graph.opset >= OPSET and takes(context.target, 4) else []
        found = [_rated(graph, weight) for weight in weights]
        dense = sum(options[0].nbytes for options in found)
        limit = self.load_memory or BASE + max(int(TIMES_DENSE * 2 * dense), ANYHOW)
        picked = _settled(found, limit - BASE - dense, graph.opset)
        smallest = _settled(found, _UNLIMITED, graph.opset)
        packed, shared = [], Shared()
        for weight, choice in zip(weights, picked, strict=True):
            if choice.form is not None and choice.outline is not None:
                values = graph.read(weight)
                packed.append(Packed(weight.name, choice.outline.names, choice.outline.shape,
                                     float(1 - np.count_nonzero(values) / values.size), values.nbytes,
                                     choice.outline.nbytes))
                pack_weight(graph, weight, choice.outline, choice.form.encode, shared)
        context.packing = Packing(tuple(packed), limit, BASE + 2 * dense, peak(picked, dense), _bytes(picked),
                                  _bytes(smallest), peak(smallest, dense))
        return bool(packed)

    def _weights(self, graph: Graph) -> list[Tensor]:
        outputs = {t.name for holder in graph.graphs() for t in holder.outputs}
        found = {t.name: t for t in constants(graph) if str(dtype_of(t)) in _TYPES and t.name not in outputs}
        return [t for t in found.values() if prod(int(d or 0) for d in shape_of(t) or ()) >= self.min_elements]


def _rated(graph: Graph, weight: Tensor) -> list[Choice]:
    """What may become of a weight, with the bytes that names and nodes take besides."""
    dense, *others = choices(graph.read(weight))
    rated = [dense]
    for choice in others:
        assert choice.outline is not None
        calls, arrays = len(choice.outline.names), choice.outline.count
        if any(graph.has(f"{weight.name}.{path}") for path in choice.outline.paths):
            continue
        more = (calls + arrays) * (_NODE_BYTES + 2 * len(weight.name))
        if choice.nbytes + more < dense.nbytes:
            rated.append(Choice(choice.form, choice.outline, choice.nbytes + more, choice.left, choice.held))
    return rated


def _settled(found: list[list[Choice]], room: int, opset: int) -> list[Choice]:
    """A choice for each weight, without decoders that take more bytes than they save together."""
    while True:
        picked = [options[index] for options, index in zip(found, choose(found, room), strict=True)]
        saved: Counter[str] = Counter()
        for options, choice in zip(found, picked, strict=True):
            for name in set(choice.outline.names if choice.outline is not None else ()):
                saved[name] += options[0].nbytes - choice.nbytes
        poor = {name for name, count in saved.items() if count <= decoder_bytes(name, opset)}
        if not poor:
            return picked
        found = [[c for c in options if c.outline is None or not poor & set(c.outline.names)] for options in found]


def _bytes(picked: list[Choice]) -> int:
    return sum(choice.nbytes for choice in picked)
