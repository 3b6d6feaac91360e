"""Train and export models/recurrent: what kind of token do these characters of Python end in?

Writes model.onnx, calib.npz and eval.npz. An embedding, an LSTM and a GRU layer, read character by
character as an editor would that colours the source while it is typed. Exported through TorchScript,
so the graph has the LSTM and GRU operators.

Needs torch, onnx and onnxruntime: pip install '.[models]', and a Python that has its standard
library's source, tkinter and idlelib included. The data are that source, so the figures in
manifest.yaml hold for the Python version that it names.
"""

from __future__ import annotations

import io
import keyword
import random
import tokenize
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
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
from stdlib_snippets import Rows, split_files, take_balanced
from torch import Tensor, nn

OPSET = 14
WINDOW = 64
EMBEDDING = 64
HIDDEN = 96
LABELS = ["attribute", "comment", "definition", "docstring", "keyword", "name", "number", "operator", "string"]
# Character ids: 0 for any other, 1 to 95 for the printable ASCII characters, 96 for a line's end.
FIRST_PRINTABLE, LAST_PRINTABLE, LINE_END = 32, 126, 96
CHARACTERS = LINE_END + 1
FILE_SHARES = (0.7, 0.1, 0.2)
TRAIN_PER_LABEL, CALIB_PER_LABEL, EVAL_PER_LABEL = 4500, 24, 60
# Rows of a calibration or evaluation set end at least this many characters apart: none overlap.
APART = WINDOW


class Recurrent(nn.Module):
    """Character embedding, LSTM, GRU, and a classifier of the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, EMBEDDING)
        self.lstm = nn.LSTM(EMBEDDING, HIDDEN, batch_first=True)
        self.gru = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.classifier = nn.Linear(HIDDEN, len(LABELS))

    def forward(self, sequence: Tensor) -> Tensor:
        x, _ = self.lstm(self.characters(sequence))
        x, _ = self.gru(x)
        logits: Tensor = self.classifier(x[:, -1])
        return logits


def to_ids(text: str) -> np.ndarray:
    """Return a character id for each character."""
    codes = np.array([ord(character) for character in text], dtype=np.int64)
    printable = (codes >= FIRST_PRINTABLE) & (codes <= LAST_PRINTABLE)
    ids = np.where(printable, codes - FIRST_PRINTABLE + 1, 0)
    ids[codes == ord("\n")] = LINE_END
    return ids


def label_of(token: tokenize.TokenInfo, before: str, starts_statement: bool) -> str | None:
    """Name a token's kind; `before` is the text of the token in front of it. None for layout."""
    kind = tokenize.tok_name[token.type]
    if kind == "STRING":
        return "docstring" if starts_statement else "string"
    if kind == "NAME":
        if keyword.iskeyword(token.string):
            return "keyword"
        return {"def": "definition", "class": "definition", ".": "attribute"}.get(before, "name")
    # FSTRING_MIDDLE is the text of an f-string from Python 3.12 on.
    return {"COMMENT": "comment", "NUMBER": "number", "OP": "operator", "FSTRING_MIDDLE": "string"}.get(kind)


def find_ends(text: str, place: random.Random) -> Iterator[tuple[int, int]]:
    """Yield, of each token, the offset behind a character of it and the number of its label.

    The character is the token's last one, so that words are whole; in strings and comments it is
    any but the first two, which may be a prefix.
    """
    line_starts = [0, *accumulate(map(len, io.StringIO(text)))]
    before, starts_statement = "", True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        label = label_of(token, before, starts_statement)
        if label is not None:
            start = line_starts[token.start[0] - 1] + token.start[1]
            end = line_starts[token.end[0] - 1] + token.end[1]
            if label in ("comment", "docstring", "string"):
                end = place.randint(min(start + 3, end), end)
            yield end, LABELS.index(label)
        if tokenize.tok_name[token.type] not in ("COMMENT", "NL"):
            starts_statement = label is None
            before = token.string


def cut_windows(files: Iterable[tuple[Path, int]], seed: int, apart: int = 1) -> Rows:
    """Cut the WINDOW characters up to each token's end out of the files.

    In one file, windows end at least `apart` characters apart.
    """
    place = random.Random(seed)
    windows, labels = [], []
    for path, _ in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        ids, last = to_ids(text), 0
        for end, label in find_ends(text, place):
            if end >= WINDOW and end - last >= apart:
                windows.append(ids[end - WINDOW : end])
                labels.append(label)
                last = end
    input_ids = np.stack(windows)
    return Rows(input_ids, np.ones_like(input_ids), np.array(labels, dtype=np.int64))


def make_data(seed: int) -> tuple[Rows, Rows, Rows]:
    """Return the training, calibration and evaluation rows."""
    train_files, calib_files, eval_files = split_files(seed, FILE_SHARES)
    train = take_balanced(cut_windows(train_files, seed), TRAIN_PER_LABEL, seed)
    calib = take_balanced(cut_windows(calib_files, seed, APART), CALIB_PER_LABEL, seed, apart_from=[train])
    evaluation = cut_windows(eval_files, seed, APART)
    evaluation = take_balanced(evaluation, EVAL_PER_LABEL, seed, apart_from=[train, calib])
    return train, calib, evaluation


def export(model: nn.Module, path: Path) -> None:
    """Export through TorchScript with dynamic batch and sequence axes."""
    torch.onnx.export(
        model,
        (torch.zeros(2, WINDOW, dtype=torch.int64),),
        path,
        dynamo=False,
        opset_version=OPSET,
        input_names=["sequence"],
        output_names=["logits"],
        dynamic_axes={"sequence": {0: "batch", 1: "sequence"}, "logits": {0: "batch"}},
    )
    drop_notes(path)


def as_inputs(rows: Rows) -> Arrays:
    """Name the rows' array as the graph names its input."""
    return {"sequence": rows.input_ids}


def main() -> None:
    args = parse_args(__doc__, "recurrent", epochs=3)
    make_deterministic(args.seed, args.threads)
    train, calib, evaluation = make_data(args.seed)
    print("training rows", len(train.labels))
    model = Recurrent()
    fit(
        model,
        (torch.from_numpy(train.input_ids),),
        torch.from_numpy(train.labels),
        epochs=args.epochs,
        batch_size=128,
        learning_rate=4e-3,
        weight_decay=1e-2,
        seed=args.seed,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "model.onnx"
    export(model, path)
    save_rows(args.out / "calib.npz", as_inputs(calib))
    save_rows(args.out / "eval.npz", as_inputs(evaluation), evaluation.labels)
    # If settings are to be chosen, then by this figure; the evaluation rows are for the one reported.
    print(f"calib top1 {top1(run_in_ort(path, as_inputs(calib)), calib.labels):.4f}")
    report(args.out, trim_axis_1=True)


if __name__ == "__main__":
    main()
