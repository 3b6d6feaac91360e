"""DATA as a text file: rows of tokens by lines or as a stream, inputs by their names, and what is refused."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnxq.calibration import text as reader
from onnxq.calibration.dataset import Batch
from onnxq.calibration.readers import open_data
from onnxq.errors import DataError
from onnxq.ports import Port
from onnxq.recipe import Preprocessing

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed; pip install 'onnxq[text]'")

Array = npt.NDArray[Any]
F32, I64, I32 = np.dtype(np.float32), np.dtype(np.int64), np.dtype(np.int32)
IDS = Port("input_ids", I64, ("N", "S"))
MASK = Port("attention_mask", I64, ("N", "S"))
ENCODER = [IDS, MASK, Port("token_type_ids", I64, ("N", "S"))]
DECODER = [
    IDS,
    Port("attention_mask", I64, ("N", "past_sequence_length + 1")),
    Port("position_ids", I64, ("N", "S")),
    Port("past_key_values.0.key", F32, ("N", 2, "past_sequence_length", 8)),
    Port("past_key_values.0.value", np.dtype(np.float16), ("N", 2, "past_sequence_length", 8)),
]
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
PAD, CLS, SEP, UNK = 9, 1, 2, 3  # special ids of the little vocabulary; words follow from 10 on


def ids(text: str) -> list[int]:
    """What the little tokenizer makes of words, by the definition of its vocabulary."""
    return [10 + WORDS.index(word) if word in WORDS else UNK for word in text.split()]


def make_tokenizer(folder: Path, *, special: bool = True, padding: bool = False) -> Path:
    """A word-level tokenizer.json, with [CLS] ... [SEP] around each text."""
    vocabulary = {"[PAD]": PAD, "[CLS]": CLS, "[SEP]": SEP, "[UNK]": UNK, **{w: 10 + k for k, w in enumerate(WORDS)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if special:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
        )
    if padding:  # as files from hubs often have: it must not disturb
        made.enable_padding(length=77, pad_id=5)
        made.enable_truncation(3)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokenizer(tmp_path)
    return tmp_path


def write(folder: Path, lines: Iterable[str], name: str = "a.txt") -> Path:
    path = folder / name
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def batches(path: Path, ports: list[Port], limits: dict[str, int] | None = None, **how: Any) -> list[Batch]:
    return list(open_data(path, ports, how=Preprocessing(**how)).batches(**(limits or {})))


# ------------------------------------------------------------------ lines


def test_lines_are_padded_and_cut_for_a_model_with_a_mask(folder: Path) -> None:
    path = write(folder, ["alpha beta", "", "   ", "gamma  gamma delta eta zeta", "epsilon oops"])
    (batch,) = batches(path, ENCODER, length=6)
    assert (batch.rows, batch.first_row, batch.labels) == (3, 0, None)
    rows = [
        [CLS, *ids("alpha beta"), SEP, PAD, PAD],
        [CLS, *ids("gamma gamma delta eta"), SEP],
        [CLS, *ids("epsilon"), UNK, SEP, PAD, PAD],
    ]
    np.testing.assert_array_equal(batch.feed["input_ids"], np.array(rows), strict=True)
    mask = [[1, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 1, 1, 0, 0]]
    np.testing.assert_array_equal(batch.feed["attention_mask"], np.array(mask), strict=True)
    np.testing.assert_array_equal(batch.feed["token_type_ids"], np.zeros((3, 6), np.int64), strict=True)


def test_length_is_the_models_or_128(folder: Path) -> None:
    path = write(folder, ["alpha " * 200])
    assert batches(path, ENCODER)[0].feed["input_ids"].shape == (1, 128)
    fixed = [Port("input_ids", I32, ("N", 5)), Port("attention_mask", F32, ("N", 5))]
    feed = batches(path, fixed)[0].feed
    assert feed["input_ids"].tolist() == [[CLS, 10, 10, 10, SEP]]
    assert {name: array.dtype for name, array in feed.items()} == {"input_ids": I32, "attention_mask": F32}
    with pytest.raises(DataError, match=r"rows of 5 tokens and data\.length in the recipe is 6; leave it out"):
        open_data(path, fixed, how=Preprocessing(length=6))
    assert batches(path, fixed, length=5)[0].feed["input_ids"].shape == (1, 5)


def test_lines_without_a_mask_keep_their_lengths(folder: Path) -> None:
    path = write(folder, ["alpha", "beta", "alpha beta gamma", "eta", "alpha " * 9])
    found = batches(path, [IDS], length=7)
    shapes = [(b.first_row, b.feed["input_ids"].shape) for b in found]
    assert shapes == [(0, (2, 3)), (2, (1, 5)), (3, (1, 3)), (4, (1, 7))]
    assert found[1].feed["input_ids"].tolist() == [[CLS, *ids("alpha beta gamma"), SEP]]
    assert [b.rows for b in batches(path, [IDS], {"batch": 1, "samples": 3}, length=7)] == [1, 1, 1]


def test_lines_too_short_for_a_fixed_length_without_a_mask(folder: Path) -> None:
    path = write(folder, ["alpha", "beta gamma delta", "eta", "alpha " * 9])
    data = open_data(path, [Port("input_ids", I64, ("N", 5))])
    (batch,) = data.batches()
    assert batch.feed["input_ids"].tolist() == [[CLS, 11, 12, 13, SEP], [CLS, 10, 10, 10, SEP]]
    assert "shorter ones left out as the model takes no attention_mask" in data.notes[0]
    with pytest.raises(DataError, match="does not fill a row of 7 tokens; give more text"):
        batches(write(folder, ["alpha"], "b.txt"), [Port("input_ids", I64, ("N", 7))])


@pytest.mark.parametrize("key", ["text", "inputs_pretokenized"])
def test_records_of_a_jsonl(folder: Path, key: str) -> None:
    texts = ["alpha beta", "  ", "gamma\ndelta"]
    path = write(folder, [json.dumps({"id": 3, key: text}) for text in texts] + [""], "a.jsonl")
    (batch,) = batches(path, ENCODER, length=5)
    assert batch.feed["input_ids"].tolist() == [[CLS, 10, 11, SEP, PAD], [CLS, 12, 13, SEP, PAD]]


def test_padding_and_truncation_of_the_file_do_not_count(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, padding=True)
    path = write(tmp_path, ["alpha beta gamma delta"])
    assert batches(path, ENCODER, length=8)[0].feed["input_ids"].tolist() == [[CLS, 10, 11, 12, 13, SEP, 5, 5]]
    assert batches(path, [IDS], length=3, mode="stream")[0].feed["input_ids"].tolist() == [[10, 11, 12]]


def test_batches_and_samples(folder: Path) -> None:
    data = open_data(write(folder, WORDS), ENCODER, how=Preprocessing(length=4))
    assert (data.name, data.rows, data.labels, data.random) == ("a.txt", None, None, False)
    for _ in range(2):
        found = list(data.batches(batch=3))
        assert [(b.rows, b.first_row) for b in found] == [(3, 0), (3, 3), (2, 6)]
        assert np.concatenate([b.feed["input_ids"] for b in found])[:, 1].tolist() == list(range(10, 18))
    assert [b.rows for b in data.batches(batch=3, samples=4)] == [3, 1]


def test_fixed_batches_leave_out_what_fills_none(folder: Path) -> None:
    ports = [Port("input_ids", I64, (3, "S")), Port("attention_mask", I64, (3, "S"))]
    data = open_data(write(folder, WORDS), ports, how=Preprocessing(length=4))
    assert len(data.notes) == 1
    for _ in range(2):
        assert [b.rows for b in data.batches(batch=2)] == [3, 3]
        assert data.notes[1:] == ("2 of 8 rows of a.txt left out: they fill no batch of 3",)
    with pytest.raises(DataError, match="does not fill 3 rows of 4 tokens within 2 samples"):
        list(data.batches(samples=2))


# ------------------------------------------------------------------ stream


def test_stream_rows_and_their_next_tokens(folder: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, rng.integers(0, 9))) for _ in range(60)]
    tokens = [number for line in lines for number in ids(line)]
    for path in (write(folder, lines), write(folder, [json.dumps({"text": line}) for line in lines], "a.jsonl")):
        found = batches(path, [IDS], {"batch": 3}, length=6, mode="stream")
        wanted = np.array(tokens[: len(tokens) // 7 * 7]).reshape(-1, 7)
        assert [b.first_row for b in found] == list(range(0, len(wanted), 3))
        np.testing.assert_array_equal(np.concatenate([b.feed["input_ids"] for b in found]), wanted[:, :6])
        labels = [b.labels for b in found if b.labels is not None]
        np.testing.assert_array_equal(np.concatenate(labels), wanted[:, 1:], strict=True)
        assert all(len(label) == b.rows for label, b in zip(labels, found, strict=True))


def test_a_model_with_a_cache_streams_by_default(folder: Path) -> None:
    path = write(folder, ["alpha beta gamma", "delta epsilon zeta eta", "theta"])
    (batch,) = batches(path, DECODER, length=3)
    feed = batch.feed
    assert feed["input_ids"].tolist() == [[10, 11, 12], [14, 15, 16]]
    assert batch.labels is not None
    assert batch.labels.tolist() == [[11, 12, 13], [15, 16, 17]]
    assert feed["attention_mask"].tolist() == [[1, 1, 1]] * 2
    np.testing.assert_array_equal(feed["position_ids"], np.array([[0, 1, 2]] * 2), strict=True)
    assert (feed["past_key_values.0.key"].shape, feed["past_key_values.0.key"].dtype) == ((2, 2, 0, 8), F32)
    assert feed["past_key_values.0.value"].dtype == np.float16
    lines = batches(path, DECODER, length=3, mode="lines")[0]
    assert (lines.labels, lines.feed["input_ids"].tolist()[2]) == (None, [CLS, 17, SEP])
    assert lines.feed["past_key_values.0.key"].shape == (3, 2, 0, 8)


def test_a_merged_decoder_is_told_that_nothing_came_before(folder: Path) -> None:
    ports = [*DECODER, Port("use_cache_branch", np.dtype(bool), (1,))]
    (batch,) = batches(write(folder, ["alpha " * 8]), ports, length=3)
    assert batch.feed["use_cache_branch"].tolist() == [False]
    assert batch.feed["input_ids"].shape == (2, 3)


def test_the_batch_axis_of_a_cache_goes_by_its_name(folder: Path) -> None:
    past = Port("past_0", F32, (2, "N", 4, "past_sequence", 8))
    feed = batches(write(folder, ["alpha " * 12]), [IDS, past], length=3)[0].feed
    assert feed["past_0"].shape == (2, 3, 4, 0, 8)


def test_a_long_text_is_tokenized_in_pieces_at_line_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_PIECE", 50)
    rng = np.random.default_rng(1)
    lines = [" ".join(rng.choice(WORDS, 7)) for _ in range(40)]
    seen = [piece for _, piece in reader._pieces(write(folder, lines))]
    assert len(seen) > 10
    assert "".join(seen) == "".join(f"{line}\n" for line in lines)
    assert all(piece.endswith("\n") for piece in seen)
    rows = np.concatenate([b.feed["input_ids"] for b in batches(folder / "a.txt", [IDS], length=1, mode="stream")])
    assert rows[:, 0].tolist() == ids(" ".join(lines))[::2]


def test_memory_stays_flat(folder: Path) -> None:
    """A pass over 8 MB of text holds a piece of 256 Ki characters and its tokens."""
    path = folder / "big.txt"
    with open(path, "w") as file:
        for _ in range(8):
            file.write((" ".join(WORDS) + "\n") * 22_000)
    data = open_data(path, [IDS], how=Preprocessing(length=64, mode="stream"))
    tracemalloc.start()
    try:
        rows = sum(batch.rows for batch in data.batches())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows == 8 * 22_000 * len(WORDS) // 65
    assert peak < 6 << 20


def test_byte_level_text_reads_back_through_the_tokenizer(tmp_path: Path) -> None:
    """Rows of a byte-level BPE, decoded, are the text again."""
    text = "def f(x):\n    return x + 1  # grün\n\n\nfor y in f(3):\n    print(y)\n" * 5
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([text], tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    made.save(str(tmp_path / "bpe.json"))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = batches(tmp_path / "a.txt", [IDS], length=1, mode="stream", tokenizer=str(tmp_path / "bpe.json"))
    pairs = [np.concatenate([b.feed["input_ids"], b.labels], axis=1) for b in found if b.labels is not None]
    decoded = made.decode(np.concatenate(pairs).ravel().tolist())
    assert text.startswith(decoded)
    assert len(text) - len(decoded) < 20
    assert np.concatenate(pairs).ravel().tolist() == made.encode(text).ids[: 2 * sum(map(len, pairs))]


def test_what_was_done_is_said(folder: Path) -> None:
    path = write(folder, WORDS)
    for ports, how, note in (
        (ENCODER, {}, "each line is a row of 128 tokens, cut or padded"),
        ([IDS], {"length": 9}, "each line is a row of up to 9 tokens"),
        (DECODER, {"length": 9}, "the text is one stream, cut into rows of 9 tokens, labelled with the next"),
    ):
        notes = open_data(path, ports, how=Preprocessing(**how)).notes
        assert notes == (f"{note}, by tokenizer.json; data: in the recipe changes that",)


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("ports", "message"),
    [
        ([IDS, Port("use_cache", np.dtype(bool), (1,))], r"the model takes use_cache bool \[1\]; write an \.npz"),
        ([Port("tokens", I64, ("N", "S"))], r"takes tokens int64 \[N, S\]"),
        ([MASK], r"with input_ids among them, and the model takes attention_mask int64 \[N, S\]"),
        ([IDS, Port("past_0", F32, ("N", 4, 16, 8))], r"takes past_0 float32"),
        ([IDS, Port("past_length", I64, ("past",))], r"takes past_length int64"),
        ([IDS, Port("past_0", None, ("N", 4, "past", 8))], r"takes past_0 no numpy type"),
        ([IDS, Port("past_0", F32, ("N", "heads", "past", 8))], r"'past_0' is .* the size of axis 1 is not known"),
        ([Port("input_ids", I64, ("S",))], r"inputs of \[rows, tokens\] and input 'input_ids' is int64 \[S\]"),
        ([Port("input_ids", I64, None)], r"input 'input_ids' is int64 of any rank"),
        ([Port("input_ids", I64, ("N", 8)), Port("attention_mask", I64, ("N", 9))], r"unequal numbers of tokens"),
        ([Port("input_ids", I64, (1, 8)), Port("attention_mask", I64, (2, 8))], r"unequal numbers of rows"),
    ],
)
def test_models_that_take_something_else(folder: Path, ports: list[Port], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(write(folder, WORDS), ports)


def test_texts_that_give_no_rows(folder: Path) -> None:
    for path in (write(folder, [], "empty.txt"), write(folder, ["", "  "], "blank.txt"), write(folder, [], "e.jsonl")):
        for mode in ("lines", "stream"):
            with pytest.raises(DataError, match=rf"{path.name} does not fill a row of 4 tokens; give more text"):
                batches(path, ENCODER, length=4, mode=mode)
    with pytest.raises(DataError, match="does not fill a row of 8 tokens"):
        batches(write(folder, [" ".join(WORDS)]), [IDS], length=8, mode="stream")
    with pytest.raises(DataError, match="rows of 2 tokens have no place for text beside 2 special ones"):
        batches(write(folder, WORDS), ENCODER, length=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("alpha", "is no JSON"),
        ("[1, 2]", "has no text under text or inputs_pretokenized"),
        ('{"content": "alpha"}', "has no text"),
        ('{"text": 3}', "has no text"),
    ],
)
def test_records_that_are_no_text(folder: Path, line: str, message: str) -> None:
    path = write(folder, ['{"text": "alpha"}', line], "a.jsonl")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2, {message}"):
        batches(path, ENCODER)


def test_texts_that_can_not_be_read(folder: Path) -> None:
    path = folder / "a.txt"
    path.write_bytes(b"alpha \xff\xfe beta")
    for mode in ("lines", "stream"):
        with pytest.raises(DataError, match=r"a\.txt can't be read .*; give a text file in UTF-8"):
            batches(path, ENCODER, mode=mode)
    data = open_data(path, ENCODER)
    path.unlink()
    with pytest.raises(DataError, match="can't be read"):
        list(data.batches())
    path.write_bytes("\ufeffalpha\r\nbeta\r\n".encode())
    assert batches(path, ENCODER, length=3)[0].feed["input_ids"].tolist() == [[CLS, 10, SEP], [CLS, 11, SEP]]


def test_tokenizers_that_can_not_be_used(tmp_path: Path) -> None:
    path = write(tmp_path, WORDS)
    with pytest.raises(DataError, match=r"no tokenizer .*tokenizer\.json; name the model's tokenizer\.json with"):
        open_data(path, ENCODER)
    with pytest.raises(DataError, match=r"no tokenizer elsewhere\.json"):
        open_data(path, ENCODER, how=Preprocessing(tokenizer="elsewhere.json"))
    for content in ("", "{}", '{"model": {}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match=r"tokenizer .*tokenizer\.json can't be read .*came with the model"):
            open_data(path, ENCODER)
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"alpha": 0}, unk_token="[UNK]"))
    bare.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"a\.txt, line 1, can't be tokenized"):
        batches(write(tmp_path, ["beta"]), ENCODER)


def test_without_tokenizers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"needs the package tokenizers .*; pip install 'onnxq\[text\]'"):
        open_data(write(folder, WORDS), ENCODER)
