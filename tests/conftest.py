"""What the tests share: tiny ONNX models spelled out in a line per node, a run of them, and golden texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxq.graph import Graph, load, save
from onnxq.passes.manager import Context, Pass, PassManager
from onnxq.targets import Target

GOLDEN = Path(__file__).parent / "golden"
OPSET = 17
PORT = Sequence[int | str | None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regen", action="store_true", help="write the golden texts anew instead of comparing with them")
    parser.addoption("--edge", metavar="DIR", help="run exports in the runtimes that tests/edge/setup.sh put into DIR")
    parser.addoption("--ort-include", metavar="DIR", help="onnxruntime's C++ headers, if not those in --edge's folder")


# The same examples in each run: a change is judged by itself. `--hypothesis-profile explore` looks for new ones.
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile("steady")

_homes = count()


@pytest.fixture(autouse=True)
def _shared_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's own cache; what one test timed the next one need not."""
    _use_cache(tmp_path_factory.getbasetemp() / "cache", monkeypatch)


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asserts a time, so none needs to measure well."""
    from onnxq import settling, verification
    from onnxq.planner import pricing, rewriting

    for module, name in ((pricing, "BLOCK_SECONDS"), (rewriting, "_BLOCK_SECONDS"),
                         (settling, "_CONFIRM_SECONDS"), (verification, "BLOCK_SECONDS")):
        monkeypatch.setattr(module, name, 0.01)


@pytest.fixture
def cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder for the caches of this test, and of the processes that it starts."""
    folder = tmp_path_factory.getbasetemp() / f"cache{next(_homes)}"
    _use_cache(folder, monkeypatch)
    return folder


def _use_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("LOCALAPPDATA", str(folder))  # its name on Windows


# ------------------------------------------------------------------ building


def node(op: str, inputs: str, outputs: str, /, name: str | None = None, *, domain: str | None = None,
         **attrs: Any) -> onnx.NodeProto:
    """`node("Conv", "x w b", "y", pads=[1, 1, 1, 1])`; `_` stands for an omitted input or output.

    The node is named after its first output unless `name` says otherwise ('' for none).
    """
    ins = ["" if n == "_" else n for n in inputs.split()]
    outs = ["" if n == "_" else n for n in outputs.split()]
    return helper.make_node(op, ins, outs, name=f"{op}_{outs[0]}" if name is None else name, domain=domain, **attrs)


def value(name: str, shape: PORT | None, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """A graph input or output of a dtype (float by default)."""
    return helper.make_tensor_value_info(name, dtype, shape)


def body(nodes: Sequence[onnx.NodeProto], outputs: Mapping[str, PORT | None], name: str = "body",
         initializers: Mapping[str, Any] | None = None, inputs: Sequence[onnx.ValueInfoProto] = ()) -> onnx.GraphProto:
    """A graph for an If or Loop."""
    stored = [numpy_helper.from_array(np.asarray(v), k) for k, v in (initializers or {}).items()]
    return helper.make_graph(list(nodes), name, list(inputs), [value(k, s) for k, s in outputs.items()], stored)


def make_model(nodes: Sequence[onnx.NodeProto], inputs: Mapping[str, Any], outputs: Mapping[str, Any],
               initializers: Mapping[str, Any] | None = None, opset: int = OPSET,
               domains: Mapping[str, int] | None = None, ir_version: int = 8) -> onnx.ModelProto:
    """A model of one graph; ports are `name: shape` for float, `name: (dtype, shape)` for others."""
    def ports(given: Mapping[str, Any]) -> list[onnx.ValueInfoProto]:
        return [value(k, p[1], p[0]) if isinstance(p, tuple) else value(k, p) for k, p in given.items()]

    stored = [v if isinstance(v, TensorProto) else numpy_helper.from_array(np.asarray(v), k)
              for k, v in (initializers or {}).items()]
    graph = helper.make_graph(list(nodes), "g", ports(inputs), ports(outputs), stored)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in (domains or {}).items())]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def random(*shape: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Normally distributed float32 numbers, the same for the same shape and seed."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


# ------------------------------------------------------------------ running


def run(model: onnx.ModelProto | str | Path, feed: Mapping[str, Any], optimize: bool = False) -> dict[str, Any]:
    """Outputs by name, from onnxruntime's CPU provider with graph optimizations off (or all on)."""
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def assert_same(got: Mapping[str, Any], wanted: Mapping[str, Any], rtol: float = 0.0) -> None:
    """The same names, types and shapes, and values within `rtol` of the largest one (0: the same bits)."""
    assert list(got) == list(wanted)
    for name, right in wanted.items():
        left = got[name]
        assert (left.dtype, left.shape) == (right.dtype, right.shape), name
        if rtol == 0 or right.dtype.kind not in "fc":
            np.testing.assert_array_equal(left, right, err_msg=name)
        else:
            largest = float(np.abs(right).max(initial=0.0))
            np.testing.assert_allclose(left, right, rtol=0, atol=rtol * max(largest, 1e-30), err_msg=name)


# ------------------------------------------------------------------ through onnxq

Opener = Callable[[onnx.ModelProto], Graph]


@pytest.fixture
def opened(tmp_path: Path) -> Opener:
    """Writes a model to a file of its own and loads it."""
    numbers = count()

    def open_model(model: onnx.ModelProto) -> Graph:
        path = tmp_path / f"opened{next(numbers)}.onnx"
        onnx.save(model, path)
        return load(path)

    return open_model


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Graph], Path]:
    """Saves a graph to a file of its own, checks that file with onnx, and returns its path."""
    numbers = count()

    def write(graph: Graph) -> Path:
        path = tmp_path / f"written{next(numbers)}.onnx"
        save(graph, path)
        onnx.checker.check_model(str(path), full_check=True)
        return path

    return write


