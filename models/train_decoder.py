"""Train and export models/decoder: a small language model of Python source, with a key/value cache.

Writes model.onnx, vocabulary.json, calib.npz and eval.npz. A decoder of the Llama kind: RMSNorm,
rotary positions, attention with fewer key/value heads than query heads, SwiGLU. Exported through
TorchScript, with the input and output names that exported language models usually have.

Needs torch, onnx and onnxruntime: pip install '.[models]', and a Python that has its standard
library's source, tkinter and idlelib included. The data are that source, so the figures in
manifest.yaml hold for the Python version that it names.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from model_tools import (
    Arrays,
    drop_notes,
    fit,
    make_deterministic,
    parse_args,
    perplexity,
    report,
    run_in_ort,
    save_rows,
)
from stdlib_snippets import Snippet, build_vocabulary, cut_rows, read_marked, split_files, take_distinct
from torch import Tensor, nn
from torch.nn import functional as F

OPSET = 17
VOCABULARY = 1024
SEQUENCE = 128
HIDDEN = 96
LAYERS = 3
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16
INNER = 224
ROPE_BASE = 10_000.0
EPSILON = 1e-5
FILE_SHARES = (0.7, 0.1, 0.2)
CALIB_ROWS, EVAL_ROWS = 64, 128


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight, spelled out so that the graph shows its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + EPSILON))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [batch, heads, sequence, HEAD_DIM] by its positions' angles; pairs lie half a head apart."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention over the cached and the new positions."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        query = rotate(self.q_proj(x).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2), *turn)
        key = rotate(self.k_proj(x).view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2), *turn)
        value = self.v_proj(x).view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2)
        key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        scores = query @ self.for_each_query(key).transpose(2, 3) * HEAD_DIM**-0.5
        weights = (scores + mask).softmax(dim=-1)
        mixed = (weights @ self.for_each_query(value)).transpose(1, 2).reshape(batch, length, HEADS * HEAD_DIM)
        return self.o_proj(mixed), key, value

    @staticmethod
    def for_each_query(x: Tensor) -> Tensor:
        """Repeat each key/value head [batch, KV_HEADS, ..] for the query heads that share it."""
        batch, _, total, _ = x.shape
        shared = x[:, :, None].expand(batch, KV_HEADS, HEADS // KV_HEADS, total, HEAD_DIM)
        return shared.reshape(batch, HEADS, total, HEAD_DIM)


class DecoderLayer(nn.Module):
    """Attention and SwiGLU, each normalized in front, as in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.input_norm = RMSNorm()
        self.attention = Attention()
        self.mlp_norm = RMSNorm()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixed, key, value = self.attention(self.input_norm(x), turn, mask, past)
        x = x + mixed
        y = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y)), key, value


class Decoder(nn.Module):
    """Token embedding, the layers, a last norm and an untied head."""

    inverse_frequency: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        self.layers = nn.ModuleList(DecoderLayer() for _ in range(LAYERS))
        self.norm = RMSNorm()
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        exponents = torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM
        self.register_buffer("inverse_frequency", ROPE_BASE**-exponents)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the logits [batch, sequence, VOCABULARY], then each layer's key and value.

        `past` is each layer's key and value [batch, KV_HEADS, past, HEAD_DIM]; what is returned
        is as long as attention_mask, [batch, past + sequence].
        """
        angles = position_ids[:, None, :, None].float() * self.inverse_frequency
        angles = torch.cat([angles, angles], dim=-1)
        turn = (angles.cos(), angles.sin())
        mask = self.make_mask(attention_mask, input_ids.shape[1])
        x, present = self.embed_tokens(input_ids), []
        for number, layer in enumerate(self.layers):
            x, key, value = layer(x, turn, mask, (past[2 * number], past[2 * number + 1]))
            present += [key, value]
        return (self.lm_head(self.norm(x)), *present)

    @staticmethod
    def make_mask(attention_mask: Tensor, length: int) -> Tensor:
        """Return what is added to scores: 0 for real tokens up to the query's own, else float32's least."""
        places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        seen = places <= places[-length:, None]
        allowed = seen & (attention_mask != 0)[:, None, None, :]
        return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)


class NextToken(nn.Module):
    """The decoder in training: full rows without a past, and the classes on axis 1 as the loss wants them."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor) -> Tensor:
        feed = {name: torch.from_numpy(array) for name, array in prefill(input_ids.numpy()).items()}
        logits: Tensor = self.decoder(*feed.values())[0]
        return logits.transpose(1, 2)


