"""Which of a model's inputs and outputs are those of a causal language model, by what exporters call them.

Known are the names of transformers and optimum (`past_key_values.0.key` and `present.0.key`, a merged decoder's
`use_cache_branch`), of onnxruntime-genai's builder, and of exports by hand (`past_key_0` and `present_key_0`, or a
tensor `past_0` [2, rows, heads, past, width] for both), all with or without a mask and positions; and models without a
cache. Caches of a fixed size that the caller manages (`seqlens_k`) are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.ports import Port

Array = npt.NDArray[Any]
Feed = dict[str, Array]

IDS, MASK, SEGMENTS, POSITIONS = "input_ids", "attention_mask", "token_type_ids", "position_ids"
TOKEN_INPUTS = (IDS, MASK, SEGMENTS, POSITIONS)
CACHE_BRANCH = "use_cache_branch"
_OF_A_CACHE = ("past", "cache")
_SHARED = re.compile(r"seq_?lens?(_?k)?$|^(past|total)_seq|total_sequence_length|block_table|slot_mapping")
# parts of names that tell neither a layer nor key from value, so that past and present are alike without them
_ROLES = frozenset({"past", "present", "new", "updated", "cache", "kv", "keyvalues", "in", "out", "input", "output"})


class Unrecognised(Exception):
    """The ports are not those of a language model: a clause that says why, for the caller to end with a remedy."""


@dataclass(frozen=True)
class Past:
    """An input that takes keys or values of earlier tokens: `axis` grows, rows lie along `rows` (None: only one)."""

    port: Port
    axis: int
    rows: int | None

    def empty(self, rows: int) -> Array:
        """What comes before the first token: 0 along `axis`."""
        sizes = [dim if isinstance(dim, int) else rows if axis == self.rows else 0
                 for axis, dim in enumerate(self.port.shape or ())]
        return np.zeros(sizes, self.port.dtype)


@dataclass(frozen=True)
class TokenInputs:
    """The inputs of a model that reads tokens, by role; `rows` and `length` are what the model fixes of [rows, length].

    Without `pasts` the model may be an encoder just as well.
    """

    tokens: tuple[Port, ...]
    pasts: tuple[Past, ...]
    branch: Port | None
    rows: int | None
    length: int | None

    @property
    def has_mask(self) -> bool:
        """Whether padding can be told from tokens."""
        return any(port.name == MASK for port in self.tokens)

    def feed(self, tokens: Array, real: Array | None = None, past: int = 0) -> Feed:
        """Inputs for ids [rows, length] that follow `past` tokens, apart from the cache.

        `real` bool [rows, past + length] is false at padding (None: nowhere); positions count from `past`.
        """
        rows, length = tokens.shape
        made = {IDS: tokens, MASK: np.ones((rows, past + length), bool) if real is None else real,
                SEGMENTS: np.zeros_like(tokens), POSITIONS: np.tile(np.arange(past, past + length), (rows, 1))}
        found = {port.name: made[port.name].astype(port.dtype) for port in self.tokens}
        if self.branch is not None:
            found[self.branch.name] = np.full([1] * len(self.branch.shape or ()), past > 0)
        return found

    def prefill(self, tokens: Array, real: Array | None = None) -> Feed:
        """All inputs for ids [rows, length] that nothing comes before."""
        return self.feed(tokens, real) | {past.port.name: past.empty(len(tokens)) for past in self.pasts}


@dataclass(frozen=True)
class CausalModel:
    """A model that scores next tokens: `logits` [rows, length, V]; `presents` names the output that each past becomes.

    `logits` may hold the last position alone, or no axis for it.
    """

    inputs: TokenInputs
    logits: Port
    presents: dict[str, str]


def token_inputs(ports: Sequence[Port]) -> TokenInputs:
    """The inputs by role. Raises Unrecognised unless they are all that the model takes, and tell their sizes."""
    tokens = tuple(port for port in ports if port.name in TOKEN_INPUTS)
    batch = next((port.shape[0] for port in tokens if port.name == IDS and port.shape), None)
    rest = [port for port in ports if port.name not in TOKEN_INPUTS]
    pasts = [past for port in rest if (past := _past(port, batch)) is not None]
    branch = next((port for port in rest if port.name == CACHE_BRANCH and port.dtype == np.bool_ and pasts), None)
    others = [port for port in rest if port is not branch and port not in [past.port for past in pasts]]
    shared = [port.name for port in others if _SHARED.search(port.name)]
    if shared:
        raise Unrecognised(f"the model takes {', '.join(shared)}: a cache of a fixed size that its caller manages, "
                           "where onnxq feeds one that grows from nothing")
    if others or IDS not in {port.name for port in tokens}:
        found = ", ".join(f"{port.name} {port}" for port in others or ports)
        raise Unrecognised(f"tokens fill the inputs {', '.join(TOKEN_INPUTS)} and an empty past_*, with {IDS} among "
                           f"them, and the model takes {found}")
    for port in tokens:
        if port.shape is None or len(port.shape) != 2 or port.dtype is None or port.dtype.kind not in "iubf":
            raise Unrecognised(f"tokens fill inputs of [rows, tokens] and input '{port.name}' is {_about(port)}")
    return TokenInputs(tokens, tuple(pasts), branch, _agreed(tokens, 0, "rows"), _agreed(tokens, 1, "tokens"))


def causal_model(inputs: Sequence[Port], outputs: Sequence[Port]) -> CausalModel:
    """Inputs and outputs by role. Raises Unrecognised unless next tokens are scored and each past comes back longer."""
    taken = token_inputs(inputs)
    by_key = {_key(port.name): port for port in outputs if "logits" not in port.name}
    presents = {}
    for past in taken.pasts:
        present = by_key.get(_key(past.port.name))
        if present is None or (present.shape and len(present.shape) != len(past.port.shape or ())):
            raise Unrecognised(f"no output gives back what the input '{past.port.name}' takes, such as present.*")
        presents[past.port.name] = present.name
    rest = [port for port in outputs if port.name not in presents.values()]
    named = [port for port in rest if port.name.endswith("logits")]
    scores = named or [port for port in rest if port.dtype is not None and port.dtype.kind == "f"
                       and "hidden" not in port.name]
    if len(scores) != 1 or len(scores[0].shape or ()) not in ((0, 2, 3) if presents else (0, 3)):
        found = ", ".join(f"{port.name} {port}" for port in rest)
        raise Unrecognised(f"a language model gives logits [rows, tokens, vocabulary], and the model gives {found}")
    return CausalModel(taken, scores[0], presents)


def _past(port: Port, batch: int | str | None) -> Past | None:
    """By its name, its type, and the axis that grows: it is called past*, or is the only free one beside the rows'."""
    if port.dtype is None or port.dtype.kind != "f" or not any(word in port.name for word in _OF_A_CACHE):
        return None
    dims = port.shape or ()
    called = [axis for axis, dim in enumerate(dims) if str(dim).lower().startswith("past")]
    rows = dims.index(batch) if isinstance(batch, str) and batch in dims else None if 0 in called else 0
    free = [axis for axis, dim in enumerate(dims) if not isinstance(dim, int) and axis != rows]
    if not free:
        return None
    axis = (called or free)[0]
    unknown = next((other for other in free if other != axis), None)
    if unknown is not None:
        raise Unrecognised(f"input '{port.name}' is {_about(port)}, where the size of axis {unknown} is not known")
    return Past(port, axis, rows)


def _key(name: str) -> tuple[str, ...]:
    """What a past and its present have in common: ('0', 'key') of past_key_values.0.key and of present.0.key."""
    parts = re.split(r"[._/]", re.sub(r"key_values?(?=[._/]|$)", "keyvalues", name.lower()))
    return tuple(part for part in parts if part not in _ROLES)


def _agreed(ports: Iterable[Port], axis: int, what: str) -> int | None:
    """The size that the inputs fix along an axis, or None. Raises Unrecognised for two sizes."""
    sizes = {port.shape[axis]: port.name for port in ports if port.shape and isinstance(port.shape[axis], int)}
    if len(sizes) > 1:
        found = ", ".join(f"{name} {size}" for size, name in sizes.items())
        raise Unrecognised(f"the model's inputs take unequal numbers of {what} ({found})")
    return next((size for size in sizes if isinstance(size, int)), None)


def _about(port: Port) -> str:
    return str(port) if port.shape is not None else f"{port.dtype} of any rank"
