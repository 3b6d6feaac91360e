"""Encodings of weights: exact inverses by property, bytes and pictures by hand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.numerics import encodings
from onnxq.numerics.encodings import Encoded, Stored, decode

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.sampled_from([(8,), (3, 16), (16, 24), (24, 5, 8), (4, 2, 3, 8)])


def codes(seed: int, shape: tuple[int, ...], low: int = -128, high: int = 127, zeros: float = 0.0) -> np.ndarray:
    """int8 [shape] from `low` to `high`, a share of them 0."""
    rng = np.random.default_rng(seed)
    found = rng.integers(low, high, shape, np.int8, endpoint=True)
    found[rng.random(shape) < zeros] = 0
    return found


def floats(seed: int, shape: tuple[int, ...], zeros: float) -> np.ndarray:
    """float32 with what comparisons of numbers would lose: -0.0, infinities, NaN of several bits."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 2**32, shape, np.uint32).view(np.float32)
    odd = np.array([-0.0, np.inf, np.nan], np.float32)
    found = np.where(rng.random(shape) < 0.2, rng.choice(odd, shape), found)
    found[rng.random(shape) < zeros] = 0
    return found


def assert_exact(encoded: Encoded, values: np.ndarray) -> None:
    found = decode(encoded)
    assert (found.dtype, found.shape, found.tobytes()) == (values.dtype, values.shape, values.tobytes())
    outline = encoded.outline()
    assert (outline.dtype, outline.shape, outline.count) == (values.dtype, values.shape, len(encoded.arrays()))
    assert outline.nbytes == sum(stored.nbytes for stored in encoded.arrays())


def stored(encoded: Encoded, name: str) -> list[int]:
    part = encoded.parts[name]
    assert isinstance(part, Stored)
    return [int(value) for value in part.values.reshape(-1)]


# ------------------------------------------------------------------ exact inverses


