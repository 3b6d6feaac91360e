"""Which ports are those of a language model: names of several exporters, axes that grow, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxq.language import Unrecognised, causal_model, token_inputs
from onnxq.ports import Port

F32, F16, I64, BOOL = (np.dtype(kind) for kind in (np.float32, np.float16, np.int64, np.bool_))
IDS, MASK = Port("input_ids", I64, ("batch", "sequence")), Port("attention_mask", I64, ("batch", "total"))
POSITIONS = Port("position_ids", I64, ("batch", "sequence"))
LOGITS = Port("logits", F32, ("batch", "sequence", 50))


def cache(name: str, dims: tuple[Any, ...] = ("batch", 2, "past", 8), dtype: Any = F32) -> Port:
    return Port(name, dtype, dims)


def grown(name: str, dtype: Any = F32) -> Port:
    return Port(name, dtype, ("batch", 2, "total", 8))


@pytest.mark.parametrize(("past", "present"), [
    ("past_key_values.{n}.{part}", "present.{n}.{part}"),
    ("past_key_values.{n}.{part}", "present_key_values.{n}.{part}"),
    ("past_{part}_{n}", "present_{part}_{n}"),
    ("past.{n}.{part}", "present.{n}.{part}"),
    ("past_key_values_{part}_cache_{n}", "present_key_values_{part}_cache_{n}"),
    ("past_key_values_{part}_cache_{n}", "{part}_cache_{n}"),
    ("cache_{part}_{n}", "new_cache_{part}_{n}"),
    ("{part}_cache.{n}", "{part}_cache.{n}_out"),
])
def test_each_past_finds_its_present(past: str, present: str) -> None:
    """Whatever the order of the outputs, and with more layers than digits."""
    places = [(n, part) for n in range(12) for part in ("key", "value")]
    inputs = [IDS, MASK, *(cache(past.format(n=n, part=part)) for n, part in places)]
    outputs = [LOGITS, *(grown(present.format(n=n, part=part)) for n, part in reversed(places))]
    found = causal_model(inputs, outputs)
    assert found.presents == {past.format(n=n, part=part): present.format(n=n, part=part) for n, part in places}
    assert list(found.presents) == [port.name for port in inputs[2:]]
    assert found.logits is LOGITS


def test_keys_and_values_in_one_tensor() -> None:
    inputs = [IDS, *(cache(f"past_{n}", (2, "batch", 4, "past_sequence", 8)) for n in range(2))]
    outputs = [Port("scores", F32, ("batch", "sequence", 50)),
               *(Port(f"present_{n}", F32, (2, "batch", 4, "total", 8)) for n in range(2))]
    found = causal_model(inputs, outputs)
    assert found.presents == {"past_0": "present_0", "past_1": "present_1"}
    assert [(past.axis, past.rows) for past in found.inputs.pasts] == [(3, 1)] * 2
    assert found.inputs.pasts[0].empty(3).shape == (2, 3, 4, 0, 8)
    assert found.logits.name == "scores"


@pytest.mark.parametrize(("dims", "axis", "rows", "empty"), [
    (("batch", 2, "past", 8), 2, 0, (3, 2, 0, 8)),
    (("batch", "past_sequence_length", 2, 8), 1, 0, (3, 0, 2, 8)),
    (("batch", 2, "kv_len", 8), 2, 0, (3, 2, 0, 8)),
    (("batch", 2, None, 8), 2, 0, (3, 2, 0, 8)),
    ((None, 2, None, 8), 2, 0, (3, 2, 0, 8)),
    ((1, 2, "past", 8), 2, 0, (1, 2, 0, 8)),
    (("past", 1, 2, 8), 0, None, (0, 1, 2, 8)),
    (("past", "batch", 2, 8), 0, 1, (0, 3, 2, 8)),
])
def test_the_axis_that_grows(dims: tuple[Any, ...], axis: int, rows: int | None, empty: tuple[int, ...]) -> None:
    [past] = token_inputs([IDS, cache("past_key_0", dims, F16)]).pasts
    assert (past.axis, past.rows) == (axis, rows)
    assert (past.empty(3).shape, past.empty(3).dtype) == (empty, F16)


def test_feeds_count_on_from_the_past() -> None:
    segments = Port("token_type_ids", np.dtype(np.int32), ("batch", "sequence"))
    inputs = token_inputs([IDS, Port("attention_mask", F32, ("batch", "total")), POSITIONS, segments, cache("past_0")])
    feed = inputs.feed(np.array([[7, 8], [9, 9]]), past=3)
    assert list(feed) == ["input_ids", "attention_mask", "position_ids", "token_type_ids"]
    np.testing.assert_array_equal(feed["attention_mask"], np.ones((2, 5), np.float32), strict=True)
    np.testing.assert_array_equal(feed["position_ids"], np.array([[3, 4], [3, 4]]), strict=True)
    np.testing.assert_array_equal(feed["token_type_ids"], np.zeros((2, 2), np.int32), strict=True)
    whole = inputs.prefill(np.array([[7, 8]]), np.array([[True, False]]))
    assert whole["attention_mask"].tolist() == [[1.0, 0.0]]
    assert (whole["past_0"].shape, inputs.has_mask) == ((1, 2, 0, 8), True)


@pytest.mark.parametrize("dims", [(1,), ()])
def test_a_merged_decoder_is_told_whether_there_is_a_past(dims: tuple[int, ...]) -> None:
    inputs = token_inputs([IDS, Port("use_cache_branch", BOOL, dims), cache("past_0")])
    ids = np.array([[7]])
    np.testing.assert_array_equal(inputs.prefill(ids)["use_cache_branch"], np.zeros(dims, bool), strict=True)
    np.testing.assert_array_equal(inputs.feed(ids, past=4)["use_cache_branch"], np.ones(dims, bool), strict=True)


@pytest.mark.parametrize("inputs", [[IDS], [IDS, MASK], [IDS, MASK, POSITIONS]])
def test_models_without_a_cache(inputs: list[Port]) -> None:
    found = causal_model(inputs, [Port("hidden_states", F32, ("batch", "sequence", 8)), LOGITS])
    assert (found.logits, found.presents, found.inputs.pasts) == (LOGITS, {}, ())
    assert list(found.inputs.prefill(np.array([[1, 2]]))) == [port.name for port in inputs]


def test_sizes_that_a_model_fixes() -> None:
    found = token_inputs([Port("input_ids", I64, (1, 16)), Port("attention_mask", I64, (1, 16))])
    assert (found.rows, found.length) == (1, 16)
    assert (token_inputs([IDS, MASK]).rows, token_inputs([IDS, MASK]).length) == (None, None)


@pytest.mark.parametrize(("inputs", "message"), [
    ([IDS, Port("seqlens_k", np.dtype(np.int32), ("batch",))], "takes seqlens_k: a cache of a fixed size that"),
    ([IDS, cache("past_0"), Port("total_sequence_length", I64, ())], "takes total_sequence_length: a cache of a fixed"),
    ([IDS, Port("past_seq_len", I64, (1, 1)), Port("total_seq_len", I64, ())], "takes past_seq_len, total_seq_len: a"),
    ([IDS, cache("past_0", ("batch", 2, 64, 8))], r"the model takes past_0 float32 \[batch, 2, 64, 8\]"),
    ([IDS, cache("past_0", ("batch", "heads", "past", 8))], "where the size of axis 1 is not known"),
    ([IDS, cache("past_0", ("batch", None, None, 8))], "where the size of axis 2 is not known"),
    ([IDS, Port("use_cache_branch", BOOL, (1,))], r"the model takes use_cache_branch bool \[1\]"),
    ([IDS, Port("encoder_hidden_states", F32, ("batch", "s", 8))], "takes encoder_hidden_states float32"),
    ([Port("pixel_values", F32, ("batch", 3, 8, 8))], "with input_ids among them, and the model takes pixel_values"),
])
def test_inputs_of_something_else(inputs: list[Port], message: str) -> None:
    with pytest.raises(Unrecognised, match=message):
        token_inputs(inputs)


@pytest.mark.parametrize(("inputs", "outputs", "message"), [
    ([IDS], [Port("last_hidden_state", F32, ("batch", "sequence", 8))], r"the model gives last_hidden_state float32"),
    ([IDS], [Port("logits", F32, ("batch", 10))], r"gives logits \[rows, tokens, vocabulary\], and the model gives "
                                                  r"logits float32 \[batch, 10\]"),
    ([IDS], [Port("a", F32, ("batch", "sequence", 8)), Port("b", F32, ("batch", "sequence", 8))], "gives a .*, b "),
    ([IDS], [Port("a", I64, ("batch", "sequence", 8))], "the model gives a int64"),
    ([IDS, cache("past_key_0")], [LOGITS], "no output gives back what the input 'past_key_0' takes"),
    ([IDS, cache("past_key_0")], [LOGITS, grown("present_value_0")], "no output gives back .* 'past_key_0'"),
    ([IDS, cache("past_key_0")], [LOGITS, Port("present_key_0", F32, ("batch", 8))], "no output gives back"),
])
def test_outputs_of_something_else(inputs: list[Port], outputs: list[Port], message: str) -> None:
    with pytest.raises(Unrecognised, match=message):
        causal_model(inputs, outputs)


def test_logits_of_the_last_token_alone() -> None:
    logits = Port("logits", F32, ("batch", 50))
    assert causal_model([IDS, cache("past_0")], [logits, grown("present_0")]).logits is logits
