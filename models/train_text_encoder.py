"""Train and export models/text_encoder: which standard-library package is this snippet from?

Writes model.onnx, vocabulary.json, calib.npz and eval.npz. A transformer encoder with LayerNorm,
Gelu and masked Softmax attention, exported by torch's dynamo exporter.

Needs torch, onnx, onnxscript and onnxruntime: pip install '.[models]', and a Python that has its
standard library's source, tkinter and idlelib included. The data are that source, so the
figures in manifest.yaml hold for the Python version that it names.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from model_tools import (
    Arrays,
    drop_notes,
    fit,
    make_deterministic,
    parse_args,
    report,
    run_in_ort,
    save_rows,
    top1,
)
from stdlib_snippets import (
    LABELS,
    MAX_TOKENS,
    PAD,
    UNKNOWN,
    Rows,
    build_vocabulary,
    cut_snippets,
    split_files,
    take_balanced,
    to_rows,
)
from torch import Tensor, nn
from torch.nn import functional as F

OPSET = 20
VOCABULARY = 2048
HIDDEN = 96
HEADS = 4
LAYERS = 2
DROPOUT = 0.1
# Large enough to silence a padded position, and like what exported encoders really hold.
MASKED_SCORE = -1e9
FILE_SHARES = (0.7, 0.1, 0.2)
TRAIN_PER_LABEL, CALIB_PER_LABEL, EVAL_PER_LABEL = 3600, 20, 60


class Attention(nn.Module):
    """Multi-head self-attention, spelled out so that the graph shows MatMul and Softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(HIDDEN, HIDDEN)
        self.key = nn.Linear(HIDDEN, HIDDEN)
        self.value = nn.Linear(HIDDEN, HIDDEN)
        self.output = nn.Linear(HIDDEN, HIDDEN)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        batch, length, _ = x.shape
        split = (batch, length, HEADS, HIDDEN // HEADS)
        query = self.query(x).view(split).transpose(1, 2)
        key = self.key(x).view(split).permute(0, 2, 3, 1)
        value = self.value(x).view(split).transpose(1, 2)
        scores = (query @ key) * (HIDDEN // HEADS) ** -0.5
        weights = self.dropout(scores.masked_fill(padded, MASKED_SCORE).softmax(dim=-1))
        mixed: Tensor = self.output((weights @ value).transpose(1, 2).reshape(batch, length, HIDDEN))
        return mixed


class EncoderLayer(nn.Module):
    """Attention and a feed-forward part, each normalized after its shortcut, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.attention_norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN)
        self.output_norm = nn.LayerNorm(HIDDEN)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, padded)))
        y: Tensor = self.output_norm(x + self.dropout(self.down(F.gelu(self.up(x)))))
        return y


class TextEncoder(nn.Module):
    """Token and position embeddings, the layers, the mean over real tokens, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN, padding_idx=PAD)
        self.positions = nn.Embedding(MAX_TOKENS, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.dropout = nn.Dropout(DROPOUT)
        self.layers = nn.ModuleList(EncoderLayer() for _ in range(LAYERS))
        self.classifier = nn.Linear(HIDDEN, len(LABELS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.dropout(self.norm(self.tokens(input_ids) + self.positions(places)))
        padded = (attention_mask == 0)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, padded)
        kept = attention_mask.unsqueeze(-1).to(x.dtype)
        logits: Tensor = self.classifier(self.dropout((x * kept).sum(dim=1) / kept.sum(dim=1)))
        return logits


def make_data(seed: int) -> tuple[list[str], Rows, Rows, Rows]:
    """Return the vocabulary and the training, calibration and evaluation rows."""
    train_files, calib_files, eval_files = split_files(seed, FILE_SHARES)
    train_snippets = cut_snippets(train_files, step=2, seed=seed)
    vocabulary = build_vocabulary(train_snippets, VOCABULARY)
    train = take_balanced(to_rows(train_snippets, vocabulary), TRAIN_PER_LABEL, seed)
    # As many lines apart as the longest snippet has: no two of these rows share a line.
    calib = to_rows(cut_snippets(calib_files, step=6, seed=seed), vocabulary)
    calib = take_balanced(calib, CALIB_PER_LABEL, seed, apart_from=[train])
    evaluation = to_rows(cut_snippets(eval_files, step=6, seed=seed), vocabulary)
    evaluation = take_balanced(evaluation, EVAL_PER_LABEL, seed, apart_from=[train, calib])
    return vocabulary, train, calib, evaluation


def drop_tokens(ids: Tensor, generator: torch.Generator) -> Tensor:
    """Replace a tenth of the tokens by [UNK], so that no single word decides."""
    hit = torch.rand(ids.shape, generator=generator) < 0.1
    return torch.where(hit & (ids != PAD), UNKNOWN, ids)


def export(model: nn.Module, path: Path) -> None:
    """Export with dynamic batch and sequence axes and the weights inside the model."""
    ids = torch.randint(2, VOCABULARY, (2, 48))
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=MAX_TOKENS)}
    torch.onnx.export(
        model,
        (ids, torch.ones_like(ids)),
        path,
        dynamo=True,
        opset_version=OPSET,
        external_data=False,
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
    )
    drop_notes(path)


def as_inputs(rows: Rows) -> Arrays:
    """Name the rows' arrays as the graph names its inputs."""
    return {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}


def main() -> None:
    args = parse_args(__doc__, "text_encoder", epochs=5)
    make_deterministic(args.seed, args.threads)
    vocabulary, train, calib, evaluation = make_data(args.seed)
    print("training rows", len(train.labels))
    model = TextEncoder()
    fit(
        model,
        (torch.from_numpy(train.input_ids), torch.from_numpy(train.attention_mask)),
        torch.from_numpy(train.labels),
        epochs=args.epochs,
        batch_size=128,
        learning_rate=2e-3,
        weight_decay=5e-2,
        seed=args.seed,
        augment=drop_tokens,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "model.onnx"
    export(model, path)
    text = json.dumps({"labels": LABELS, "tokens": vocabulary}, ensure_ascii=False, indent=0)
    (args.out / "vocabulary.json").write_text(text + "\n", encoding="utf-8")
    save_rows(args.out / "calib.npz", as_inputs(calib))
    save_rows(args.out / "eval.npz", as_inputs(evaluation), evaluation.labels)
    # Settings are chosen by this figure; the evaluation rows are only for the one reported.
    print(f"calib top1 {top1(run_in_ort(path, as_inputs(calib)), calib.labels):.4f}")
    report(args.out, trim_axis_1=True)


if __name__ == "__main__":
    main()
