"""A small model through plan, quantize and lower, as the compiler does it, with every stage kept to look at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random
from observer_support import ALL, ONE_THREAD, observe

from onnxq.calibration.readers import open_data
from onnxq.graph import Graph, load, read_nodes, save
from onnxq.numerics import affine
from onnxq.passes.canonicalize import canonicalize
from onnxq.passes.lower import lower
from onnxq.passes.manager import Context, PassManager, Skip
from onnxq.passes.quantize import quantize
from onnxq.passes.transform import transform
from onnxq.plan import NodePlan, Plan
from onnxq.planner.outline import Outline, outline
from onnxq.planner.scales import finish
from onnxq.recipe import Calibration, Fallback, Recipe, Rule
from onnxq.report.report import NodeRow, Verdict
from onnxq.runtime.machine import target_here
from onnxq.runtime.observe import Executed, executed
from onnxq.runtime.session import Session, SessionOptions
from onnxq.schemes import scheme
from onnxq.targets import TARGETS
from onnxq.verification import what_ran

MODELS = Path(__file__).resolve().parent.parent / "models"
CPU = TARGETS["cpu"]  # what is planned does not depend on the machine
HERE = target_here("cpu")  # what runs does: without VNNI, two products have to fit 16 bits
FORMATS = ("qdq", "qoperator")
UNOPTIMIZED = SessionOptions(threads=1, optimize=False)
BOTH_FORMATS = pytest.mark.parametrize("fmt", FORMATS)

Array = np.ndarray[Any, Any]
Feed = dict[str, Array]


def recipe(name: str = "w8a8", keep: Sequence[str] = (), rules: Sequence[Rule] = ()) -> Recipe:
    """A named scheme with what stays float."""
    return Recipe(scheme(name), rules=tuple(rules), fallback=Fallback(tuple(keep)))


def canonical(graph: Graph) -> Graph:
    """The graph after the canonicalizing passes."""
    PassManager(canonicalize()).run(graph, Context(CPU))
    return graph


def outlined(graph: Graph, name: str = "w8a8", keep: Sequence[str] = (), rules: Sequence[Rule] = ()) -> Outline:
    """Verdicts on a canonical graph."""
    return outline(canonical(graph), recipe(name, keep, rules), CPU)


def verdicts(graph: Graph, name: str = "w8a8", keep: Sequence[str] = (), rules: Sequence[Rule] = ()) -> \
        dict[str, str]:
    """Node -> kernel, `part of NODE`, or `float: reason`."""
    return {n.node: described(n) for n in outlined(graph, name, keep, rules).nodes.values()}


def described(plan: NodePlan) -> str:
    """One verdict in a line."""
    if plan.part_of is not None:
        return f"part of {plan.part_of}"
    return plan.lowering if plan.is_int else f"{plan.scheme}: {plan.reason}"


@dataclass
class Made:
    """A model compiled by hand: files, the plan, near misses and the feeds that calibrated it."""

    source: Path
    canonical: Path
    twin: Path
    compiled: Path
    plan: Plan
    graph: Graph
    feeds: list[Feed]
    skips: list[Skip]

    def run(self, path: Path, feed: Feed | None = None, optimize: bool = True) -> dict[str, Array]:
        """Outputs of one of the files."""
        return Session(path, ONE_THREAD if optimize else UNOPTIMIZED).run(self.feeds[0] if feed is None else feed)

    def executed(self) -> list[Executed]:
        """What a plain default session runs."""
        return executed(self.compiled, self.feeds[:1], ONE_THREAD, read_nodes)

    def rows(self) -> dict[str, NodeRow]:
        """What the compiler would report on each node; it has to find no fault."""
        verdict = Verdict()
        made = {name: outs for name, _, _, _, outs in read_nodes(self.canonical)}
        rows = what_ran(self.plan, self.compiled, self.feeds[:1], ONE_THREAD, verdict, made)
        assert verdict.failures == []
        return {row.name: row for row in rows}

    def ran(self, *nodes: str) -> list[str]:
        """The operators (without domains) that a plain default session runs for planned nodes."""
        rows = self.rows()
        return [bare(rows[name].ran_as) for name in nodes]

    def ops(self) -> list[str]:
        """All executed operators without domains, in order."""
        return [bare(e.op) for e in self.executed()]

    def stored(self, path: Path | None = None) -> list[str]:
        """Operators in a file."""
        return [op for _, op, *_ in read_nodes(path or self.compiled)]

    def initializers(self, path: Path | None = None) -> dict[str, Array]:
        """Stored tensors of a file by name."""
        model = onnx.load(str(path or self.compiled))
        return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def bare(op: str) -> str:
    """An operator without its domain."""
    return op.rpartition(".")[2]


def make(model: onnx.ModelProto | Path, folder: Path, feeds: Iterable[Mapping[str, Array]], fmt: str = "qoperator", *,
         name: str = "w8a8", keep: Sequence[str] = (), rules: Sequence[Rule] = (),
         calibration: Calibration | None = None, ranges: Mapping[str, tuple[float, float]] | None = None,
         attention: str = "float") -> Made:
    """Compile by the passes alone; ranges come from the feeds unless given."""
    given = [dict(f) for f in feeds]
    folder = folder / f"{fmt}.{len(list(folder.iterdir()))}"
    folder.mkdir()
    source = model if isinstance(model, Path) else folder / "source.onnx"
    if isinstance(model, onnx.ModelProto):
        onnx.save(model, source)
    graph = load(source)
    chosen, context = replace(recipe(name, keep, rules), attention=attention), Context(HERE)
    canonical(graph)
    save(graph, folder / "canonical.onnx")
    found = outline(graph, chosen, HERE)
    if ranges is None:
        ranges = observe(graph, found.ranges_of, open_data(given, graph.ports()),
                         calibration or ALL) if found.ranges_of else {}
    context.plan = finish(found, graph, ranges, chosen, HERE)
    PassManager([*transform(), *quantize()]).run(graph, context)
    save(graph, folder / "twin.onnx")
    PassManager(lower(fmt)).run(graph, context)
    save(graph, folder / "compiled.onnx")
    return Made(source, folder / "canonical.onnx", folder / "twin.onnx", folder / "compiled.onnx", context.plan, graph,
                given, context.skips)


# ------------------------------------------------------------------ references


def codes_of(made: Made, name: str, values: Array) -> Array:
    """Values as codes of the tensor `name`; exact for values that were decoded from codes."""
    params = made.plan.activations[name]
    exact = np.rint(np.asarray(values, np.float64) / np.float64(params.scale)) + int(params.zero_point)
    return np.clip(exact, params.dtype.qmin, params.dtype.qmax).astype(np.int64)


def centred(made: Made, name: str, values: Array) -> Array:
    """Codes of float values minus the zero point, rounded as QuantizeLinear does (division in float32)."""
    params = made.plan.activations[name]
    codes = np.rint(np.asarray(values, np.float32) / params.scale) + int(params.zero_point)
    return np.clip(codes, params.dtype.qmin, params.dtype.qmax).astype(np.int64) - int(params.zero_point)


def requantized(made: Made, name: str, real: Array) -> Array:
    """Real numbers as codes of the tensor `name`: rint(real / scale) + zero_point, saturated, in float64."""
    return codes_of(made, name, real)


def convolve(x: Array, w: Array, strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int],
             group: int) -> Array:
    """Convolution of x [N, C, *S] with w [M, C/group, *K], zero padded; exact for integers. ONNX Conv-11."""
    rank = x.ndim - 2
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    size = [(x.shape[2 + i] - dilations[i] * (w.shape[2 + i] - 1) - 1) // strides[i] + 1 for i in range(rank)]
    result = np.zeros((x.shape[0], w.shape[0], *size), np.result_type(x, w))
    inner, outer = x.shape[1] // group, w.shape[0] // group
    for g in range(group):
        part, filters = x[:, g * inner:(g + 1) * inner], w[g * outer:(g + 1) * outer]
        for at in np.ndindex(*w.shape[2:]):
            start = [at[i] * dilations[i] for i in range(rank)]
            window = tuple(slice(start[i], start[i] + strides[i] * (size[i] - 1) + 1, strides[i]) for i in range(rank))
            product = np.einsum("nc...,mc->nm...", part[(slice(None), slice(None), *window)],
                                filters[(slice(None), slice(None), *at)])
            result[:, g * outer:(g + 1) * outer] += product
    return result


def weight_codes(made: Made, name: str) -> tuple[Array, Array]:
    """(codes as int64, scales as float64) of a weight in the compiled file."""
    stored = made.initializers()
    assert not np.any(stored.get(f"{name}.zero_point", 0)), "weights are symmetric"
    return stored[f"{name}.q"].astype(np.int64), stored[f"{name}.scale"].astype(np.float64)


def weight_scales(rows: Array) -> Array:
    """The scale of each row of weights [C, K], in the kernel's order along K, as it is chosen on this machine."""
    least = affine.largest_pair(rows) if HERE.saturates else 0.0
    return affine.weight_params(rows, 0, least=least).scale


