"""Reading model files without their large weights: the same model comes out, however its file was written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, assert_same, body, make_model, node, random, run
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxq.errors import ModelError
from onnxq.graph import load, save, stored_bytes
from onnxq.graph import parse as rooms
from onnxq.graph.parse import KEPT_BELOW, field, parse

LARGE = KEPT_BELOW // 4  # float32 numbers


def large(opset: int = 17, name: str = "w") -> onnx.ModelProto:
    """y = x + w + v + s, of which w and v are as large as what stays in the file."""
    model = make_model([node("Add", f"x {name}", "a"), node("Add", "a v", "b"), node("Mul", "b s", "y")],
                       {"x": [LARGE]}, {"y": [LARGE]},
                       {name: random(LARGE), "s": np.float32([2]), "v": random(LARGE, seed=1)}, opset=opset)
    model.doc_string = "about"
    model.metadata_props.add(key="author", value="me")
    return model


def filled(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """A parsed model with its values back in it."""
    raw = path.read_bytes()
    for proto in model.graph.initializer:
        if proto.data_location == TensorProto.EXTERNAL:
            entries = {e.key: e.value for e in proto.external_data}
            assert entries["location"] == path.name
            start = int(entries["offset"])
            proto.raw_data = raw[start:start + int(entries["length"])]
            proto.ClearField("data_location")
            del proto.external_data[:]
    return model


def test_large_weights_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(large(), path)
    light = parse(path)
    assert [t.name for t in light.graph.initializer if t.external_data] == ["w", "v"]
    assert light.ByteSize() < 2000
    assert filled(light, path) == onnx.load(path)


def test_only_what_is_large_and_raw(tmp_path: Path) -> None:
    """Just below the limit, in fields of their own type, or in bodies, they are read with the model."""
    inner = body([node("Add", "x u", "r")], {"r": [LARGE]}, "b", {"u": random(LARGE)})
    model = make_model([node("If", "c", "y", then_branch=inner, else_branch=inner), node("Identity", "p", "q"),
                        node("Identity", "k", "z")], {"c": (TensorProto.BOOL, []), "x": [LARGE]},
                       {"y": [LARGE], "q": [LARGE], "z": [LARGE - 1]},
                       {"p": helper.make_tensor("p", TensorProto.FLOAT, [LARGE], random(LARGE)),
                        "k": random(LARGE - 1)})
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    assert parse(path) == onnx.load(path)


def test_a_file_in_any_order_of_fields(tmp_path: Path) -> None:
    """The graph in two parts, values before their shape, and fields that onnx doesn't know of any kind."""
    model = large()
    tensor = model.graph.initializer[0]
    values, tensor.raw_data = tensor.raw_data, b""
    tensor.ClearField("raw_data")
    head = tensor.SerializeToString()
    turned = field(9, len(values)) + values + head
    del model.graph.initializer[0]
    first, second = onnx.GraphProto(), onnx.GraphProto()
    first.node.extend(model.graph.node)
    second.CopyFrom(model.graph)
    del second.node[:]
    late = field(5, len(turned)) + turned + second.SerializeToString()
    unknown = (bytes([15 << 3 | 1]) + bytes(8) + bytes([15 << 3 | 5]) + bytes(4) + bytes([15 << 3, 200, 1])
               + field(15, 3) + b"abc")
    model.ClearField("graph")
    early = first.SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(unknown + field(7, len(early)) + early + model.SerializeToString() + field(7, len(late)) + late
                     + unknown)
    light = parse(path)
    assert [t.name for t in light.graph.initializer if t.external_data] == ["w", "v"]
    assert filled(light, path) == onnx.load(path)
    assert_same(run(path, {"x": random(LARGE)}), run(large(), {"x": random(LARGE)}))


