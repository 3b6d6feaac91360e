"""Packed models from end to end: compiled so, packed and unpacked afterwards, and used like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import assert_same, make_model, node, random, run, text
from lowering_support import MODELS
from packing_support import CONTRIB, examples, reader

import onnxq
from onnxq.bench import bench
from onnxq.cli import cli
from onnxq.errors import ModelError, OutputError, RecipeError, UsageError
from onnxq.explanation.explain import explain
from onnxq.graph import constants, load, packed_weights, save, tensors
from onnxq.inspection import inspect
from onnxq.packing import pack, unpack
from onnxq.recipe import parse

FOLDER = MODELS / "text_encoder"
PLENTY = "1GB"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text encoder with the smaller 7 of 10 weights of each linear at 0."""
    graph = load(FOLDER / "model.onnx")
    for tensor in constants(graph):
        values = graph.read(tensor)
        if values.dtype == np.float32 and values.ndim == 2 and values.size > 4096:
            tensors.store(tensor, np.where(np.abs(values) < np.quantile(np.abs(values), 0.7), np.float32(0), values))
    path = tmp_path_factory.mktemp("pruned") / "pruned.onnx"
    save(graph, path)
    return path


@pytest.fixture(scope="module")
def compiled(pruned: Path) -> dict[bool, tuple[Path, onnxq.Report]]:
    """packed -> (file, report)."""
    found = {}
    for packed in (False, True):
        path = pruned.with_name(f"{packed}.onnx")
        report = onnxq.compile(pruned, path, scheme="w8a8", calib=str(FOLDER / "calib.npz"), measure=False, threads=1,
                               pack=packed, load_memory=PLENTY if packed else None)
        found[packed] = path, report
    return found


Compiled = dict[bool, tuple[Path, onnxq.Report]]


def feed() -> dict[str, Any]:
    with np.load(FOLDER / "eval.npz") as data:
        return {p.name: data[p.name][:8] for p in load(FOLDER / "model.onnx").ports()}


def test_compiles_to_the_same_numbers_in_fewer_bytes(compiled: Compiled) -> None:
    (dense, plain), (small, report) = compiled[False], compiled[True]
    assert report.ok
    assert_same(run(small, feed(), optimize=True), run(dense, feed(), optimize=True))
    assert report.size is not None
    assert report.size.compiled_bytes == small.stat().st_size < 0.75 * dense.stat().st_size
    assert [(n.name, n.ran_as) for n in report.nodes] == [(n.name, n.ran_as) for n in plain.nodes]
    assert report.semantic is not None
    assert plain.semantic is not None
    assert report.semantic.twin_sqnr_db == plain.semantic.twin_sqnr_db
    assert plain.packing is None
    assert not packed_weights(dense)
    assert report.packing is not None
    rows = {w["name"]: w for w in report.to_dict()["packing"]["weights"]}
    assert {w.name: w.packed_bytes for w in packed_weights(small)} == {k: w["packed_bytes"] for k, w in rows.items()}
    assert min(w["zeros"] for w in rows.values()) > 0.6  # rounding by GPTQ makes some of them up again
    onnx.checker.check_model(str(small), full_check=True)


