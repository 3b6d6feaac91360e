"""Whatever is wrong with the input: the right kind of error, one sentence with a remedy, and nothing left behind."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_model, node, random

import onnxq
from onnxq.errors import DataError, ModelError, OnnxqError, OutputError, RecipeError, UsageError
from onnxq.progress import Silent

DATA = {"x": random(20, 8)}


def classifier(**change: Any) -> onnx.ModelProto:
    """x [N, 8] -> 32 -> 16 -> 3 logits."""
    stored = {"w": random(8, 32), "v": random(32, 16), "u": random(16, 3), "b": random(16), **change}
    return make_model([node("MatMul", "x w", "h"), node("Relu", "h", "r"), node("Gemm", "r v b", "g", name="fc"),
                       node("MatMul", "g u", "y")], {"x": ["N", 8]}, {"y": ["N", 3]}, stored)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with model.onnx and data.npz, the current one; temporary files go to `tmp` in it."""
    onnx.save(classifier(), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", **DATA)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))
            if "__pycache__" not in p.parts}


@contextmanager
def refused(kind: type[OnnxqError], *parts: str) -> Iterator[None]:
    """The body raises exactly this kind with one sentence that holds `parts`, and leaves the folder as it was."""
    before = listing(Path.cwd())
    with pytest.raises(kind) as caught:
        yield
    text = str(caught.value)
    assert caught.type is kind, text
    assert len(text.splitlines()) == 1
    assert "Traceback" not in text
    for part in parts:
        assert part in text, text
    assert any(mark in text for mark in ("; ", ": ", "give ", "use ", "choose ")), f"no remedy in: {text}"
    assert listing(Path.cwd()) == before


def compiled(model: str = "model.onnx", **options: Any) -> Any:
    return onnxq.compile(model, options.pop("output", "out.onnx"), **{"calib": "data.npz", "measure": False, **options})


# ------------------------------------------------------------------ the model


