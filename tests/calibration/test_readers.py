"""DATA as a folder, a function, the word `random`, or anything else, which is refused with a DataError."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from readers_support import F32, FIXED4, I64, IDS, STATEFUL, Save, X, feeds, floats, joined

from onnxq.calibration.readers import open_data
from onnxq.errors import DataError
from onnxq.ports import Port

# ------------------------------------------------------------------ folders


def test_a_folder_of_npz_concatenates_rows_in_name_order(tmp_path: Path, save: Save) -> None:
    x = floats(21, 3)
    for name, rows in {"b.npz": slice(5, 7), "a.npz": slice(0, 5), "c.npz": slice(7, 21)}.items():
        save(tmp_path / name, x=x[rows], labels=np.arange(21)[rows])
    (tmp_path / "readme.txt").write_text("not data")
    (tmp_path / "._a.npz").write_bytes(b"not data either")
    data = open_data(tmp_path, [X])
    assert (data.name, data.rows) == (tmp_path.name, 21)
    assert [(b.rows, b.first_row) for b in data.batches()] == [(8, 0), (8, 8), (5, 16)]
    np.testing.assert_array_equal(joined(data), x)
    np.testing.assert_array_equal(joined(data, samples=7, batch=2), x[:7])
    assert data.labels is not None
    assert data.labels.tolist() == list(range(21))


def test_a_folder_of_npz_of_unequal_row_shapes(tmp_path: Path) -> None:
    """A batch holds rows of one shape; a fixed batch fills from one shape only, and labels follow the rows kept."""
    for name, (rows, width) in {"a": (3, 2), "b": (4, 5), "c": (2, 5)}.items():
        np.savez(tmp_path / f"{name}.npz", ids=np.full((rows, width), ord(name)), labels=np.full(rows, ord(name)))
    data = open_data(tmp_path, [IDS])
    assert [b.feed["ids"].shape for b in data.batches(batch=4)] == [(3, 2), (4, 5), (2, 5)]
    data = open_data(tmp_path, [Port("ids", I64, (2, None))])
    assert (data.rows, [b.feed["ids"].shape for b in data.batches()]) == (8, [(2, 2), (2, 5), (2, 5), (2, 5)])
    assert data.labels is not None
    assert bytes(data.labels.tolist()) == b"aabbbbcc"
    assert bytes(label for b in data.batches() if b.labels is not None for label in b.labels.tolist()) == b"aabbbbcc"


def test_a_folder_of_npz_that_are_single_feeds(tmp_path: Path, save: Save) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.npz", input=floats(1, 5) + i, sr=np.array(8000 + i), state=floats(2, 1, 3), labels=i)
    data = open_data(tmp_path, STATEFUL)
    assert data.rows == 3
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 2]
    for i, batch in enumerate(data.batches()):
        assert (batch.rows, batch.first_row) == (1, i)
        np.testing.assert_array_equal(batch.feed["input"], floats(1, 5) + i, strict=True)
        np.testing.assert_array_equal(batch.feed["state"], floats(2, 1, 3), strict=True)
        assert batch.feed["sr"].shape == ()
        assert batch.feed["sr"] == 8000 + i


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
    assert data.labels is not None
    assert data.labels.tolist() == list(range(9))


def test_damaged_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", floats(9, 3))
    whole = (tmp_path / "x.npy").read_bytes()
    for content in (whole[:-1], whole[:20], b""):
        (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(DataError, match=r"x\.npy can't be read"):
            open_data(tmp_path, [X])


def test_folders_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.npz, \.npy or image files"):
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
    assert batches[0].feed["sr"].shape == ()
    assert batches[0].feed["sr"].dtype == np.int64
    assert batches[0].labels is not None
    assert batches[0].labels.tolist() == [1]


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
    with pytest.raises(DataError, match=r"only once .*pass a function"):
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
    assert abs(first["x"].mean()) < 0.1
    assert abs(first["x"].std() - 1) < 0.1
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
    # Without the scalar, too, axis 0 of the state is no batch axis: the batch's name stands at its axis 1.
    first = feeds(open_data("random", [STATEFUL[0], STATEFUL[2]]))[0]
    assert {name: a.shape for name, a in first.items()} == {"input": (1, 5), "state": (2, 1, 3)}


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
    kinds = (
        "DATA is an .npz file, a folder of .npz, .npy or image files, a .txt or .jsonl text, an .npy of token "
        "ids, module:function or the word random"
    )
    for spec, end in {
        str(tmp_path / "absent.npz"): "absent.npz', which is missing",
        "somewhere": "not 'somewhere', which is missing",
        "a: b": "not 'a: b', which is missing",
        "": "not ''",
    }.items():
        with pytest.raises(DataError) as caught:
            open_data(spec, [X])
        assert kinds in str(caught.value)
        assert end in str(caught.value)
    for wrong in (3, {"x": floats(2, 3)}, None):
        with pytest.raises(DataError, match=f"not a {type(wrong).__name__}"):
            open_data(wrong, [X])  # type: ignore[arg-type]
