"""A text file as DATA: rows of tokens for a language model or an encoder, read and tokenized as they are needed.

Tokens come from a tokenizer.json, read by the package `tokenizers`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxq.calibration.dataset import Batch, Dataset
from onnxq.calibration.sources import Array
from onnxq.calibration.vocabulary import load_tokenizer
from onnxq.errors import DataError
from onnxq.language import MASK, TokenInputs, Unrecognised, token_inputs
from onnxq.ports import Port
from onnxq.recipe import Preprocessing

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SUFFIXES = (".jsonl", ".txt")
LENGTH = 128  # tokens of a row unless the recipe or the model says otherwise
_KEYS = ("text", "inputs_pretokenized")
_PAD_TOKENS = ("[PAD]", "<pad>")
_PIECE = 1 << 18  # characters tokenized at once


class Text(Dataset):
    """Rows of tokens from a .txt or .jsonl file, for inputs known by their names.

    `input_ids` [rows, length] are the tokens, `attention_mask` 1 where there is one, `token_type_ids` 0,
    `position_ids` 0, 1, 2 ...; of a key/value cache (see onnxq.language) nothing is there yet.

    Mode `lines`: a row per line that is not blank, or per record of a .jsonl (its `text` or `inputs_pretokenized`),
    with the tokenizer's special tokens, cut to `length` and padded on the right if the model takes an attention mask;
    without one, rows keep their own lengths and neighbours of equal length share a batch. No labels.
    Mode `stream`: the tokens of the whole text without special ones, cut into rows of length + 1; the first `length`
    are the inputs and the last `length` the labels, int64 [rows, length], as perplexity wants them. A .txt is tokenized
    in pieces of 256 Ki characters and up to a line end, so that a token at such a seam may be another.

    `rows` is None: only a whole pass tells. Raises DataError for a model with other inputs, for settings that don't fit
    it, for a tokenizer or a text that can't be read, and for a lack of the package `tokenizers`.
    """

    def __init__(self, path: Path, ports: Sequence[Port], how: Preprocessing) -> None:
        self.name = path.name
        self._path, self._inputs = path, inputs_of(ports)
        self._step = self._inputs.rows
        self._length = row_length(self._inputs, how) or LENGTH
        self._stream = how.mode == "stream" or (how.mode is None and len(self._inputs.pasts) > 0)
        self._pads = self._inputs.has_mask
        self._exact = self._inputs.length is not None
        vocabulary = Path(how.tokenizer) if how.tokenizer is not None else path.with_name("tokenizer.json")
        self._tokenizer = load_tokenizer(vocabulary, "a text", "name the model's tokenizer.json with tokenizer: under "
                                         "data: in the recipe, or put it beside the text")
        self._pad = _pad_id(self._tokenizer)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if not self._stream:
            self._truncate()
        self._about = (self._describe(vocabulary.name),)
        self.notes = self._about

    def _truncate(self) -> None:
        special = self._tokenizer.num_special_tokens_to_add(False)
        if special >= self._length:
            raise DataError(f"rows of {self._length} tokens have no place for text beside {special} special ones of "
                            "the tokenizer; set a larger length under data: in the recipe")
        self._tokenizer.enable_truncation(self._length)

    def _describe(self, vocabulary: str) -> str:
        if self._stream:
            rows = f"the text is one stream, cut into rows of {self._length} tokens, labelled with the next"
        elif self._pads:
            rows = f"each line is a row of {self._length} tokens, cut or padded"
        elif self._exact:
            rows = f"each line is a row of {self._length} tokens, shorter ones left out as the model takes no {MASK}"
        else:
            rows = f"each line is a row of up to {self._length} tokens"
        return f"{rows}, by {vocabulary}; data: in the recipe changes that"

    def _pass(self, batch: int, samples: int | None) -> Iterator[Batch]:
        """Sets `notes` at its end, by what it left out."""
        first = seen = 0
        rows = self._stream_rows() if self._stream else self._line_rows()
        for group in _groups(itertools.islice(rows, samples), self._step or batch):
            seen += len(group)
            if self._step in (None, len(group)):
                yield self._batch(np.stack(group), first)
                first += len(group)
        if not first:
            wanted = f"{self._step} rows" if self._step is not None else "a row"
            raise DataError(f"{self.name} does not fill {wanted} of {self._length} tokens"
                            f"{f' within {samples} samples' if samples is not None else ''}; give more text, or set a "
                            "smaller length under data: in the recipe")
        left = f"{seen - first} of {seen} rows of {self.name} left out: they fill no batch of {self._step}"
        self.notes = (*self._about, left) if seen > first else self._about

    def _batch(self, rows: Array, first: int) -> Batch:
        """Of rows [rows, length] where -1 is padding, or in a stream [rows, length + 1]."""
        labels = np.ascontiguousarray(rows[:, 1:]) if self._stream else None
        tokens = rows[:, :-1] if self._stream else rows
        real = tokens >= 0
        return Batch(self._inputs.prefill(np.where(real, tokens, self._pad), real), labels, len(tokens), first)

    def _stream_rows(self) -> Iterator[Array]:
        """[length + 1] each; the tokens after the last whole row are dropped."""
        width = self._length + 1
        held = np.empty(0, np.int64)
        for where, text in _records(self._path) if self._path.suffix.lower() == ".jsonl" else _pieces(self._path):
            held = np.concatenate([held, self._encode(where, text, special=False)])
            whole = len(held) // width * width
            yield from held[:whole].reshape(-1, width)
            held = held[whole:]

    def _line_rows(self) -> Iterator[Array]:
        """[length] with -1 for padding, or [up to length] without an attention mask."""
        for where, text in _records(self._path) if self._path.suffix.lower() == ".jsonl" else _lines(self._path):
            tokens = self._encode(where, text, special=True)
            if self._pads and len(tokens):
                tokens = np.pad(tokens, (0, self._length - len(tokens)), constant_values=-1)
            if len(tokens) == self._length or (len(tokens) and not self._exact):
                yield tokens

    def _encode(self, where: str, text: str, special: bool) -> Array:
        try:
            return np.array(self._tokenizer.encode(text, add_special_tokens=special).ids, np.int64)
        except Exception as error:  # the package raises plain Exception
            raise DataError(f"{where} can't be tokenized ({error}); use the tokenizer.json of the model and text in "
                            "Unicode") from error


def inputs_of(ports: Sequence[Port]) -> TokenInputs:
    """The roles of the inputs. Raises DataError for a model that wants more than tokens."""
    try:
        return token_inputs(ports)
    except Unrecognised as reason:
        raise DataError(f"{reason}; write an .npz with an array per input") from None


def row_length(inputs: TokenInputs, how: Preprocessing) -> int | None:
    """Tokens of a row by the recipe or the model, or None. Raises DataError where the two differ."""
    if how.length is not None and inputs.length not in (None, how.length):
        raise DataError(f"the model takes rows of {inputs.length} tokens and data.length in the recipe is {how.length};"
                        " leave it out")
    return how.length or inputs.length


def _groups(rows: Iterable[Array], size: int) -> Iterator[list[Array]]:
    """Up to `size` rows in sequence, of one length."""
    held: list[Array] = []
    for row in rows:
        if held and (len(held) == size or len(row) != len(held[0])):
            yield held
            held = []
        held.append(row)
    if held:
        yield held


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, line) without blank lines. Raises DataError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path.name}, line {number},", line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _pieces(path: Path) -> Iterator[tuple[str, str]]:
    """(where, piece): the whole text, in pieces that end with a line unless lines are endless. Raises DataError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            while piece := file.read(_PIECE) + file.readline(_PIECE):
                yield path.name, piece
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _records(path: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of the records of a .jsonl. Raises DataError naming the line."""
    for where, line in _lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is no JSON ({error}); write one object per line") from None
        texts = [record[key] for key in _KEYS if key in record] if isinstance(record, dict) else []
        if not texts or not isinstance(texts[0], str):
            raise DataError(f"{where} has no text under {' or '.join(_KEYS)}; write one object per line with that key")
        if texts[0].strip():
            yield where, texts[0]


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path.name} can't be read ({error}); give a text file in UTF-8")


def _pad_id(tokenizer: Tokenizer) -> int:
    padding: dict[str, Any] | None = tokenizer.padding
    if padding is not None:
        return int(padding["pad_id"])
    found = [tokenizer.token_to_id(token) for token in _PAD_TOKENS]
    return next((number for number in found if number is not None), 0)
