"""Plans of weights in blocks, made by hand, and models written by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from conftest import make_model, node, random, run
from lowering_support import CPU, canonical

from onnxq.graph import Graph, is_constant, load, save
from onnxq.numerics import affine, blocks
from onnxq.numerics.dtypes import by_name
from onnxq.passes.lower import lower
from onnxq.passes.manager import Context, Pass, PassManager
from onnxq.passes.pack import pack
from onnxq.passes.quantize import quantize
from onnxq.plan import STORED, UNTOUCHED, Blocks, NodePlan, Plan
from onnxq.planner.chains import chain

Array = np.ndarray[Any, Any]
KERNELS = {"MatMul": "MatMulNBits", "Gemm": "MatMulNBits", "Gather": "GatherBlockQuantized"}
SIZES = (16, 32, 64, 128, 256)


def form(bits: int, size: int, symmetric: bool, axis: int = 0) -> Blocks:
    """Blocks of codes of so many bits, with scales by the extremes."""
    return Blocks(by_name(f"{'int' if symmetric else 'uint'}{bits}"), size, axis, "absmax")


def decoded(values: Array, how: Blocks) -> Array:
    """What the codes of a weight stand for, by the numerics alone."""
    matrix = values.T if how.axis else values
    params = blocks.choose(matrix, how.dtype, how.block_size, how.symmetric, how.search)
    found = affine.dequantize(affine.quantize(matrix, params), params)
    return found.T if how.axis else found


def planned(graph: Graph, forms: Mapping[str, Blocks], kept: Sequence[str] = (), lowered: bool = True) -> Plan:
    """A Plan in which all readers of the weights named in `forms`, but those `kept`, take them in blocks.

    lowered: by a kernel, and not decoded as the model is loaded.
    """
    plan = Plan("w4a16", "cpu", blocks=dict(forms))
    for reader, holder in graph.walk():
        weight = next((t.name for t in reader.inputs if is_constant(t) and t.name in forms), None)
        if weight is None or reader.name in kept:
            continue
        scheme, kernel = ("w4a16", KERNELS[reader.op]) if lowered else (STORED, STORED)
        link = chain(holder, reader) if lowered and reader.op in ("MatMul", "Gemm") else None
        add = link.bias_add.name if link is not None and link.bias_add is not None else None
        result = link.unclamped.name if link is not None else reader.outputs[0].name
        plan.nodes[reader.name] = NodePlan(reader.name, reader.op, scheme, kernel, "", result=result, weight=weight,
                                           activation=UNTOUCHED, bias_add=add)
        if add is not None:
            plan.nodes[add] = NodePlan(add, "Add", scheme, kernel, "", part_of=reader.name)
    return plan


@dataclass
class Written:
    """A model rewritten by a Plan: the graph as it is now, near misses, and the file."""

    graph: Graph
    context: Context
    path: Path

    def ops(self) -> list[str]:
        """Operators of the file, in order, bodies apart."""
        return [n.op_type for n in onnx.load(self.path).graph.node]

    def stored(self) -> dict[str, onnx.TensorProto]:
        """Constants of the file by name."""
        return {t.name: t for t in onnx.load(self.path).graph.initializer}

    def run(self, feed: Mapping[str, Array], optimize: bool = False, level: int | None = None) -> dict[str, Array]:
        """Outputs of the file, MatMulNBits with another accuracy_level if given."""
        if level is None:
            return run(self.path, feed, optimize)
        model = onnx.load(self.path)
        for item in model.graph.node:
            for attribute in item.attribute:
                attribute.i = level if attribute.name == "accuracy_level" else attribute.i
        return run(model, feed, optimize)


def written(model: onnx.ModelProto, folder: Path, forms: Mapping[str, Blocks], fmt: str | None = "qoperator",
            kept: Sequence[str] = ()) -> Written:
    """A canonical model written by the passes of a format; `fmt` None: decoded as it is loaded, codes packed."""
    onnx.save(model, folder / "source.onnx")
    graph = canonical(load(folder / "source.onnx"))
    context = Context(CPU, planned(graph, forms, kept, fmt is not None))
    steps: list[Pass] = [*quantize(), *(lower(fmt) if fmt is not None else pack())]
    PassManager(steps).run(graph, context)
    save(graph, folder / "written.onnx")
    return Written(graph, context, folder / "written.onnx")


def linear(inputs: int, outputs: int, op: str = "MatMul", opset: int = 17) -> tuple[onnx.ModelProto, Array]:
    """A layer x [n, K] -> y [n, N] with weight w, and w; "Add" puts a bias behind a MatMul, "Gemm" has one."""
    w, b = random(inputs, outputs) / 4, random(outputs, seed=3)
    nodes = {"MatMul": [node("MatMul", "x w", "y")], "Gemm": [node("Gemm", "x w b", "y")],
             "Add": [node("MatMul", "x w", "m"), node("Add", "m b", "y")]}[op]
    stored = {"w": w} if op == "MatMul" else {"w": w, "b": b}
    return make_model(nodes, {"x": ["n", inputs]}, {"y": ["n", outputs]}, stored, opset=opset,
                      ir_version=13 if opset > 21 else 10), w