def test_a_recipe_says_so_too(pruned: Path, compiled: Compiled, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("scheme: w8a8\npack: true\nload_memory: 1GB\n")
    onnxq.compile(pruned, tmp_path / "out.onnx", recipe=recipe, calib=str(FOLDER / "calib.npz"), measure=False)
    assert packed_weights(tmp_path / "out.onnx") == packed_weights(compiled[True][0])
    with pytest.raises(RecipeError, match="nothing is packed"):
        parse("scheme: w8a8\nload_memory: 1GB\n")
    with pytest.raises(RecipeError, match="load_memory: a size of 'much'"):
        parse("scheme: w8a8\npack: true\nload_memory: much\n")
    assert parse("scheme: w8a8\npack: true\n").load_memory is None
    with pytest.raises(RecipeError, match="give --pack"):
        onnxq.compile(pruned, tmp_path / "none.onnx", scheme="w8a8-dynamic", load_memory="1GB")


def test_packs_and_unpacks_what_was_compiled(compiled: Compiled, tmp_path: Path) -> None:
    """The packed weights are those of compiling with it; the way back gives the same nodes and bits."""
    dense, small = compiled[False][0], tmp_path / "small.onnx"
    found = pack(dense, small, load_memory=PLENTY)
    assert packed_weights(small) == packed_weights(compiled[True][0])
    assert found["notices"] == []
    assert found["size"] == {"dense": dense.stat().st_size, "packed": small.stat().st_size}
    assert [w["name"] for w in found["weights"]] == [w.name for w in packed_weights(small)]
    back = unpack(small, tmp_path / "back.onnx")
    assert back["size"] == {"dense": (tmp_path / "back.onnx").stat().st_size, "packed": small.stat().st_size}
    left, right = load(dense), load(tmp_path / "back.onnx")
    assert text(left) == text(right)
    assert left.metadata == right.metadata
    for a, b in zip(constants(left), constants(right), strict=True):
        assert (a.name, left.read(a).tobytes()) == (b.name, right.read(b).tobytes())


def test_packed_again_and_with_less_memory(compiled: Compiled, tmp_path: Path) -> None:
    """A packed model is packed anew from its dense weights."""
    again = pack(compiled[True][0], tmp_path / "again.onnx", load_memory=PLENTY)
    assert again["size"]["dense"] == again["size"]["packed"]  # what it was packed from is packed, too
    less = pack(compiled[True][0], tmp_path / "less.onnx", load_memory="46MB")
    assert less["size"]["packed"] > again["size"]["packed"]
    assert_same(run(tmp_path / "less.onnx", feed()), run(compiled[True][0], feed()))


def test_packed_models_are_used_like_others(pruned: Path, compiled: Compiled) -> None:
    (dense, _), (small, _) = compiled[False], compiled[True]
    for path in (dense, small):
        assert bench(path, threads=1)["a_ms"] > 0
    one, other = (onnxq.verify(pruned, path, data=str(FOLDER / "eval.npz"), layers=True, threads=1)
                  for path in (dense, small))
    assert one.ok
    assert other.ok
    assert [vars(layer) for layer in one.layers] == [vars(layer) for layer in other.layers]
    assert [(n.name, n.ran_as) for n in one.nodes] == [(n.name, n.ran_as) for n in other.nodes]
    assert inspect(small)["operators"] == inspect(dense)["operators"]
    assert inspect(small)["weight_bytes"] == inspect(dense)["weight_bytes"]
    kernel = next(n for n in load(dense).nodes if n.op == "MatMulIntegerToFloat").name
    told = [explain(path, kernel) for path in (dense, small)]
    assert told[0]["summary"] == told[1]["summary"]
    assert told[0]["inputs"] == told[1]["inputs"]


def test_a_packed_float_model_compiles(pruned: Path, tmp_path: Path) -> None:
    """Its weights are found where they were, so the same plan comes of it."""
    small = tmp_path / "float.onnx"
    assert pack(pruned, small, load_memory=PLENTY)["size"]["packed"] < 0.6 * pruned.stat().st_size
    paths = []
    for source in (pruned, small):
        paths.append(tmp_path / f"{source.stem}.w8a8.onnx")
        onnxq.compile(source, paths[-1], scheme="w8a8-dynamic", measure=False, threads=1)
    feeds = feed()
    assert_same(run(paths[0], feeds), run(paths[1], feeds))


def test_a_model_that_the_runtime_refuses(tmp_path: Path) -> None:
    """Packed all the same, and it is said that nothing was tried."""
    model = make_model([node("Odd", "x w", "y", domain="own")], {"x": [2]}, {"y": [2]},
                       {"w": np.repeat(examples()["exceptions"].weight, 9, axis=0)}, 21, {"own": 1}, 10)
    onnx.save(model, tmp_path / "m.onnx")
    found = pack(tmp_path / "m.onnx", tmp_path / "p.onnx")
    assert len(found["weights"]) == 1
    assert "can't load the model" in found["notices"][0]


def test_sparse_initializers(pruned: Path, tmp_path: Path) -> None:
    """ONNX's own form: smaller from 67 % zeros of float32 on, of any opset, dense for everyone who reads it."""
    small = tmp_path / "sparse.onnx"
    found = pack(pruned, small, form="sparse-initializer")
    assert found["size"]["packed"] < found["size"]["dense"]
    assert set(found) == {"model", "output", "form", "weights", "size", "notices"}
    model = onnx.load(small)
    onnx.checker.check_model(model)  # onnx's shape inference knows no operator that reads a sparse tensor
    assert not model.functions
    assert model.opset_import[0].version == onnx.load(pruned).opset_import[0].version
    told = packed_weights(small)
    assert [w.name for w in told] == [s.values.name for s in model.graph.sparse_initializer]
    assert {(w.name, w.names, w.packed_bytes) for w in told} == {
        (w["name"], ("SparseInitializer",), w["packed_bytes"]) for w in found["weights"]}
    assert all(w["packed_bytes"] == 12 * round((1 - w["zeros"]) * w["dense_bytes"] / 4) for w in found["weights"])
    assert_same(run(small, feed(), optimize=True), run(pruned, feed(), optimize=True))
    unpack(small, tmp_path / "back.onnx")
    left, right = load(pruned), load(tmp_path / "back.onnx")
    assert {t.name: left.read(t).tobytes() for t in constants(left)} == {
        t.name: right.read(t).tobytes() for t in constants(right)}
    assert packed_weights(tmp_path / "back.onnx") == []


def test_sparse_initializers_keep_what_equals_zero_and_is_not(tmp_path: Path) -> None:
    """-0.0 and NaN; a weight of few zeros stays as it is."""
    weight = np.zeros((96, 40), np.float32)
    weight[::7, 3], weight[5, 5] = -0.0, np.nan
    model = make_model([node("MatMul", "x w", "a"), node("MatMul", "x v", "b")], {"x": [2, 96]},
                       {"a": [2, 40], "b": [2, 40]}, {"w": weight, "v": random(96, 40)}, 17)
    onnx.save(model, tmp_path / "m.onnx")
    found = pack(tmp_path / "m.onnx", tmp_path / "s.onnx", form="sparse-initializer")
    assert [w["name"] for w in found["weights"]] == ["w"]
    graph = load(tmp_path / "s.onnx")
    [read] = [graph.read(t) for t in constants(graph) if t.name == "w"]
    assert read.tobytes() == weight.tobytes()


# ------------------------------------------------------------------ the command line


def call(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    weight = np.repeat(examples()["bitmap"].weight, 20, axis=0)
    nodes = [node("DynamicQuantizeMatMul", "x w scale", "y", domain="com.microsoft")]
    path = tmp_path / "model.onnx"
    stored = {"w": weight, "scale": np.float32(0.1)}
    onnx.save(make_model(nodes, {"x": ["N", len(weight)]}, {"y": ["N", 40]}, stored, 21, CONTRIB, 10), path)
    return path


def test_command_line(model: Path) -> None:
    done = call("pack", model)
    assert done.exit_code == 0, done.output
    small = model.with_name("model.packed.onnx")
    size = small.stat().st_size
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["weight", "shape", "stored", "as", "zeros", "dense", "packed", "share"]
    assert lines[1].split()[:2] == ["w", "1920x40"]
    assert "bitmap, values" in lines[1]
    assert any(line.startswith("1 weight packed: file ") for line in lines)
    assert any("zeros save bytes, not time" in line for line in lines)
    assert lines[-1] == f"wrote {small}"
    back = call("unpack", small, "-o", model.with_name("back.onnx"), "--json")
    found = json.loads(back.stdout)
    assert found["size"]["packed"] == size
    assert found["weights"][0]["encodings"] == ["Bitmap"]
    assert text(load(model.with_name("back.onnx"))) == text(load(model))


def test_command_line_json_and_quiet(model: Path) -> None:
    done = call("pack", model, "--json", "--load-memory", "1GB")
    found = json.loads(done.stdout)
    assert set(found) == {"model", "output", "form", "weights", "limit", "dense_peak", "peak", "packed_bytes",
                          "fewest_bytes", "fewest_peak", "size", "notices"}
    assert found["limit"] == 10**9
    assert set(found["weights"][0]) == {"name", "encodings", "shape", "zeros", "dense_bytes", "packed_bytes"}
    assert call("pack", model, "--force", "-q").output == ""


def test_sparse_initializers_tell_what_they_take(model: Path) -> None:
    done = call("pack", model, "--as", "sparse-initializer")
    assert "0 weights packed" in done.stdout  # 70 % zeros are too few for int8
    assert "int8 gains from 89 % zeros on" in done.stdout
    with pytest.raises(UsageError, match="no form 'zip'"):
        pack(model, form="zip", force=True)


def test_more_memory_is_offered(model: Path) -> None:
    done = call("pack", model, "--load-memory", "45.4MB")
    assert "--load-memory" in done.stdout
    more = next(line for line in done.stdout.splitlines() if "could go with" in line).split()[-1]
    assert "could go" not in call("pack", model, "--force", "--load-memory", more).stdout


@pytest.mark.parametrize(("arguments", "status", "said"), [
    (("pack", "missing.onnx"), 3, "does not exist"),
    (("pack", "model.onnx", "-o", "model.onnx"), 2, "would replace the model itself"),
    (("pack", "model.onnx", "--load-memory", "much"), 2, "a size of 'much'"),
    (("pack", "model.onnx", "--as", "sparse-initializer", "--load-memory", "1GB"), 2, "leave it out"),
    (("unpack", "model.onnx"), 2, "holds no packed weight"),
])
def test_errors(model: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], status: int,
                said: str) -> None:
    monkeypatch.chdir(model.parent)
    done = call(*arguments)
    assert done.exit_code == status
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_existing_files_stay(model: Path) -> None:
    pack(model)
    with pytest.raises(OutputError, match="--force"):
        pack(model)
    with pytest.raises(UsageError, match="a size of '0'"):
        pack(model, force=True, load_memory="0")


def test_a_model_that_can_not_be_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxq.packing
    from onnxq.errors import GraphError

    def refuse(graph: Any, version: int) -> Any:
        raise GraphError("onnx can't raise it")

    onnx.save(reader(examples()["exceptions"].weight, 20), tmp_path / "m.onnx")
    monkeypatch.setattr(onnxq.packing, "raise_opset", refuse)
    with pytest.raises(ModelError, match="opset 21"):
        pack(tmp_path / "m.onnx")
    assert not (tmp_path / "m.packed.onnx").exists()


def test_a_weight_that_changes_is_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The saved file is read again: an encoder that loses anything would be found."""
    from onnxq.numerics import encodings

    real = encodings.bitmap

    def lossy(values: np.ndarray[Any, Any], bits: int = 8) -> encodings.Encoded:
        return real(np.where(values == 5, 6, values).astype(np.int8), bits)

    monkeypatch.setattr(encodings, "bitmap", lossy)
    with pytest.raises(ModelError, match="'w' does not come back"):
        pack(model, load_memory=PLENTY)
    assert not model.with_name("model.packed.onnx").exists()
