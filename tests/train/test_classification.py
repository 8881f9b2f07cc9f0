"""Figures of a classifier: scikit-learn's on the same scores, intervals scipy's, ties by hand."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, t
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from train.evaluation import classification
from train.evaluation.classification import measure, over_seeds, wilson_interval


def scored(num_samples, num_classes, seed=0):
    """Scores that are right somewhat more often than not, for labels of unequal frequency."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.geometric(0.2, num_samples) - 1, num_classes - 1)
    scores = rng.normal(size=(num_samples, num_classes)).astype(np.float32)
    scores[np.arange(num_samples), labels] += 1.5
    return torch.from_numpy(scores), torch.from_numpy(labels)


@pytest.mark.parametrize(("num_samples", "num_classes", "chunk"), [(1271, 11, 2**24), (401, 23, 50), (2, 6, 2**24)])
def test_figures_are_those_of_scikit_learn(num_samples, num_classes, chunk, monkeypatch):
    monkeypatch.setattr(classification, "CHUNK_NUMBERS", chunk)
    scores, labels = scored(num_samples, num_classes)
    found = measure(scores, labels, num_classes)
    predicted, every = scores.argmax(dim=1).numpy(), list(range(num_classes))
    assert found.num_samples == num_samples
    assert found.top1 == pytest.approx(accuracy_score(labels, predicted), abs=1e-12)
    assert found.top5 == pytest.approx(top_k_accuracy_score(labels, scores, k=5, labels=every), abs=1e-12)
    present = np.unique(labels)
    hits = confusion_matrix(labels, predicted, labels=every).diagonal()
    counts = np.bincount(labels, minlength=num_classes)
    assert [figure.count for figure in found.per_class.values()] == counts.tolist()
    shares = (hits / counts.clip(1))[present]
    assert [found.per_class[str(label)].accuracy for label in present] == pytest.approx(shares.tolist())
    if set(predicted) <= set(present):  # scikit-learn warns else
        assert found.mean_per_class == pytest.approx(balanced_accuracy_score(labels, predicted), abs=1e-12)
    assert found.mean_per_class == pytest.approx(shares.mean(), abs=1e-12)


def test_few_classes_and_classes_without_samples():
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0]])
    found = measure(scores, torch.tensor([0, 1]), 3, ["cat", "dog", "fox"])
    assert (found.top1, found.top5, found.mean_per_class) == (0.5, 1.0, 0.5)
    assert {name: (f.accuracy, f.count) for name, f in found.per_class.items()} == {
        "cat": (1.0, 1),
        "dog": (0.0, 1),
        "fox": (None, 0),
    }


def test_of_equal_scores_the_lowest_class_stands_first():
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    found = [measure(scores, torch.tensor([label]), 7) for label in range(7)]
    assert [one.top1 for one in found] == [1, 0, 0, 0, 0, 0, 0]
    assert [one.top5 for one in found] == [1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (10, 10), (1, 3), (372, 450), (38_765, 50_000)])
def test_the_interval_of_a_test_set_is_scipys(hits, count):
    expected = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_interval_over_seeds_is_scipys():
    values = [0.81, 0.79, 0.84, 0.8]
    found = over_seeds(values)
    mean, error = np.mean(values), np.std(values, ddof=1) / 2
    assert (found.mean, found.std) == pytest.approx((mean, np.std(values, ddof=1)))
    assert found.confidence_interval == pytest.approx(t.interval(0.95, 3, loc=mean, scale=error))
    assert over_seeds([0.5]) == classification.SeedFigure(mean=0.5, std=0.0, confidence_interval=None)


@pytest.mark.parametrize(
    ("scores", "labels", "classes", "message"),
    [
        (torch.zeros(2, 3), [0, 3], None, "labels must be from 0 to 2, got 3"),
        (torch.zeros(2, 3), [-1, 0], None, "labels must be from 0 to 2, got -1"),
        (torch.zeros(2, 4), [0, 1], None, r"scores must be \[N, 3\] .* got \[2, 4\] with labels \[2\]"),
        (torch.zeros(0, 3), [], None, "N ≥ 1"),
        (torch.full((2, 3), torch.nan), [0, 1], None, "scores must not be NaN, got 2 samples"),
        (torch.zeros(2, 3), [0, 1], ["a"], "a name for each of 3 classes, got 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(scores, labels, classes, message):
    with pytest.raises(ValueError, match=message):
        measure(scores, torch.tensor(labels, dtype=torch.int64), 3, classes)
