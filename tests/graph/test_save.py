"""Saving: the file says what the graph says, is written whole or not at all, and keeps large weights outside."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Opener, assert_same, body, make_model, node, random, run, value
from onnx import TensorProto, external_data_helper, helper

from onnxq.errors import OutputError
from onnxq.graph import Graph, load, save

Written = Callable[[Graph], Path]


def two_layers() -> onnx.ModelProto:
    """Two weights above the size that goes outside, a bias below it; free, named and fixed dimensions."""
    return make_model(
        [node("MatMul", "x w1", "h"), node("Add", "h b", "s"), node("Relu", "s", "r"), node("MatMul", "r w2", "y"),
         node("Shape", "y", "shape")],
        {"x": ["batch", None, 30], "unread": (TensorProto.INT64, [2])},
        {"y": ["batch", None, 20], "shape": (TensorProto.INT64, [3])},
        {"w1": random(30, 40), "b": random(40), "w2": random(40, 20)})


FEED = {"x": random(2, 5, 30), "unread": np.zeros(2, np.int64)}


def ports(model: onnx.ModelProto) -> list[bytes]:
    return [v.SerializeToString() for v in [*model.graph.input, *model.graph.output]]


def leftovers(folder: Path, *expected: str) -> set[str]:
    return {p.name for p in folder.iterdir()} ^ set(expected)


@pytest.mark.parametrize("optimize", [False, True])
def test_round_trip(opened: Opener, written: Written, optimize: bool) -> None:
    model = two_layers()
    path = written(opened(model))
    assert_same(run(path, FEED, optimize), run(model, FEED, optimize))
    assert ports(onnx.load(path)) == ports(model)
    again = written(load(path))
    assert again.read_bytes() == path.read_bytes(), "saving what was saved changes nothing"


def test_external_data(tmp_path: Path, opened: Opener) -> None:
    model = two_layers()
    path = tmp_path / "out" / "m.onnx"
    path.parent.mkdir()
    save(opened(model), path, external_above=1000)
    assert not leftovers(path.parent, "m.onnx", "m.onnx.data")
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(path, load_external_data=False)
    outside = {t.name: external_data_helper.ExternalDataInfo(t) for t in proto.graph.initializer if t.external_data}
    assert set(outside) == {"w1", "w2"}, "the bias is small enough to stay"
    for name, info in outside.items():
        assert (info.location, info.offset % 4096) == ("m.onnx.data", 0)
        assert info.length == {"w1": 30 * 40 * 4, "w2": 40 * 20 * 4}[name]
    assert path.stat().st_size < 3000
    assert_same(run(path, FEED), run(model, FEED))
    assert_same(run(path, FEED, optimize=True), run(model, FEED, optimize=True))
    again = tmp_path / "again.onnx"
    save(load(path), again)
    assert not any(t.external_data for t in onnx.load(again, load_external_data=False).graph.initializer)
    assert_same(run(again, FEED), run(model, FEED))


def test_the_threshold_counts_all_weights(tmp_path: Path, opened: Opener) -> None:
    total = 4 * (30 * 40 + 40 + 40 * 20)
    for limit, outside in ((total, False), (total - 1, True)):
        path = tmp_path / f"{limit}.onnx"
        save(opened(two_layers()), path, external_above=limit)
        assert path.with_name(f"{limit}.onnx.data").exists() is outside


@pytest.mark.parametrize("external_above", [0, 10**9])
def test_every_stored_type_keeps_its_bytes(tmp_path: Path, external_above: int) -> None:
    """Typed fields or raw bytes, packed or not, with and without elements; strings can't go outside."""
    stored = {
        "i4": helper.make_tensor("i4", TensorProto.INT4, [5001], np.arange(5001) % 16 - 8),
        "f8": helper.make_tensor("f8", TensorProto.FLOAT8E4M3FN, [2000], np.arange(2000) % 16),
        "b": np.arange(2000) % 3 == 0,
        "d": helper.make_tensor("d", TensorProto.DOUBLE, [500], np.arange(500.0)),
        "i": helper.make_tensor("i", TensorProto.INT64, [500], np.arange(500)),
        "u": helper.make_tensor("u", TensorProto.UINT8, [2000], np.arange(2000) % 256),
        "s": helper.make_tensor("s", TensorProto.STRING, [600], [f"text {k}".encode() for k in range(600)]),
        "none": np.zeros((0, 4), np.float32),
    }
    outputs = {f"{k}_y": (v.data_type if isinstance(v, TensorProto) else helper.np_dtype_to_tensor_dtype(v.dtype),
                          list(v.dims if isinstance(v, TensorProto) else v.shape)) for k, v in stored.items()}
    model = make_model([node("Identity", k, f"{k}_y") for k in stored], {}, outputs, stored, opset=21, ir_version=10)
    source, path = tmp_path / "m.onnx", tmp_path / "out.onnx"
    onnx.save(model, source)
    save(load(source), path, external_above=external_above)
    onnx.checker.check_model(str(path), full_check=True)
    outside = {t.name for t in onnx.load(path, load_external_data=False).graph.initializer if t.external_data}
    assert outside == ({"i4", "f8", "b", "d", "i", "u"} if external_above == 0 else set())
    if outside:
        size = next(e.value for t in onnx.load(path, load_external_data=False).graph.initializer if t.name == "i4"
                    for e in t.external_data if e.key == "length")
        assert size == "2501"
    once, twice = onnx.load(path).graph.initializer, tmp_path / "twice.onnx"
    wanted = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    save(load(path), twice)
    for saved in (once, onnx.load(twice).graph.initializer):
        assert {t.name for t in saved} == set(wanted)
        for t in saved:
            np.testing.assert_array_equal(onnx.numpy_helper.to_array(t), wanted[t.name], strict=True)


