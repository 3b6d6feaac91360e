import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.errors import DataError, UsageError
from onnxq.numerics import metrics
from onnxq.numerics.metrics import make_metric

no_deadline = settings(deadline=None)


def scored(metric, output, labels, **inputs):
    """The metric's result over one batch."""
    metric.update({"y": np.asarray(output)}, None if labels is None else np.asarray(labels), inputs)
    return metric.result()


# ---------------------------------------------------------------- classification

SCORES = np.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.4, 0.4, 0.2]], np.float32)


def test_top1_by_hand():
    assert scored(make_metric("top1"), SCORES, [1, 1, 2, 0]) == 0.75
    assert scored(make_metric("top1"), SCORES, [[1], [1], [2], [1]]) == 0.5  # of equal scores the first class wins


def test_top1_over_batches_and_positions():
    metric = make_metric("top1")
    metric.update({"y": SCORES[:3]}, np.array([1, 0, 2]), {})
    metric.update({"y": SCORES[3:]}, np.array([2]), {})
    assert metric.result() == 0.75
    assert scored(make_metric("top1"), SCORES.reshape(2, 2, 3), [[1, 0], [0, 0]]) == 0.75


@pytest.mark.parametrize("output", [np.array([3, 1, 2]), np.array([3.0, 1.0, 2.0], np.float32)])
@pytest.mark.parametrize("name", ["top1", "f1"])
def test_class_ids_as_output(name, output):
    assert scored(make_metric(name), output, [3, 1, 2]) == 1.0
    assert scored(make_metric(name), output, [7, 8, 9]) == 0.0


def test_integer_output_of_rank_two_is_class_ids():
    assert scored(make_metric("top1"), np.array([[3, 1], [2, 2]]), [[3, 1], [2, 0]]) == 0.75


def test_topk_by_hand():
    labels = [2, 1, 0, 1]
    assert [scored(make_metric(name), SCORES, labels) for name in ("top1", "top2", "top3", "topk")] == [0, 0.75, 1, 1]


@no_deadline
@given(hnp.arrays(np.float32, (6, 5), elements=st.integers(0, 3).map(float)), st.integers(1, 5), st.data())
def test_topk_equals_a_stable_sort(output, k, data):
    labels = data.draw(hnp.arrays(np.int64, 6, elements=st.integers(0, 4)))
    best = np.argsort(-output, axis=1, kind="stable")[:, :k]
    expected = np.mean([label in row for label, row in zip(labels, best, strict=True)])
    assert scored(make_metric(f"top{k}"), output, labels) == expected


@pytest.mark.parametrize("name", ["top1", "top2", "f1"])
def test_a_row_with_nan_is_wrong(name):
    output = np.array([[0.9, 0.1, 0.0], [np.nan, 0.2, 0.1]], np.float32)
    good = scored(make_metric(name), np.nan_to_num(output, nan=0.9), [0, 0])
    bad = scored(make_metric(name), output, [0, 0])
    assert good == 1.0
    assert bad < 0.7


def test_macro_f1_by_hand():
    # Class 0: tp 1, predicted 2, actual 1 -> 2/3. Class 1: tp 1, predicted 1, actual 2 -> 2/3. Class 2: tp 0, predicted
    # 1, actual 0 -> 0. Class 3: tp 0, predicted 0, actual 1 -> 0.
    assert scored(make_metric("f1"), np.array([0, 0, 1, 2]), [0, 1, 1, 3]) == pytest.approx((2 / 3 + 2 / 3 + 0 + 0) / 4)


@no_deadline
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30), st.integers(1, 7))
def test_macro_f1_in_batches_equals_the_definition(rows, step):
    predicted, actual = np.array(rows).T
    metric = make_metric("f1")
    for start in range(0, len(rows), step):
        scores = np.eye(5, dtype=np.float32)[predicted[start : start + step]]
        metric.update({"y": scores}, actual[start : start + step], {})
    f1 = []
    for label in set(predicted) | set(actual):
        hits = np.sum((predicted == label) & (actual == label))
        precision, recall = hits / max(np.sum(predicted == label), 1), hits / max(np.sum(actual == label), 1)
        f1.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert metric.result() == pytest.approx(np.mean(f1))


@pytest.mark.parametrize("name", ["top1", "top2", "f1"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "needs labels; add an array named labels"),
        ([0, 1, 2], r"labels \[3\] for an output that needs labels \[4\]; store one label"),
        ([[0, 1], [1, 2]], r"labels \[2, 2\]"),
        ([0, 1, 2, 3], "labels from 0 to 3 for an output of 3 classes; use class ids from 0 to 2"),
        ([0, -1, 2, 1], "labels from -1 to 2"),
        ([0.5, 1, 2, 1], "are fractions; store integers"),
        ([np.nan, 1, 2, 1], "are fractions; store integers"),
    ],
)
def test_class_label_errors(name, labels, message):
    with pytest.raises(DataError, match=message):
        scored(make_metric(name), SCORES, labels)