needs_vnni = pytest.mark.skipif(HERE.saturates, reason="without VNNI instructions this kernel is not used")

# ------------------------------------------------------------------ models


def network(opset: int = 17) -> onnx.ModelProto:
    """Every operator that int8 regions of w8a8 hold, in one small CNN: x [N, 8, 12, 12] -> y [N, 16]."""
    nodes = [
        node("Conv", "x w0 b0", "c0", pads=[1, 1, 1, 1]), node("Relu", "c0", "r0"),
        node("Conv", "r0 w1 b1", "c1", pads=[1, 1, 1, 1], group=8), node("Clip", "c1 zero six", "k1"),
        node("Conv", "k1 w2 b2", "c2"),
        node("Add", "c2 r0", "a"), node("Relu", "a", "r1"),
        node("MaxPool", "r1", "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("Transpose", "p", "t", perm=[0, 1, 3, 2]),
        node("Conv", "t w3 b3", "c3", pads=[1, 1, 1, 1]), node("Conv", "t w4", "c4"),
        node("Concat", "c3 c4", "cat", axis=1),
        node("AveragePool", "cat", "ap", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", "ap w5 b5", "c5"),
        node("GlobalAveragePool", "c5", "g"),
        node("Squeeze", "g axes", "s"), node("Unsqueeze", "s axes", "u"), node("Reshape", "u shape", "rs"),
        node("Flatten", "rs", "f"),
        node("Gemm", "f w6 b6", "h"), node("Relu", "h", "hr"),
        node("MatMul", "hr w7", "m"), node("Add", "m b7", "y"),
    ]
    shapes = {"w0": (8, 8, 3, 3), "w1": (8, 1, 3, 3), "w2": (8, 8, 1, 1), "w3": (8, 8, 3, 3), "w4": (8, 8, 1, 1),
              "w5": (16, 16, 1, 1), "w6": (16, 32), "w7": (32, 16)}
    stored: dict[str, Any] = {k: random(*s, seed=i) / np.sqrt(np.prod(s[1:]) if len(s) > 2 else s[0]).astype(np.float32)
                              for i, (k, s) in enumerate(shapes.items())}
    stored |= {f"b{i}": random(n, seed=20 + i) * np.float32(0.2)
               for i, n in enumerate([8, 8, 8, 8, 8, 16, 32, 16]) if i != 4}
    stored |= {"zero": np.float32(0), "six": np.float32(6), "axes": np.array([2, 3]), "shape": np.array([0, 16, 1, 1])}
    return make_model(nodes, {"x": ["N", 8, 12, 12]}, {"y": ["N", 16]}, stored, opset=opset)


NETWORK_FEEDS = [{"x": random(2, 8, 12, 12, seed=k)} for k in range(3)]
