"""Channels that are taken out: the least squares that is promised, and choices that are checked one by one."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.numerics import channel_pruning
from onnxq.numerics.channel_pruning import DAMPING, Layer, Removal, remove
from onnxq.numerics.rounding import damped

few = settings(max_examples=25)
SEEDS = st.integers(0, 2**32 - 1)


def layer(seed, inputs, outputs=7, rank=4):
    """(w [K, N], rows [200, K] whose channels move together)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, rank)) @ rng.normal(size=(rank, inputs)) + 0.3 * rng.normal(size=(200, inputs))
    return rng.normal(size=(inputs, outputs)).astype(np.float32), x * rng.uniform(0.2, 2.0, inputs)


def alone(w, hessian, count, size=1, damping=DAMPING):
    """What is left of one layer without `count` groups of `size` neighbouring inputs."""
    groups = np.arange(len(w)) // size
    return remove([Layer(w, hessian, groups, damping)], np.zeros(len(w) // size, np.int64), [count])


def fitted(w, hessian, inputs):
    """Weights of `inputs` that fit the outputs best under a hessian, by the normal equations, and the error."""
    best = np.linalg.solve(hessian[np.ix_(inputs, inputs)], hessian[inputs] @ w)
    whole = np.zeros(w.shape)
    whole[inputs] = best
    return best, float(np.einsum("kn,kn->", whole - w, hessian @ (whole - w)))


@given(SEEDS, st.sampled_from([1, 2, 4]), st.data())
@few
def test_what_stays_is_the_least_squares_fit(seed, size, data):
    w, x = layer(seed, 24)
    count = data.draw(st.integers(0, 24 // size - 1))
    found = alone(w, x.T @ x, count, size)
    assert found.kept.tolist() == sorted(set(found.kept.tolist()))
    assert len(found.kept) == 24 // size - count
    inputs = (found.kept[:, None] * size + np.arange(size)).reshape(-1)
    best, _ = fitted(w, damped(x.T @ x, channel_pruning.DAMPING), inputs)
    [weight], [error] = found.weights, found.errors
    np.testing.assert_allclose(weight, best, rtol=0, atol=1e-4 * np.abs(best).max())
    rest = x[:, inputs] @ weight - x @ w
    np.testing.assert_allclose(error, np.square(rest).sum() / np.square(x @ w).sum(), atol=1e-5)


@given(SEEDS, st.sampled_from([1, 3]))
@few
def test_the_first_to_go_costs_least(seed, size):
    w, x = layer(seed, 12)
    hessian = damped(x.T @ x, channel_pruning.DAMPING)
    every = [np.setdiff1d(np.arange(12), np.arange(g * size, (g + 1) * size)) for g in range(12 // size)]
    errors = [fitted(w, hessian, inputs)[1] for inputs in every]
    kept = alone(w, x.T @ x, 1, size).kept
    gone = np.setdiff1d(np.arange(12 // size), kept)
    assert errors[int(gone[0])] <= min(errors) * (1 + 1e-6)


def test_it_comes_near_the_best_choice_of_all(monkeypatch):
    monkeypatch.setattr(channel_pruning, "DAMPING", 1e-6)
    ratios = []
    for seed in range(12):
        w, x = layer(seed, 10)
        hessian = x.T @ x
        best = min(fitted(w, hessian, list(kept))[1] for kept in combinations(range(10), 6))
        ratios.append(alone(w, hessian, 4, damping=1e-6).errors[0] * np.square(x @ w).sum() / best)
    assert min(ratios) > 1 - 1e-3
    assert np.mean(ratios) < 1.3


def test_many_at_once_lose_little(monkeypatch):
    errors = []
    for steps in (1000, channel_pruning.STEPS):
        monkeypatch.setattr(channel_pruning, "STEPS", steps)
        w, x = layer(3, 400, 16, rank=60)
        errors.append(alone(w, x.T @ x, 200).errors[0])
    assert errors[1] < 1.1 * errors[0]


def test_copies_and_silent_channels_go_first_and_cost_nothing():
    w, x = layer(0, 9)
    x[:, 4] = 0.0
    x[:, 7] = 2 * x[:, 2]
    found = alone(w, x.T @ x, 2, damping=1e-9)
    assert 4 not in found.kept
    assert {2, 7} - set(found.kept.tolist())
    assert found.errors[0] < 1e-6
    nothing = alone(w, np.zeros((9, 9)), 3)
    assert len(nothing.kept) == 6
    assert nothing.errors == (0.0,)


@given(SEEDS)
@few
def test_layers_lose_the_group_that_costs_all_together_least(seed):
    """Two layers read the groups at places of their own, one of them some groups twice, the other not all."""
    rng = np.random.default_rng(seed)
    places = [rng.permutation(np.r_[np.arange(8), [0, 3]]), rng.permutation(6)]
    made = [layer(seed + k, len(groups)) for k, groups in enumerate(places)]
    layers = [Layer(w, x.T @ x, groups) for (w, x), groups in zip(made, places, strict=True)]

    def cost(gone):
        total = 0.0
        for one in layers:
            stay = np.flatnonzero(one.groups != gone)
            power = np.einsum("kn,kn->", one.weight, one.hessian @ one.weight)
            total += fitted(one.weight, damped(one.hessian, DAMPING), stay)[1] / power
        return total

    found = remove(layers, np.zeros(8, np.int64), [1])
    [gone] = np.setdiff1d(np.arange(8), found.kept)
    assert cost(gone) <= min(cost(g) for g in range(8)) * (1 + 1e-6)
    for one, weight in zip(layers, found.weights, strict=True):
        stay = np.flatnonzero(one.groups != gone)
        best, _ = fitted(one.weight, damped(one.hessian, DAMPING), stay)
        np.testing.assert_allclose(weight, best, rtol=0, atol=1e-4 * np.abs(best).max())


@given(SEEDS, st.lists(st.integers(0, 3), min_size=3, max_size=3), st.integers(1, 8))
@few
def test_each_bundle_loses_its_own(seed, counts, steps):
    w, x = layer(seed, 16)
    bundles = np.random.default_rng(seed).permutation(np.repeat([-1, 0, 1, 2], 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel_pruning, "STEPS", steps)
        found: Removal = remove([Layer(w, x.T @ x, np.arange(16))], bundles, counts)
    gone = np.setdiff1d(np.arange(16), found.kept)
    assert [(bundles[gone] == b).sum() for b in (-1, 0, 1, 2)] == [0, *counts]
    assert found.weights[0].shape == (16 - sum(counts), 7)


def test_what_it_refuses():
    w, x = layer(0, 8)
    hessian, groups, one = x.T @ x, np.arange(8), np.zeros(8, np.int64)
    for wrong in (Layer(w, np.eye(7), groups), Layer(w[0], np.eye(7), groups), Layer(w, hessian, groups[:7]),
                  Layer(w, hessian, groups + 1), Layer(w, hessian, groups - 1)):
        with pytest.raises(ValueError, match="don't fit"):
            remove([wrong], one, [1])
    for count, bundles in ((8, one), (-1, one), (4, np.repeat([0, 1], 4))):
        with pytest.raises(ValueError, match=f"{count} of {8 // (1 + bundles.max())} groups can't go"):
            remove([Layer(w, hessian, groups)], bundles, [count] * (1 + int(bundles.max())))
    with pytest.raises(ValueError, match="NaN"):
        remove([Layer(w, np.full((8, 8), np.nan), groups)], one, [1])


def test_few_rows_are_damped_more():
    assert channel_pruning.damping(100, 10**6) == DAMPING
    assert channel_pruning.damping(1000, 2000) == 0.125
    assert channel_pruning.damping(1000, 500) == 4 * channel_pruning.damping(1000, 2000)
