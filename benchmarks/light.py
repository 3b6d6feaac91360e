"""Full-size convolutional networks without their trained weights: the topologies that the onnx package ships.

There is no accuracy to measure on them; they are here for the speed of networks of the old kind (opset 9, residuals as
`Sum`, BatchNormalization apart, batch fixed at 1): plain (VGG-19), residual (ResNet-50), of many branches (Inception),
densely connected (DenseNet-121), with grouped convolutions and channel shuffles (ShuffleNet), small (SqueezeNet).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from onnxq.runtime.session import Session

Floats = npt.NDArray[np.float32]

_FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
NAMES = tuple(sorted(path.stem for path in _FOLDER.glob("light_*.onnx")))
IN_TABLE = "light_resnet50"  # the others only when asked for by name
_SIDE = 224
_IR_VERSION = 8  # from 4 on, initializers need not be inputs, too
# Each residual branch ends in a smaller gamma, or the sum of branches would double the variance block by block.
_BRANCH_END_GAMMA = 0.5
_OBSERVED = 8  # images behind each statistic
# A random classifier behind averaged features gives every image nearly the same scores: its bias takes their mean off
# and its weights are scaled until scores vary by so much.
_SCORE_DEVIATION = 1.0


@dataclass(frozen=True)
class _Observed:
    """A tensor [1, C, H, W] that is normalized by the mean and variance of its channels.

    `node` reads it (a BatchNormalization) or makes it (a Conv with a bias and no BatchNormalization behind it, whose
    weights are to be as if one had been folded into them).
    """

    node: onnx.NodeProto
    tensor: str


def write(name: str, folder: Path, *, seed: int = 0, calib_rows: int = 32, eval_rows: int = 64) -> None:
    """Write model.onnx, calib.npz, eval.npz and meta.json of a network of NAMES into a folder, which must exist.

    The images are random and normalized: float32 [rows, 3, 224, 224], the same for the same seed and number of rows.
    """
    model = build(name, seed)
    onnx.save(model, folder / "model.onnx")
    fed = model.graph.input[0].name
    for part, rows in (("calib", calib_rows), ("eval", eval_rows)):
        np.savez(folder / f"{part}.npz", **{fed: images(rows, seed + 1 + (part == "eval"))})  # type: ignore[arg-type]
    meta = {"name": name, "metric": "agreement", "agreement": "top1", "higher_is_better": True,
            "scored_outputs": [model.graph.output[0].name], "inputs": {fed: {"stored": "batch"}}, "max_batch": 1,
            "metric_definition": "share of rows whose arg max is the float model's",
            "notes": "random weights and images: for speed; nothing was ever trained"}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def build(name: str, seed: int = 0) -> onnx.ModelProto:
    """The model of a network of NAMES with one input [1, 3, 224, 224] and scores [1, 1000] or [1, 1000, 1, 1].

    Convolutions and classifiers are normal with variance 2 / fan_in, which keeps the mean square of activations
    through a Relu (He et al., Delving Deep into Rectifiers, arXiv:1502.01852, eq. 10). Statistics of normalizations
    are those of random images, so that no activation grows, dies or forgets its image on the way, however deep.
    """
    model = onnx.load(_FOLDER / f"{name}.onnx")
    graph = model.graph
    values = _parameters(graph, _constant_shapes(graph), np.random.default_rng(seed))
    kept = [t for t in graph.initializer if t.name not in values and not t.name.endswith("__SHAPE")]
    fed = {name for node in graph.node for name in node.input}
    nodes = [n for n in graph.node if n.op_type != "ConstantOfShape"]
    stored = {t.name for t in graph.initializer}
    image = next(i for i in graph.input if i.name not in stored)
    del graph.node[:], graph.initializer[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.append(image)
    graph.initializer.extend(t for t in kept if t.name in fed)
    model.ir_version = _IR_VERSION
    seen = images(_OBSERVED, seed + 3)
    _normalize(model, values, seen)
    _spread_scores(model, values, seen)
    graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in values.items())
    return model


def images(rows: int, seed: int) -> Floats:
    """Blotches of five sizes over one another, float32 [rows, 3, 224, 224], each image with mean 0 and variance 1.

    How much there is of each size differs by image and color, from a plain tint to noise: what a network averages over
    an image is then its own, and not that of all random images.
    """
    generator = np.random.default_rng(seed)
    made = np.zeros((rows, 3, _SIDE, _SIDE), np.float32)
    for side in (1, 7, 28, 56, _SIDE):
        blotch = generator.standard_normal((rows, 3, side, side), dtype=np.float32)
        blotch *= generator.lognormal(0.0, 1.0, (rows, 3, 1, 1)).astype(np.float32)
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


# ------------------------------------------------------------------ random parameters


def _parameters(graph: onnx.GraphProto, shapes: dict[str, tuple[int, ...]],
                generator: np.random.Generator) -> dict[str, Floats]:
    values: dict[str, Floats] = {}
    residual = {name for node in graph.node if node.op_type == "Sum" for name in node.input}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            weight = _parameter(graph, node.input[1])
            shape = shapes[weight]  # Conv [M, C / groups, kH, kW]; Gemm, with transB, [N, K] or [1, 1, N, K]
            fan_in = float(np.prod(shape[1:])) if node.op_type == "Conv" else shape[-1]
            values[weight] = _normal(generator, shape, (2.0 / fan_in) ** 0.5)
            if len(node.input) > 2:
                values[node.input[2]] = _normal(generator, shapes[node.input[2]], 0.01)
        elif node.op_type == "BatchNormalization":
            gamma, beta, mean, variance = node.input[1:5]
            size = _BRANCH_END_GAMMA if node.output[0] in residual else 1.0
            values |= {gamma: size * _near_one(generator, shapes[gamma]), beta: _normal(generator, shapes[beta], 0.1),
                       mean: np.zeros(shapes[mean], np.float32), variance: np.ones(shapes[variance], np.float32)}
        elif node.op_type in ("Mul", "Add"):  # of what a BatchNormalization makes, in place of its own gamma and beta
            name = _parameter(graph, node.input[1])
            shape = shapes[name]
            values[name] = _near_one(generator, shape) if node.op_type == "Mul" else _normal(generator, shape, 0.1)
    return values


def _parameter(graph: onnx.GraphProto, name: str) -> str:
    """The parameter that a tensor is a Reshape or an Unsqueeze of."""
    makers = {n.output[0]: n.input[0] for n in graph.node if n.op_type in ("Reshape", "Unsqueeze")}
    while name in makers:
        name = makers[name]
    return name


def _near_one(generator: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    return np.asarray(generator.uniform(0.8, 1.2, shape), np.float32)


def _normal(generator: np.random.Generator, shape: tuple[int, ...], deviation: float) -> Floats:
    return np.float32(deviation) * generator.standard_normal(shape, dtype=np.float32)


# ------------------------------------------------------------------ statistics of activations


def _normalize(model: onnx.ModelProto, values: dict[str, Floats], seen: Floats) -> None:
    """Set the statistics of each BatchNormalization, and weights and bias of each Conv without one, from images.

    All in one run per image: in a twin of the model every image is normalized by statistics of its own, and tells them.
    """
    observed = list(_observed(model.graph))
    found = _statistics(model, values, seen, observed)
    for at in observed:
        mean, variance = found[at.tensor]
        if at.node.op_type == "BatchNormalization":
            values[at.node.input[3]], values[at.node.input[4]] = mean, variance
        else:
            weight, bias = at.node.input[1:3]
            size = 1 / np.sqrt(variance)
            values[weight] *= size[:, None, None, None]
            values[bias] -= mean * size


def _observed(graph: onnx.GraphProto) -> Iterator[_Observed]:
    readers = {name: node.op_type for node in graph.node for name in node.input}
    for node in graph.node:
        if node.op_type == "BatchNormalization":
            yield _Observed(node, node.input[0])
        elif node.op_type == "Conv" and readers.get(node.output[0]) == "Relu":
            yield _Observed(node, node.output[0])


def _statistics(model: onnx.ModelProto, values: dict[str, Floats], seen: Floats, observed: list[_Observed],
                ) -> dict[str, tuple[Floats, Floats]]:
    """Mean and variance [C] of each observed tensor over the images, without the biases of the Convs that make them."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    graph = twin.graph
    at = {o.node.output[0]: o for o in observed}
    del graph.node[:], graph.output[:]
    for node in model.graph.node:
        graph.node.extend(_taps(node, at[node.output[0]].tensor) if node.output[0] in at else [node])
    made = dict(values)
    for o in observed:
        graph.output.extend(helper.make_empty_tensor_value_info(f"{o.tensor}.{part}") for part in ("mean", "square"))
        if o.node.op_type == "Conv":
            made[f"{o.tensor}.one"] = np.ones_like(values[o.node.input[2]])
    graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in made.items())
    session = Session(twin.SerializeToString())
    runs = [session.run({model.graph.input[0].name: image[None]}) for image in seen]
    found = {}
    for o in observed:
        mean, square = (np.mean([run[f"{o.tensor}.{part}"] for run in runs], axis=0, dtype=np.float64).ravel()
                        for part in ("mean", "square"))
        found[o.tensor] = (mean.astype(np.float32), (square - mean * mean).astype(np.float32))
    return found


