"""generate(): a quick look at what a language model writes, greedily, with its cache; compare(): two of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxq.calibration.vocabulary import load_tokenizer
from onnxq.errors import DataError, ModelError, UsageError
from onnxq.language import Feed, Unrecognised, causal_model
from onnxq.runtime.session import Session, SessionOptions

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = npt.NDArray[Any]
TOKENS = 64  # that are made unless the caller says otherwise
STOP, CONTEXT, ENOUGH = "stop", "context", "tokens"  # why a generation ended
# tokens that end a text, by the names that tokenizers give them
_ENDS = ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
# where exporters leave what a model's graph does not tell
_SETTINGS = ("generation_config.json", "config.json", "genai_config.json")
_CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "context_length")
_UNFINISHED = "\ufffd"  # what a tokenizer makes of a character whose last bytes are yet to come


@dataclass(frozen=True)
class Generated:
    """What a model went on with: `ids` with the token that ended it, if one did; `text` None without a tokenizer.

    `ended` is stop (at a token that ends a text), context (the model takes no more) or tokens (as many as were wanted).
    Rates are in tokens per second; decoding's is None where the first token was the last.
    """

    model: str
    prompt_ids: list[int]
    ids: list[int]
    text: str | None
    ended: str
    prefill_rate: float
    decode_rate: float | None
    cached: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        found = asdict(self)
        rates = {"prefill": found.pop("prefill_rate"), "decode": found.pop("decode_rate")}
        return found | {"tokens_per_second": rates}


class Decoder:
    """A causal language model in a session, fed with one text from left to right; the cache is kept between calls.

    Raises ModelError for a model that is none.
    """

    def __init__(self, session: Session) -> None:
        try:
            self._model = causal_model(session.inputs, session.outputs)
        except Unrecognised as reason:
            raise ModelError(f"{session.label} can't generate: {reason}; export a causal language model, best with its "
                             "key/value cache") from None
        if self._model.inputs.rows not in (None, 1) or (self._model.presents and self._model.inputs.length is not None):
            raise ModelError(f"{session.label} can't generate: its input_ids are of a fixed size; export it with free "
                             "axes for rows and tokens")
        self._session = session
        self._cache: Feed = {}
        self._seen: list[int] = []
        self.context = self._model.inputs.length
        last = (self._model.logits.shape or (None,))[-1]
        self.vocabulary = last if isinstance(last, int) else None

    @property
    def cached(self) -> bool:
        """Whether the model has a cache; without one each call computes the whole text again."""
        return bool(self._model.presents)

    def feed(self, tokens: Sequence[int]) -> Array:
        """Scores [V] of what follows when `tokens` do, after all those fed before. Raises ModelError."""
        past = len(self._seen)
        self._seen += tokens
        try:
            rows, padding = self._step(np.array([tokens], np.int64), past) if self.cached else self._whole()
        except ModelError as error:
            raise ModelError(f"{str(error).rpartition(';')[0]}, after {past} tokens and with {len(tokens)} more; if "
                             "its context ends there, ask for fewer tokens or shorten the prompt") from error
        if padding and len(rows) == 1:
            raise ModelError(f"{self._session.label} takes a fixed number of tokens and scores the last alone; export "
                             "a model that scores each")
        scores = rows[len(rows) - padding - 1]
        if np.isnan(scores).any():
            raise ModelError(f"{self._session.label} scores next tokens with NaN; look for what is wrong with it by "
                             "onnxq verify --layers")
        return np.asarray(scores)

    def _step(self, ids: Array, past: int) -> tuple[Array, int]:
        """(scores [tokens or 1, V], 0), and the cache goes on."""
        inputs, presents, logits = self._model.inputs, self._model.presents, self._model.logits.name
        feed = inputs.feed(ids, past=past) | self._cache if past else inputs.prefill(ids)
        # arrays do: onnxruntime hands its results out without a copy and reads them where they are
        found = self._session.run(feed, [logits, *presents.values()])
        self._cache = {name: found[present] for name, present in presents.items()}
        return _rows(found[logits]), 0

    def _whole(self) -> tuple[Array, int]:
        """(scores [tokens or 1, V], how many of these are padding: behind, where a causal model does not look)."""
        count, logits = len(self._seen), self._model.logits.name
        padding = (self.context or count) - count
        ids = np.pad(np.array([self._seen], np.int64), ((0, 0), (0, padding)))
        feed = self._model.inputs.prefill(ids, np.arange(count + padding)[None] < count)
        return _rows(self._session.run(feed, [logits])[logits]), padding


def _rows(logits: Array) -> Array:
    """[tokens, V] of [1, tokens, V] or [1, V]."""
    return logits.reshape(-1, logits.shape[-1])


class Writer:
    """Turns tokens into text as they come: `show` gets each piece as soon as its characters are whole."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], show: Callable[[str], None] | None) -> None:
        self._tokenizer, self._show = tokenizer, show
        # the end of the prompt decides whether what follows begins with a space
        self._ids, self._done, self._from = list(prompt[-4:]), len(prompt[-4:]), 0
        self._pieces: list[str] = []

    def put(self, token: int) -> None:
        """Take a token."""
        self._ids.append(token)
        if self._tokenizer is None:
            self._say(f"{' ' if len(self._pieces) else ''}{token}")
            return
        text = self._new()
        if text and not text.endswith(_UNFINISHED):
            self._say(text)
            self._from, self._done = self._done, len(self._ids)

    def end(self) -> str | None:
        """The whole text, or None without a tokenizer; characters that stayed unfinished are shown as they are."""
        if self._tokenizer is None:
            return None
        text = self._new()
        if text:
            self._say(text)
        return "".join(self._pieces)

    def _new(self) -> str:
        """What the tokens that are not shown yet add to those before."""
        assert self._tokenizer is not None
        before = self._tokenizer.decode(self._ids[self._from:self._done])
        return str(self._tokenizer.decode(self._ids[self._from:]))[len(before):]

    def _say(self, text: str) -> None:
        self._pieces.append(text)
        if self._show is not None:
            self._show(text)


