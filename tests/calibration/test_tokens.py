"""DATA as a file of token ids: rows and their next tokens, how they are cut, and what is refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.calibration.dataset import Batch
from onnxq.calibration.readers import open_data
from onnxq.errors import DataError
from onnxq.ports import Port
from onnxq.recipe import Preprocessing

F32, I64, I32 = np.dtype(np.float32), np.dtype(np.int64), np.dtype(np.int32)
IDS = Port("input_ids", I64, ("N", "S"))
DECODER = [IDS, Port("attention_mask", I32, ("N", "total")), Port("position_ids", I64, ("N", "S")),
           Port("past_key_0", F32, ("N", 2, "past", 8)), Port("past_value_0", F32, ("N", 2, "past", 8))]
FIXED = [Port("input_ids", I64, (3, 4)), Port("attention_mask", I64, (3, 4))]


def batches(path: Path, ports: list[Port], limits: dict[str, int] | None = None, **how: Any) -> list[Batch]:
    return list(open_data(path, ports, how=Preprocessing(**how)).batches(**(limits or {})))


def joined(found: list[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, labels) of all batches."""
    labels = [b.labels for b in found if b.labels is not None]
    assert [len(label) for label in labels] == [b.rows for b in found]
    return np.concatenate([b.feed["input_ids"] for b in found]), np.concatenate(labels)


def test_rows_are_prefills_labelled_with_the_next_tokens(tmp_path: Path) -> None:
    tokens = np.arange(60, dtype=np.uint16).reshape(10, 6)
    np.save(tmp_path / "t.npy", tokens)
    data = open_data(tmp_path / "t.npy", DECODER)
    assert (data.name, data.rows, data.random) == ("t.npy", 10, False)
    assert data.notes == ("each row gives its first 5 tokens, labelled with the next; data: in the recipe changes "
                          "that",)
    for _ in range(2):
        found = list(data.batches(batch=4))
        assert [(b.rows, b.first_row) for b in found] == [(4, 0), (4, 4), (2, 8)]
        ids, labels = joined(found)
        np.testing.assert_array_equal(ids, tokens[:, :-1].astype(np.int64), strict=True)
        np.testing.assert_array_equal(labels, tokens[:, 1:].astype(np.int64), strict=True)
    feed = found[0].feed
    assert list(feed) == [port.name for port in DECODER]
    np.testing.assert_array_equal(feed["attention_mask"], np.ones((4, 5), np.int32), strict=True)
    np.testing.assert_array_equal(feed["position_ids"], np.tile(np.arange(5), (4, 1)), strict=True)
    assert (feed["past_key_0"].shape, feed["past_key_0"].dtype) == ((4, 2, 0, 8), F32)
    np.testing.assert_array_equal(data.labels, tokens[:, 1:])


def test_length_takes_the_first_tokens_of_each_row(tmp_path: Path) -> None:
    tokens = np.arange(60).reshape(10, 6)
    np.save(tmp_path / "t.npy", tokens)
    ids, labels = joined(batches(tmp_path / "t.npy", [IDS], length=3))
    np.testing.assert_array_equal(ids, tokens[:, :3])
    np.testing.assert_array_equal(labels, tokens[:, 1:4])
    with pytest.raises(DataError, match=r"t\.npy of \[10, 6\] does not fill a row of 6 tokens and their next"):
        open_data(tmp_path / "t.npy", [IDS], how=Preprocessing(length=6))


@given(st.integers(2, 60), st.integers(1, 9), st.integers(1, 5))
def test_a_stream_is_cut_without_gaps(count: int, length: int, batch: int) -> None:
    """Each token of the whole rows is an input or the last label of one row, in the order of the file."""
    tokens, how = np.random.default_rng(count).integers(0, 99, count), Preprocessing(length=length)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "t.npy"
        np.save(path, tokens)
        if count < length + 1:
            with pytest.raises(DataError, match="does not fill a row"):
                open_data(path, [IDS], how=how)
            return
        data = open_data(path, [IDS], how=how)
        ids, labels = joined(list(data.batches(batch)))
        assert data.rows == len(ids) == count // (length + 1)
        whole = np.concatenate([ids, labels[:, -1:]], axis=1)
        np.testing.assert_array_equal(whole.ravel(), tokens[:len(ids) * (length + 1)])
        np.testing.assert_array_equal(ids[:, 1:], labels[:, :-1])
        np.testing.assert_array_equal(data.labels, labels)