def test_classification_of_the_wrong_output():
    with pytest.raises(DataError, match="neither scores per class nor class ids"):
        scored(make_metric("top1"), np.array([0.2, 0.9], np.float32), [0, 1])
    with pytest.raises(UsageError, match=r"top3 needs scores .* use top1"):
        scored(make_metric("top3"), np.array([0, 1]), [0, 1])


# ---------------------------------------------------------------- psnr


def test_psnr_by_hand():
    output = np.array([[[0.1, 2.0]], [[-1.0, 0.5]]], np.float64)
    labels = np.array([[[0.0, 1.0]], [[0.0, 0.4]]])
    # Both images have the mean squared error 0.01 / 2 once clipped.
    assert scored(make_metric("psnr"), output, labels) == pytest.approx(-10 * math.log10(0.005))


def test_psnr_is_the_mean_over_images_not_of_errors():
    output = np.stack([np.full((1, 2, 2), 0.1), np.full((1, 2, 2), 0.01)]).astype(np.float32)
    metric = make_metric("psnr")
    metric.update({"y": output[:1]}, np.zeros((1, 1, 2, 2)), {})
    metric.update({"y": output[1:]}, np.zeros((1, 1, 2, 2)), {})
    assert metric.result() == pytest.approx((20 + 40) / 2, abs=1e-5)


def test_psnr_of_uint8_labels():
    labels = np.array([[[0, 51], [255, 102]]], np.uint8)
    shifted = labels / 255 + np.array([[[0.1, 0.1], [0.1, -0.1]]])  # 255 + 0.1 is clipped back to 1
    assert scored(make_metric("psnr"), shifted, labels) == pytest.approx(-10 * math.log10(0.03 / 4))


def test_equal_images_have_100_db():
    labels = np.array([[0.25, 0.5]])
    assert scored(make_metric("psnr"), labels.astype(np.float32), labels) == pytest.approx(100.0)


def test_psnr_of_nan_is_nan():
    assert math.isnan(scored(make_metric("psnr"), np.array([[0.5, np.nan]], np.float32), np.array([[0.5, 0.5]])))


@pytest.mark.parametrize("labels", [np.array([[0.0, 255.0]]), np.array([[0, 1]]), np.array([[0.5, np.nan]])])
def test_psnr_label_values(labels):
    with pytest.raises(DataError, match="from 0 to 1 or as uint8"):
        scored(make_metric("psnr"), np.zeros((1, 2), np.float32), labels)


def test_psnr_label_shape():
    with pytest.raises(DataError, match=r"labels \[1, 3\] for an output that needs labels \[1, 2\]"):
        scored(make_metric("psnr"), np.zeros((1, 2), np.float32), np.zeros((1, 3)))


# ---------------------------------------------------------------- perplexity


def test_perplexity_of_uniform_logits_is_the_vocabulary():
    assert scored(make_metric("perplexity"), np.full((2, 3, 7), 5.0, np.float32), np.zeros((2, 3), int)) == (
        pytest.approx(7.0)
    )


def test_perplexity_scores_the_output_called_logits():
    """Wherever it stands; a model may give its cache first."""
    metric = make_metric("perplexity")
    metric.update({"present.0.key": np.zeros((2, 4, 3, 8)), "logits": np.zeros((2, 3, 7))}, np.zeros((2, 3), int), {})
    assert metric.result() == pytest.approx(7)


def test_perplexity_by_hand():
    logits = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]]))
    # The middle position is left out: sqrt(1/0.25 * 1/0.6).
    assert scored(make_metric("perplexity"), logits, [[1, -100, 2]]) == pytest.approx(math.sqrt(4 / 0.6))


@no_deadline
@given(hnp.arrays(np.float32, (3, 4, 5), elements=st.floats(-200, 200, width=32)), st.data())
def test_perplexity_in_batches_equals_softmax(logits, data):
    labels = data.draw(hnp.arrays(np.int64, (3, 4), elements=st.integers(-1, 4)).filter(lambda x: (x >= 0).any()))
    wide = logits.astype(np.longdouble)
    likelihood = np.exp(wide) / np.exp(wide).sum(axis=-1, keepdims=True)
    kept = labels >= 0
    expected = np.exp(-np.log(likelihood[kept, labels[kept]]).mean())
    metric = make_metric("perplexity")
    for i in range(3):
        metric.update({"y": logits[i : i + 1]}, labels[i : i + 1], {})
    assert metric.result() == pytest.approx(float(expected), rel=1e-9)