def _taps(node: onnx.NodeProto, tensor: str) -> Iterator[onnx.NodeProto]:
    """A normalized node as one that normalizes each image on its own, with the channels' means and mean squares."""
    if node.op_type == "Conv":
        raw, size, shift = f"{tensor}.raw", f"{tensor}.one", node.input[2]
        made = onnx.NodeProto()
        made.CopyFrom(node)
        del made.input[2:]
        made.output[0] = raw
        yield made
    else:
        raw, size, shift = tensor, node.input[1], node.input[2]
    yield helper.make_node("InstanceNormalization", [raw, size, shift], [node.output[0]])
    yield helper.make_node("Mul", [raw, raw], [f"{tensor}.squared"])
    yield helper.make_node("ReduceMean", [raw], [f"{tensor}.mean"], axes=[0, 2, 3])
    yield helper.make_node("ReduceMean", [f"{tensor}.squared"], [f"{tensor}.square"], axes=[0, 2, 3])


def _spread_scores(model: onnx.ModelProto, values: dict[str, Floats], seen: Floats) -> None:
    """Scale the last Conv or Gemm until scores deviate by a fixed size from their means over the images.

    It is centered, too, unless a Relu stands between it and the scores. Relu and means pass a scale on.
    """
    last = next(n for n in reversed(model.graph.node) if n.op_type in ("Conv", "Gemm"))
    scores = next((n.input[0] for n in model.graph.node if n.op_type == "Softmax"), model.graph.output[0].name)
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    twin.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in values.items())
    del twin.graph.output[:]
    twin.graph.output.append(helper.make_empty_tensor_value_info(scores))
    session = Session(twin.SerializeToString())
    found = np.stack([session.run({model.graph.input[0].name: image[None]})[scores].ravel() for image in seen])
    mean = found.mean(axis=0)
    size = np.float32(_SCORE_DEVIATION) / (found - mean).std()
    weight, bias = _parameter(model.graph, last.input[1]), last.input[2]
    if any(n.op_type == "Relu" and n.input[0] == last.output[0] for n in model.graph.node):
        mean = np.zeros_like(mean)
    values[weight] *= size
    values[bias] = size * (values[bias] - mean)
