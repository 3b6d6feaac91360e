"""Models that are as right as a given one, for telling how far apart two right results may lie.

Runtimes add up float32 sums in different orders, which changes a result by some units in its last place. Where codes
are made of it, a number near the middle between two codes takes the other one, and what follows differs by a whole
step. How much comes of that depends on the model and on the input: it is found by changing the model as little.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from onnxq.graph.names import with_bodies
from onnxq.graph.parse import parse

# relative: 32 units in the last place of float32, above what sums of thousands of products differ by, so that a few
# nudges meet the codes that may change
NUDGE = 2.0 ** -18

# what sums or makes codes; elsewhere a constant may count something, which a nudge would change
_SUMS = ("Conv", "GRU", "Gemm", "LSTM", "MatMul", "Normalization", "QuantizeLinear", "RNN")
_FLOAT_ACTIVATIONS = 1  # accuracy_level of MatMulNBits: activations stay float32
_LARGEST = 1e30  # larger ones stand for infinity in masks


def write_nudged(path: Path, destination: Path, seed: int | None, by: float = NUDGE) -> bool:
    """Write the model with its small float32 constants nudged at random, by `seed`; whether any was.

    Those count that operators read which sum, or make codes: biases, scales, and weights below 1 MiB. Each is
    multiplied by 1 + `by` or 1 - `by`. For `seed` None instead, weights in blocks are multiplied by float activations
    where a processor may make int8 of them. `destination` has to lie in the folder of the model: larger weights are
    read from there. Raises what onnxq.graph.parse does.
    """
    model = parse(path)
    changed = False
    for graph in with_bodies(model.graph):
        changed = (_float_activations(graph) if seed is None else _nudge(graph, seed, by)) or changed
    if changed:
        destination.write_bytes(model.SerializeToString())
    return changed


def _nudge(graph: onnx.GraphProto, seed: int, by: float) -> bool:
    read = {name for node in graph.node if any(op in node.op_type for op in _SUMS) for name in node.input}
    rng, changed = np.random.default_rng(seed), False
    for tensor in graph.initializer:
        if (tensor.name not in read or tensor.data_type != onnx.TensorProto.FLOAT
                or tensor.data_location == onnx.TensorProto.EXTERNAL):
            continue
        values = numpy_helper.to_array(tensor)
        if not values.size or not np.all(np.abs(values) < _LARGEST):
            continue
        nudged = values * (1 + by * rng.choice([-1.0, 1.0], values.shape))
        tensor.CopyFrom(numpy_helper.from_array(nudged.astype(np.float32), tensor.name))
        changed = True
    return changed


def _float_activations(graph: onnx.GraphProto) -> bool:
    changed = False
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            kept = [a for a in node.attribute if a.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*(onnx.AttributeProto.FromString(a.SerializeToString()) for a in kept),
                                   onnx.helper.make_attribute("accuracy_level", _FLOAT_ACTIVATIONS)])
            changed = True
    return changed