@given(SEEDS, SHAPES, st.sampled_from(sorted(encodings.PLANES)))
def test_planes(seed, shape, bits):
    values = codes(seed, shape, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    encoded = encodings.planes(values, bits)
    assert_exact(encoded, values)
    assert encoded.outline().nbytes == values.size * bits // 8


@given(SEEDS, SHAPES, st.sampled_from(sorted(encodings.PLANES)), st.sampled_from([0.0, 0.02, 0.5]))
def test_narrow(seed, shape, bits, share):
    values = codes(seed, shape, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    wide = np.random.default_rng(seed + 1).random(shape) < share
    values = np.where(wide, codes(seed + 2, shape), values)
    assert_exact(encodings.narrow(values, bits), values)


@given(SEEDS, SHAPES, st.sampled_from([0.0, 0.5, 0.9, 0.999, 1.0]), st.sampled_from([8, *sorted(encodings.PLANES)]))
def test_bitmap(seed, shape, zeros, bits):
    values = codes(seed, shape, zeros=zeros)
    assert_exact(encodings.bitmap(values, bits), values)
    weights = floats(seed, shape, zeros)
    assert_exact(encodings.bitmap(weights), weights)


@given(SEEDS, st.sampled_from([(8,), (7, 5), (3, 3000)]), st.sampled_from([0.0, 0.5, 0.99, 0.9999, 1.0]),
       st.sampled_from([4, 8]), st.sampled_from([0, 128, 255]))
def test_gaps(seed, shape, zeros, bits, zero_point):
    values = codes(seed, shape, zeros=zeros)
    assert_exact(encodings.gaps(values, bits), values)
    shifted = (values.astype(np.int16) + zero_point).astype(np.uint8)
    assert_exact(encodings.gaps(shifted), shifted)
    weights = floats(seed, shape, zeros)
    assert_exact(encodings.gaps(weights), weights)


@given(SEEDS, st.sampled_from([(2, 4), (4, 8), (1, 4), (1, 2), (3, 8)]), st.sampled_from([-1, 0]),
       st.sampled_from([4, 8]), st.booleans())
def test_groups(seed, pattern, axis, bits, is_float):
    rng = np.random.default_rng(seed)
    kept, size = pattern
    rows, shape = 16 * 3, (16, 3, 3 * size)
    values = codes(seed, (rows, 3, size))
    order = np.argsort(rng.random(values.shape), axis=-1)
    np.put_along_axis(values, order[..., kept:], 0, -1)
    values = values.reshape(shape)
    if axis == 0:
        values = np.ascontiguousarray(np.moveaxis(values, -1, 0))
    values = values.astype(np.float32) if is_float else values
    assert_exact(encodings.groups(values, pattern, axis, 8 if is_float else bits), values)


@given(SEEDS, SHAPES, st.sampled_from([2, 4]), st.sampled_from(["int8", "uint8", "float32"]))
def test_codebook(seed, shape, bits, dtype):
    rng = np.random.default_rng(seed)
    table = np.frombuffer(rng.bytes(2**bits * np.dtype(dtype).itemsize), dtype)
    values = rng.choice(table, shape)
    assert_exact(encodings.codebook(values, bits), values)


def test_codebook_of_256_floats():
    values = np.random.default_rng(0).choice(np.linspace(-1, 1, 200, dtype=np.float32), (30, 40))
    encoded = encodings.codebook(values, 8)
    assert_exact(encoded, values)
    assert encoded.outline().nbytes == 1200 + 1024


# ------------------------------------------------------------------ by hand


def test_planes_by_hand():
    six = encodings.planes(np.array([-32, 31, 5, -1, 0, 1, 16, -17], np.int8), 6)  # 100000 011111 000101 111111 ..
    assert stored(six, "low") == [0, 15, 5, 15, 0, 1, 0, 15]
    assert stored(six, "high") == [0b11_00_01_10, 0b10_01_00_00]
    assert [part.nbytes for part in six.parts.values()] == [4, 2]
    five = encodings.planes(np.array([-16, 15, 0, -1, 0, 0, 0, 0], np.int8), 5)
    assert stored(five, "high") == [0b0000_1001]
    assert stored(encodings.planes(np.array([-8, 7, -1, 0], np.int8), 4), "low") == [-8, 7, -1, 0]
    assert stored(encodings.planes(np.array([-2, 1, -1, 0], np.int8), 2), "low") == [0b00_11_01_10]


def test_bitmap_by_hand():
    encoded = encodings.bitmap(np.array([0, 7, 0, 0, 0, -3, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0], np.int8))
    assert stored(encoded, "bitmap") == [0b0010_0010, 1]
    assert stored(encoded, "values")[:4] == [7, -3, 9, 0]


def test_steps_by_hand():
    """Four bits count to 15: a longer way is listed in parts, with what lies there."""
    values = np.zeros(64, np.int8)
    values[[0, 3, 6, 9, 12, 50]] = range(1, 7)
    encoded = encodings.gaps(values)
    assert encoded.outline().names == ("Exceptions", "Filled")
    assert stored(encoded, "steps") == [0, 3, 3, 3, 3, 15, 15, 8]
    assert stored(encoded, "values") == [1, 2, 3, 4, 5, 0, 0, 6]


def test_steps_are_as_wide_as_is_smallest():
    """What two or three of 4 bits would have to count is one of 8 or 16."""
    for every, dtype in ((10, "uint4"), (100, "uint8"), (2000, "uint16")):
        values = np.zeros(20000, np.int8)
        values[::every] = 1
        part = encodings.gaps(values).parts["steps"]
        assert isinstance(part, Stored)
        assert part.dtype == dtype


def test_groups_by_hand():
    """2 of 4: (0,1) (0,2) (0,3) (1,2) (1,3) (2,3) are 0 to 5, and a byte holds three as digits of base 6."""
    values = np.array([[1, 0, 2, 0, 0, 0, 3, 4, 0, 5, 0, 0]], np.int8)  # the last has one value: 0 and it
    encoded = encodings.groups(values, (2, 4))
    assert encoded.name == "Groups_2_4_3"
    assert stored(encoded, "codes") == [1 + 5 * 6 + 0 * 36]
    assert stored(encoded, "values") == [1, 2, 3, 4, 0, 5]
    assert encodings.group_table(2, 4, 1).tolist()[4] == [-1, 0, -1, 1]
    assert len(encodings.group_table(4, 8, 1)) == len(list(combinations(range(8), 4))) == 70


def test_codebook_by_hand():
    encoded = encodings.codebook(np.array([3, -5, -5, 7], np.int8), 2)
    assert stored(encoded, "table") == [3, 7, -5, 0]  # as unsigned bytes they ascend
    assert stored(encoded, "codes") == [0b01_10_10_00]


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(("call", "said"), [
    (lambda: encodings.planes(np.array([8, 0], np.int8), 4), "don't fit 4 bits"),
    (lambda: encodings.planes(np.zeros(3, np.int8), 2), "don't fill bytes"),
    (lambda: encodings.bitmap(np.zeros(9, np.int8)), "don't fill bytes"),
    (lambda: encodings.groups(np.ones((2, 4), np.int8), (2, 4)), "more than 2 of 4"),
    (lambda: encodings.groups(np.zeros((2, 6), np.int8), (2, 4)), "no groups of 4"),
    (lambda: encodings.groups_in_byte((5, 11), 22), "no whole bytes"),
    (lambda: encodings.codebook(np.arange(5, dtype=np.int8), 2), "5 different values"),
    (lambda: encodings.part_names("Planes_9"), "no encoding"),
    (lambda: encodings.part_names("Huffman"), "no encoding"),
])
def test_what_does_not_fit_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
