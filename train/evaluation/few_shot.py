"""What features are worth when labels are few: accuracy by the number of labels a class, over several subsets.

All representations see the same subsets (they depend on labels and seed alone), the same test set, and the same
hyperparameters, so that their numbers can be compared.
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

Protocol = Literal["knn", "linear"]
LabelCount = int | Literal["all"]
Accuracies = dict[str, dict[str, float]]
"""By the number of labels a class: `{"1": {"mean": …, "std": …}, …, "all": …}`."""


def few_shot_accuracy(
    protocol: Protocol,
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    label_counts: Sequence[LabelCount] = (1, 5, 20, "all"),
    num_seeds: int = 5,
    k: int = 20,
) -> Accuracies:
    """Accuracy on the test set, in [0, 1], of a classifier given some of the labels.

    Args:
        protocol: which classifier.
        train_x: features [M, D]; all of them, unlabelled, standardise the features of the linear classifier.
        train_y: labels [M], integers from 0.
        test_x: features [N, D].
        test_y: labels [N].
        label_counts: labels a class; "all" takes every training sample, once.
        num_seeds: subsets for each other count.
        k: neighbours of the kNN classifier; all labelled samples where there are fewer.

    Returns:
        Mean and sample standard deviation over the subsets for each count; 0 deviation where there is only one.

    Raises:
        ValueError: features or labels do not fit, or a class has too few samples.
    """
    check_labelled(train_x, train_y, test_x, test_y)
    if protocol == "linear":
        train_x, test_x = standardize(train_x, test_x)
    results: Accuracies = {}
    for count in label_counts:
        accuracies = []
        for seed in range(1 if count == "all" else num_seeds):
            rows = slice(None) if count == "all" else balanced_subset(train_y, count, seed)
            x, y = train_x[rows], train_y[rows]
            if protocol == "linear":
                accuracies.append(fit_accuracy(x, y, test_x, test_y))
            else:
                accuracies.append(knn_accuracy(x, y, test_x, test_y, k=min(k, len(y))))
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        results[str(count)] = {"mean": statistics.mean(accuracies), "std": spread}
    return results
