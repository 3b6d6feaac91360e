"""The spool: what was put is got, to the bit; what isn't whole is as if it had never been put."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.errors import OutputError
from onnxq.spool import Spool, digest

KEY, OTHER = digest("a"), digest("b")
DTYPES = [np.float32, np.float16, np.uint8, np.int64, np.bool_, ml_dtypes.bfloat16, ml_dtypes.int4, ml_dtypes.uint2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (33, 7)])
def test_what_was_put_is_got(tmp_path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    Spool(tmp_path / "s").put(KEY, {"a/b": values, "": values.T})
    got = Spool(tmp_path / "s").get(KEY)
    assert got is not None
    assert list(got) == ["a/b", ""]
    np.testing.assert_array_equal(got["a/b"], values, strict=True)
    np.testing.assert_array_equal(got[""], values.T, strict=True)


def test_entries_are_apart(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s")
    assert (spool.get(KEY), spool.size()) == (None, 0)
    assert not spool.folder.exists(), "asking makes nothing"
    spool.put(KEY, {"x": np.arange(1000)})
    assert spool.get(OTHER) is None
    first = spool.size()
    assert 8000 < first < 10000
    spool.put(OTHER, {})
    assert spool.get(OTHER) == {}
    spool.put(KEY, {"x": np.arange(3)})
    found = spool.get(KEY)
    assert found is not None
    assert found["x"].tolist() == [0, 1, 2], "the last one counts"
    assert spool.size() < first


def test_what_is_got_is_mapped(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s")
    spool.put(KEY, {"x": np.arange(1000)})
    found = spool.get(KEY)
    assert found is not None
    base: Any = found["x"]
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        found["x"][0] = 1


def parts(spool: Spool) -> list[Path]:
    return sorted((spool.folder / KEY).iterdir())


@pytest.mark.parametrize("harm", ["cut", "emptied", "zeros", "gone", "list cut", "list gone", "list of other things"])
def test_a_damaged_entry_is_none(tmp_path: Path, harm: str) -> None:
    spool = Spool(tmp_path / "s")
    spool.put(KEY, {"x": np.arange(1000), "y": np.arange(3)})
    array, listed = parts(spool)[0], parts(spool)[-1]
    assert (array.suffix, listed.suffix) == (".npy", ".json")
    content = array.read_bytes()
    if harm == "cut":
        array.write_bytes(content[:-1])
    elif harm == "emptied":
        array.write_bytes(b"")
    elif harm == "zeros":  # as after a power cut: the length arrived, the bytes did not
        array.write_bytes(content[:-8] + bytes(8))
    elif harm == "gone":
        array.unlink()
    elif harm == "list cut":
        listed.write_bytes(listed.read_bytes()[:-1])
    elif harm == "list gone":
        listed.unlink()
    else:
        listed.write_text(json.dumps({"x": {"file": array.name, "dtype": "nothing", "shape": [1000]}}))
    assert spool.get(KEY) is None
    spool.put(KEY, {"x": np.arange(2)})
    assert spool.get(KEY) is not None


_WRITER = """
import sys, time
import numpy as np
from onnxq.spool import Spool
class Slow(dict):
    def items(self):
        yield "first", np.arange(100_000)
        print("half", flush=True)
        time.sleep(600)
        yield "second", np.arange(10)
spool = Spool(sys.argv[1])
spool.put(sys.argv[2], {"x": np.arange(5)})
spool.put(sys.argv[3], Slow())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_writer_leaves_what_was_whole(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s")
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(spool.folder), KEY, OTHER], stdout=subprocess.PIPE,
                          text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        os.kill(writer.pid, signal.SIGKILL)
    whole = spool.get(KEY)
    assert whole is not None
    assert whole["x"].tolist() == [0, 1, 2, 3, 4]
    assert spool.get(OTHER) is None
    assert spool.size() > 800_000, "what it left behind counts"
    spool.put(OTHER, {"y": np.arange(2)})
    assert spool.get(OTHER) is not None
    spool.remove()
    assert not spool.folder.exists()


def test_a_failing_writer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path / "s")
    spool.put(KEY, {"x": np.arange(5)})
    before = spool.size()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OutputError, match=r"s can't be written \(No space left on device\); free some space"):
        spool.put(OTHER, {"x": np.arange(5)})
    assert (spool.size(), spool.get(OTHER)) == (before, None)


def test_removal_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s")
    spool.remove()
    spool.put(KEY, {"x": np.arange(5)})
    (spool.folder / "notes.txt").write_text("mine")
    (spool.folder / "more").mkdir()
    spool.remove()
    assert sorted(p.name for p in spool.folder.iterdir()) == ["more", "notes.txt"]
    assert spool.size() == 0


def test_keys_come_from_digest(tmp_path: Path) -> None:
    for name in ("../elsewhere", "", "a" * 31, "A" * 32, "partial-x"):
        with pytest.raises(ValueError, match="is no key"):
            Spool(tmp_path).put(name, {})


# ------------------------------------------------------------------ keys


@dataclasses.dataclass(frozen=True)
class Settings:
    bits: int = 4
    name: str = "x"


@dataclasses.dataclass(frozen=True)
class Choices(Settings):
    pass


ALL: list[Any] = [
    None, True, False, 0, 1, 1.0, 1j, "1", "", b"1", (1,), [1], (1, 2), ((1,), 2), (1, (2,)), ("1", "2"), ("12",), {},
    {1: 2}, {2: 1}, Settings(), Settings(8), Settings(name="y"), Choices(), np.float32(1), np.int64(1), np.arange(3),
    np.arange(3.0), np.arange(3).reshape(1, 3), np.arange(3, dtype=np.int32), np.zeros(0), np.array(1),
]


def test_digests_tell_apart() -> None:
    assert len({digest(one) for one in ALL}) == len(ALL)
    assert digest("ab", "c") != digest("a", "bc")
    assert digest() != digest(())
    assert digest(1, 2) != digest((1, 2))


plain = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.binary(max_size=4),
                     lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=2), one, max_size=2))


@given(plain, plain)
def test_digests_are_equal_only_for_what_is(left: Any, right: Any) -> None:
    same = repr(left) == repr(right)  # True == 1, but they aren't one setting
    assert (digest(left) == digest(right)) is same


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=3)))
def test_digests_of_arrays_know_their_values_not_their_layout(array: Any) -> None:
    turned = np.asfortranarray(array)
    assert digest(array) == digest(turned) == digest(array.copy())


def test_digests_are_the_same_in_another_process() -> None:
    code = "from onnxq.spool import digest; print(digest('w', 3, 0.5, {'a': None}))"
    found = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                            env={**os.environ, "PYTHONHASHSEED": seed}).stdout.strip() for seed in ("1", "2")}
    assert found == {digest("w", 3, 0.5, {"a": None})}


def test_what_has_no_lasting_text_is_refused() -> None:
    for part in (object(), {1, 2}, time.time, Path("x"), (1, object())):
        with pytest.raises(TypeError, match="can't be part of a key"):
            digest(part)
