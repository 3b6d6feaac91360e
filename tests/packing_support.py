"""Weights that encodings are for, and models that read them, for the tests of packing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from conftest import make_model, node
from onnx import TensorProto

from onnxq.graph import Graph, Shared, constants, load, pack_weight, save
from onnxq.numerics.encoding_choice import Form

SHAPE = (96, 40)
CONTRIB = {"com.microsoft": 1}


@dataclass(frozen=True)
class Example:
    """A weight of `SHAPE` that a form encodes by decoders of these names."""

    form: Form
    weight: np.ndarray[Any, Any]
    names: tuple[str, ...]


def examples() -> dict[str, Example]:
    """Each decoder in each type that it is for, alone and in the others."""
    rng = np.random.default_rng(5)
    wide = rng.integers(-128, 128, SHAPE).astype(np.int8)
    sparse = np.where(rng.random(SHAPE) < 0.7, np.int8(0), wide)
    few = np.where(rng.random(SHAPE) < 0.02, wide, wide // 16)
    halves = grouped(wide, (2, 4))
    turned = np.ascontiguousarray(grouped(wide.T, (4, 8)).T)
    levels = rng.normal(size=(2, 256)).astype(np.float32)
    found = {
        "gaps": Example(Form("gaps"), sparse, ("Exceptions", "Filled")),
        "gaps-4": Example(Form("gaps", 4), sparse // 16, ("Exceptions", "Filled", "Planes_4")),
        "gaps-uint8": Example(Form("gaps"), sparse.view(np.uint8) + np.uint8(128), ("Exceptions", "Filled")),
        "gaps-float": Example(Form("gaps"), sparse.astype(np.float32), ("Exceptions", "Filled")),
        "filled": Example(Form("gaps"), np.full(SHAPE, 3, np.int8), ("Filled",)),
        "exceptions": Example(Form("narrow", 4), few, ("Exceptions", "Planes_4")),
        "bitmap": Example(Form("bitmap"), sparse, ("Bitmap",)),
        "bitmap-4": Example(Form("bitmap", 4), np.where(sparse == 0, np.int8(0), few),
                            ("Bitmap", "Exceptions", "Planes_4")),
        "bitmap-float": Example(Form("bitmap"), odd(sparse), ("FloatBitmap",)),
        "groups": Example(Form("groups", 8, (2, 4)), halves, ("Groups_2_4_3",)),
        "groups-rows": Example(Form("groups", 8, (4, 8), 0), turned, ("Transposed", "Groups_4_8_1")),
        "groups-float": Example(Form("groups", 8, (2, 4)), odd(halves), ("FloatGroups_2_4_3",)),
        "codebook-float": Example(Form("codebook", 8), levels[0][rng.integers(0, 256, SHAPE)], ("Codebook_8",)),
    }
    for bits in range(2, 8):
        found[f"planes-{bits}"] = Example(Form("narrow", bits), wide >> (8 - bits), (f"Planes_{bits}",))
    for bits in (2, 4):
        for dtype, values in (("int8", wide), ("uint8", wide.view(np.uint8)), ("float", levels[1])):
            table = values.reshape(-1)[:2**bits]
            found[f"codebook-{bits}-{dtype}"] = Example(
                Form("codebook", bits), table[rng.integers(0, 2**bits, SHAPE)], (f"Codebook_{bits}",))
    return found


def grouped(values: np.ndarray[Any, Any], pattern: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Values [.., n] with all but the largest N of each M along the last axis made 0."""
    kept, size = pattern
    rows = values.reshape(-1, size).copy()
    order = np.argsort(-np.abs(rows.astype(np.int32)), axis=1)
    np.put_along_axis(rows, order[:, kept:], 0, 1)
    return rows.reshape(values.shape)


def odd(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Codes as float32, some of them infinite."""
    return np.where(codes == 77, np.float32(np.inf), codes.astype(np.float32))


def reader(weight: np.ndarray[Any, Any], opset: int = 21) -> onnx.ModelProto:
    """x [N, 96] times the weight, by the kernel for its type."""
    if weight.dtype == np.float32:
        return make_model([node("MatMul", "x w", "y")], {"x": ["N", SHAPE[0]]}, {"y": ["N", SHAPE[1]]}, {"w": weight},
                          opset, ir_version=10)
    nodes = [node("DynamicQuantizeMatMul", "x w scale", "y", domain="com.microsoft")]
    return make_model(nodes, {"x": ["N", SHAPE[0]]}, {"y": (TensorProto.FLOAT, ["N", SHAPE[1]])},
                      {"w": weight, "scale": np.float32(0.02)}, opset, CONTRIB, ir_version=10)


def packed(example: Example, folder: Path) -> tuple[Path, Path, Graph]:
    """(dense file, packed file, the graph that was saved as the latter) of a model that reads the weight."""
    dense, small = folder / "dense.onnx", folder / "packed.onnx"
    onnx.save(reader(example.weight), dense)
    graph = load(dense)
    [weight] = [t for t in constants(graph) if t.name == "w"]
    outline = example.form.encode(example.weight).outline()
    assert outline.names == example.names
    pack_weight(graph, weight, outline, example.form.encode, Shared())
    save(graph, small)
    return dense, small, graph