def generate(model: str | Path, prompt: str | Sequence[int], *, tokenizer: str | Path | None = None,
             tokens: int = TOKENS, stop: Collection[int] = (), threads: int = 0,
             show: Callable[[str], None] | None = None) -> Generated:
    """What a causal language model goes on with after a prompt: always the likeliest token (of equals the lower id).

    A text is tokenized by `tokenizer` (None: the tokenizer.json beside the model), and so are the results; ids need
    none. It ends with `tokens` tokens, a token of `stop` or one that is known to end texts (by the tokenizer, or by
    generation_config.json, config.json or genai_config.json beside the model), or the context. `show` gets the text,
    or ids without a tokenizer, piece by piece.

    Raises UsageError for an unfit prompt or number of tokens, DataError for a tokenizer that can't be used, ModelError
    for a model that is no causal language model or fails.
    """
    if tokens < 1:
        raise UsageError(f"{tokens} tokens can't be generated; ask for at least 1")
    decoder = Decoder(Session(model, SessionOptions(threads=threads)))
    by = _tokenizer(model, prompt, tokenizer)
    ids = _ids(prompt, by)
    ends, limit = _settings(Path(model).parent, by)
    context = min((n for n in (decoder.context, limit) if n is not None), default=None)
    _check_prompt(ids, decoder.vocabulary, context)
    writer, made, seconds, fed, ended = Writer(by, ids, show), list[int](), list[float](), ids, ""
    while not ended:
        start = time.perf_counter()
        made.append(int(np.argmax(decoder.feed(fed))))
        seconds.append(time.perf_counter() - start)
        fed = made[-1:]
        if made[-1] in ends or made[-1] in stop:
            ended = STOP
        else:
            writer.put(made[-1])
            full = context is not None and len(ids) + len(made) > context
            ended = ENOUGH if len(made) == tokens else CONTEXT if full else ""
    return Generated(str(model), ids, made, writer.end(), ended, len(ids) / seconds[0],
                     len(seconds[1:]) / sum(seconds[1:]) if len(made) > 1 else None, decoder.cached)


def compare(model: str | Path, other: str | Path, prompt: str | Sequence[int], *, tokenizer: str | Path | None = None,
            tokens: int = TOKENS, stop: Collection[int] = (), threads: int = 0) -> tuple[Generated, Generated, int]:
    """What two models go on with after the same prompt, and how many tokens agree before the two part.

    The tokenizer and what ends a text are those of the first. Raises what `generate` raises.
    """
    first = generate(model, prompt, tokenizer=tokenizer, tokens=tokens, stop=stop, threads=threads)
    by = _tokenizer(model, prompt, tokenizer)
    ends = {*stop, *_settings(Path(model).parent, by)[0]}
    path = _beside(model, tokenizer) if by is not None else None
    second = generate(other, prompt, tokenizer=path, tokens=tokens, stop=ends, threads=threads)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first.ids, second.ids, strict=False))
    return first, second, sum(1 for _ in same)


def _beside(model: str | Path, tokenizer: str | Path | None) -> Path:
    return Path(tokenizer) if tokenizer is not None else Path(model).with_name("tokenizer.json")


def _tokenizer(model: str | Path, prompt: str | Sequence[int], tokenizer: str | Path | None) -> Tokenizer | None:
    """None for a prompt of ids without a tokenizer named."""
    if tokenizer is None and not isinstance(prompt, str):
        return None
    return load_tokenizer(_beside(model, tokenizer), "a prompt of text", "name the model's tokenizer.json with "
                          "--tokenizer FILE, or give the prompt as ids with --prompt-ids")


def _ids(prompt: str | Sequence[int], tokenizer: Tokenizer | None) -> list[int]:
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    assert tokenizer is not None
    try:
        return list(tokenizer.encode(prompt).ids)
    except Exception as error:  # the package raises plain Exception
        raise DataError(f"the prompt can't be tokenized ({error}); use the tokenizer.json of the model") from error


def _check_prompt(ids: Sequence[int], vocabulary: int | None, context: int | None) -> None:
    if not ids:
        raise UsageError("the prompt holds no tokens; give some text, or ids with --prompt-ids")
    wrong = next((token for token in ids if token < 0 or (vocabulary is not None and token >= vocabulary)), None)
    if wrong is not None:
        known = "" if vocabulary is None else f" to {vocabulary - 1}"
        raise UsageError(f"the prompt holds the token {wrong} and the model's ids go from 0{known}; use the model's "
                         "own tokenizer.json, or other ids")
    if context is not None and len(ids) > context:
        raise UsageError(f"the prompt has {len(ids)} tokens and the model takes {context} at most; shorten it")


def _settings(folder: Path, tokenizer: Tokenizer | None) -> tuple[set[int], int | None]:
    """The tokens that end a text and the longest context, as far as the files beside a model tell."""
    named = [tokenizer.token_to_id(name) for name in _ENDS] if tokenizer is not None else []
    ends = {token for token in named if token is not None}
    context: int | None = None
    for name in _SETTINGS:
        try:
            read = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, or something else of that name
            continue
        found = read.get("model", read) if isinstance(read, dict) and name == "genai_config.json" else read
        if isinstance(found, dict):
            given = found.get("eos_token_id")
            ends |= {token for token in (given if isinstance(given, list) else [given]) if isinstance(token, int)}
            context = context or next((found[key] for key in _CONTEXTS if isinstance(found.get(key), int)), None)
    return ends, context
