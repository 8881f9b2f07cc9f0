"""Class-balanced subsets of a labelled set, as a pure function of labels, count and seed.

Every row gets a random number that depends on the seed and the row alone, and each class gives its rows
with the smallest numbers. So subsets of one seed are nested: 5 labels a class hold the 1 of the same seed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipelines.rng import key_of


def balanced_subset(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Choose `per_class` rows of every class that occurs.

    Args:
        labels: integers [N].
        per_class: rows of each class, at least 1.
        seed: which subset.

    Returns:
        Row numbers, int64 [classes · per_class] on the CPU, rising.

    Raises:
        ValueError: a class has fewer rows; the smallest class is named.
    """
    values = labels.cpu().numpy()
    classes, counts = np.unique(values, return_counts=True)
    if not 1 <= per_class <= counts.min():
        raise ValueError(
            f"labels per class must be between 1 and {counts.min()}, the size of class "
            f"{classes[counts.argmin()]}, got {per_class}; ask for fewer labels"
        )
    order = np.argsort(key_of(seed, np.arange(len(values))), kind="stable")
    chosen = [order[values[order] == label][:per_class] for label in classes]
    return torch.from_numpy(np.sort(np.concatenate(chosen)))
