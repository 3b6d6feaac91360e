"""Zeros against the rules that say how many and where, and SparseGPT against itself written down with an inverse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.numerics import sparsity
from onnxq.numerics.rounding import damped
from onnxq.numerics.sparsity import Pattern, exchange, magnitude, refit, relative_error, sparsegpt, wanda

no_deadline = settings(deadline=None, max_examples=60)
few = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**32 - 1)
SHARES = st.sampled_from([0.0, 0.1, 0.37, 0.5, 0.7, 0.99, 1.0])
PATTERNS = st.sampled_from([Pattern(1, 2), Pattern(2, 4), Pattern(1, 4), Pattern(4, 8)])


def layer(seed, groups=None, dead=True):
    """(w, hessian, x) of random sizes, inputs in groups of 8: some move together, with `dead` some are always 0."""
    rng = np.random.default_rng(seed)
    inputs, outputs = 8 * (groups or int(rng.integers(1, 9))), int(rng.integers(1, 9))
    x = rng.normal(size=(60, 5)) @ rng.normal(size=(5, inputs)) + 0.5 * rng.normal(size=(60, inputs))
    x *= rng.uniform(0.2, 2.0, inputs)
    if dead:
        x[:, rng.random(inputs) < 0.1] = 0.0
    return rng.normal(size=(inputs, outputs)).astype(np.float32), x.T @ x, x


def squares(w, pruned, hessian):
    change = pruned.astype(np.float64) - w
    return float(np.einsum("kn,kn->", change, hessian @ change))


def holds(kept, pattern):
    return bool((kept.reshape(-1, pattern.size, kept.shape[1]).sum(axis=1) == pattern.kept).all())


def reference_sparsegpt(w, hessian, share=None, pattern=None, damping=0.01, block=sparsity.BLOCK):
    """Algorithm 1 of arXiv 2301.00774 in float64, with an inverse of its own for the inputs from each one on.

    Inputs that are always 0 go first, and change nothing.
    """
    found, live = w.astype(np.float64), hessian.diagonal() > 0
    full = damped(hessian, damping) + np.diag(np.where(live, 0.0, 1.0))
    gone, made = np.zeros(w.shape, bool), 0
    step = pattern.size if pattern else block
    for j in range(len(w)):
        if j % step == 0:
            rows = range(j, min(j + step, len(w)))
            # once the weights of all later inputs make up for it, a zero costs w^2 / [H^-1]_kk
            scores = np.array([found[k] ** 2 / np.linalg.inv(full[k:, k:])[0, 0] * live[k] for k in rows])
            if pattern:
                order = np.argsort(scores, axis=0, kind="stable")[: pattern.size - pattern.kept]
                for place in order:
                    gone[j + place, np.arange(w.shape[1])] = True
            else:
                wanted = int(share * (rows[-1] + 1) * w.shape[1] + 0.5)
                for flat in np.argsort(scores.reshape(-1), kind="stable")[: wanted - made]:
                    gone[j + flat // w.shape[1], flat % w.shape[1]] = True
                made = wanted
        inverse = np.linalg.inv(full[j:, j:])
        change = np.where(gone[j], -found[j], 0.0)
        found[j:] += np.outer(inverse[:, 0] / inverse[0, 0], change)
        found[j] = np.where(gone[j], 0.0, found[j])
    return found


# ------------------------------------------------------------------ how many and where


@no_deadline
@given(SEEDS, SHARES)
def test_shares_are_reached_exactly(seed, share):
    w, hessian, _ = layer(seed)
    wanted = int(share * w.size + 0.5)
    assert (~magnitude(w, share)).sum() == wanted
    gone = ~wanda(w, np.sqrt(hessian.diagonal()), share)
    assert (gone.sum(axis=0) == int(share * len(w) + 0.5)).all()
    assert (sparsegpt(w, hessian, share) == 0).sum() == wanted


@no_deadline
@given(SEEDS, PATTERNS)
def test_patterns_hold_in_each_group(seed, pattern):
    w, hessian, _ = layer(seed)
    made = sparsegpt(w, hessian, pattern)
    for kept in (magnitude(w, pattern), wanda(w, np.sqrt(hessian.diagonal()), pattern), made != 0,
                 exchange(w, made, hessian, pattern) != 0):
        assert holds(kept, pattern)


def test_magnitude_takes_the_smallest_of_the_tensor():
    w = np.array([[4, -1, 2], [0.5, 3, -6]], np.float32)
    assert magnitude(w, 0.5).tolist() == [[True, False, False], [False, True, True]]
    assert magnitude(w, Pattern(1, 2)).tolist() == [[True, False, False], [False, True, True]]


def test_wanda_weighs_by_the_size_of_inputs_and_compares_within_outputs():
    w = np.array([[1, 10], [2, 20], [3, 30], [4, 40]], np.float32)
    norms = np.array([9.0, 1.0, 1.0, 1.0])  # scores of an output: 9, 2, 3, 4, and ten times these
    assert wanda(w, norms, 0.5).tolist() == [[True, True], [False, False], [False, False], [True, True]]


def test_of_equal_scores_the_earlier_goes():
    assert magnitude(np.ones((4, 1), np.float32), 0.5).reshape(-1).tolist() == [False, False, True, True]
    assert magnitude(np.ones((4, 1), np.float32), Pattern(2, 4)).reshape(-1).tolist() == [False, False, True, True]


# ------------------------------------------------------------------ SparseGPT


@few
@given(SEEDS, st.sampled_from([0.25, 0.5, 0.8]), st.sampled_from([3, 8, 128]))
def test_is_sparsegpt_of_the_paper(seed, share, block):
    """To float32's rounding: both solve systems whose condition the damping keeps below 1e4."""
    w, hessian, _ = layer(seed, groups=3)
    np.testing.assert_allclose(sparsegpt(w, hessian, share, block=block),
                               reference_sparsegpt(w, hessian, share, block=block), rtol=1e-4, atol=1e-5)


