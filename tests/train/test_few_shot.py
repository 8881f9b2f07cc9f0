"""The accuracy table: every cell from its subset, and the spread over subsets."""

import statistics

import pytest
import torch
from sklearn.datasets import load_digits

from train.evaluation.few_shot import few_shot_accuracy
from train.evaluation.knn import knn_accuracy
from train.evaluation.label_subsets import balanced_subset
from train.evaluation.linear_probe import fit_accuracy, linear_accuracy, standardize


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    features, labels = torch.from_numpy(data.data).float(), torch.from_numpy(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return features[order[:1437]], labels[order[:1437]], features[order[1437:]], labels[order[1437:]]


@pytest.fixture(scope="module")
def table(digits):
    return {name: few_shot_accuracy(name, *digits, num_seeds=3) for name in ("knn", "linear")}


def test_the_table_has_a_mean_and_a_deviation_for_every_count(table):
    for row in table.values():
        assert list(row) == ["1", "5", "20", "all"]
        assert all(set(cell) == {"mean", "std"} for cell in row.values())
        means = [cell["mean"] for cell in row.values()]
        assert means == sorted(means), "more labels must help on the digits"
        assert row["1"]["std"] > row["20"]["std"] > 0 == row["all"]["std"]


def test_a_cell_holds_mean_and_sample_deviation_over_the_subsets(digits, table):
    train_x, train_y, test_x, test_y = digits
    scaled, scaled_test = standardize(train_x, test_x)
    subsets = [balanced_subset(train_y, 5, seed) for seed in range(3)]
    knn = [knn_accuracy(train_x[rows], train_y[rows], test_x, test_y, k=20) for rows in subsets]
    linear = [fit_accuracy(scaled[rows], train_y[rows], scaled_test, test_y) for rows in subsets]
    for protocol, accuracies in (("knn", knn), ("linear", linear)):
        assert table[protocol]["5"]["mean"] == pytest.approx(statistics.mean(accuracies), abs=1e-12)
        assert table[protocol]["5"]["std"] == pytest.approx(statistics.stdev(accuracies), abs=1e-12)


def test_all_labels_give_the_plain_accuracies(digits, table):
    assert table["knn"]["all"]["mean"] == knn_accuracy(*digits, k=20)
    assert table["linear"]["all"]["mean"] == linear_accuracy(*digits)


def test_k_is_all_labelled_samples_where_there_are_fewer(digits, table):
    train_x, train_y, test_x, test_y = digits
    rows = [balanced_subset(train_y, 1, seed) for seed in range(3)]  # 10 samples, and k = 20
    expected = [knn_accuracy(train_x[r], train_y[r], test_x, test_y, k=10) for r in rows]
    assert table["knn"]["1"]["mean"] == pytest.approx(statistics.mean(expected), abs=1e-12)


def test_one_seed_has_no_spread(digits):
    row = few_shot_accuracy("linear", *digits, label_counts=(2,), num_seeds=1)
    assert list(row) == ["2"]
    assert row["2"]["std"] == 0.0


def test_too_few_samples_of_a_class_are_named(digits):
    with pytest.raises(ValueError, match=r"labels per class must be between 1 and \d+, the size of class \d, got 500"):
        few_shot_accuracy("knn", *digits, label_counts=(500,))