MODELS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "holds no ONNX graph"),
    "text": (b"this is no model, it is only text\n" * 9, "is not an ONNX model or is cut short"),
    "truncated": (classifier().SerializeToString()[:-700], "is not an ONNX model or is cut short"),
    "no nodes": (make_model([], {"x": [1]}, {"x": [1]}).SerializeToString(), "has no nodes"),
    "opset 6": (make_model([node("Relu", "x", "y")], {"x": [1]}, {"y": [1]}, opset=6).SerializeToString(),
                "uses opset 6; the oldest that onnxq reads is 7"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_file_that_is_no_model(case: str, here: Path) -> None:
    content, part = MODELS[case]
    Path("bad.onnx").write_bytes(content)
    with refused(ModelError, "bad.onnx", part):
        compiled("bad.onnx")


def test_a_model_that_is_not_there_is_named_before_the_output(here: Path) -> None:
    with refused(ModelError, "missing.onnx does not exist; check the path"):
        compiled("missing.onnx")
    with refused(ModelError, "nowhere/missing.onnx does not exist"):
        onnxq.compile("nowhere/missing.onnx")
    with refused(ModelError, "is not a file"):
        compiled("tmp")


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic-tensor"])
def test_weights_that_are_no_numbers(scheme: str, here: Path) -> None:
    weight = random(32, 16)
    weight[4, 5] = np.nan
    onnx.save(classifier(v=weight), "nan.onnx")
    with refused(ModelError, "the weights 'v' of fc hold NaN"):
        compiled("nan.onnx", scheme=scheme, calib=None if "dynamic" in scheme else "data.npz")


def test_a_model_whose_inputs_disagree_at_run_time(here: Path) -> None:
    onnx.save(make_model([node("Reshape", "x s", "r"), node("MatMul", "r w", "y")], {"x": ["N", 8]}, {"y": None},
                         {"s": np.array([3, 32]), "w": random(32, 16)}), "odd.onnx")
    with refused(ModelError, "onnxruntime failed in a run of"):
        compiled("odd.onnx")


# ------------------------------------------------------------------ the data


ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown input": ({"xx": random(4, 8)}, "did you mean 'x'?"),
    "extra input": ({**DATA, "mask": random(20, 8)}, "'mask', which the model does not take"),
    "missing input": ({"labels": np.zeros(4, np.int64)}, "lacks the model's inputs x"),
    "wrong rank": ({"x": random(4, 8, 2, 2)}, "float32 [4, 8, 2, 2] and input 'x' wants float32 [N, 8]"),
    "wrong width": ({"x": random(4, 9)}, "wants float32 [N, 8]"),
    "wrong dtype": ({"x": np.ones((4, 8), np.complex64)}, "wants float32 [N, 8]"),
    "text": ({"x": np.array([["a"] * 8])}, "wants float32 [N, 8]"),
    "no rows": ({"x": np.empty((0, 8), np.float32)}, "has no rows"),
    "labels of the wrong length": ({**DATA, "labels": np.zeros(7, np.int64)}, "has 7 labels for 20 rows"),
    "NaN": ({"x": np.where(np.arange(160).reshape(20, 8) == 30, np.nan, 1).astype(np.float32)},
            "input 'x' holds NaN in row 3"),
    "objects": ({"x": np.array([None] * 8, object)}, "never unpickled"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_data_that_do_not_fit(case: str, here: Path) -> None:
    arrays, part = ARRAYS[case]
    np.savez("bad.npz", **arrays)
    with refused(DataError, part):
        compiled(calib="bad.npz")


def test_unequal_rows_of_two_inputs(here: Path) -> None:
    onnx.save(make_model([node("Add", "x z", "s"), node("MatMul", "s w", "y")], {"x": ["N", 32], "z": ["M", 32]},
                         {"y": None}, {"w": random(32, 16)}), "two.onnx")
    np.savez("bad.npz", x=random(4, 32), z=random(5, 32))
    with refused(DataError, "unequal numbers of rows ('x' 4, 'z' 5)"):
        compiled("two.onnx", calib="bad.npz")


FILES: dict[str, tuple[Callable[[], str], str]] = {
    "missing": (lambda: "nothing.npz", "which is missing"),
    "not an archive": (lambda: written("bad.npz", b"no archive"), "bad.npz can't be read"),
    "truncated": (lambda: written("bad.npz", Path("data.npz").read_bytes()[:300]), "bad.npz can't be read"),
    "empty folder": (lambda: "tmp", "folder tmp has no .npz"),
    "no such module": (lambda: "no_such_module:feeds", "module 'no_such_module'"),
}


def written(name: str, content: bytes) -> str:
    Path(name).write_bytes(content)
    return name


@pytest.mark.parametrize("case", FILES)
def test_data_that_can_not_be_read(case: str, here: Path) -> None:
    make, part = FILES[case]
    spec = make()
    with refused(DataError, part):
        compiled(calib=spec)


def test_a_metric_without_its_labels(here: Path) -> None:
    with refused(DataError, "metric top1 needs labels, and data.npz has none"):
        compiled(eval="data.npz", metric="top1")


def test_labels_of_another_metric(here: Path) -> None:
    np.savez("pairs.npz", **DATA, labels=np.arange(10))
    with refused(DataError, "pairs.npz has 10 labels for 20 rows; metric top1 wants one label per row"):
        compiled(eval="pairs.npz", metric="top1")
    np.savez("single.npz", **DATA, labels=np.arange(20))
    with refused(DataError, "has 20 labels for 20 rows; metric spearman wants one label per 2 rows"):
        compiled(eval="single.npz", metric="spearman")


def test_a_generator_that_fails(here: Path) -> None:
    def feeds() -> Iterator[dict[str, Any]]:
        yield {"x": random(2, 8)}
        raise RuntimeError("the camera is unplugged")

    with refused(DataError, "failed at feed 1 (RuntimeError: the camera is unplugged)"):
        compiled(calib=feeds)


# ------------------------------------------------------------------ the call


CALLS: dict[str, tuple[dict[str, Any], type[OnnxqError], str]] = {
    "unknown scheme": ({"scheme": "w8b8"}, UsageError, "there is no scheme 'w8b8'"),
    "unknown metric": ({"metric": "best"}, UsageError, "best"),
    "unknown target": ({"target": "npu"}, UsageError, "there is no target 'npu'; known: cpu"),
    "unknown format": ({"format": "qdp"}, UsageError, "there is no format 'qdp'; use one of auto, qdq, qoperator"),
    "unknown ranges": ({"ranges": "median"}, UsageError, "median"),
    "static without data": ({"scheme": "w8a8", "calib": None}, UsageError, "give --calib DATA, or choose"),
    "budget without data": ({"calib": None, "max_drop": "1%"}, UsageError, "--max-drop needs data"),
    "metric without data": ({"calib": None, "metric": "top1"}, UsageError, "--metric needs data"),
    "no number": ({"max_drop": "a bit"}, UsageError, "a bit"),
    "a budget on sqnr": ({"metric": "sqnr", "max_drop": "1%"}, UsageError, "--min-sqnr DB"),
    "no node of that name": ({"keep_float": ["fd"]}, UsageError, "--keep-float 'fd' matches no node; near: fc"),
    "fallback without data": ({"scheme": "w8a8-dynamic", "calib": None, "fallback": 2}, UsageError,
                              "--fallback 2 ranks layers by what calibration data make of them; give --calib DATA"),
    "a negative fallback": ({"fallback": -1}, RecipeError, "fallback.level: -1 layers can't stay float"),
    "negative threads": ({"threads": -1}, UsageError, "threads"),
    "no samples": ({"samples": 0}, UsageError, "samples"),
    "empty batches": ({"batch": 0}, UsageError, "batch"),
    "no such recipe": ({"recipe": "no.yaml"}, UsageError, "no.yaml can't be read"),
    "unknown pass": ({"dump": "d", "dump_after": "fuse"}, UsageError, "there is no pass 'fuse'; known: "),
    "no such metric function": ({"metric": "no_such_module:f"}, UsageError, "can't be imported"),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_is_wrong(case: str, here: Path) -> None:
    options, kind, part = CALLS[case]
    with refused(kind, part):
        compiled(**options)


RECIPES: dict[str, tuple[str, str]] = {
    "unknown key": ("scheme: w8a8\nschema: 3\n", "schema: there is no such key; did you mean 'scheme'?"),
    "unknown inner key": ("scheme: w8a8\ncalibration: {sample: 3}\n", "calibration.sample: there is no such key"),
    "unknown scheme": ("scheme: w9a9\n", "scheme: there is no scheme 'w9a9'"),
    "wrong kind": ("scheme: w8a8\ncalibration: {samples: many}\n", "calibration.samples: int is wanted"),
    "no mapping": ("- 1\n", "must be a mapping"),
    "no YAML": ("scheme: [\n", "is not valid YAML"),
    "a rule of another scheme": ("scheme: w8a8\nrules: [{match: {op: Conv}, scheme: w4a4}]\n", "rules[0].scheme"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_that_can_not_be_used(case: str, here: Path) -> None:
    text, part = RECIPES[case]
    Path("recipe.yaml").write_text(text)
    with refused(RecipeError, part):
        compiled(recipe="recipe.yaml")


def test_a_scheme_and_a_recipe(here: Path) -> None:
    Path("recipe.yaml").write_text("scheme: w8a8\n")
    with refused(UsageError, "exclude one another"):
        compiled(recipe="recipe.yaml", scheme="w8a8")


# ------------------------------------------------------------------ the output


def test_an_output_that_can_not_be_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("not a folder")
    with refused(OutputError, "file, is not a folder"):
        compiled(output="file/out.onnx")
    with refused(OutputError, "does not exist; make it"):
        compiled(output="nowhere/out.onnx")
    with refused(OutputError, "tmp is a folder; name the file"):
        compiled(output="tmp")
    with refused(OutputError, "exists; give --force"):
        compiled(output="data.npz")
    with refused(UsageError, "would replace the model itself"):
        compiled(output="./model.onnx", force=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with refused(OutputError, "can't be written; choose another -o"):
        compiled()


@pytest.mark.parametrize("full", ["", "tmp"], ids=["output folder", "temporary folder"])
def test_a_full_disk(full: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes below the folder end with ENOSPC after some bytes."""
    real = os.fdopen

    def fdopen(handle: int, *mode: Any, **more: Any) -> Any:
        file = real(handle, *mode, **more)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.parent != here and not (full and path.is_relative_to(here / full)):
            return file

        def write(data: Any) -> int:
            file.raw.write(bytes(data)[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return Full(file, write)

    monkeypatch.setattr(os, "fdopen", fdopen)
    with refused(OutputError, "No space left on device", "free some space"):
        compiled()
    Path("out.onnx").write_bytes(b"what was there before")
    with refused(OutputError, "No space left on device"):
        compiled(force=True)


class Full:
    """A file whose disk is full."""

    def __init__(self, file: Any, write: Callable[[Any], int]) -> None:
        self.file, self.write = file, write

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *what: object) -> None:
        self.file.close()

    def seek(self, offset: int) -> int:
        return int(self.file.seek(offset))


@pytest.mark.parametrize("stage", ["calibrate", "rewrite", "verify", "accuracy", "save"])
def test_an_interruption_leaves_nothing(stage: str, here: Path) -> None:
    class Impatient(Silent):
        def stage(self, name: str) -> None:
            if name == stage:
                raise KeyboardInterrupt

    before = listing(here)
    with pytest.raises(KeyboardInterrupt):
        compiled(progress=Impatient())
    assert listing(here) == before


def test_the_good_call_beside_all_these_works(here: Path) -> None:
    assert compiled().ok
    assert sorted(listing(here)) == ["data.npz", "model.onnx", "out.onnx", "tmp"]