@few
@given(SEEDS, PATTERNS)
def test_is_sparsegpt_of_the_paper_with_patterns(seed, pattern):
    w, hessian, _ = layer(seed, groups=3)
    np.testing.assert_allclose(sparsegpt(w, hessian, pattern), reference_sparsegpt(w, hessian, pattern=pattern),
                               rtol=1e-4, atol=1e-5)


@no_deadline
@given(SEEDS)
def test_inputs_that_are_always_0_go_first(seed):
    w, hessian, _ = layer(seed)
    dead = hessian.diagonal() == 0
    made = sparsegpt(w, hessian, max(float(dead.mean()), 0.5), block=len(w))
    assert (made[dead] == 0).all()


def test_the_scale_of_the_hessian_has_no_influence():
    w, hessian, _ = layer(5)
    np.testing.assert_allclose(sparsegpt(w, hessian, 0.5), sparsegpt(w, 1024 * hessian, 0.5), rtol=1e-6)


def test_without_a_cholesky_factor_the_smallest_go():
    w, hessian, _ = layer(1, dead=False)
    broken = -hessian
    np.fill_diagonal(broken, hessian.diagonal())
    broken[0, 1] = broken[1, 0] = 1e9
    assert np.array_equal(sparsegpt(w, broken, 0.5), np.where(magnitude(w, 0.5), w, 0))


# ------------------------------------------------------------------ refit and exchange


@no_deadline
@given(SEEDS)
def test_refit_is_least_squares_over_what_stays(seed):
    w, hessian, _ = layer(seed, groups=2, dead=False)
    kept = magnitude(w, 0.5)
    made, tempered = refit(w, np.where(kept, w, 0), hessian, steps=200), damped(hessian, 0.01)
    for n in range(w.shape[1]):
        stays = kept[:, n]
        if stays.any():
            best = np.linalg.solve(tempered[np.ix_(stays, stays)], (tempered @ w[:, n])[stays])
            np.testing.assert_allclose(made[stays, n], best, rtol=1e-3, atol=1e-4)
    assert (made[~kept] == 0).all()


@no_deadline
@given(SEEDS, st.sampled_from([0.3, 0.5, 0.8, Pattern(2, 4)]))
def test_each_step_costs_no_more_than_the_one_before(seed, wanted):
    """By the damped hessian, which all of them minimise; a float32 result is off by its rounding, 2**-24 of w."""
    w, hessian, _ = layer(seed)
    pattern = wanted if isinstance(wanted, Pattern) else None
    tempered = damped(hessian, 0.01)
    slack = 1e-5 * np.einsum("kn,kn->", w, tempered @ w)
    first = sparsegpt(w, hessian, wanted)
    then, last = refit(w, first, hessian), exchange(w, first, hessian, pattern)
    errors = [squares(w, made, tempered) for made in (first, then, last)]
    assert errors[1] <= errors[0] + slack
    assert errors[2] <= errors[1] + slack
    assert (last == 0).sum() == (first == 0).sum()