def test_perplexity_makes_no_float64_copy_of_the_logits(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 4096)
    logits = np.random.default_rng(0).standard_normal((4, 500, 256)).astype(np.float32)
    labels = np.random.default_rng(1).integers(-1, 256, (4, 500))
    tracemalloc.start()
    try:
        in_chunks = scored(make_metric("perplexity"), logits, labels)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < logits.nbytes / 4
    monkeypatch.undo()
    assert in_chunks == pytest.approx(scored(make_metric("perplexity"), logits, labels), rel=1e-12)


def test_perplexity_of_impossible_and_broken_logits():
    assert scored(make_metric("perplexity"), np.array([[0.0, -np.inf]]), [1]) == math.inf
    assert scored(make_metric("perplexity"), np.array([[0.0, -5000.0]]), [1]) == math.inf
    assert math.isnan(scored(make_metric("perplexity"), np.array([[0.0, np.nan]]), [0]))
    assert math.isnan(scored(make_metric("perplexity"), np.array([[-np.inf, -np.inf]]), [0]))


def test_perplexity_errors():
    logits = np.zeros((1, 3, 4), np.float32)
    with pytest.raises(DataError, match="labels from 0 to 4 for an output of 4 classes"):
        scored(make_metric("perplexity"), logits, [[0, 1, 4]])
    with pytest.raises(DataError, match=r"needs labels \[1, 3\]"):
        scored(make_metric("perplexity"), logits, [[0, 1]])
    with pytest.raises(DataError, match="nothing to score"):
        scored(make_metric("perplexity"), logits, [[-1, -1, -1]])
    with pytest.raises(UsageError, match="name the output"):
        scored(make_metric("perplexity"), np.zeros(4, np.float32), [0])


# ---------------------------------------------------------------- spearman


def angles(*degrees):
    radians = np.deg2rad(np.array(degrees, float))
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def test_spearman_by_hand():
    embeddings = np.concatenate([angles(0, 0, 0, 0), 3 * angles(10, 40, 20, 80)])
    # The similarities have the ranks 4, 2, 3, 1, the labels 4, 3, 2, 1: rho = 1 - 6 * (1 + 1) / (4 * 15).
    assert scored(make_metric("spearman"), embeddings, [5.0, 3.0, 2.0, 0.0]) == pytest.approx(0.8)
    assert scored(make_metric("spearman"), embeddings, [5.0, 2.0, 3.0, 0.0]) == pytest.approx(1.0)
    assert scored(make_metric("spearman"), embeddings, [0.0, 3.0, 2.0, 5.0]) == pytest.approx(-1.0)


def test_spearman_gives_ties_their_average_rank():
    embeddings = np.concatenate([angles(0, 0, 0), angles(10, 40, 80)])
    # Ranks 3, 2, 1 against 2.5, 2.5, 1: covariance 1.5 (sums), variances 2 and 1.5.
    assert scored(make_metric("spearman"), embeddings, [4.0, 4.0, 1.0]) == pytest.approx(1.5 / math.sqrt(2 * 1.5))


@no_deadline
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_average_ranks(values):
    expected = [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]
    assert metrics._average_ranks(np.array(values, float)).tolist() == expected


def test_spearman_pools_over_the_attention_mask():
    rng = np.random.default_rng(2)
    tokens = rng.standard_normal((8, 5, 6)).astype(np.float32)
    mask = (np.arange(5) < rng.integers(1, 6, (8, 1))).astype(np.int64)
    labels = np.array([1.0, 2.0, 3.0, 4.0])
    pooled = np.stack([tokens[i, mask[i] == 1].mean(axis=0) for i in range(8)])
    expected = scored(make_metric("spearman"), pooled, labels)
    poisoned = np.where(mask[..., None] == 1, tokens, np.nan)  # what stands behind the mask does not matter
    metric = make_metric("spearman")
    for start in range(0, 8, 3):
        part = slice(start, start + 3)
        metric.update({"y": poisoned[part]}, labels, {"attention_mask": mask[part]})
    assert metric.result() == pytest.approx(expected)
    without = scored(make_metric("spearman"), tokens, labels)
    assert without == pytest.approx(scored(make_metric("spearman"), tokens.mean(axis=1), labels))


