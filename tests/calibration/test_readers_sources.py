"""Files are read in rows without being held whole, and a damaged one is refused with a DataError."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from readers_support import F32, IDS, Save, X, feeds, floats, joined

from onnxq.calibration.readers import open_data
from onnxq.errors import DataError
from onnxq.ports import Port

# ------------------------------------------------------------------ members and their bytes


def test_feeds_are_aligned_contiguous_and_the_callers_own(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.npz", x=floats(9, 3))
    data = open_data(tmp_path / "a.npz", [X])
    for feed in feeds(data):
        flags = feed["x"].flags
        assert flags.c_contiguous
        assert flags.aligned
        assert flags.writeable
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


def test_pickles_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([[{}, 1, 2]], object))
    with pytest.raises(DataError, match="key 'x' holds Python objects, which are never unpickled"):
        open_data(tmp_path / "a.npz", [X])


# ------------------------------------------------------------------ damaged files


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
            assert read.rows
            assert len(feeds(read)) >= 1
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
