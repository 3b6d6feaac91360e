"""An .npz becomes batches that the model takes; what does not fit is refused with a DataError that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from readers_support import F32, FIXED4, I64, IDS, STATEFUL, Save, X, feeds, floats, joined

from onnxq.calibration.readers import open_data
from onnxq.errors import DataError, UsageError
from onnxq.ports import Port

# ------------------------------------------------------------------ cutting into batches


def test_npz_is_cut_along_axis_0(tmp_path: Path, save: Save) -> None:
    x, ids = floats(19, 3), np.arange(19 * 2).reshape(19, 2)
    save(tmp_path / "calib.npz", x=x, ids=ids)
    data = open_data(tmp_path / "calib.npz", [X, IDS])
    assert (data.name, data.rows, data.random, data.labels, data.notes) == ("calib.npz", 19, False, None, ())
    batches = list(data.batches())
    assert [(b.rows, b.first_row) for b in batches] == [(8, 0), (8, 8), (3, 16)]
    for batch in batches:
        assert set(batch.feed) == {"x", "ids"}
        rows = slice(batch.first_row, batch.first_row + batch.rows)
        np.testing.assert_array_equal(batch.feed["x"], x[rows])
        np.testing.assert_array_equal(batch.feed["ids"], ids[rows])


@pytest.mark.parametrize(
    ("limits", "rows"),
    [
        ({"batch": 5}, [5, 5, 5, 4]),
        ({"batch": 100}, [19]),
        ({"samples": 10}, [8, 2]),
        ({"samples": 3, "batch": 2}, [2, 1]),
        ({"samples": 50}, [8, 8, 3]),
    ],
)
def test_batch_and_samples(tmp_path: Path, save: Save, limits: dict[str, int], rows: list[int]) -> None:
    x = floats(19, 3)
    save(tmp_path / "a.npz", x=x)
    data = open_data(str(tmp_path / "a.npz"), [X])
    assert [batch.rows for batch in data.batches(**limits)] == rows
    np.testing.assert_array_equal(joined(data, **limits), x[: sum(rows)])


@pytest.mark.parametrize("limits", [{"batch": 0}, {"samples": 0}, {"samples": -1}])
def test_limits_below_one_are_refused_at_the_call(limits: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        open_data("random", [X]).batches(**limits)


def test_each_pass_starts_anew_and_passes_do_not_disturb_one_another(tmp_path: Path, save: Save) -> None:
    x = floats(20, 3)
    save(tmp_path / "a.npz", x=x)
    data = open_data(tmp_path / "a.npz", [X])
    abandoned = data.batches(batch=6)
    next(abandoned)
    np.testing.assert_array_equal(joined(data), x)
    np.testing.assert_array_equal(next(abandoned).feed["x"], x[6:12])
    np.testing.assert_array_equal(joined(data, batch=7), x)


def test_no_declared_rank_is_cut_along_axis_0(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=floats(10, 2, 2))
    assert [feed["x"].shape for feed in feeds(open_data(tmp_path / "a.npz", [Port("x", F32, None)]))] == [
        (8, 2, 2),
        (2, 2, 2),
    ]


def test_a_model_without_inputs_is_refused() -> None:
    with pytest.raises(DataError, match="takes no inputs"):
        open_data("random", [])


# ------------------------------------------------------------------ layouts that fix the batch


def test_axis_0_fixed_at_1_sets_the_batch(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.npz", x=floats(5, 3), ids=np.ones((5, 2), np.int64))
    data = open_data(tmp_path / "a.npz", [Port("x", F32, (1, 3)), IDS])
    assert [(b.rows, b.feed["x"].shape, b.feed["ids"].shape) for b in data.batches(batch=4)] == [
        (1, (1, 3), (1, 2))
    ] * 5
    assert data.rows == 5
    assert not data.notes


def test_a_fixed_batch_drops_the_remainder_with_a_note(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.npz", x=floats(11, 3), labels=np.arange(11))
    data = open_data(tmp_path / "a.npz", [FIXED4])
    assert data.rows == 8
    assert len(data.notes) == 1
    assert "3 of 11 rows" in data.notes[0]
    assert "batch of 4" in data.notes[0]
    np.testing.assert_array_equal(joined(data, batch=2), floats(11, 3)[:8])
    assert [batch.rows for batch in data.batches(samples=7)] == [4]
    assert data.labels is not None
    assert data.labels.tolist() == list(range(8))


def test_a_fixed_batch_that_fits_has_no_note(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=floats(8, 3))
    assert open_data(tmp_path / "a.npz", [FIXED4]).notes == ()


def test_too_few_rows_for_a_fixed_batch(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=floats(3, 3))
    with pytest.raises(DataError, match="3 rows and the model takes exactly 4"):
        open_data(tmp_path / "a.npz", [FIXED4])
    np.savez(tmp_path / "b.npz", x=floats(8, 3))
    with pytest.raises(DataError, match=r"first 3 rows .* more samples"):
        feeds(open_data(tmp_path / "b.npz", [FIXED4]), samples=3)


def test_two_fixed_batches_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=floats(8, 3), y=floats(8, 3))
    with pytest.raises(DataError, match="axis 0 of x, y is fixed; store those inputs with a leading sample axis"):
        open_data(tmp_path / "a.npz", [FIXED4, Port("y", F32, (2, 3))])


def test_a_leading_sample_axis_sets_the_batch_and_feeds_samples_as_they_are(tmp_path: Path, save: Save) -> None:
    """The layout of a recurrent model: rank-2 input cut by rows, a scalar and a state with a sample axis in front."""
    given = {"input": floats(6, 5), "sr": np.full(6, 16000), "state": floats(6, 2, 1, 3)}
    save(tmp_path / "a.npz", **given, labels=np.arange(6))
    data = open_data(tmp_path / "a.npz", STATEFUL)
    assert data.rows == 6
    for i, batch in enumerate(data.batches(batch=4)):
        assert (batch.rows, batch.first_row) == (1, i)
        np.testing.assert_array_equal(batch.feed["input"], given["input"][i : i + 1], strict=True)
        np.testing.assert_array_equal(batch.feed["state"], given["state"][i], strict=True)
        assert isinstance(batch.feed["sr"], np.ndarray)
        assert batch.feed["sr"].shape == ()
        assert batch.feed["sr"] == 16000
        assert batch.labels is not None
        assert batch.labels.tolist() == [i]


def test_a_leading_axis_beside_an_input_of_a_wider_fixed_batch_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=floats(8, 3), y=floats(8, 5, 2))
    with pytest.raises(DataError, match="axis 0 of x is fixed"):
        open_data(tmp_path / "a.npz", [FIXED4, Port("y", F32, (5, 2))])
    np.savez(tmp_path / "a.npz", x=floats(8, 4, 3), y=floats(8, 5, 2))
    shapes = [
        (f["x"].shape, f["y"].shape) for f in feeds(open_data(tmp_path / "a.npz", [FIXED4, Port("y", F32, (5, 2))]))
    ]
    assert shapes == [((4, 3), (5, 2))] * 8


# ------------------------------------------------------------------ labels


def test_labels_go_with_their_rows(tmp_path: Path, save: Save) -> None:
    labels = np.arange(20).reshape(10, 2)
    save(tmp_path / "a.npz", x=floats(10, 3), labels=labels)
    data = open_data(tmp_path / "a.npz", [X])
    np.testing.assert_array_equal(data.labels, labels)
    assert [b.labels.tolist() for b in data.batches(batch=4, samples=6) if b.labels is not None] == [
        labels[:4].tolist(),
        labels[4:6].tolist(),
    ]


def test_labels_of_pairs_are_kept_whole(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=floats(10, 3), labels=np.arange(5))
    data = open_data(tmp_path / "a.npz", [X])
    assert data.labels is not None
    assert len(data.labels) == 5
    assert all(batch.labels is None for batch in data.batches())


@pytest.mark.parametrize("count", [0, 3, 20])
def test_a_number_of_labels_that_does_not_divide_the_rows(tmp_path: Path, count: int) -> None:
    np.savez(tmp_path / "a.npz", x=floats(10, 3), labels=np.arange(count))
    with pytest.raises(DataError, match=f"{count} labels for 10 rows"):
        open_data(tmp_path / "a.npz", [X])


def test_labels_of_pairs_can_not_lose_rows(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=floats(10, 3), labels=np.arange(5))
    with pytest.raises(DataError, match="5 labels for 10 rows, not all of which fill"):
        open_data(tmp_path / "a.npz", [FIXED4])


def test_an_input_called_labels_is_an_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", labels=floats(2, 3))
    data = open_data(tmp_path / "a.npz", [Port("labels", F32, ("N", 3))])
    assert data.labels is None
    np.testing.assert_array_equal(joined(data, "labels"), floats(2, 3))


# ------------------------------------------------------------------ what does not fit


def refuse(tmp_path: Path, ports: list[Port], *phrases: str, **arrays: np.ndarray[Any, Any]) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError) as caught:
        feeds(open_data(tmp_path / "bad.npz", ports))
    for phrase in ("bad.npz", *phrases):
        assert phrase in str(caught.value)


def test_unknown_keys_are_named_with_near_matches(tmp_path: Path) -> None:
    ports = [Port("input_ids", I64, ("N", "S"))]
    ids = np.ones((2, 3), np.int64)
    refuse(tmp_path, ports, "'input_id' (did you mean 'input_ids'?)", input_id=ids)
    refuse(tmp_path, ports, "'zzz', which the model does not take", "input_ids", input_ids=ids, zzz=ids)


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    refuse(tmp_path, [X, IDS, Port("w", F32, ())], "lacks the model's inputs ids, w", x=floats(2, 3))


def test_wrong_rank(tmp_path: Path) -> None:
    wanted = ("key 'x'", "input 'x' wants float32 [N, 3]", "leading sample axis")
    refuse(tmp_path, [X], "float32 [3]", *wanted, x=floats(3))
    refuse(tmp_path, [X], "float32 [2, 2, 2, 3]", *wanted, x=floats(2, 2, 2, 3))
    refuse(tmp_path, [Port("s", I64, ())], "int64 []", "leading sample axis", s=np.array(7))
    refuse(tmp_path, [Port("s", I64, None)], "int64 []", "wants int64 of any rank", s=np.array(7))


def test_wrong_fixed_dimension(tmp_path: Path) -> None:
    refuse(tmp_path, [X], "key 'x'", "float32 [2, 4]", "float32 [N, 3]", x=floats(2, 4))
    refuse(tmp_path, [X], "float32 [5, 2, 4]", "float32 [N, 3]", x=floats(5, 2, 4))
    refuse(tmp_path, [FIXED4], "float32 [5, 3, 3]", "float32 [4, 3]", x=floats(5, 3, 3))


def test_unequal_row_counts(tmp_path: Path) -> None:
    refuse(tmp_path, [X, IDS], "unequal numbers of rows ('x' 2, 'ids' 3)", x=floats(2, 3), ids=np.ones((3, 1), int))


def test_no_rows(tmp_path: Path) -> None:
    refuse(tmp_path, [X], "no rows", x=floats(0, 3))


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("int32", "int64"), ("uint8", "float32"), ("bool", "int64"), ("float64", "float32"), (">f4", "float32")],
)
def test_safe_casts_are_made(tmp_path: Path, stored: str, wanted: str) -> None:
    given = np.array([[0, 1, 1], [1, 0, 1]], stored)
    np.savez(tmp_path / "a.npz", x=given)
    result = joined(open_data(tmp_path / "a.npz", [Port("x", np.dtype(wanted), ("N", 3))]))
    assert result.dtype == np.dtype(wanted)
    np.testing.assert_array_equal(result, [[0, 1, 1], [1, 0, 1]])


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("int64", "int32"), ("float32", "int64"), ("int64", "float32"), ("uint8", "int8"), ("<U3", "float32")],
)
def test_lossy_casts_are_refused(tmp_path: Path, stored: str, wanted: str) -> None:
    port = Port("x", np.dtype(wanted), ("N", 3))
    refuse(tmp_path, [port], "key 'x'", f"wants {wanted}", f".astype('{wanted}')", x=np.ones((2, 3), stored))


def test_a_float_that_overflows_is_refused_but_inf_and_nan_pass(tmp_path: Path) -> None:
    half = Port("x", np.dtype(np.float16), ("N", 1))
    np.savez(tmp_path / "a.npz", x=np.array([[np.inf], [np.nan], [65504.0]], np.float32))
    assert joined(open_data(tmp_path / "a.npz", [half]))[:, 0].tolist()[::2] == [np.inf, 65504.0]
    np.savez(tmp_path / "a.npz", x=np.array([[1.0], [1e5]], np.float32))
    with pytest.raises(DataError, match="beyond the range of float16"):
        feeds(open_data(tmp_path / "a.npz", [half]))


def test_an_unknown_dtype_is_fed_as_it_is(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([["a"], ["bc"]]))
    assert joined(open_data(tmp_path / "a.npz", [Port("x", None, ("N", 1))])).tolist() == [["a"], ["bc"]]