def test_large_weights_in_bodies_go_outside_too(tmp_path: Path, opened: Opener) -> None:
    def branch(seed: int) -> onnx.GraphProto:
        return body([node("MatMul", "x w", "r")], {"r": [2, 40]}, "b", {"w": random(30, 40, seed=seed)})

    model = make_model([node("If", "c", "y", then_branch=branch(1), else_branch=branch(2))],
                       {"c": (TensorProto.BOOL, []), "x": [2, 30]}, {"y": [2, 40]})
    path = tmp_path / "m.onnx"
    save(opened(model), path, external_above=0)
    assert path.with_name("m.onnx.data").stat().st_size == 8192 + 30 * 40 * 4
    assert path.stat().st_size < 2000
    for c in (True, False):
        feed = {"c": np.array(c), "x": random(2, 30)}
        assert_same(run(path, feed), run(model, feed))


def test_a_stored_tensor_may_be_an_output(tmp_path: Path, opened: Opener) -> None:
    model = make_model([node("MatMul", "x w", "y")], {"x": [2, 30]}, {"k": [500], "y": [2, 40], "w": [30, 40]},
                       {"w": random(30, 40), "k": random(500)})
    feed = {"x": random(2, 30)}
    for limit in (0, 10**9):
        path = tmp_path / f"{limit}.onnx"
        save(opened(model), path, external_above=limit)
        assert_same(run(path, feed), run(model, feed))
        assert ports(onnx.load(path)) == ports(model)


def test_extra_outputs(tmp_path: Path, opened: Opener) -> None:
    model = two_layers()
    graph = opened(model)
    save(graph, tmp_path / "m.onnx", extra_outputs=["s", "y", "h"])
    got = run(tmp_path / "m.onnx", FEED, optimize=True)
    assert list(got) == ["y", "shape", "s", "h"]
    np.testing.assert_allclose(got["h"], FEED["x"] @ random(30, 40), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got["s"], got["h"] + random(40), rtol=1e-6)
    save(graph, tmp_path / "plain.onnx")
    assert list(run(tmp_path / "plain.onnx", FEED)) == ["y", "shape"], "the graph itself has no more outputs"


def test_nodes_are_written_in_order(opened: Opener, written: Written) -> None:
    graph = opened(two_layers())
    graph.ir.nodes.reverse()
    assert [n.op_type for n in onnx.load(written(graph)).graph.node] == ["MatMul", "Add", "Relu", "MatMul", "Shape"]


