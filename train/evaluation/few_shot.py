"""What features are worth when labels are few: kNN and linear accuracy by the number of labels a class.

All representations see the same subsets (they depend on labels and seed alone), the same test set, and the
same hyperparameters, so that their numbers can be compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from train.evaluation.checks import check_labelled
from train.evaluation.knn import knn_accuracy
from train.evaluation.label_subsets import balanced_subset
from train.evaluation.linear_probe import fit_accuracy, standardize

LabelCount = int | Literal["all"]
AccuracyTable = dict[str, dict[str, dict[str, float]]]


def few_shot_table(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    label_counts: Sequence[LabelCount] = (1, 5, 20, "all"),
    num_seeds: int = 5,
    k: int = 20,
    temperature: float = 0.07,
) -> AccuracyTable:
    """Accuracy on the test set by protocol and number of labels a class.

    Args:
        train_x: features [M, D]; all of them, unlabelled, standardise the features of the linear classifier.
        train_y: labels [M], integers from 0.
        test_x: features [N, D].
        test_y: labels [N].
        label_counts: labels a class; "all" takes every training sample, once.
        num_seeds: subsets for each other count.
        k: neighbours of the kNN classifier; all labelled samples where there are fewer.
        temperature: τ of the kNN votes.

    Returns:
        `{"knn": {"1": {"mean": …, "std": …}, …, "all": …}, "linear": {…}}`; accuracies in [0, 1], `std` the
        sample standard deviation over the subsets, 0 where there is only one.
    """
    check_labelled(train_x, train_y, test_x, test_y)
    scaled_train, scaled_test = standardize(train_x, test_x)
    table: AccuracyTable = {"knn": {}, "linear": {}}
    for count in label_counts:
        knn, linear = [], []
        for seed in range(1 if count == "all" else num_seeds):
            rows = slice(None) if count == "all" else balanced_subset(train_y, count, seed)
            labels = train_y[rows]
            votes = min(k, len(labels))
            knn.append(knn_accuracy(train_x[rows], labels, test_x, test_y, k=votes, temperature=temperature))
            linear.append(fit_accuracy(scaled_train[rows], labels, scaled_test, test_y))
        table["knn"][str(count)] = _summary(knn)
        table["linear"][str(count)] = _summary(linear)
    return table


def _summary(accuracies: list[float]) -> dict[str, float]:
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return {"mean": statistics.mean(accuracies), "std": spread}
