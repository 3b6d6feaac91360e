"""Outlier channels planted into a model without changing what it computes, as large language models grow them.

Of each normalisation's gain g some channels are multiplied by a factor, and the rows of the weights that read them are
divided by it: (x g f) (W / f) = (x g) W. A float model computes the same; one scale for all channels no longer does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

FACTOR = 50.0
SHARE = 0.01


def plant(model: Path, output: Path, factor: float = FACTOR, share: float = SHARE) -> int:
    """Write the model with `share` of the channels of each gain times `factor`; how many gains there were.

    Gains are constants [C] of a Mul whose result MatMuls of constants alone read. ValueError when there is none.
    """
    loaded = onnx.load(model)
    weights = {tensor.name: tensor for tensor in loaded.graph.initializer}
    random = np.random.default_rng(0)
    found = 0
    for node in loaded.graph.node:
        gain = next((name for name in node.input if name in weights), None) if node.op_type == "Mul" else None
        readers = _readers(loaded, node.output[0])
        if gain is None or not readers or len(weights[gain].dims) != 1 or weights[gain].dims[0] < 2:
            continue
        if any(reader.op_type != "MatMul" or reader.input[1] not in weights for reader in readers):
            continue
        channels = weights[gain].dims[0]
        chosen = random.choice(channels, max(1, round(share * channels)), replace=False)
        _multiply(weights[gain], chosen, factor)
        for name in {reader.input[1] for reader in readers}:
            _multiply(weights[name], chosen, 1 / factor)
        found += 1
    if not found:
        raise ValueError(f"{model} has no gain of a normalisation that linear layers alone read; plant none")
    onnx.save(loaded, output)
    return found


def _readers(model: ModelProto, name: str) -> list[NodeProto]:
    return [node for node in model.graph.node if name in node.input]


def _multiply(tensor: onnx.TensorProto, rows: np.ndarray, factor: float) -> None:
    values = np.array(numpy_helper.to_array(tensor))
    values[rows] *= np.float32(factor)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
