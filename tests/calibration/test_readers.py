"""DATA in each of its forms becomes feeds; whatever does not fit is refused with a DataError that says what to do."""

from __future__ import annotations

import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxq.calibration.readers import Dataset, open_data
from onnxq.errors import DataError, UsageError
from onnxq.ports import Port

F32, I64, I32 = np.dtype(np.float32), np.dtype(np.int64), np.dtype(np.int32)
X = Port("x", F32, ("N", 3))
IDS = Port("ids", I64, ("N", None))
FIXED4 = Port("x", F32, (4, 3))
STATEFUL = [Port("input", F32, ("batch", 5)), Port("sr", I64, ()), Port("state", F32, (2, "batch", 3))]
Save = Callable[..., None]


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def feeds(data: Dataset, **limits: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    return [batch.feed for batch in data.batches(**limits)]


def joined(data: Dataset, name: str = "x", **limits: int) -> np.ndarray[Any, Any]:
    return np.concatenate([feed[name] for feed in feeds(data, **limits)])


@pytest.fixture(params=[np.savez, np.savez_compressed], ids=["stored", "compressed"])
def save(request: pytest.FixtureRequest) -> Save:
    return request.param  # type: ignore[no-any-return]


# ------------------------------------------------------------------ .npz: cutting into batches


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


def test_feeds_are_aligned_contiguous_and_the_callers_own(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.npz", x=floats(9, 3))
    data = open_data(tmp_path / "a.npz", [X])
    for feed in feeds(data):
        flags = feed["x"].flags
        assert flags.c_contiguous and flags.aligned and flags.writeable
        feed["x"][:] = -1
    np.testing.assert_array_equal(joined(data), floats(9, 3))


def test_a_stored_member_is_mapped_behind_other_members(tmp_path: Path) -> None:
    """The member's place is computed from the local header: names of unequal length shift it."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((7, 2, size)) for size, name in enumerate(["a", "a.long/name", "éé", "z"], 1)}
    np.savez(tmp_path / "a.npz", **arrays)
    ports = [Port(name, np.dtype(np.float64), (None, 2, None)) for name in arrays]
    data = open_data(tmp_path / "a.npz", ports)
    for name, array in arrays.items():
        np.testing.assert_array_equal(joined(data, name, batch=3), array)


def test_stored_and_compressed_members_in_one_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", floats(5, 3))
    np.save(tmp_path / "ids.npy", np.ones((5, 2), np.int64))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.write(tmp_path / "x.npy", "x.npy", zipfile.ZIP_DEFLATED)
        archive.write(tmp_path / "ids.npy", "ids.npy", zipfile.ZIP_STORED)
    data = open_data(tmp_path / "a.npz", [X, IDS])
    np.testing.assert_array_equal(joined(data), floats(5, 3))
    np.testing.assert_array_equal(joined(data, "ids"), np.ones((5, 2)))


def test_fortran_order(tmp_path: Path, save: Save) -> None:
    x = floats(11, 3, 4)
    save(tmp_path / "a.npz", x=np.asfortranarray(x))
    data = open_data(tmp_path / "a.npz", [Port("x", F32, ("N", 3, 4))])
    np.testing.assert_array_equal(joined(data, batch=4), x)
    assert all(feed["x"].flags.c_contiguous for feed in feeds(data))


def test_rows_without_bytes(tmp_path: Path, save: Save) -> None:
    """An empty past of a language model."""
    save(tmp_path / "a.npz", x=floats(3, 3), past=np.zeros((3, 4, 0, 8), np.float32))
    data = open_data(tmp_path / "a.npz", [X, Port("past", F32, ("N", 4, "past", 8))])
    assert [feed["past"].shape for feed in feeds(data, batch=2)] == [(2, 4, 0, 8), (1, 4, 0, 8)]


def test_no_declared_rank_is_cut_along_axis_0(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=floats(10, 2, 2))
    assert [feed["x"].shape for feed in feeds(open_data(tmp_path / "a.npz", [Port("x", F32, None)]))] == [
        (8, 2, 2),
        (2, 2, 2),
    ]


def test_a_model_without_inputs_is_refused() -> None:
    with pytest.raises(DataError, match="takes no inputs"):
        open_data("random", [])


# ------------------------------------------------------------------ .npz: layouts that fix the batch


def test_axis_0_fixed_at_1_sets_the_batch(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.npz", x=floats(5, 3), ids=np.ones((5, 2), np.int64))
    data = open_data(tmp_path / "a.npz", [Port("x", F32, (1, 3)), IDS])
    assert [(b.rows, b.feed["x"].shape, b.feed["ids"].shape) for b in data.batches(batch=4)] == [
        (1, (1, 3), (1, 2))
    ] * 5
    assert data.rows == 5 and not data.notes


def test_a_fixed_batch_drops_the_remainder_with_a_note(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.npz", x=floats(11, 3), labels=np.arange(11))
    data = open_data(tmp_path / "a.npz", [FIXED4])
    assert data.rows == 8
    assert len(data.notes) == 1 and "3 of 11 rows" in data.notes[0] and "batch of 4" in data.notes[0]
    np.testing.assert_array_equal(joined(data, batch=2), floats(11, 3)[:8])
    assert [batch.rows for batch in data.batches(samples=7)] == [4]
    assert data.labels is not None and data.labels.tolist() == list(range(8))


def test_a_fixed_batch_that_fits_has_no_note(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=floats(8, 3))
    assert open_data(tmp_path / "a.npz", [FIXED4]).notes == ()


def test_too_few_rows_for_a_fixed_batch(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=floats(3, 3))
    with pytest.raises(DataError, match="3 rows and the model takes exactly 4"):
        open_data(tmp_path / "a.npz", [FIXED4])
    np.savez(tmp_path / "b.npz", x=floats(8, 3))
    with pytest.raises(DataError, match="first 3 rows .* more samples"):
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
        assert batch.feed["sr"].shape == () and batch.feed["sr"] == 16000
        assert batch.labels is not None and batch.labels.tolist() == [i]


def test_a_leading_axis_beside_an_input_of_a_wider_fixed_batch_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=floats(8, 3), y=floats(8, 5, 2))
    with pytest.raises(DataError, match="axis 0 of x is fixed"):
        open_data(tmp_path / "a.npz", [FIXED4, Port("y", F32, (5, 2))])
    np.savez(tmp_path / "a.npz", x=floats(8, 4, 3), y=floats(8, 5, 2))
    shapes = [
        (f["x"].shape, f["y"].shape) for f in feeds(open_data(tmp_path / "a.npz", [FIXED4, Port("y", F32, (5, 2))]))
    ]
    assert shapes == [((4, 3), (5, 2))] * 8


# ------------------------------------------------------------------ .npz: labels


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
    assert data.labels is not None and len(data.labels) == 5
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


# ------------------------------------------------------------------ .npz: what does not fit


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


def test_pickles_are_refused(tmp_path: Path) -> None:
    refuse(tmp_path, [X], "key 'x'", "never unpickled", x=np.array([[{}, 1, 2]], object))


# ------------------------------------------------------------------ .npz: damaged files


def test_damaged_archives(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32))
    whole = path.read_bytes()
    for data in (b"", np.random.default_rng(1).bytes(500), whole[: len(whole) // 2], whole[:-1], whole[100:]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.npz.* can't be read .*; copy it again"):
            feeds(open_data(path, [X]))


def test_a_wrong_byte_in_a_compressed_member_shows_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match="key 'x' can't be read"):
        feeds(open_data(path, [X]))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_that_are_no_arrays(tmp_path: Path, compression: int) -> None:
    np.save(tmp_path / "x.npy", floats(4, 3))
    array = (tmp_path / "x.npy").read_bytes()
    version3 = array[:6] + b"\x03" + array[7:]
    for content in (b"text", b"", array[:-4], array + b"more", array[:40], version3):
        with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
            archive.writestr("x.npy", content)
        with pytest.raises(DataError, match="key 'x' can't be read"):
            open_data(tmp_path / "a.npz", [X])


def test_any_flipped_byte_gives_feeds_or_a_data_error(tmp_path: Path, save: Save) -> None:
    path, rng = tmp_path / "a.npz", np.random.default_rng(0)
    save(path, x=floats(6, 3), labels=np.arange(6))
    whole = path.read_bytes()
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(data)
        try:
            read = open_data(path, [X])
            assert read.rows and len(feeds(read)) >= 1
        except DataError:
            refused += 1
    assert refused > 30


def test_a_file_that_vanishes_between_passes(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.npz", x=floats(6, 3))
    data = open_data(tmp_path / "a.npz", [X])
    (tmp_path / "a.npz").unlink()
    with pytest.raises(DataError, match="can't be read"):
        feeds(data)


# ------------------------------------------------------------------ memory


def test_memory_stays_flat(tmp_path: Path, save: Save) -> None:
    """A pass over 32 MB of rows holds some batches of 1 MB and the buffers of the decompressor."""
    rows, width = 256, 32_768
    save(tmp_path / "big.npz", x=np.tile(np.arange(width, dtype=np.float32), (rows, 1)))
    tracemalloc.start()
    try:
        data = open_data(tmp_path / "big.npz", [Port("x", F32, ("N", width))])
        seen = sum(batch.rows for batch in data.batches())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen == rows
    assert peak < 6 << 20


# ------------------------------------------------------------------ folders


def test_a_folder_of_npz_concatenates_rows_in_name_order(tmp_path: Path, save: Save) -> None:
    x = floats(21, 3)
    for name, rows in {"b.npz": slice(5, 6), "a.npz": slice(0, 5), "c.npz": slice(6, 21)}.items():
        save(tmp_path / name, x=x[rows], labels=np.arange(21)[rows])
    (tmp_path / "readme.txt").write_text("not data")
    (tmp_path / "._a.npz").write_bytes(b"not data either")
    data = open_data(tmp_path, [X])
    assert (data.name, data.rows) == (tmp_path.name, 21)
    assert [(b.rows, b.first_row) for b in data.batches()] == [(8, 0), (8, 8), (5, 16)]
    np.testing.assert_array_equal(joined(data), x)
    np.testing.assert_array_equal(joined(data, samples=7, batch=2), x[:7])
    assert data.labels is not None and data.labels.tolist() == list(range(21))


def test_a_folder_of_npz_of_unequal_row_shapes(tmp_path: Path) -> None:
    """A batch holds rows of one shape; a fixed batch fills from one shape only, and labels follow the rows kept."""
    for name, (rows, width) in {"a": (3, 2), "b": (4, 5), "c": (2, 5)}.items():
        np.savez(tmp_path / f"{name}.npz", ids=np.full((rows, width), ord(name)), labels=np.full(rows, ord(name)))
    data = open_data(tmp_path, [IDS])
    assert [b.feed["ids"].shape for b in data.batches(batch=4)] == [(3, 2), (4, 5), (2, 5)]
    data = open_data(tmp_path, [Port("ids", I64, (2, None))])
    assert (data.rows, [b.feed["ids"].shape for b in data.batches()]) == (8, [(2, 2), (2, 5), (2, 5), (2, 5)])
    assert data.labels is not None and bytes(data.labels.tolist()) == b"aabbbbcc"
    assert bytes(label for b in data.batches() if b.labels is not None for label in b.labels.tolist()) == b"aabbbbcc"


def test_a_folder_of_npz_that_are_single_feeds(tmp_path: Path, save: Save) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.npz", input=floats(1, 5) + i, sr=np.array(8000 + i), state=floats(2, 1, 3), labels=i)
    data = open_data(tmp_path, STATEFUL)
    assert data.rows == 3
    assert data.labels is not None and data.labels.tolist() == [0, 1, 2]
    for i, batch in enumerate(data.batches()):
        assert (batch.rows, batch.first_row) == (1, i)
        np.testing.assert_array_equal(batch.feed["input"], floats(1, 5) + i, strict=True)
        np.testing.assert_array_equal(batch.feed["state"], floats(2, 1, 3), strict=True)
        assert batch.feed["sr"].shape == () and batch.feed["sr"] == 8000 + i


def test_unequal_rows_in_a_folder_are_no_single_feed_where_named_axes_disagree(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=floats(2, 3), ids=np.ones((3, 4), np.int64))
    with pytest.raises(DataError, match=r"a\.npz has unequal numbers of rows"):
        open_data(tmp_path, [X, IDS])


def test_labels_in_some_files_only(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=floats(2, 3), labels=np.arange(2))
    np.savez(tmp_path / "b.npz", x=floats(2, 3))
    with pytest.raises(DataError, match="only some files"):
        open_data(tmp_path, [X])
    np.savez(tmp_path / "b.npz", x=floats(2, 3), labels=np.ones((2, 2)))
    with pytest.raises(DataError, match="unequal shapes"):
        open_data(tmp_path, [X])


def test_a_folder_of_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", floats(9, 3))
    np.save(tmp_path / "ids.npy", np.asfortranarray(np.arange(18, dtype=np.int32).reshape(9, 2)))
    np.save(tmp_path / "labels.npy", np.arange(9))
    data = open_data(tmp_path, [X, IDS])
    assert (data.name, data.rows) == (tmp_path.name, 9)
    for _ in range(2):
        np.testing.assert_array_equal(joined(data), floats(9, 3))
        np.testing.assert_array_equal(joined(data, "ids"), np.arange(18).reshape(9, 2))
    assert data.labels is not None and data.labels.tolist() == list(range(9))


def test_damaged_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", floats(9, 3))
    whole = (tmp_path / "x.npy").read_bytes()
    for content in (whole[:-1], whole[:20], b""):
        (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(DataError, match=r"x\.npy can't be read"):
            open_data(tmp_path, [X])


def test_folders_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.npz or \.npy files"):
        open_data(tmp_path, [X])
    np.save(tmp_path / "y.npy", floats(9, 3))
    with pytest.raises(DataError, match="has 'y'"):
        open_data(tmp_path, [X])
    np.savez(tmp_path / "a.npz", x=floats(9, 3))
    with pytest.raises(DataError, match="both"):
        open_data(tmp_path, [X])


# ------------------------------------------------------------------ module:function, functions, iterables


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("onnxq_reader_"):
            del sys.modules[name]


def test_module_function_from_the_working_directory(workdir: Path) -> None:
    (workdir / "onnxq_reader_feeds.py").write_text(
        "import numpy as np\n"
        "def calibration():\n"
        "    for i in range(3):\n"
        "        yield {'x': np.full((2, 3), i), 'labels': [i, i + 10]}\n"
    )
    path = list(sys.path)
    data = open_data("onnxq_reader_feeds:calibration", [Port("x", np.dtype(np.float64), ("N", 3))])
    assert sys.path == path
    assert (data.name, data.rows, data.labels) == ("onnxq_reader_feeds:calibration", None, None)
    for _ in range(2):  # the function is called anew
        batches = list(data.batches(batch=1))
        assert [(b.rows, b.first_row, b.feed["x"][0, 0]) for b in batches] == [(2, 0, 0), (2, 2, 1), (2, 4, 2)]
        assert [b.labels.tolist() for b in batches if b.labels is not None] == [[0, 10], [1, 11], [2, 12]]
        assert all(b.feed["x"].dtype == np.float64 for b in batches)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("onnxq_reader_absent:f", "module 'onnxq_reader_absent' .* can't be imported .*run from the folder"),
        ("onnxq_reader_some:absent", "has no function 'absent'"),
        ("onnxq_reader_some:number", "has no function 'number'"),
        ("onnxq_reader_broken:f", "can't be imported .SyntaxError"),
        ("onnxq_reader_raising:f", "can't be imported .ZeroDivisionError"),
    ],
)
def test_modules_and_functions_that_are_not_there(workdir: Path, spec: str, message: str) -> None:
    (workdir / "onnxq_reader_some.py").write_text("number = 1\n")
    (workdir / "onnxq_reader_broken.py").write_text("def f(:\n")
    (workdir / "onnxq_reader_raising.py").write_text("1 / 0\n")
    path = list(sys.path)
    with pytest.raises(DataError, match=message):
        open_data(spec, [X])
    assert sys.path == path


def test_a_function_is_asked_for_no_more_than_samples() -> None:
    asked = []

    def source() -> Iterator[dict[str, Any]]:
        for i in range(100):
            asked.append(i)
            yield {"x": np.full((2, 3), i, np.float32)}

    data = open_data(source, [X])
    assert [b.rows for b in data.batches(samples=5)] == [2, 2, 2]
    assert asked == [0, 1, 2]
    assert "source" in data.name


@pytest.mark.parametrize("wrong", [7, "text", (np.ones(3),), None])
def test_a_feed_that_is_no_dictionary(wrong: object) -> None:
    data = open_data(lambda: iter([{"x": floats(1, 3)}, wrong]), [X])
    with pytest.raises(DataError, match=f"feed 1 of .* is a {type(wrong).__name__}; give a dictionary"):
        feeds(data)


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, "lacks the model's inputs x"),
        ({"x": floats(2, 3), "xx": 1}, r"'xx' \(did you mean 'x'\?\)"),
        ({"x": floats(3)}, r"key 'x', is float32 \[3\] and input 'x' wants float32 \[N, 3\]"),
        ({"x": floats(5, 2, 3)}, r"\[5, 2, 3\].*exactly the input's axes"),
        ({"x": floats(2, 4)}, r"\[2, 4\]"),
        ({"x": floats(0, 3)}, "no rows"),
        ({"x": np.ones((2, 3), np.int64)}, "would lose values"),
        ({"x": [[1.0, 2.0], [3.0]]}, "is no array"),
        ({"x": floats(2, 3), "labels": [1, 2, 3]}, "3 labels for 2 rows"),
    ],
)
def test_a_feed_that_does_not_fit(feed: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        feeds(open_data([feed], [X]))


def test_feeds_of_unlike_axes_count_as_one_row() -> None:
    feed = {"input": floats(1, 5), "sr": 16000, "state": floats(2, 1, 3), "labels": 1}
    batches = list(open_data([feed, feed], STATEFUL).batches())
    assert [(b.rows, b.first_row) for b in batches] == [(1, 0), (1, 1)]
    assert batches[0].feed["sr"].shape == () and batches[0].feed["sr"].dtype == np.int64
    assert batches[0].labels is not None and batches[0].labels.tolist() == [1]


def test_a_function_that_fails_or_gives_nothing() -> None:
    def failing() -> Iterator[dict[str, Any]]:
        yield {"x": floats(1, 3)}
        raise KeyError("lost")

    def needs(argument: object) -> None: ...

    cases: list[tuple[Any, str]] = [
        (failing, "failed at feed 1 .KeyError: 'lost'.; correct the code"),
        (needs, "gives no feeds .TypeError.*without arguments"),
        (lambda: 3, "gives no feeds .TypeError"),
        (list, "gave no feeds"),
        ([], "gave no feeds"),
    ]
    for source, message in cases:
        with pytest.raises(DataError, match=message):
            feeds(open_data(source, [X]))


def test_an_iterator_can_be_read_once_a_list_as_often_as_wanted() -> None:
    given = [{"x": floats(2, 3)}, {"x": floats(1, 3)}]
    data = open_data(given, [X])
    assert len(feeds(data)) == len(feeds(data)) == 2
    data = open_data(iter(given), [X])
    assert len(feeds(data)) == 2
    with pytest.raises(DataError, match="only once .*pass a function"):
        feeds(data)


# ------------------------------------------------------------------ random


def test_random_only_by_that_word() -> None:
    ports = [
        Port("x", F32, ("N", 3, None)),
        Port("input_ids", I64, ("N", "S")),
        Port("attention_mask", I64, ("N", "S")),
        Port("flags", np.dtype(bool), ("N",)),
        Port("pixels", np.dtype(np.uint8), ("N", 2)),
    ]
    data = open_data("random", ports, seed=3)
    assert (data.name, data.random, data.rows, data.labels) == ("random (asked for)", True, 16, None)
    first, second = feeds(data)
    shapes = {name: array.shape for name, array in first.items()}
    assert shapes == {
        "x": (8, 3, 64),
        "input_ids": (8, 64),
        "attention_mask": (8, 64),
        "flags": (8,),
        "pixels": (8, 2),
    }
    assert {name: array.dtype for name, array in first.items()} == {port.name: port.dtype for port in ports}
    for name in ("input_ids", "flags", "pixels"):
        assert set(np.unique(np.concatenate([first[name], second[name]])).tolist()) == {0, 1}
    assert (first["attention_mask"] == 1).all()
    assert abs(first["x"].mean()) < 0.1 and abs(first["x"].std() - 1) < 0.1  # 1536 draws: 4 and 5 standard errors
    assert not np.array_equal(first["x"], second["x"])


def test_random_depends_on_the_seed_and_not_on_the_batch() -> None:
    ports = [Port("a", F32, ("N", 3)), Port("b", F32, ("N", 3)), Port("c", np.dtype(np.uint8), ("N", 3))]
    for name in "abc":
        one = joined(open_data("random", ports, seed=1), name)
        np.testing.assert_array_equal(one, joined(open_data("random", ports, seed=1), name, batch=3))
        assert not np.array_equal(one, joined(open_data("random", ports, seed=2), name))
    data = open_data("random", ports)
    assert not np.array_equal(joined(data, "a"), joined(data, "b"))


def test_random_follows_fixed_batches_and_state_axes() -> None:
    assert [f["x"].shape for f in feeds(open_data("random", [FIXED4]))] == [(4, 3)] * 4
    assert [f["x"].shape for f in feeds(open_data("random", [Port("x", F32, (24, 3))]))] == [(24, 3)]
    assert open_data("random", [Port("x", F32, (1, 3))]).rows == 16
    stateful = feeds(open_data("random", STATEFUL))
    assert len(stateful) == 16
    assert {name: a.shape for name, a in stateful[0].items()} == {"input": (1, 5), "sr": (), "state": (2, 1, 3)}


@pytest.mark.parametrize("port", [Port("x", F32, None), Port("x", None, ("N",)), Port("x", np.dtype(object), ("N",))])
def test_random_needs_a_rank_and_a_dtype(port: Port) -> None:
    with pytest.raises(DataError, match="can't be made for input 'x'"):
        open_data("random", [port])


def test_random_is_the_word_and_not_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="not 'random', which is missing"):
        open_data(Path("random"), [X])
    Path("random").mkdir()
    np.savez("random/a.npz", x=floats(2, 3))
    assert open_data("random", [X]).random
    assert not open_data("./random", [X]).random


# ------------------------------------------------------------------ nothing else


def test_nothing_else_is_data(tmp_path: Path) -> None:
    kinds = "DATA is an .npz file, a folder of .npz or .npy files, module:function or the word random"
    np.save(tmp_path / "x.npy", floats(2, 3))
    for spec, end in {
        str(tmp_path / "absent.npz"): "absent.npz', which is missing",
        "somewhere": "not 'somewhere', which is missing",
        "a: b": "not 'a: b', which is missing",
        "": "not ''",
        str(tmp_path / "x.npy"): "x.npy'; check",
    }.items():
        with pytest.raises(DataError) as caught:
            open_data(spec, [X])
        assert kinds in str(caught.value) and end in str(caught.value)
    for wrong in (3, {"x": floats(2, 3)}, None):
        with pytest.raises(DataError, match=f"not a {type(wrong).__name__}"):
            open_data(wrong, [X])  # type: ignore[arg-type]
