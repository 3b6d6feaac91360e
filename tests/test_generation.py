"""Generation: what a model goes on with, by its cache or without, where it ends, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_model, node
from language_support import HALF, INT64, VOCABULARY, following, saved, summing
from lowering_support import MODELS
from onnx import TensorProto

from onnxq.calibration.readers import open_data
from onnxq.errors import DataError, ModelError, UsageError
from onnxq.generation import Decoder, Writer, compare, generate
from onnxq.numerics.metrics import Perplexity
from onnxq.runtime.session import Session

PROMPT = [3, 1, 5]


@pytest.mark.parametrize("options", [
    {},
    {"past": "past_key_0", "present": "present_key_0", "mask": False},
    {"past": "past_0", "present": "present_0", "positions": False},
    {"dtype": HALF},
    {"merged": True},
    {"rows": 1},
    {"last": True},
    {"past": None},
    {"past": None, "last": True},
    {"past": None, "mask": False, "positions": False},
    {"past": None, "length": 16, "rows": 1},
], ids=lambda options: ",".join(map(str, options.items())) or "usual")
def test_each_kind_of_model_goes_on_as_it_must(options: dict[str, Any], tmp_path: Path) -> None:
    path, pieces = saved(summing(**options), tmp_path), list[str]()
    made = generate(path, PROMPT, tokens=8, threads=1, show=pieces.append)
    wanted = following(PROMPT, 8) if options.get("positions", True) else _sums(PROMPT, 8)
    assert (made.ids, made.prompt_ids, made.text, made.ended) == (wanted, PROMPT, None, "tokens")
    assert made.cached == (options.get("past", "") is not None)
    assert "".join(pieces) == " ".join(map(str, wanted))
    assert made.prefill_rate > 0
    assert made.decode_rate is not None
    assert made.decode_rate > 0


def _sums(prompt: list[int], count: int) -> list[int]:
    seen = list(prompt)
    for _ in range(count):
        seen.append(sum(seen) % VOCABULARY)
    return seen[len(prompt):]


def test_a_prompt_of_one_token_and_one_token_made(tmp_path: Path) -> None:
    made = generate(saved(summing(), tmp_path), [5], tokens=1)
    assert (made.ids, made.decode_rate) == ([5], None)


def test_the_decoder_may_be_fed_in_any_portions(tmp_path: Path) -> None:
    path, tokens = saved(summing(), tmp_path), [3, 1, 4, 1, 5, 9, 2]
    for portions in ([7], [1] * 7, [3, 4], [2, 1, 4]):
        decoder, left = Decoder(Session(path)), list(tokens)
        for portion in portions:
            scores = decoder.feed(left[:portion])
            left = left[portion:]
        assert scores.argmax() == following(tokens, 1)[0]
        assert (decoder.vocabulary, decoder.context, decoder.cached) == (VOCABULARY, None, True)


def test_where_a_text_ends(tmp_path: Path) -> None:
    path, all_ids = saved(summing(), tmp_path), following(PROMPT, 8)
    assert len(set(all_ids)) == 8
    made = generate(path, PROMPT, tokens=8, stop=[all_ids[2]])
    assert (made.ids, made.ended) == (all_ids[:3], "stop")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [99, all_ids[2]]}))
    assert generate(path, PROMPT, tokens=8).ids == made.ids
    (tmp_path / "config.json").write_text("nonsense")
    (tmp_path / "generation_config.json").write_text("[]")
    assert generate(path, PROMPT, tokens=8).ids == all_ids
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"eos_token_id": 99, "context_length": 7}}))
    made = generate(path, PROMPT, tokens=8)
    assert (made.ids, made.ended) == (all_ids[:5], "context")  # the fifth is never fed: 3 + 4 tokens fill 7


@pytest.mark.parametrize("source", ["config", "fixed length"])
def test_the_context_ends_a_text_and_bounds_the_prompt(source: str, tmp_path: Path) -> None:
    path = saved(summing() if source == "config" else summing(None, length=5), tmp_path)
    if source == "config":
        (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 5}))
    made = generate(path, PROMPT, tokens=8)
    assert (made.ids, made.ended) == (following(PROMPT, 3), "context")
    assert generate(path, [1] * 5, tokens=8).ids == following([1] * 5, 1)
    with pytest.raises(UsageError, match="the prompt has 6 tokens and the model takes 5 at most; shorten it"):
        generate(path, [1] * 6)


# ------------------------------------------------------------------ perplexity


def test_decoding_gives_the_perplexity_of_a_prefill(tmp_path: Path) -> None:
    """Scores of a step are those of the prefill within 1e-4 (see models/README.md), so that each label's negative
    log likelihood differs by 2e-4 at most, and so does the logarithm of perplexity."""
    session = Session(MODELS / "decoder" / "model.onnx")
    with np.load(MODELS / "decoder" / "eval.npz") as data:
        np.save(tmp_path / "tokens.npy", data["input_ids"][:3, :49])
    whole, steps = Perplexity(), Perplexity()
    for batch in open_data(tmp_path / "tokens.npy", session.inputs).batches():
        assert batch.labels is not None
        whole.update(session.run(batch.feed), batch.labels, batch.feed)
        for row, labels in zip(batch.feed["input_ids"].tolist(), batch.labels, strict=True):
            decoder = Decoder(session)
            scores = np.array([decoder.feed([token]) for token in row])
            steps.update({"logits": scores}, labels, {})
    assert np.log(steps.result()) == pytest.approx(np.log(whole.result()), abs=2e-4)


# ------------------------------------------------------------------ text

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def words(folder: Path, **change: str) -> Path:
    """A tokenizer.json of eleven words; `six="<eos>"` calls one otherwise."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed; pip install 'onnxq[text]'")
    known = {change.get(word, word): number for number, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(known))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_text_comes_in_pieces(tmp_path: Path) -> None:
    path, pieces = saved(summing(), tmp_path), list[str]()
    words(tmp_path)
    made = generate(path, "three one five", tokens=8, show=pieces.append)
    assert (made.prompt_ids, made.ids) == (PROMPT, following(PROMPT, 8))
    assert made.text == "".join(pieces) == "".join(f" {WORDS[token]}" for token in made.ids)
    assert len(pieces) == 8
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    other = saved(summing(), elsewhere)
    assert generate(other, PROMPT, tokens=8, tokenizer=tmp_path / "tokenizer.json").text == made.text
    assert generate(path, PROMPT, tokens=8).text is None


