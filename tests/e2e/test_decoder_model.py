"""compile() on the decoder language model: perplexity, and a compiled prefill that goes on with the cache it made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lowering_support import MODELS

import onnxq
from onnxq.runtime.session import Session

FOLDER = MODELS / "decoder"
Cache = dict[str, np.ndarray]
LAYERS, HEADS, WIDTH = 3, 2, 16


@pytest.mark.parametrize(("scheme", "ratio"), [("w8a8", 1.02), ("w8a8-dynamic", 1.002), ("w8a8-dynamic-tensor", 1.02)])
def test_perplexity_stays_near_float(scheme: str, ratio: float, tmp_path: Path) -> None:
    report = onnxq.compile(FOLDER / "model.onnx", tmp_path / "o.onnx", scheme=scheme, calib=str(FOLDER / "calib.npz"),
                           eval=str(FOLDER / "eval.npz"), metric="perplexity", measure=False)
    assert report.ok, report.verdict.failures
    assert report.accuracy is not None
    assert report.accuracy.float == pytest.approx(15.358, abs=0.01)
    assert report.accuracy.compiled <= ratio * report.accuracy.float
    assert report.size is not None
    assert report.size.ratio < 0.36
    assert [row.op for row in report.nodes if row.scheme == "stored"] == ["Gather"]
    assert sum(row.op == "MatMul" and row.scheme == scheme for row in report.nodes) == 22


def _step(session: Session, tokens: np.ndarray, past: Cache) -> tuple[np.ndarray, Cache]:
    """Logits of the tokens [1, S], and the cache with them."""
    first = next(iter(past.values())).shape[2]
    length = tokens.shape[1]
    feed = {"input_ids": tokens, "attention_mask": np.ones((1, first + length), np.int64),
            "position_ids": np.arange(first, first + length)[None]}
    found = session.run({**feed, **past})
    return found["logits"], {k.replace("present", "past_key_values"): v for k, v in found.items() if "present" in k}


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
def test_decoding_with_the_cache_gives_what_a_prefill_gives(scheme: str, tmp_path: Path) -> None:
    """Static scales are the same for any length; scales per token are the same for any batch: both must agree."""
    onnxq.compile(FOLDER / "model.onnx", tmp_path / "o.onnx", scheme=scheme, calib=str(FOLDER / "calib.npz"),
                  measure=False)
    with np.load(FOLDER / "eval.npz") as data:
        tokens = data["input_ids"][:1, :24]
    empty = {f"past_key_values.{n}.{part}": np.zeros((1, HEADS, 0, WIDTH), np.float32)
             for n in range(LAYERS) for part in ("key", "value")}
    session = Session(tmp_path / "o.onnx")
    whole, _ = _step(session, tokens, empty)
    _, past = _step(session, tokens[:, :16], empty)
    for k in range(16, 24):
        logits, past = _step(session, tokens[:, k:k + 1], past)
        spread = np.abs(whole[0, k]).max()
        # roundings of codes may differ by one where sums of floats end near a tie
        assert np.abs(logits[0, 0] - whole[0, k]).max() < 0.05 * spread
        assert np.argmax(logits[0, 0]) == np.argmax(whole[0, k])