def test_sparsegpt_costs_less_than_wanda_and_wanda_less_than_magnitude_in_the_mean():
    errors = []
    for seed in range(40):
        w, hessian, _ = layer(seed, groups=6)
        masks = magnitude(w, 0.5), wanda(w, np.sqrt(hessian.diagonal()), 0.5)
        made = [*(np.where(kept, w, np.float32(0)) for kept in masks), sparsegpt(w, hessian, 0.5)]
        made.append(exchange(w, made[-1], hessian))
        errors.append([relative_error(w, one, hessian) for one in made])
    by_size, by_wanda, gpt, exchanged = np.mean(errors, axis=0)
    assert exchanged < gpt < by_wanda < by_size
    assert all(one[2] <= one[0] for one in errors)


def test_exchanges_find_the_best_of_all_masks_of_a_tiny_layer():
    w, hessian, _ = layer(11, groups=1, dead=False)
    w, tempered = w[:, :1], damped(hessian, 0.01)
    masks = [m for m in np.ndindex(*[2] * 8) if sum(m) == 4]
    every = [squares(w, refit(w, np.where(np.array(m)[:, None] == 1, w, 0), hessian, steps=100), tempered)
             for m in masks]
    worst = np.where(np.array(masks[int(np.argmax(every))])[:, None] == 1, w, np.float32(0))
    found = squares(w, exchange(w, worst, hessian, rounds=40), tempered)
    assert found <= np.sort(every)[2] * (1 + 1e-4)  # a local search: among the three best of 70


def test_columns_are_searched_apart_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    w, hessian, _ = layer(3, groups=4)
    first = sparsegpt(w, hessian, 0.5)
    monkeypatch.setattr(sparsity, "COLUMNS", 2)
    parts = [exchange(w[:, k:k + 2], first[:, k:k + 2], hessian) for k in range(0, w.shape[1], 2)]
    assert np.array_equal(exchange(w, first, hessian), np.concatenate(parts, 1))


def test_relative_error_is_that_of_the_rows():
    w, hessian, x = layer(8)
    made = sparsegpt(w, hessian, 0.5)
    assert relative_error(w, made, hessian) == pytest.approx(
        float(np.square(x @ (made - w)).sum() / np.square(x @ w).sum()))
    assert relative_error(w, made, 0 * hessian) == 0


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("text", ["2:4", " 4:8 "])
def test_patterns_read_and_print(text):
    assert str(Pattern.parse(text)) == text.strip()
    assert Pattern.parse(text).share == 0.5


@pytest.mark.parametrize(("text", "why"), [("4", "no pattern"), ("4:4", "prunes nothing"), ("0:4", "prunes nothing"),
                                           ("a:b", "no pattern")])
def test_other_patterns_are_refused(text, why):
    with pytest.raises(ValueError, match=why):
        Pattern.parse(text)


@pytest.mark.parametrize("call", [lambda w: magnitude(w, 0.5), lambda w: wanda(w, np.ones(8), 0.5),
                                  lambda w: sparsegpt(w, np.eye(8), 0.5), lambda w: exchange(w, w, np.eye(8))])
def test_weights_that_are_not_finite_are_refused(call):
    w = np.ones((8, 2), np.float32)
    w[3, 1] = np.nan
    with pytest.raises(ValueError, match="finite"):
        call(w)


def test_what_does_not_fit_is_refused():
    w = np.ones((8, 2), np.float32)
    for wanted in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share"):
            magnitude(w, wanted)
    with pytest.raises(ValueError, match="no groups of 3"):
        magnitude(w, Pattern(1, 3))
    with pytest.raises(ValueError, match="norms"):
        wanda(w, np.ones(7), 0.5)
    for hessian in (np.eye(7), np.full((8, 8), np.nan)):
        with pytest.raises(ValueError, match="hessian"):
            sparsegpt(w, hessian, 0.5)
        with pytest.raises(ValueError, match="hessian"):
            refit(w, w, hessian)
