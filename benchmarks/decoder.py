"""A decoder of any size with random weights: the graph of a Llama-like language model, its weights beside it.

Blocks are RMSNorm in small operators, attention in which several heads share keys and values, and SwiGLU, all linear
layers as MatMul. There are no rotary embeddings and no cache of keys and values: neither has weights. Nothing was ever
trained; it is here for what compiling costs, not for accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

_OPSET, _IR_VERSION = 17, 8
_ALIGN = 4096  # offsets that can be memory-mapped
_CHUNK = 16 << 20  # weights drawn at a time
_EPSILON = 1e-5
DATA = "model.onnx.data"


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; `feed_forward` is the inner width of SwiGLU, `shared` the heads of keys and values."""

    layers: int = 15
    hidden: int = 4096
    feed_forward: int = 11008
    heads: int = 32
    shared: int = 8
    vocabulary: int = 32000

    def weights(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of each large weight in the order of the file; linear layers are [K, N]."""
        hidden, inner = self.hidden, self.feed_forward
        narrow = hidden // self.heads * self.shared
        yield "embedding", (self.vocabulary, hidden)
        for layer in range(self.layers):
            for name, shape in (("q_proj", (hidden, hidden)), ("k_proj", (hidden, narrow)),
                                ("v_proj", (hidden, narrow)), ("o_proj", (hidden, hidden)),
                                ("gate_proj", (hidden, inner)), ("up_proj", (hidden, inner)),
                                ("down_proj", (inner, hidden))):
                yield f"layers.{layer}.{name}", shape
        yield "lm_head", (hidden, self.vocabulary)

    def count(self) -> int:
        """Number of weights."""
        return sum(int(np.prod(shape)) for _, shape in self.weights())


def of_size(gigabytes: float, base: Shape | None = None) -> Shape:
    """The shape with as many layers as float32 weights of that size (10^9 bytes) allow, one at least."""
    base = base or Shape()
    none = replace(base, layers=0).count()
    each = replace(base, layers=1).count() - none
    return replace(base, layers=max(1, int((gigabytes * 1e9 / 4 - none) // each)))


def write(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write model.onnx and its external data into a folder, which is made; one piece of a weight in memory at a time.

    Weights are normal with variance 1 / K, so that no activation grows; the same for the same seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = _graph(shape)
    generator = np.random.Generator(np.random.SFC64(seed))
    offset = 0
    with (folder / DATA).open("wb") as file:
        for name, dims in shape.weights():
            offset = -(-offset // _ALIGN) * _ALIGN
            file.seek(offset)
            length = _draw(generator, dims, file)
            proto = model.graph.initializer.add(name=name, data_type=TensorProto.FLOAT, dims=dims,
                                                data_location=TensorProto.EXTERNAL)
            for key, value in (("location", DATA), ("offset", str(offset)), ("length", str(length))):
                proto.external_data.add(key=key, value=value)
            offset += length
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _draw(generator: np.random.Generator, dims: tuple[int, ...], file: IO[bytes]) -> int:
    """Write normal numbers for a weight [K, N], piece by piece; the bytes written."""
    left, deviation = int(np.prod(dims)), np.float32(dims[0] ** -0.5)
    length = 4 * left
    while left:
        piece = generator.standard_normal(min(left, _CHUNK), dtype=np.float32)
        piece *= deviation
        file.write(piece.data)
        left -= len(piece)
    return length


# ------------------------------------------------------------------ the graph


def _graph(shape: Shape) -> onnx.ModelProto:
    """The model without its large weights: `input_ids` int64 [batch, sequence] -> `logits` [batch, sequence, V]."""
    build = _Builder(shape)
    hidden = build.add("Gather", ["embedding", "input_ids"], "hidden")
    mask = build.mask()
    for layer in range(shape.layers):
        at = f"layers.{layer}"
        hidden = build.add("Add", [hidden, build.attention(build.norm(hidden, f"{at}.norm1"), mask, at)], f"{at}.mid")
        hidden = build.add("Add", [hidden, build.swiglu(build.norm(hidden, f"{at}.norm2"), at)], f"{at}.out")
    build.add("MatMul", [build.norm(hidden, "norm"), "lm_head"], "logits")
    free: list[str | int] = ["batch", "sequence"]
    graph = helper.make_graph(
        build.nodes, "decoder", [helper.make_tensor_value_info("input_ids", TensorProto.INT64, free)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*free, shape.vocabulary])], build.small)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)


class _Builder:
    """Appends nodes that are named after their output, and the small constants that they need."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.nodes: list[onnx.NodeProto] = []
        self.small: list[onnx.TensorProto] = []
        each = shape.hidden // shape.heads
        group = shape.heads // shape.shared
        floats = {"two": 2, "epsilon": _EPSILON, "zero": 0, "never": -1e9, "scale": each**-0.5}
        integers: dict[str, int | list[int]] = {
            "one": [1], "first": 0, "step": 1, "rows": [0], "merge": [0, 0, shape.hidden],
            "split_q": [0, 0, shape.shared, group, each], "split_kv": [0, 0, shape.shared, 1, each]}
        self.small += [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in floats.items()]
        self.small += [numpy_helper.from_array(np.asarray(v, np.int64), k) for k, v in integers.items()]

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Append a node of one output, whose name is returned."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def norm(self, tensor: str, name: str) -> str:
        """RMSNorm over the last axis."""
        self.small.append(numpy_helper.from_array(np.ones(self.shape.hidden, np.float32), f"{name}.weight"))
        square = self.add("Pow", [tensor, "two"], f"{name}.square")
        mean = self.add("ReduceMean", [square], f"{name}.mean", axes=[-1], keepdims=1)
        root = self.add("Sqrt", [self.add("Add", [mean, "epsilon"], f"{name}.sum")], f"{name}.root")
        unit = self.add("Div", [tensor, root], f"{name}.unit")
        return self.add("Mul", [unit, f"{name}.weight"], f"{name}.scaled")

    def mask(self) -> str:
        """[sequence, sequence]: 0 where a token may look, a large negative number where it may not."""
        size = self.add("Squeeze", [self.add("Gather", [self.add("Shape", ["input_ids"], "ids.shape"), "one"],
                                             "ids.length"), "rows"], "length")
        steps = self.add("Range", ["first", size, "step"], "positions")
        later = self.add("Greater", [steps, self.add("Unsqueeze", [steps, "one"], "positions.column")], "later")
        return self.add("Where", [later, "never", "zero"], "mask")

    def attention(self, tensor: str, mask: str, at: str) -> str:
        """Heads [batch, shared, group, sequence, each] over keys and values [batch, shared, 1, sequence, each]."""
        split = {}
        for part, perm in (("q", [0, 2, 3, 1, 4]), ("k", [0, 2, 3, 4, 1]), ("v", [0, 2, 3, 1, 4])):
            made = self.add("MatMul", [tensor, f"{at}.{part}_proj"], f"{at}.{part}")
            heads = self.add("Reshape", [made, "split_q" if part == "q" else "split_kv"], f"{at}.{part}.heads")
            split[part] = self.add("Transpose", [heads], f"{at}.{part}.turned", perm=perm)
        scores = self.add("MatMul", [split["q"], split["k"]], f"{at}.scores")
        masked = self.add("Add", [self.add("Mul", [scores, "scale"], f"{at}.scaled"), mask], f"{at}.masked")
        weights = self.add("Softmax", [masked], f"{at}.weights", axis=-1)
        mixed = self.add("MatMul", [weights, split["v"]], f"{at}.mixed")
        back = self.add("Transpose", [mixed], f"{at}.back", perm=[0, 3, 1, 2, 4])
        return self.add("MatMul", [self.add("Reshape", [back, "merge"], f"{at}.merged"), f"{at}.o_proj"], f"{at}.o")

    def swiglu(self, tensor: str, at: str) -> str:
        """down(silu(gate(x)) * up(x))."""
        gate = self.add("MatMul", [tensor, f"{at}.gate_proj"], f"{at}.gate")
        up = self.add("MatMul", [tensor, f"{at}.up_proj"], f"{at}.up")
        silu = self.add("Mul", [gate, self.add("Sigmoid", [gate], f"{at}.sigmoid")], f"{at}.silu")
        return self.add("MatMul", [self.add("Mul", [silu, up], f"{at}.inner"), f"{at}.down_proj"], f"{at}.down")


def token_ids(rows: int, length: int, shape: Shape, seed: int = 1) -> npt.NDArray[np.int64]:
    """Random tokens, int64 [rows, length]."""
    return np.random.default_rng(seed).integers(0, shape.vocabulary, (rows, length))