@pytest.mark.parametrize("part", ["middle", "end", "nothing", "noise"])
def test_what_is_no_model_is_told_by_protobuf(tmp_path: Path, part: str) -> None:
    content = large().SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes({"middle": content[:len(content) // 2], "end": content[:-1], "nothing": b"",
                      "noise": np.random.default_rng(0).bytes(5000)}[part])
    if part == "nothing":
        assert parse(path) == onnx.ModelProto()
    else:
        with pytest.raises(DecodeError):
            parse(path)
    with pytest.raises(ModelError, match=r"m\.onnx (is not an ONNX model or is cut short|holds no ONNX graph)"):
        load(path)


@given(st.integers(0, 2**40), st.integers(1, 15))
def test_a_field_is_what_protobuf_reads(length: int, number: int) -> None:
    """By the definition of base 128: seven bits a byte, low ones first, the top bit set on all but the last."""
    found = field(number, length)
    assert (found[0] >> 3, found[0] & 7) == (number, 2)
    assert sum((byte & 127) << 7 * k for k, byte in enumerate(found[1:])) == length
    assert [byte >= 128 for byte in found[1:]] == [True] * (len(found) - 2) + [False]
    assert len(found) == 2 or found[-1] > 0


# ------------------------------------------------------------------ as a Graph


@pytest.mark.parametrize("name", ["w", "ww", "www", "wwww"])
@pytest.mark.parametrize("opset", [11, 17])
def test_loaded_and_saved(tmp_path: Path, opened: Opener, name: str, opset: int) -> None:
    """Wherever the values lie, at odd bytes, too; and however old the operators are."""
    model = large(opset, name)
    graph = opened(model)
    weights = [n.inputs[1] for n in graph.nodes[:2]]
    for tensor, wanted in zip(weights, (random(LARGE), random(LARGE, seed=1)), strict=True):
        for found in (graph.read(tensor), graph.read_rows(tensor, 0, LARGE)):
            assert found.flags.aligned
            np.testing.assert_array_equal(found, wanted, strict=True)
        np.testing.assert_array_equal(graph.read_rows(tensor, 7, 99), wanted[7:99], strict=True)
    for limit in (0, 10**9):
        path = tmp_path / "out.onnx"
        save(graph, path, external_above=limit)
        onnx.checker.check_model(str(path), full_check=True)
        assert_same(run(path, {"x": random(LARGE)}), run(model, {"x": random(LARGE)}))


def test_through_a_link_and_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    onnx.save(large(), tmp_path / "real" / "m.onnx")
    (tmp_path / "link.onnx").symlink_to(tmp_path / "real" / "m.onnx")
    monkeypatch.chdir(tmp_path)
    for path in ("link.onnx", "real/m.onnx"):
        graph = load(path)
        np.testing.assert_array_equal(graph.read(graph.nodes[0].inputs[1]), random(LARGE))
        assert stored_bytes(path) == (tmp_path / "real" / "m.onnx").stat().st_size


def test_a_model_beside_whose_large_weights_are_external_ones(tmp_path: Path) -> None:
    model = large()
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    mixed = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    mixed.graph.initializer[0].CopyFrom(model.graph.initializer[0])
    (tmp_path / "m.onnx").write_bytes(mixed.SerializeToString())
    graph = load(tmp_path / "m.onnx")
    for item, wanted in zip(graph.nodes, (random(LARGE), random(LARGE, seed=1)), strict=False):
        np.testing.assert_array_equal(graph.read(item.inputs[1]), wanted)
    sizes = [(tmp_path / n).stat().st_size for n in ("m.onnx", "m.data")]
    assert stored_bytes(tmp_path / "m.onnx") == sum(sizes)


_PEAK = """
import re, sys
from pathlib import Path
from onnxq.graph import load, save
def memory(kind):
    return int(re.search(rf"^{kind}:\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
before = memory("VmRSS")
save(load(sys.argv[1]), sys.argv[2])
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak")
def test_a_model_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    count, size = 8, 24 << 20
    model = make_model([node("Identity", f"w{k}", f"y{k}") for k in range(count)], {},
                       {f"y{k}": (TensorProto.UINT8, [size]) for k in range(count)},
                       {f"w{k}": numpy_helper.from_array(np.full(size, k, np.uint8), f"w{k}") for k in range(count)})
    onnx.save(model, tmp_path / "m.onnx")
    done = subprocess.run([sys.executable, "-c", _PEAK, str(tmp_path / "m.onnx"), str(tmp_path / "out.onnx")],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < count * size / 2
    saved: Any = onnx.load(tmp_path / "out.onnx").graph
    assert [t.raw_data[-1] for t in saved.initializer] == list(range(count))


def test_the_limit_is_above_what_inference_reads() -> None:
    """Shape inference sees small tensors only if they are in the model."""
    assert rooms.KEPT_BELOW > 8 * 1024
