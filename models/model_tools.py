"""What the training scripts share: seeding, the training loop, saving and checking a model.

Needs torch, onnx and onnxruntime (`pip install '.[models]'`). Nothing in the package imports this.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

Arrays = dict[str, np.ndarray]
Augment = Callable[[Tensor, torch.Generator], Tensor]
Metric = Callable[[np.ndarray, np.ndarray], float]

MODELS_DIR = Path(__file__).resolve().parent


def parse_args(doc: str | None, name: str, epochs: int) -> argparse.Namespace:
    """Parse the options that every script takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODELS_DIR / name, help="folder to write to")
    parser.add_argument("--epochs", type=int, default=epochs, help=f"default {epochs}")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--threads", type=int, default=2, help="torch threads, default 2")
    return parser.parse_args()


def make_deterministic(seed: int, threads: int) -> None:
    """Seed torch and hold it to deterministic kernels."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield shuffled row indices; a short last batch is dropped, as it would upset BatchNorm."""
    order = torch.randperm(count, generator=generator)
    for start in range(0, count - size + 1, size):
        yield order[start : start + size]


def fit(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    augment: Augment | None = None,
    label_smoothing: float = 0.05,
) -> None:
    """Train with AdamW and a one-cycle schedule; the last weights are kept, nothing is selected.

    `augment` changes the first input only.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=learning_rate,
        total_steps=epochs * (len(labels) // batch_size),
        pct_start=0.15,
    )
    loss_of = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    model.train()
    for epoch in range(1, epochs + 1):
        began, losses = time.monotonic(), []
        for rows in batches(len(labels), batch_size, generator):
            first, *rest = (tensor[rows] for tensor in inputs)
            if augment is not None:
                first = augment(first, generator)
            loss = loss_of(model(first, *rest), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch:3d}  loss {np.mean(losses):.4f}  {time.monotonic() - began:.1f} s")
    model.eval()


def drop_notes(path: Path) -> None:
    """Rewrite a model without its exporter's notes: they hold stack traces, so this machine's paths."""
    model = onnx.load(str(path))
    graph = model.graph
    tensors = [*graph.input, *graph.output, *graph.value_info, *graph.initializer]
    for item in (model, graph, *graph.node, *tensors):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    onnx.save(model, str(path))


def save_rows(path: Path, rows: Arrays, labels: np.ndarray | None = None) -> None:
    """Write one array per graph input, and `labels` for an evaluation set."""
    extra: Arrays = {} if labels is None else {"labels": labels.astype(np.int64)}
    np.savez_compressed(path, **rows, **extra)  # type: ignore[arg-type]


def load_rows(path: Path) -> Arrays:
    """Read a file that `save_rows` wrote."""
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


def run_in_ort(path: Path, rows: Arrays) -> np.ndarray:
    """Run the model once in a plain onnxruntime session and return its logits."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], rows)
    return np.asarray(logits)


def top1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose largest logit is the label's."""
    return float((logits.argmax(axis=1) == labels).mean())


def perplexity(logits: np.ndarray, labels: np.ndarray) -> float:
    """exp of the mean negative log likelihood of labels [N, S] under logits [N, S, V]."""
    scores = logits.astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    own = np.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]
    return float(np.exp(np.mean(np.log(np.exp(scores).sum(axis=-1)) - own)))


def check_disjoint(first: Arrays, second: Arrays) -> None:
    """Fail when a row of `first` is also a row of `second`."""
    seen = row_keys(second)
    shared = sum(key in seen for key in row_keys(first))
    if shared:
        raise ValueError(f"{shared} rows are in both sets")


def row_keys(rows: Arrays) -> set[bytes]:
    """Return each row's bytes over all inputs."""
    names = sorted(rows)
    count = len(rows[names[0]])
    return {b"".join(rows[name][i].tobytes() for name in names) for i in range(count)}


def report(folder: Path, *, metric: Metric = top1, trim_axis_1: bool = False) -> None:
    """Check what was written and print the figures that `manifest.yaml` states.

    `trim_axis_1` also runs the model on inputs cut short along axis 1 (a sequence axis).
    """
    path = folder / "model.onnx"
    calib, evaluation = load_rows(folder / "calib.npz"), load_rows(folder / "eval.npz")
    labels = evaluation.pop("labels")
    check_disjoint(evaluation, calib)
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    logits = run_in_ort(path, evaluation)
    for size in (1, 7):
        part = run_in_ort(path, {name: rows[:size] for name, rows in evaluation.items()})
        np.testing.assert_allclose(part, logits[:size], rtol=1e-3, atol=1e-3)
    if trim_axis_1:
        cut = {name: rows[:3, :20] for name, rows in evaluation.items()}
        if not np.isfinite(run_in_ort(path, cut)).all():
            raise ValueError("shorter rows give no finite logits")
    weights = sum(
        int(np.prod(tensor.dims)) for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT
    )
    print("opset", {entry.domain or "ai.onnx": entry.version for entry in model.opset_import})
    print("ops", dict(Counter(node.op_type for node in model.graph.node).most_common()))
    print("weights", weights)
    for file in sorted(folder.iterdir()):
        print("bytes", file.name, file.stat().st_size)
    print("rows", {"calib": len(next(iter(calib.values()))), "eval": len(labels)})
    print(f"{metric.__name__} {metric(logits, labels):.4f} (onnxruntime {ort.__version__})")
