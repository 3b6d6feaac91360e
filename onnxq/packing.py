"""pack() and unpack(): the weights of a model that there is already, in fewer bytes and back."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import sizes
from onnxq.errors import GraphError, ModelError, UsageError
from onnxq.graph import (
    PackedWeight,
    constants,
    load,
    packed_weights,
    raise_opset,
    read_nodes,
    save,
    stored_bytes,
)
from onnxq.passes.manager import Context, PassManager
from onnxq.passes.pack.sparse import StoreSparse
from onnxq.passes.pack.weights import OPSET, PackWeights
from onnxq.progress import Progress, Silent
from onnxq.report.report import plain
from onnxq.request import check_output
from onnxq.runtime.observe import optimized
from onnxq.runtime.session import SessionOptions

FUNCTIONS, SPARSE_INITIALIZER = "functions", "sparse-initializer"
FORMS = (FUNCTIONS, SPARSE_INITIALIZER)


def pack(model: str | Path, output: str | Path | None = None, *, load_memory: int | str | None = None,
         form: str = FUNCTIONS, force: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Write a model whose constants of int8, uint8 and float32 are packed where that makes them smaller.

    `form` is functions, which decode, or sparse-initializer: ONNX's own form for many zeros, which takes more bytes and
    leaves the opset as it is. `load_memory` ("500MB", or bytes) bounds the estimated peak of loading; by default the
    model may take 2.5 times as much over an empty process as it takes dense, or 16 MB if that is more. The result is
    read again: every weight has to come back bit for bit, and onnxruntime's optimized graph has to have the operators
    of the dense model's.
    `output` is MODEL.packed.onnx beside the model where it isn't given. Raises UsageError for a wrong call,
    OutputError for a file that can't be written, and ModelError when a check fails.
    """
    source, destination = Path(model), _named(model, output, "packed")
    if form not in FORMS:
        raise UsageError(f"there is no form {form!r}; use {' or '.join(FORMS)}")
    if form == SPARSE_INITIALIZER and load_memory is not None:
        raise UsageError("--load-memory bounds what decoders take, and sparse initializers have none; leave it out")
    limit = sizes.parse(load_memory) if isinstance(load_memory, str) else load_memory
    bar = progress or Silent()
    bar.stage("load")
    graph = load(source)
    check_output(source, destination, force)
    context = Context()
    bar.stage("pack")
    if form == FUNCTIONS:
        try:
            graph = raise_opset(graph, OPSET)
        except GraphError as e:
            raise ModelError(f"packed weights take opset {OPSET}: {e}") from None
    PassManager([PackWeights(limit) if form == FUNCTIONS else StoreSparse()]).run(graph, context)
    bar.stage("save")
    save(graph, destination)
    bar.stage("check")
    try:
        _check_weights(source, destination)
        notices = _check_kernels(source, destination)
    except ModelError:
        for path in (destination, destination.with_name(f"{destination.name}.data")):
            path.unlink(missing_ok=True)
        raise
    told = plain(asdict(context.packing))
    if form == SPARSE_INITIALIZER:  # no memory to tell of
        told = {"weights": told["weights"]}
    return {"model": str(source), "output": str(destination), "form": form, **told,
            "size": {"dense": stored_bytes(source), "packed": stored_bytes(destination)}, "notices": notices}


def unpack(model: str | Path, output: str | Path | None = None, *, force: bool = False,
           progress: Progress | None = None) -> dict[str, Any]:
    """Write a model whose packed weights are dense again, bit for bit; `output` is MODEL.dense.onnx by default.

    Raises UsageError where nothing is packed, and OutputError for a file that can't be written.
    """
    source, destination = Path(model), _named(model, output, "dense")
    bar = progress or Silent()
    bar.stage("load")
    graph = load(source)
    check_output(source, destination, force)
    found = packed_weights(source)
    if not found:
        raise UsageError(f"{source} holds no packed weight; onnxq pack makes such models")
    bar.stage("save")
    save(graph, destination)
    return {"model": str(source), "output": str(destination), "weights": [_row(weight) for weight in found],
            "size": {"packed": stored_bytes(source), "dense": stored_bytes(destination)}}


def _named(model: str | Path, output: str | Path | None, kind: str) -> Path:
    return Path(output) if output is not None else Path(model).with_name(f"{Path(model).stem}.{kind}.onnx")


def _row(weight: PackedWeight) -> dict[str, Any]:
    return {"name": weight.name, "encodings": list(weight.names), "shape": list(weight.shape),
            "dense_bytes": weight.dense_bytes, "packed_bytes": weight.packed_bytes}


def _check_weights(dense: Path, packed: Path) -> None:
    """Compare what is stored, weight by weight. Raises ModelError."""
    left, right = load(dense), load(packed)
    known = {t.name: t for t in constants(left)}
    for tensor in constants(right):
        if tensor.name in known and not _same(left.read(known[tensor.name]), right.read(tensor)):
            raise ModelError(f"{tensor.name!r} does not come back from {packed}; keep the dense model, and please "
                             "report this")


def _same(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and (a.tobytes() == b.tobytes() if a.dtype != object
                                                         else bool(np.array_equal(a, b)))


def _check_kernels(dense: Path, packed: Path) -> list[str]:
    """Compare the operators that the runtime makes of both. Gives a notice where it can't load the dense model, either;
    raises ModelError where they differ."""
    options = SessionOptions()
    try:
        wanted = Counter(node.op for node in optimized(dense, options, read_nodes))
    except ModelError:
        return ["onnxruntime can't load the model, so it was not checked that it decodes the weights as it loads it"]
    found = Counter(node.op for node in optimized(packed, options, read_nodes))
    if found != wanted:
        differing = sorted(op for op in found | wanted if found[op] != wanted[op])
        raise ModelError(f"onnxruntime runs other operators in {packed} than in the dense model "
                         f"({', '.join(differing)}); keep the dense model, and please report this")
    return []