def apply(step: Pass, graph: Graph, context: Context | None = None) -> tuple[bool, list[tuple[str, str]]]:
    """(whether the pass edited, (node, reason) for each near miss), run as the compiler runs it."""
    context = context or Context()
    edited = PassManager([step]).run(graph, context)
    return edited, [(s.node, s.reason) for s in context.skips]


# ------------------------------------------------------------------ trying a pass

Skips = list[tuple[str, str]]
Try = Callable[..., tuple[Graph, Skips]]
TOLERANCE = 1e-5  # of the largest output: float32 sums in another order


@pytest.fixture
def fires(opened: Opener, tmp_path: Path) -> Try:
    """Runs a pass that has to edit, checks its outputs against the model's, and that a second run edits nothing."""
    return _trier(opened, tmp_path, True)


@pytest.fixture
def leaves(opened: Opener, tmp_path: Path) -> Try:
    """Runs a pass that must leave the graph as it is."""
    return _trier(opened, tmp_path, False)


def _trier(opened: Opener, folder: Path, wanted: bool) -> Try:
    def attempt(model: onnx.ModelProto, step: Pass, feed: Mapping[str, Any],
                target: Target | None = None) -> tuple[Graph, Skips]:
        graph = opened(model)
        before = text(graph)
        edited, skips = apply(step, graph, Context(target))
        after = text(graph)
        assert edited is wanted, after
        assert (after != before) is wanted, "what a pass returns is whether it edited"
        expected = run(model, feed)
        for twin, name in ((graph, "out.onnx"), (graph.copy(), "twin.onnx")):
            path = folder / name
            save_checked(twin, path)
            assert_same(run(path, feed), expected, TOLERANCE if wanted else 0)
        assert apply(step, graph, Context(target))[0] is False, "a second run edits nothing"
        assert text(graph) == after
        return graph, skips

    return attempt


def save_checked(graph: Graph, path: Path) -> None:
    """Save a graph and check the file with onnx."""
    save(graph, path)
    onnx.checker.check_model(str(path), full_check=True)


# ------------------------------------------------------------------ golden texts


def text(graph: Graph) -> str:
    """The graph in a form to read: `Conv(x, w, _) -> y {pads: [1, 1]}`; constants carry their type and shape.

    Bodies of If and Loop follow their node, indented.
    """
    stored: dict[str, str] = {}
    lines = [f"inputs {', '.join(f'{t.name}{_dims(t.shape)}' for t in graph.inputs)}"]
    bodies: dict[str, list[str]] = {}
    for owner, inner in graph.subgraphs():
        bodies.setdefault(owner.name, []).extend(f"    {line}" for line in text(inner).splitlines())
    for item in graph.nodes:
        for t in item.inputs:
            if hasattr(t, "_values"):
                stored[t.name] = f"constant {t.name} {t._values.dtype}{_dims(t._values.shape)}"
        attrs = {k: v for k, v in item.attrs.items() if not hasattr(v, "nodes")}
        shown = f" {{{', '.join(f'{k}: {v}' for k, v in attrs.items())}}}" if attrs else ""
        domain = f"{item.domain}." if item.domain else ""
        lines.append(f"{domain}{item.op}({', '.join(t.name or '_' for t in item.inputs)}) -> "
                     f"{', '.join(t.name or '_' for t in item.outputs)}{shown}")
        lines += bodies.get(item.name, [])
    lines.append(f"outputs {', '.join(f'{t.name}{_dims(t.shape)}' for t in graph.outputs)}")
    return "\n".join([*stored.values(), *lines]) + "\n"


def _dims(shape: PORT | None) -> str:
    return "?" if shape is None else f"[{', '.join('?' if d is None else str(d) for d in shape)}]"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with tests/golden/NAME.txt; `pytest --regen` writes the file instead."""

    def compare(name: str, found: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--regen"):
            path.write_text(found, encoding="utf-8")
        assert found == path.read_text(encoding="utf-8"), f"{name} differs; if it should, run pytest --regen"

    return compare


# ------------------------------------------------------------------ data


@pytest.fixture(name="save", params=[np.savez, np.savez_compressed], ids=["stored", "compressed"])
def npz_saver(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Writes an .npz both ways: as it is, and compressed."""
    return request.param  # type: ignore[no-any-return]
