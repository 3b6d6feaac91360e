"""Saving in a stream: what is written is whole, what is in memory is one weight, and who asks hears how far it is."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, assert_same, body, make_model, node, random, run
from onnx import TensorProto, numpy_helper

from onnxq.graph import Graph, load, raise_opset, save, weight_bytes


def added(sizes: list[int]) -> onnx.ModelProto:
    """x [1] and a weight of each size, uint8, all of them outputs."""
    stored = {f"w{k}": np.random.default_rng(k).integers(0, 256, size, np.uint8) for k, size in enumerate(sizes)}
    outputs = {f"y{k}": (TensorProto.UINT8, [size]) for k, size in enumerate(sizes)}
    return make_model([node("Identity", f"w{k}", f"y{k}") for k in range(len(sizes))], {}, outputs, stored)


# lengths of messages and of values on both sides of the steps of base 128: 2 bytes to 3 bytes at 16384, 4 at 2097152
SIZES = [1024, 16300, 16383, 16384, 16385, 2097151 - 40, 2097151 - 20, 2097151, 2097152]


@pytest.mark.parametrize("external_above", [0, 10**9])
def test_lengths_at_the_steps_of_their_encoding(tmp_path: Path, opened: Opener, external_above: int) -> None:
    for model in (added(SIZES), *(added([size]) for size in SIZES)):
        save(opened(model), tmp_path / "m.onnx", external_above=external_above)
        onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
        found = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
        assert list(found) == [t.name for t in model.graph.initializer]
        for t in model.graph.initializer:
            np.testing.assert_array_equal(found[t.name], numpy_helper.to_array(t), strict=True)


def computed(opened: Opener, count: int, values: list[Any]) -> Graph:
    """A graph with computed weights [30, 40] in the main graph and in a body."""
    inner = body([node("MatMul", "x v", "r")], {"r": [2, 40]}, "b", {"v": random(30, 40)})
    nodes = [node("MatMul", f"x w{k}", f"y{k}") for k in range(count)]
    model = make_model([*nodes, node("If", "c", "z", then_branch=inner, else_branch=inner)],
                       {"c": (TensorProto.BOOL, []), "x": [2, 30]}, {f"y{k}": [2, 40] for k in range(count)} | {
                           "z": [2, 40]}, {f"w{k}": random(30, 40) for k in range(count)})
    graph = opened(model)

    def compute() -> Any:
        alive = [v for v in values if v() is not None]
        assert not alive, "what was written before is gone"
        found = random(30, 40).copy()
        values.append(weakref.ref(found))
        return found

    for one, holder in graph.walk():
        if one.op == "MatMul":
            holder.replace_input(one, 1, holder.computed(f"{one.name}.c", np.float32, (30, 40), compute))
    return graph


@pytest.mark.parametrize("external_above", [0, 10**9])
def test_one_weight_at_a_time(tmp_path: Path, opened: Opener, external_above: int) -> None:
    values: list[Any] = []
    save(computed(opened, 3, values), tmp_path / "m.onnx", external_above=external_above)
    assert len(values) == 5, "each weight once: three in the main graph and one in each branch"
    feed = {"c": np.array(True), "x": random(2, 30)}
    wanted = feed["x"] @ random(30, 40)
    for name, found in run(tmp_path / "m.onnx", feed).items():
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("external_above", [0, 10**9])
def test_progress(tmp_path: Path, opened: Opener, external_above: int) -> None:
    heard: list[tuple[int, int]] = []
    save(computed(opened, 3, []), tmp_path / "m.onnx", external_above=external_above,
         progress=lambda done, total: heard.append((done, total)))
    assert heard == [(4800 * k, 5 * 4800) for k in range(1, 6)]


def test_pieces_of_a_large_weight(tmp_path: Path, opened: Opener) -> None:
    """External data of more than one piece are copied whole, wherever they lie in their file."""
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    model = added([40_000_000, 5000])
    save(opened(model), first, external_above=0)
    heard: list[int] = []
    save(load(first), second, external_above=0, progress=lambda done, _: heard.append(done))
    assert heard == sorted(heard)
    assert (len(heard), heard[-1]) == (4, 40_005_000), "three pieces and the small one"
    assert second.with_name("second.onnx.data").read_bytes() == first.with_name("first.onnx.data").read_bytes()


_PEAK = """
import re, sys
from pathlib import Path
from onnxq.graph import load, save
def memory(kind):
    return int(re.search(rf"^{kind}:\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) * 1024
source, target, external_above = sys.argv[1:]
graph = load(source)
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
before = memory("VmRSS")
save(graph, target, external_above=int(external_above))
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak")
@pytest.mark.parametrize("source", ["embedded", "external"])
@pytest.mark.parametrize("external_above", [0, 10**9])
def test_saving_takes_no_memory_that_grows_with_the_weights(tmp_path: Path, opened: Opener, source: str,
                                                            external_above: int) -> None:
    """Less than half of what the weights take, where each copy of them would take it all."""
    sizes = [24 << 20] * 6
    path, target = tmp_path / "m.onnx", tmp_path / "out.onnx"
    save(opened(added(sizes)), path, external_above=0 if source == "external" else 10**9)
    done = subprocess.run([sys.executable, "-c", _PEAK, str(path), str(target), str(external_above)],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < sum(sizes) / 2


_ROWS = """
import re, sys
from pathlib import Path
import numpy as np
from onnxq.graph import load, widen
def memory(kind):
    return int(re.search(rf"^{kind}:\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) * 1024
graph = load(sys.argv[1])
weight = graph.nodes[0].inputs[1]
if sys.argv[2] == "widened":
    widen(weight)
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
total = sum(float(graph.read_rows(weight, k, k + 1024).sum(dtype=np.float64)) for k in range(0, 16384, 1024))
print(memory("VmHWM") - before, total)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak")
@pytest.mark.parametrize(("dtype", "how"), [(np.float32, "plain"), (np.float16, "plain"), (np.float16, "widened")])
def test_rows_are_all_that_is_in_memory(tmp_path: Path, opened: Opener, dtype: Any, how: str) -> None:
    """A sixteenth of the rows at a time takes less than a quarter of the memory, where the whole counts as float32."""
    weight = np.ones((16384, 1024), dtype)
    kind = TensorProto.FLOAT16 if dtype == np.float16 else TensorProto.FLOAT
    model = make_model([node("MatMul", "x w", "y")], {"x": (kind, [1, 16384])}, {"y": (kind, [1, 1024])}, {"w": weight})
    save(opened(model), tmp_path / "m.onnx", external_above=0)
    done = subprocess.run([sys.executable, "-c", _ROWS, str(tmp_path / "m.onnx"), how], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    peak, total = done.stdout.split()
    assert float(total) == weight.size
    assert int(peak) < 4 * weight.size / 4


@pytest.mark.parametrize("outside", [False, True])
def test_rows(tmp_path: Path, opened: Opener, outside: bool) -> None:
    path = tmp_path / "m.onnx"
    save(opened(make_model([node("MatMul", "x w", "y")], {"x": [2, 30]}, {"y": [2, 40]}, {"w": random(30, 40)})), path,
         external_above=0 if outside else 10**9)
    graph = load(path)
    stored = graph.nodes[0].inputs[1]
    made = graph.computed("c", np.float32, (30, 40), lambda: random(30, 40))
    for tensor in (stored, made, graph.constant("k", random(30, 40))):
        for start, stop in ((0, 30), (3, 17), (29, 99), (5, 5)):
            np.testing.assert_array_equal(graph.read_rows(tensor, start, stop), random(30, 40)[start:stop], strict=True)


def test_many_files_in_folders(tmp_path: Path, opened: Opener) -> None:
    """One file per weight, as PyTorch's exporter writes them: each is opened when it is read and not before."""
    count = 300
    names = [f"w{k}" for k in range(count)]
    model = make_model([node("Add", f"{'x' if k == 0 else f'h{k - 1}'} w{k}", f"h{k}") for k in range(count)],
                       {"x": [400]}, {f"h{count - 1}": [400]}, {n: random(400, seed=k) for k, n in enumerate(names)})
    source = tmp_path / "in" / "m.onnx"
    source.parent.mkdir()
    wanted = run(model, {"x": random(400)})
    for number, proto in enumerate(model.graph.initializer):
        where = f"part{number % 7}/deep/{proto.name}.bin"
        (source.parent / where).parent.mkdir(parents=True, exist_ok=True)
        (source.parent / where).write_bytes(proto.raw_data)
        proto.ClearField("raw_data")
        proto.data_location = TensorProto.EXTERNAL
        proto.external_data.add(key="location", value=where)
    onnx.save(model, source)
    graph = load(source)
    for limit in (0, 10**9):
        save(graph, tmp_path / "out.onnx", external_above=limit)
        assert_same(run(tmp_path / "out.onnx", {"x": random(400)}), wanted)
    held = [graph.read(n.inputs[1]) for n in graph.nodes]
    assert len(held) == count
    source.parent.rename(tmp_path / "moved")
    np.testing.assert_array_equal(held[-1], random(400, seed=count - 1))  # what is mapped stays readable


def test_beyond_two_gigabytes(tmp_path: Path) -> None:
    """One weight of 5 GB in a file that is a hole but for its last row."""
    rows, columns = 320, 1 << 24
    with (tmp_path / "w.bin").open("wb") as file:
        file.seek((rows - 1) * columns)
        file.write(bytes([7]) * columns)
    weight = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[rows, columns],
                         data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="w.bin")
    onnx.save(make_model([node("Gather", "w i", "y")], {"i": (TensorProto.INT64, [1])},
                         {"y": (TensorProto.UINT8, [1, columns])}, {"w": weight}), tmp_path / "m.onnx")
    graph = load(tmp_path / "m.onnx")
    tensor = graph.nodes[0].inputs[0]
    assert weight_bytes(graph) == rows * columns
    assert (graph.read_rows(tensor, rows - 1, rows) == 7).all()
    assert not graph.read_rows(tensor, rows - 2, rows - 1).any()
    assert graph.read(tensor)[rows - 1, columns - 1] == 7
    raised = raise_opset(graph, 21)
    assert (raised.read_rows(raised.nodes[0].inputs[0], rows - 1, rows) == 7).all()