def prefill(input_ids: np.ndarray) -> Arrays:
    """Name the inputs of the first call, in the graph's order: no past, every token real."""
    rows, length = input_ids.shape
    positions = np.tile(np.arange(length, dtype=np.int64), (rows, 1))
    feed = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids), "position_ids": positions}
    for name in cache_names("past_key_values"):
        feed[name] = np.zeros((rows, KV_HEADS, 0, HEAD_DIM), dtype=np.float32)
    return feed


def cache_names(prefix: str) -> list[str]:
    """Name each layer's key and value."""
    return [f"{prefix}.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]


def make_data(seed: int) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Return the vocabulary and the training, calibration and evaluation rows [rows, SEQUENCE + 1]."""
    texts = [[read_marked(path) for path, _ in files] for files in split_files(seed, FILE_SHARES)]
    vocabulary = build_vocabulary([Snippet(text, 0) for text in texts[0]], VOCABULARY)
    train, calib, evaluation = (cut_rows(part, vocabulary, SEQUENCE) for part in texts)
    calib = take_distinct(calib, CALIB_ROWS, seed, apart_from=[train])
    evaluation = take_distinct(evaluation, EVAL_ROWS, seed, apart_from=[train, calib])
    return vocabulary, train, calib, evaluation


def export(model: nn.Module, path: Path) -> None:
    """Export through TorchScript; batch, sequence, past and total (past + sequence) are dynamic."""
    past, present = cache_names("past_key_values"), cache_names("present")
    feed = prefill(np.ones((2, 5), dtype=np.int64))
    feed["attention_mask"] = np.ones((2, 8), dtype=np.int64)
    feed["position_ids"] += 3
    for name in past:
        feed[name] = np.zeros((2, KV_HEADS, 3, HEAD_DIM), dtype=np.float32)
    axes = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "position_ids", "logits")}
    axes["attention_mask"] = {0: "batch", 1: "total"}
    axes |= {name: {0: "batch", 2: "past"} for name in past}
    axes |= {name: {0: "batch", 2: "total"} for name in present}
    torch.onnx.export(
        model,
        tuple(torch.from_numpy(array) for array in feed.values()),
        path,
        dynamo=False,
        opset_version=OPSET,
        input_names=list(feed),
        output_names=["logits", *present],
        dynamic_axes=axes,
    )
    drop_notes(path)


def check_cache(path: Path, input_ids: np.ndarray) -> float:
    """Decode token by token with the cache and return the largest difference from the prefill's logits.

    Raises AssertionError when it is more than 1e-4.
    """
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    past = {name: array for name, array in prefill(input_ids).items() if name.startswith("past")}
    steps = []
    for place in range(input_ids.shape[1]):
        step = prefill(input_ids[:, place : place + 1]) | past
        step["attention_mask"] = np.ones((len(input_ids), place + 1), dtype=np.int64)
        step["position_ids"] += place
        logits, *present = session.run(None, step)
        past = dict(zip(past, present, strict=True))
        steps.append(logits)
    whole = run_in_ort(path, prefill(input_ids))
    one_by_one = np.concatenate(steps, axis=1)
    np.testing.assert_allclose(one_by_one, whole, rtol=0, atol=1e-4)
    return float(np.abs(one_by_one - whole).max())


def main() -> None:
    args = parse_args(__doc__, "decoder", epochs=2)
    make_deterministic(args.seed, args.threads)
    vocabulary, train, calib, evaluation = make_data(args.seed)
    print("training rows", len(train))
    decoder = Decoder()
    model = NextToken(decoder)
    fit(
        model,
        (torch.from_numpy(train[:, :-1]),),
        torch.from_numpy(train[:, 1:]),
        epochs=args.epochs,
        batch_size=16,
        learning_rate=5e-3,
        weight_decay=5e-2,
        seed=args.seed,
        label_smoothing=0.0,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "model.onnx"
    export(decoder, path)
    text = json.dumps({"tokens": vocabulary}, ensure_ascii=False, indent=0)
    (args.out / "vocabulary.json").write_text(text + "\n", encoding="utf-8")
    save_rows(args.out / "calib.npz", prefill(calib[:, :-1]))
    save_rows(args.out / "eval.npz", prefill(evaluation[:, :-1]), evaluation[:, 1:])
    # If settings are to be chosen, then by this figure; the evaluation rows are for the one reported.
    print(f"calib perplexity {perplexity(run_in_ort(path, prefill(calib[:, :-1])), calib[:, 1:]):.4f}")
    report(args.out, metric=perplexity, trim_axis_1=True)
    print(f"cache {check_cache(path, evaluation[:4, :-1]):.1e} from the prefill's logits at most")


if __name__ == "__main__":
    main()