def test_spearman_keeps_only_pooled_embeddings():
    metric = make_metric("spearman")
    labels = np.arange(64, dtype=np.float32)
    tracemalloc.start()
    try:
        for _ in range(16):
            metric.update({"y": np.ones((8, 128, 32), np.float32)}, labels, {})
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 128 * 32 * 4 * 2


def test_spearman_of_collapsed_and_broken_embeddings():
    assert scored(make_metric("spearman"), np.ones((4, 3), np.float32), [1.0, 2.0]) == 0.0
    assert scored(make_metric("spearman"), np.zeros((4, 3), np.float32), [1.0, 2.0]) == 0.0
    broken = np.ones((4, 3), np.float32)
    broken[1, 1] = np.nan
    assert math.isnan(scored(make_metric("spearman"), broken, [1.0, 2.0]))


def test_spearman_errors():
    four = np.ones((4, 3), np.float32)
    with pytest.raises(DataError, match="4 rows for 3 labels; give twice as many rows as labels"):
        scored(make_metric("spearman"), four, [1.0, 2.0, 3.0])
    with pytest.raises(DataError, match=r"labels \[1\] for 4 rows or more"):
        scored(make_metric("spearman"), four, [1.0])
    with pytest.raises(DataError, match=r"labels \[2, 1\]"):
        scored(make_metric("spearman"), four, [[1.0], [2.0]])
    with pytest.raises(DataError, match="needs labels"):
        scored(make_metric("spearman"), four, None)
    with pytest.raises(DataError, match="labels that differ"):
        scored(make_metric("spearman"), four, [1.0, 1.0])
    with pytest.raises(DataError, match="labels that differ and are not NaN"):
        scored(make_metric("spearman"), four, [1.0, np.nan])
    with pytest.raises(DataError, match=r"attention_mask \[4, 2\] does not fit"):
        scored(make_metric("spearman"), np.ones((4, 3, 2)), [1.0, 2.0], attention_mask=np.ones((4, 2)))
    with pytest.raises(UsageError, match=r"\[N, D\] or \[N, S, D\]"):
        scored(make_metric("spearman"), np.ones(4), [1.0, 2.0])


def test_spearman_refuses_labels_that_change():
    metric = make_metric("spearman")
    metric.update({"y": np.ones((2, 3))}, np.array([1.0, 2.0]), {})
    with pytest.raises(DataError, match=r"labels \[1\]"):
        metric.update({"y": np.ones((2, 3))}, np.array([1.0]), {})


# ---------------------------------------------------------------- make_metric


@pytest.mark.parametrize(
    ("name", "full_name", "higher", "rows"),
    [
        ("top1", "top1", True, 1),
        ("topk", "top5", True, 1),
        ("top3", "top3", True, 1),
        ("top10", "top10", True, 1),
        ("f1", "f1", True, 1),
        ("psnr", "psnr", True, 1),
        ("perplexity", "perplexity", False, 1),
        ("spearman", "spearman", True, 2),
    ],
)
def test_make_metric(name, full_name, higher, rows):
    metric = make_metric(name)
    assert (metric.name, metric.higher_is_better, metric.rows_per_label) == (full_name, higher, rows)
    with pytest.raises(DataError, match=f"{full_name} has nothing to score; give evaluation data"):
        metric.result()


def test_metrics_do_not_share_state():
    first, second = make_metric("f1"), make_metric("f1")
    scored(first, SCORES, [0, 1, 2, 0])
    with pytest.raises(DataError):
        second.result()


@pytest.mark.parametrize(("name", "near"), [("perplexty", "perplexity"), ("spearmann", "spearman"), ("top0", "top")])
def test_unknown_metric(name, near):
    known = "use one of top1, topk, f1, psnr, spearman, perplexity, or topN"
    with pytest.raises(UsageError, match=rf"unknown metric '{name}' \(did you mean {near}.*\)\?*; {known}"):
        make_metric(name)


def test_unknown_metric_without_a_near_match():
    with pytest.raises(UsageError, match="unknown metric 'zzz'; use one of"):
        make_metric("zzz")


@pytest.mark.parametrize("name", ["top1", "f1", "top2"])
def test_the_named_output_is_scored(name):
    outputs = {"first": SCORES[::-1], "second": SCORES}
    labels = np.array([1, 0, 2, 0])
    metric = make_metric(name, "second")
    metric.update(outputs, labels, {})
    assert metric.result() == scored(make_metric(name), SCORES, labels)
    metric = make_metric(name)
    metric.update(outputs, labels, {})
    assert metric.result() == scored(make_metric(name), SCORES[::-1], labels)
    with pytest.raises(UsageError, match="no output 'third' to score; name one of first, second"):
        make_metric(name, "third").update(outputs, labels, {})
