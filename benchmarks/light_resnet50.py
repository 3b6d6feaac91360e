"""ResNet-50 without its trained weights: the topology that the onnx package ships, filled with random ones.

There is no accuracy to measure on it; it is here for the speed of a full-size convolutional network of the old kind
(opset 9, residuals as `Sum`, unfolded BatchNormalization, batch fixed at 1).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

Floats = npt.NDArray[np.float32]

NAME = "light_resnet50"
SOURCE = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / "light_resnet50.onnx"
_SIDE = 224
_IR_VERSION = 8  # from 4 on, initializers need not be inputs, too
# Each residual branch ends in a smaller gamma, or the sum of branches would double the variance block by block.
_BRANCH_END_GAMMA = 0.5


def write(folder: Path, *, seed: int = 0, calib_rows: int = 32, eval_rows: int = 64) -> None:
    """Write model.onnx, calib.npz, eval.npz and meta.json into a folder, which must exist.

    The images are random and normalized: float32 [rows, 3, 224, 224], the same for the same seed and number of rows.
    """
    model = build(seed)
    onnx.save(model, folder / "model.onnx")
    name = model.graph.input[0].name
    for part, rows in (("calib", calib_rows), ("eval", eval_rows)):
        np.savez(folder / f"{part}.npz", **{name: images(rows, seed + 1 + (part == "eval"))})  # type: ignore[arg-type]
    meta = {"name": NAME, "metric": "agreement", "agreement": "top1", "higher_is_better": True,
            "scored_outputs": [model.graph.output[0].name], "inputs": {name: {"stored": "batch"}}, "max_batch": 1,
            "metric_definition": "share of rows whose arg max is the float model's",
            "notes": "random weights and images: for speed; nothing was ever trained"}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def build(seed: int = 0) -> onnx.ModelProto:
    """The model with one input [1, 3, 224, 224] and class probabilities [1, 1000] as output.

    Convolutions and the classifier are normal with variance 2 / fan_in, which keeps the mean square of activations
    through a Relu (He et al., Delving Deep into Rectifiers, arXiv:1502.01852, eq. 10).
    """
    model = onnx.load(SOURCE)
    graph = model.graph
    generator = np.random.default_rng(seed)
    shapes = _constant_shapes(graph)
    values = _parameters(graph, shapes, generator)
    kept = [t for t in graph.initializer if t.name not in values and not t.name.endswith("__SHAPE")]
    fed = {name for node in graph.node for name in node.input}
    nodes = [n for n in graph.node if n.op_type != "ConstantOfShape"]
    del graph.node[:], graph.initializer[:], graph.input[1:]
    graph.node.extend(nodes)
    graph.initializer.extend(t for t in kept if t.name in fed)
    graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in values.items())
    model.ir_version = _IR_VERSION
    return model


def images(rows: int, seed: int) -> Floats:
    """Blotches of four sizes over one another, float32 [rows, 3, 224, 224], each image with mean 0 and variance 1."""
    generator = np.random.default_rng(seed)
    made = np.zeros((rows, 3, _SIDE, _SIDE), np.float32)
    for side in (7, 28, 56, _SIDE):
        blotch = generator.standard_normal((rows, 3, side, side)).astype(np.float32)
        made += np.repeat(np.repeat(blotch, _SIDE // side, axis=2), _SIDE // side, axis=3)
    made -= made.mean(axis=(1, 2, 3), keepdims=True)
    return np.asarray(made / made.std(axis=(1, 2, 3), keepdims=True), np.float32)


def _constant_shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter by name: from the ConstantOfShape that makes it, or of the small ones that are stored."""
    stored = {t.name: t for t in graph.initializer}
    shapes = {name: tuple(t.dims) for name, t in stored.items()}
    for node in graph.node:
        if node.op_type == "ConstantOfShape":
            shapes[node.output[0]] = tuple(int(d) for d in numpy_helper.to_array(stored[node.input[0]]))
    return shapes


def _parameters(graph: onnx.GraphProto, shapes: dict[str, tuple[int, ...]],
                generator: np.random.Generator) -> dict[str, Floats]:
    values: dict[str, Floats] = {}
    residual = {name for node in graph.node if node.op_type == "Sum" for name in node.input}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            shape = shapes[node.input[1]]  # Conv [M, C, kH, kW]; Gemm, with transB, [N, K]
            fan_in = float(np.prod(shape[1:]))
            values[node.input[1]] = _normal(generator, shape, (2.0 / fan_in) ** 0.5)
            if len(node.input) > 2:
                values[node.input[2]] = _normal(generator, shapes[node.input[2]], 0.01)
        elif node.op_type == "BatchNormalization":
            values |= _normalization(node, shapes[node.input[1]], generator, node.output[0] in residual)
    return values


def _normalization(node: Any, shape: tuple[int, ...], generator: np.random.Generator, ends_branch: bool,
                   ) -> dict[str, Floats]:
    """Statistics near those of normalized data: mean 0, variance 1, gamma 1 (less where a branch ends), beta 0."""
    gamma, beta, mean, variance = node.input[1:5]
    size = _BRANCH_END_GAMMA if ends_branch else 1.0
    return {gamma: np.asarray(size * generator.uniform(0.8, 1.2, shape), np.float32),
            beta: _normal(generator, shape, 0.1), mean: _normal(generator, shape, 0.1),
            variance: generator.uniform(0.8, 1.2, shape).astype(np.float32)}


def _normal(generator: np.random.Generator, shape: tuple[int, ...], deviation: float) -> Floats:
    return np.asarray(deviation * generator.standard_normal(shape), np.float32)
