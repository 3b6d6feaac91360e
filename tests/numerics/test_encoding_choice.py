"""Which encodings are offered, and that what is chosen together is the smallest that fits."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.numerics import encoding_choice
from onnxq.numerics.encoding_choice import (
    BASE,
    LEAST_GAIN,
    Choice,
    Form,
    choices,
    choose,
    held,
    largest,
    left_behind,
    peak,
)
from onnxq.numerics.encodings import decode

SHAPE = (96, 64)
wide = np.random.default_rng(0).integers(-128, 128, SHAPE).astype(np.int8)
chance = np.random.default_rng(1).random(SHAPE)


def best(values: np.ndarray) -> tuple[str, ...]:
    found = min(choices(values), key=lambda choice: choice.nbytes)
    return found.outline.names if found.outline is not None else ()


def grouped(values: np.ndarray, kept: int, size: int) -> np.ndarray:
    rows = values.reshape(-1, size).copy()
    rows[:, kept:] = 0
    return rows.reshape(values.shape)


@pytest.mark.parametrize(("values", "names"), [
    (wide, ()),
    (wide.astype(np.float32) * 0.1, ("Codebook_8",)),
    (np.random.default_rng(2).normal(size=SHAPE).astype(np.float32), ()),
    (wide.astype(np.int32) % 3, ()),
    (wide >> 4, ("Planes_4",)),
    (wide >> 2, ("Planes_6",)),
    (np.where(chance < 0.01, wide, wide >> 4), ("Exceptions", "Planes_4")),
    (np.where(chance < 0.5, 0, wide).astype(np.int8), ("Bitmap",)),
    (np.where(chance < 0.5, 0, wide >> 4).astype(np.int8), ("Bitmap", "Planes_4")),
    (np.where(chance < 0.97, 0, wide).astype(np.int8), ("Exceptions", "Filled")),
    (np.where(chance < 0.5, 0, wide).astype(np.float32) * 0.1, ("Codebook_8",)),
    (np.where(chance < 0.8, 0, chance).astype(np.float32), ("FloatBitmap",)),
    (grouped(wide, 2, 4), ("Groups_2_4_3",)),
    (np.ascontiguousarray(grouped(wide.T, 2, 4).T), ("Transposed", "Groups_2_4_3")),
    (np.where(chance < 0.5, 100, -100).astype(np.int8), ("Codebook_2",)),
    ((wide >> 4).view(np.uint8) + np.uint8(128), ("Codebook_4",)),
    (np.zeros(SHAPE, np.int8), ("Filled",)),
    (np.zeros((0, 4), np.int8), ()),
])
def test_the_smallest(values, names):
    assert best(values) == names


@pytest.mark.parametrize("values", [wide >> 4, np.where(chance < 0.9, 0, wide).astype(np.int8), grouped(wide, 2, 4),
                                    (wide >> 5).astype(np.float32)])
def test_what_is_offered_is_exact_and_worth_it(values):
    dense, *others = choices(values)
    assert (dense.form, dense.nbytes, dense.left, dense.held) == (None, values.nbytes, 0, 0)
    assert len(others) > 1
    for choice in others:
        assert choice.form is not None
        assert choice.outline is not None
        encoded = choice.form.encode(values)
        assert encoded.outline() == choice.outline
        assert decode(encoded).tobytes() == values.tobytes()
        assert choice.nbytes == choice.outline.nbytes <= (1 - LEAST_GAIN) * values.nbytes
        assert (choice.left, choice.held) == (left_behind(choice.outline), held(choice.outline))
        assert choice.left >= values.nbytes, "the decoded weight itself is left, too"


def test_left_and_held_by_hand():
    """4 bits and one exception of 64: the plane as int8, a step as int32 and its sum, all elements twice."""
    values = np.zeros(64, np.int8)
    values[40] = 100
    outline = Form("narrow", 4).encode(values).outline()
    assert outline.names == ("Exceptions", "Planes_4")
    assert left_behind(outline) == 64 + 2 * 4 + 2 * 64
    assert held(outline) == 12
    assert outline.nbytes == 32 + 1 + 1


@pytest.mark.parametrize(("form", "bytes_of_an_element"), [
    (Form("narrow", 4), 1), (Form("narrow", 6), 1), (Form("bitmap"), 4), (Form("groups", 8, (4, 8)), 4),
    (Form("gaps"), 2), (Form("codebook", 4), 2)])
def test_the_largest_result(form, bytes_of_an_element, monkeypatch):
    """What the runtime would not fold, since one of its results is too large, is not offered: int32 places of a bitmap
    or of groups, a step for every other element, a number for every other one in a codebook."""
    values = np.tile(np.array([0, 1], np.int8), 4096)
    outline = form.encode(values).outline()
    assert largest(outline) == bytes_of_an_element * values.size
    for room, offered in ((largest(outline), True), (largest(outline) - 1, False)):
        monkeypatch.setattr(encoding_choice, "MOST_FOLDED", room)
        monkeypatch.setattr(encoding_choice, "_forms", lambda values: [form])
        assert (len(choices(values)) == 2) is offered


option = st.builds(lambda size, left, kept: Choice(None, None, size, left, kept), st.integers(1, 60),
                   st.integers(0, 60), st.integers(0, 30))
plain = st.integers(1, 60).map(lambda size: Choice(None, None, size))
weights = st.lists(st.builds(lambda first, more: [first, *more], plain, st.lists(option, max_size=3)), min_size=1,
                   max_size=4)


def memory(weights, picked):
    taken = [found[index] for found, index in zip(weights, picked, strict=True)]
    return sum(c.nbytes + c.left for c in taken) + max(c.held for c in taken)


@given(weights, st.integers(1, 400))
def test_what_is_chosen_fits_wherever_dense_does(weights, most):
    """In the exact range of the allocation: within `most`, no larger than dense, and no larger than the smallest of
    those whose parts fit with everything that any of them might hold set aside."""
    picked = choose(weights, most)
    size = sum(found[index].nbytes for found, index in zip(weights, picked, strict=True))
    dense = [0] * len(weights)
    if memory(weights, dense) > most:
        return
    assert memory(weights, picked) <= most
    assert size <= sum(found[0].nbytes for found in weights)
    most_held = max(choice.held for found in weights for choice in found)
    surely = [p for p in product(*(range(len(found)) for found in weights))
              if memory(weights, p) - max(f[k].held for f, k in zip(weights, p, strict=True)) <= most - most_held]
    assert size <= min((sum(f[k].nbytes for f, k in zip(weights, p, strict=True)) for p in surely), default=size)


def test_peak():
    small = [Choice(Form("gaps"), None, 10, 40, 7), Choice(None, None, 20), Choice(Form("bitmap"), None, 5, 50, 9)]
    assert peak(small, 60) == BASE + 60 + 35 + 90 + 9
    assert peak([], 0) == BASE