def test_only_domains_in_use_are_added(tmp_path: Path, opened: Opener) -> None:
    graph = opened(two_layers())
    twin = graph.copy()
    twin.add_node("Gelu", "gelu", [twin.outputs[0]], [twin.variable("g", np.float32)], domain="com.microsoft")
    for item, domains in ((twin, {"", "com.microsoft"}), (graph, {""})):
        save(item, tmp_path / "m.onnx")
        assert {o.domain for o in onnx.load(tmp_path / "m.onnx").opset_import} == domains


# ------------------------------------------------------------------ atomic


def test_an_existing_model_is_replaced(tmp_path: Path, opened: Opener) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    save(opened(two_layers()), path, external_above=0)
    save(opened(two_layers()), path, external_above=0)
    assert_same(run(path, FEED), run(two_layers(), FEED))
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask, "as readable as any file that the user makes"


def test_saving_over_the_model_that_it_came_from(tmp_path: Path, opened: Opener) -> None:
    path = tmp_path / "m.onnx"
    save(opened(two_layers()), path, external_above=0)
    save(load(path), path, external_above=0)
    assert_same(run(path, FEED), run(two_layers(), FEED))


@pytest.mark.parametrize(("external_above", "fails"), [
    (0, "data"), (0, "model"), (0, "rename"), (0, "close"), (10**9, "model"), (10**9, "rename"), (10**9, "close")])
def test_when_writing_fails_the_old_file_stays(tmp_path: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch,
                                               external_above: int, fails: str) -> None:
    graph = opened(two_layers())
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("m.onnx", "m.onnx.data"):
        (folder / name).write_bytes(b"old")
    full = OSError(28, "No space left on device")
    real = os.fdopen
    files = []

    class Full:
        """A file on a disk that fills up at the first or the second write, or as it is closed."""

        def __init__(self, file: Any) -> None:
            self.file = file
            files.append(self)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()
            if fails == "close":
                raise full

        def seek(self, offset: int) -> None:
            self.file.seek(offset)

        def write(self, content: bytes) -> None:
            self.file.write(content[:10])
            if fails == "data" or (fails == "model" and len(files) == (1 if external_above else 2)):
                raise full

    def refuse(*_: object) -> None:
        raise full

    if fails == "rename":
        monkeypatch.setattr(os, "replace", refuse)
    else:
        monkeypatch.setattr(os, "fdopen", lambda *a: Full(real(*a)))
    with pytest.raises(OutputError, match=r"m\.onnx can't be written \(No space left on device\); choose another"):
        save(graph, folder / "m.onnx", external_above=external_above)
    assert not leftovers(folder, "m.onnx", "m.onnx.data")
    assert {(folder / n).read_bytes() for n in ("m.onnx", "m.onnx.data")} == {b"old"}


def test_other_failures_leave_nothing_behind(tmp_path: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = opened(two_layers())
    folder = tmp_path / "out"
    folder.mkdir()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "chmod", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(graph, folder / "m.onnx", external_above=0)
    assert not leftovers(folder)


def test_a_folder_that_is_not_there(tmp_path: Path, opened: Opener) -> None:
    with pytest.raises(OutputError, match=r"m\.onnx can't be written \(No such file or directory\); choose another"):
        save(opened(two_layers()), tmp_path / "nowhere" / "m.onnx")


def test_a_folder_in_the_way(tmp_path: Path, opened: Opener) -> None:
    (tmp_path / "out" / "m.onnx").mkdir(parents=True)
    (tmp_path / "out" / "m.onnx.data").write_bytes(b"old")
    with pytest.raises(OutputError, match=r"can't be written \(Is a directory\)"):
        save(opened(two_layers()), tmp_path / "out" / "m.onnx", external_above=0)
    assert not leftovers(tmp_path / "out", "m.onnx", "m.onnx.data")


def test_scan_and_loop_round_trip(opened: Opener, written: Written) -> None:
    inner = body([node("Add", "s e", "n"), node("Mul", "n two", "o")], {"n": [3], "o": [3]}, "scan",
                 {"two": np.float32(2)}, [value("s", [3]), value("e", [3])])
    model = make_model([node("Scan", "s0 x", "last all", body=inner, num_scan_inputs=1, scan_input_directions=[1])],
                       {"s0": [3], "x": [4, 3]}, {"last": [3], "all": [4, 3]})
    feed = {"s0": random(3), "x": random(4, 3)}
    assert_same(run(written(opened(model)), feed), run(model, feed))