def test_a_stream_has_rows_of_128_unless_the_model_says_otherwise(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.arange(300))
    data = open_data(tmp_path / "t.npy", DECODER)
    assert data.rows == 2
    assert data.notes[0].startswith("the ids are one stream, cut into rows of 128 tokens, labelled with the next")
    assert next(iter(data.batches())).feed["input_ids"].shape == (2, 128)
    np.save(tmp_path / "u.npy", np.arange(37))
    data = open_data(tmp_path / "u.npy", FIXED)
    assert (data.rows, [b.rows for b in data.batches(batch=2)]) == (6, [3, 3])
    assert data.notes[1:] == ("1 of 7 rows of u.npy left out: they fill no batch of 3",)
    assert data.labels is not None
    assert data.labels.shape == (6, 4)
    with pytest.raises(DataError, match=r"rows of 4 tokens and data\.length in the recipe is 6; leave it out"):
        open_data(tmp_path / "u.npy", FIXED, how=Preprocessing(length=6))


def test_samples_are_the_first_rows(tmp_path: Path) -> None:
    tokens = np.arange(60).reshape(10, 6)
    np.save(tmp_path / "t.npy", tokens)
    found = batches(tmp_path / "t.npy", [IDS], {"batch": 3, "samples": 4})
    assert [b.rows for b in found] == [3, 1]
    np.testing.assert_array_equal(joined(found)[0], tokens[:4, :-1])
    assert len(batches(tmp_path / "t.npy", [IDS], {"samples": 99})) == 2
    assert [b.rows for b in batches(tmp_path / "t.npy", FIXED, {"samples": 5})] == [3]
    with pytest.raises(DataError, match=r"the first 2 rows of t\.npy fill no batch of the model; ask for more"):
        batches(tmp_path / "t.npy", FIXED, {"samples": 2})


def test_an_npz_with_tokens_alone(tmp_path: Path, save: Callable[..., None]) -> None:
    tokens = np.arange(60).reshape(10, 6)
    save(tmp_path / "t.npz", tokens=tokens)
    data = open_data(tmp_path / "t.npz", DECODER)
    ids, labels = joined(list(data.batches(batch=3)))
    np.testing.assert_array_equal(ids, tokens[:, :-1])
    np.testing.assert_array_equal(labels, tokens[:, 1:])
    np.testing.assert_array_equal(data.labels, labels)
    own = open_data(tmp_path / "t.npz", [Port("tokens", I64, ("N", 6))])
    np.testing.assert_array_equal(next(iter(own.batches())).feed["tokens"], tokens[:8])
    save(tmp_path / "more.npz", tokens=tokens, other=tokens)
    with pytest.raises(DataError, match="'other', 'tokens', which the model does not take"):
        open_data(tmp_path / "more.npz", [IDS])


def test_memory_stays_flat(tmp_path: Path) -> None:
    """A pass over 16 MB of tokens holds a batch; their labels are looked at where they lie."""
    np.save(tmp_path / "t.npy", np.zeros(2 << 20, np.int64))
    data = open_data(tmp_path / "t.npy", [IDS], how=Preprocessing(length=127))
    tracemalloc.start()
    try:
        rows = sum(batch.rows for batch in data.batches())
        labels = data.labels
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert labels is not None
    assert len(labels) == rows == 2 << 13
    assert peak < 1 << 20


@pytest.mark.parametrize(("tokens", "message"), [
    (np.zeros((3, 4), np.float32), r"is float32 \[3, 4\] and token ids are integers, \[tokens\] or \[rows, tokens\]"),
    (np.zeros((3, 4), bool), "is bool"),
    (np.zeros((3, 4, 5), np.int64), r"is int64 \[3, 4, 5\]"),
    (np.zeros((), np.int64), r"is int64 \[\]"),
    (np.zeros((0, 4), np.int64), r"of \[0, 4\] does not fill a row of 3 tokens and their next; give more tokens"),
    (np.zeros((4, 1), np.int64), r"of \[4, 1\] does not fill a row of 1 tokens"),
    (np.zeros((4, 0), np.int64), r"of \[4, 0\] does not fill a row"),
    (np.zeros(128, np.int64), r"of \[128\] does not fill a row of 128 tokens and their next"),
])
def test_arrays_that_hold_no_rows(tokens: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", tokens)
    with pytest.raises(DataError, match=rf"t\.npy {message}"):
        open_data(tmp_path / "t.npy", [IDS])


def test_negative_ids_are_refused(tmp_path: Path) -> None:
    tokens = np.zeros((5, 4), np.int64)
    tokens[3, 3] = -100
    np.save(tmp_path / "t.npy", tokens)
    assert len(batches(tmp_path / "t.npy", [IDS], {"samples": 3})) == 1
    with pytest.raises(DataError, match=r"t\.npy holds negative ids in the rows from 2 on; leave padding out"):
        batches(tmp_path / "t.npy", [IDS], {"batch": 2})


def test_models_that_take_something_else(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.zeros((3, 4), np.int64))
    with pytest.raises(DataError, match=r"tokens fill the inputs .* and the model takes x float32 \[N, 3\]; write an"):
        open_data(tmp_path / "t.npy", [Port("x", F32, ("N", 3))])
    (tmp_path / "t.npy").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"t\.npy can't be read"):
        open_data(tmp_path / "t.npy", [IDS])