def test_the_tokenizer_tells_what_ends_a_text(tmp_path: Path) -> None:
    ids = following(PROMPT, 8)
    words(tmp_path, **{WORDS[ids[3]]: "</s>"})
    made = generate(saved(summing(), tmp_path), "three one five", tokens=8)
    assert (made.ids, made.ended) == (ids[:4], "stop")
    assert made.text == "".join(f" {WORDS[token]}" for token in made.ids[:-1])


def test_characters_of_several_tokens_are_shown_whole() -> None:
    """Of a byte-level vocabulary, where a letter beyond ASCII takes several tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([], tokenizers.trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet))
    for prompt, text in (("aé", "b层🙂 c"), ("", "é")):
        pieces = list[str]()
        writer = Writer(made, made.encode(prompt).ids, pieces.append)
        for token in made.encode(text).ids:
            writer.put(token)
        assert writer.end() == text
        assert pieces == list(text)
    writer = Writer(made, [], None)
    for token in made.encode("a🙂").ids[:-1]:
        writer.put(token)
    assert writer.end() == "a\ufffd"


# ------------------------------------------------------------------ compared


def test_two_models_agree_until_they_part(tmp_path: Path) -> None:
    """One that reckons without positions parts from the other at the first token that has one other than 0."""
    a, b = saved(summing(), tmp_path), saved(summing(), tmp_path, "b.onnx")
    c = saved(summing(positions=False), tmp_path, "c.onnx")
    first, second, agreed = compare(a, b, PROMPT, tokens=8)
    assert (first.ids, second.ids, agreed) == (following(PROMPT, 8), following(PROMPT, 8), 8)
    assert (first.model, second.model) == (str(a), str(b))
    first, second, agreed = compare(a, c, [5], tokens=8)
    assert agreed == 1  # the first token's position is 0
    assert first.ids[0] == second.ids[0]
    assert first.ids[1] != second.ids[1]


def test_the_second_of_two_models_goes_by_the_firsts_tokenizer_and_ends(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    a, b = saved(summing(), tmp_path), saved(summing(), elsewhere)
    words(tmp_path)
    ids = following(PROMPT, 8)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": ids[2]}))
    first, second, agreed = compare(a, b, "three one five", tokens=8)
    assert first.ids == second.ids == ids[:3]
    assert first.text == second.text
    assert agreed == len(first.ids)


# ------------------------------------------------------------------ refused


def test_models_that_are_no_language_models(tmp_path: Path) -> None:
    text_encoder = MODELS / "text_encoder" / "model.onnx"
    with pytest.raises(ModelError, match=r"text_encoder.model\.onnx can't generate: a language model gives logits "
                                         r"\[rows, tokens, vocabulary\], .*; export a causal language model"):
        generate(text_encoder, "no tokenizer is looked for")
    with pytest.raises(ModelError, match=r"can't generate: tokens fill the inputs .* and the model takes image float"):
        generate(MODELS / "digits_cnn" / "model.onnx", PROMPT)
    with pytest.raises(ModelError, match="input_ids are of a fixed size; export it with free axes"):
        generate(saved(summing(length=1), tmp_path), PROMPT)
    with pytest.raises(ModelError, match="input_ids are of a fixed size"):
        generate(saved(summing(rows=2), tmp_path), PROMPT)
    with pytest.raises(ModelError, match="takes a fixed number of tokens and scores the last alone; export"):
        generate(saved(summing(None, length=5, last=True), tmp_path), PROMPT)
    with pytest.raises(ModelError, match="check the path"):
        generate(tmp_path / "absent.onnx", PROMPT)


@pytest.mark.parametrize(("prompt", "message"), [
    ([], "the prompt holds no tokens; give some text"),
    ([3, -1], "holds the token -1 and the model's ids go from 0 to 10; use"),
    ([3, 11], "holds the token 11 and the model's ids go from 0 to 10; use"),
])
def test_prompts_that_can_not_be_used(prompt: list[int], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        generate(saved(summing(), tmp_path), prompt)
    with pytest.raises(UsageError, match="0 tokens can't be generated"):
        generate(saved(summing(), tmp_path), PROMPT, tokens=0)


def test_tokenizers_that_can_not_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(summing(), tmp_path)
    words(tmp_path)
    with pytest.raises(DataError, match=r"no tokenizer elsewhere\.json; name .* --tokenizer FILE, or .* --prompt-ids"):
        generate(path, "three", tokenizer="elsewhere.json")
    with pytest.raises(DataError, match=r"the prompt can't be tokenized .*; use the tokenizer\.json of the model"):
        generate(path, "a word that it lacks")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="can't be read"):
        generate(path, "three")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"a prompt of text needs the package tokenizers .*; pip install 'onnxq\[text"):
        generate(path, "three")


def test_a_model_that_fails_beyond_its_context(tmp_path: Path) -> None:
    """Positions looked up in a table of four."""
    nodes = [node("Gather", "table position_ids", "moved"), node("Cast", "input_ids", "tokens", to=TensorProto.FLOAT),
             node("Add", "tokens moved", "sum"), node("Unsqueeze", "sum two", "logits")]
    ports = {name: (INT64, ["batch", "sequence"]) for name in ("input_ids", "position_ids")}
    model = make_model(nodes, ports, {"logits": ["batch", "sequence", 1]},
                       {"table": np.zeros(4, np.float32), "two": np.array([2])})
    path = saved(model, tmp_path)
    assert generate(path, [0, 0, 0], tokens=2).ids == [0, 0]
    with pytest.raises(ModelError, match=r"onnxruntime failed .*, after 4 tokens and with 1 more; if its context ends "
                                         r"there, ask for fewer tokens or shorten the prompt"):
        generate(path, [0, 0, 0], tokens=3)


def test_scores_of_nan_are_refused(tmp_path: Path) -> None:
    model = summing(None)
    one_hot = next(stored for stored in model.graph.initializer if stored.name == "values")
    one_hot.CopyFrom(onnx.numpy_helper.from_array(np.array([np.nan, 1], np.float32), "values"))
    with pytest.raises(ModelError, match="scores next tokens with NaN; look for what is wrong"):
        generate(saved(model, tmp_path), PROMPT)
